def all_gather(*args: object) -> None:
    raise RuntimeError("ring attention is not for this test")
