"""The README's picture is of what its file says, and of a text that every token of it comes from."""

import json
import math
from pathlib import Path

from benchmarks import credit_picture


def test_the_committed_rewards_add_up_to_the_score_and_tile_the_review() -> None:
    found = json.loads((credit_picture.OUT / "credit.json").read_text())
    assert math.isclose(sum(found["rewards"]), found["score"], abs_tol=1e-5)
    assert (
        "".join(found["tokens"]) == credit_picture.REVIEW.replace(" ", "") == found["review"].replace(" ", "")
    )
    assert (found["model"], found["source"]) == (credit_picture.MODEL, credit_picture.SOURCE)


def test_a_picture_grows_with_its_text(tmp_path: Path) -> None:
    heights = []
    for count in (3, 60):
        path = tmp_path / f"{count}.png"
        credit_picture.draw(["word", "$", "x"] * (count // 3), [0.5, -1.0, 0.0] * (count // 3), path)
        header = path.read_bytes()[16:24]  # width and height of the PNG
        assert int.from_bytes(header[:4], "big") == round(credit_picture.WIDTH * 200)
        heights.append(int.from_bytes(header[4:], "big"))
    assert heights[0] < heights[1]
