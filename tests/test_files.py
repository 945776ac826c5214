from pathlib import Path

import pytest

from attnshape.files import json_rows, whole_file


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
