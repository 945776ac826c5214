import os
from pathlib import Path

import pytest

from attnshape.files import followed, is_stream, json_rows, kept_file, whole_file


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "figures.txt"
    with whole_file(path) as file:
        file.write("one")
        assert not path.exists()
    assert path.read_text() == "one"
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines(["two", 3])  # type: ignore[list-item]
    assert [x.name for x in tmp_path.iterdir()] == ["figures.txt"]
    assert path.read_text() == "one"


def test_a_pipe_is_written_into_and_a_link_followed(tmp_path: Path) -> None:
    """What is no file is not replaced by one: for root that would be the machine's /dev/null."""
    pipe, target, link = (tmp_path / name for name in ("pipe", "target.txt", "link.txt"))
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDWR)
    with whole_file(pipe) as file:
        file.write("one")
    assert os.read(end, 9) == b"one"
    os.close(end)
    assert is_stream(pipe)
    target.write_text("old")
    link.symlink_to(target)
    with whole_file(link) as file:
        file.write("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert followed(pipe) == pipe
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="too long") as caught, kept_file(tmp_path, tmp_path / ("x" * 300)):
        pass
    assert caught.value.__context__ is None  # and nothing that came of looking at it


def test_a_row_has_a_line() -> None:
    value = {
        "by method": {"ABC": {"n": 2, "mean": [1.5, None], "at": {"1": [2.0]}}, "none": {}},
        "claims": {"one": [{"claim": 'it "flies"', "lead": None}, {"claim": "é"}]},
        "seed": 3,
        "marks": (1, 2),
        "empty": [],
    }
    assert (
        json_rows(value)
        == """{
 "by method": {
  "ABC": {"n": 2, "mean": [1.5, null], "at": {"1": [2.0]}},
  "none": {}
 },
 "claims": {
  "one": [
   {"claim": "it \\"flies\\"", "lead": null},
   {"claim": "\\u00e9"}
  ]
 },
 "seed": 3,
 "marks": [1, 2],
 "empty": []
}
"""
    )


def test_the_outermost_levels_are_opened_in_any_case() -> None:
    value = {"settings": {"lr": 0.5, "ppo": {"steps": 3}}, "seeds": [0, 1]}
    assert (
        json_rows(value, 2)
        == """{
 "settings": {
  "lr": 0.5,
  "ppo": {"steps": 3}
 },
 "seeds": [
  0,
  1
 ]
}
"""
    )
    assert json_rows([]) == "[]\n"
