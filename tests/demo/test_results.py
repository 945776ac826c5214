import io
import json
import math
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console

from attnshape.demo.config import DemoConfig
from attnshape.demo.curves import rounded, smooth
from attnshape.demo.plots import COLORS, learning_curves
from attnshape.demo.ppo import Completion, Method
from attnshape.demo.results import Results, Run, write_results

STEPS = 20


def make_run(method: Method, seed: int, level: float, *, truth: bool = True) -> Run:
    records = []
    for step in range(STEPS):
        record = {"score": level * step / 10, "kl": 0.1 * step}
        if truth:
            record |= {"true_reward": level, "precision_at_k": 0.5, "auc": 0.75}
        records.append(record)
    completion = Completion("the plot", [" was", " great"], [0.2, 0.8], 1.5, level if truth else None)
    return Run(method, seed, records, [completion], 1.0)


def make_results(
    sparse: list[float], abc: list[float], *, truth: bool = True, out: Path = Path("out")
) -> Results:
    runs = [make_run("sparse", i, level, truth=truth) for i, level in enumerate(sparse)]
    runs += [make_run("ABC", i, level, truth=truth) for i, level in enumerate(abc)]
    config = DemoConfig(seeds=tuple(range(len(sparse))), out=out)
    return Results(config, None, 0.0, 0.25 if truth else None, runs, 12.0)


def printed(results: Results) -> str:
    console = Console(file=io.StringIO(), width=160)
    results.print(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return " ".join(text.split())


def test_smooth_averages_the_last_five() -> None:
    assert smooth([1, 2, 3, 4, 5, 6, 7]) == [1, 1.5, 2, 2.5, 3, 4, 5]


def test_curves_in_a_file_have_four_digits() -> None:
    assert rounded([0.123456, -98765.4, 2.0, 1.00005e-9]) == [0.1235, -98770.0, 2.0, 1.0e-9]
    assert math.isnan(rounded([math.nan])[0])


def test_summaries_of_a_run() -> None:
    run = make_run("ABC", 0, 1.0)
    assert run.mean("score") == pytest.approx(0.95)
    assert run.end("score") == pytest.approx((1.8 + 1.9) / 2)  # the last tenth of 20 steps
    # from the fifth step on, step n's smoothed score is (n - 3) / 10
    assert run.steps_to(1.0) == 13
    assert run.steps_to(2.0) is None


@pytest.mark.parametrize(
    ("sparse", "abc", "words"),
    [
        ([1.0, 1.0, 1.0], [1.5, 1.25, 1.75], "ABC beats sparse"),
        ([1.0, 1.0, 1.0], [1.5, 1.25, 0.75], "ABC is not clearly better than sparse"),
        ([1.0, 1.0, 1.0], [0.5, 0.25, 1.25], "ABC LOSES to sparse"),
        ([1.0], [1.0], "ABC LOSES to sparse"),
    ],
)
def test_verdict_says_who_won(sparse: list[float], abc: list[float], words: str) -> None:
    assert words in printed(make_results(sparse, abc))


def test_verdict_figures() -> None:
    verdict = make_results([1.0, 1.0, 1.0], [1.5, 1.25, 1.75]).verdict("ABC")
    # leads .5, .25, .75: mean .5, standard deviation .25, over the square root of 3
    assert "+0.50 ± 0.14" in verdict
    assert "ahead in 3 of 3" in verdict
    # true rewards 1 and 1.5 on average; the score's last two steps are 1.8 and 1.9 times as much
    assert "At the end: true reward +0.50, reward model's reward +0.92, KL +0.00." in verdict
    without = make_results([1.0], [2.0], truth=False).verdict("ABC")
    assert without.startswith("ABC beats sparse: reward model's reward, mean over all steps, +0.95, ahead")
    assert "true" not in without


def test_table_fits_a_terminal() -> None:
    console = Console(file=io.StringIO(), width=80)
    make_results([10.0, -10.0], [10.0, -10.0]).print(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert "steps to" in text


def test_table_shows_every_seed_and_no_truth_where_there_is_none() -> None:
    text = printed(make_results([1.0, 2.0], [3.0, 4.0]))
    for cell in ("initial", "0.25", "1.00", "2.00", "1.50", "3.50", "P@k", "0.75"):
        assert cell in text
    without = printed(make_results([1.0, 2.0], [3.0, 4.0], truth=False))
    for word in ("true", "P@k", "AUC"):
        assert word not in without


def test_files(tmp_path: Path) -> None:
    results = make_results([1.0, 2.0], [3.0, 4.0], out=tmp_path / "out")
    write_results(results, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "credit.html",
        "learning_curves.png",
        "results.json",
    ]
    text = (tmp_path / "out" / "results.json").read_text()
    saved = json.loads(text)
    assert sum(line.startswith('  {"method": ') for line in text.splitlines()) == 4  # a line a seed
    assert '\n  "threshold": 1.0,\n' in text  # and a setting
    assert [(run["method"], run["seed"]) for run in saved["runs"]] == [
        ("sparse", 0),
        ("sparse", 1),
        ("ABC", 0),
        ("ABC", 1),
    ]
    assert saved["runs"][2]["curves"]["score"] == pytest.approx([3.0 * step / 10 for step in range(STEPS)])
    assert saved["config"]["ppo"]["lam"] == 0.95
    page = (tmp_path / "out" / "credit.html").read_text()
    assert "great" in page
    assert "true reward +3.00" in page


def test_failure_while_writing_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = make_results([1.0], [2.0], out=tmp_path)
    write_results(results, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def interrupted(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("attnshape.demo.results.credit_page", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_results(make_results([3.0], [4.0], out=tmp_path), tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_one_seed_and_one_panel_still_draw(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    completion = Completion("the plot", [" was $x", "\x12\n日", " great" * 300], [0.2, 0.0, 0.8], 1.5, None)
    learning_curves({"ABC": [{"score": [1.0, 2.0]}]}, completion, path, title="one")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_every_method_has_a_colour() -> None:
    assert set(COLORS) == set(get_args(Method))
