import json

import torch

from attnshape.bench.machine import in_words, machine_facts


def test_facts_name_the_machine_and_nobody() -> None:
    import platform

    facts = machine_facts(torch.device("cpu"))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert set(facts["kind"]) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert platform.node() not in json.dumps(facts)
    assert f"torch {torch.__version__}" in in_words(facts)
