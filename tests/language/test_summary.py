import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.language import figures
from benchmarks.language.cells import LR, Cell
from benchmarks.language.page import tables
from benchmarks.language.summary import (
    Estimate,
    comparisons,
    estimate,
    gold_at_kl,
    gold_lead,
    over_optimised,
    rules,
    summarise,
    verdict,
)

PAGE = Path(__file__).parents[2] / "benchmarks" / "language" / "README.md"


def credit(name: str, **rocs: float) -> dict[str, Any]:
    sources = {
        source: {"roc": roc, "roc_matched": roc, "fell": 2 * roc, "with_leave_one_out": 1 - roc, "moved": roc}
        for source, roc in {
            "last row": rocs.get("row", 0.6),
            "gradient x value": rocs.get("gradient", 0.7),
            "leave-one-out": 0.75,
            "lexicon": 0.99,
        }.items()
    }
    for source in ("relevance", "relevance a third up"):
        sources[source] = {
            "roc": 0.5,
            "roc_matched": 0.5,
            "fell": 0.2,
            "with_leave_one_out": 0.0,
            "moved": 0.5,
        }
    sources["random"] = {"roc": 0.5, "fell": 0.1}
    return {"name": name, "sources": sources}


def run(source: str, training: int, seed: int, gold: float, **cell: Any) -> dict[str, Any]:
    made = Cell(loop="grpo", source=source, reward_model=f"m_seed-{training}", seed=seed, **cell)  # type: ignore[arg-type]
    return {
        "name": made.name,
        "cell": vars(made) | {},
        "initial": {"gold": 0.5},
        "curves": {"score": [0.0, 1.0], "kl": [0.0, 2.0]},
        "gold": [[0, 0.5, 0.0], [1, gold, 0.1]],
    }


def test_an_estimate_is_over_trainings() -> None:
    assert estimate([1.0, 3.0]) == Estimate(2.0, pytest.approx(2.0), 2)
    assert estimate([1.0]).two_se is None


@pytest.mark.parametrize(
    ("lead", "ahead", "pairs", "want"),
    [
        (Estimate(1.0, 0.5, 5), 8, 10, "faster"),
        (Estimate(1.0, 0.5, 5), 7, 10, "no difference shown"),
        (Estimate(1.0, 0.5, 5), 4, 5, "no difference shown"),
        (Estimate(1.0, 0.5, 5), 5, 5, "faster"),
        (Estimate(-1.0, 0.5, 5), 0, 5, "slower"),
        (Estimate(1.0, 1.5, 5), 10, 10, "no difference shown"),
        (Estimate(1.0, 0.1, 2), 4, 4, "too few"),
    ],
)
def test_what_is_claimed_when(lead: Estimate, ahead: int, pairs: int, want: str) -> None:
    assert verdict(lead, ahead, pairs) == want


def test_pairs_share_a_training_and_a_seed() -> None:
    runs = [run("plain", t, s, 1.0) for t in range(5) for s in (0, 1)]
    runs += [run("ABC", t, s, 1.0 + 0.2 * (t + 1)) for t in range(5) for s in (0, 1)]
    runs += [run("ABC", 9, 0, 50.0), run("uniform", 0, 7, 9.0)]  # without a partner
    (found,) = comparisons(runs, gold_lead)
    assert (found["source"], found["pairs"], found["ahead"]) == ("ABC", 10, 10)
    assert found["lead"].mean == pytest.approx(0.3)
    assert found["lead"].n == 5
    assert found["verdict"] == "faster"


def test_another_learning_rate_is_held_against_plain_at_the_studys() -> None:
    runs = [run("plain", t, 0, 1.0) for t in range(5)]
    runs += [run("plain", t, 0, 1.5, lr=2 * LR) for t in range(5)]
    (found,) = comparisons(runs, gold_lead)
    assert (found["source"], found["ahead"]) == ("plain, lr 0.0006", 5)
    assert found["lead"].mean == pytest.approx(0.25)


def test_gold_at_a_kl_is_of_the_evaluations_around_it() -> None:
    record = run("plain", 0, 0, 0.0)
    record["curves"]["kl"] = [float(i) for i in range(20)]
    record["gold"] = [[0, 0.5, 0.0], [5, 1.0, 0.0], [10, 2.0, 0.0], [15, 3.0, 0.0], [19, 9.0, 0.0]]
    assert gold_at_kl(record, 10.0) == pytest.approx(2.0 - 0.5)
    assert gold_at_kl(record, 50.0) is None


def test_a_rule_gets_the_share_of_the_best_lift() -> None:
    found = rules([credit("m_seed-0"), credit("m_seed-1", row=0.7, gradient=0.6)])["m"]
    deletion = found["audit"]
    assert deletion["share"].mean == pytest.approx(0.8)
    assert deletion["picked"] == [
        "gradient x value",
        "last row",
    ]
    assert found["always the last row"]["share"].mean == pytest.approx((0.4 + 0.8) / 2)
    assert found["like leave-one-out"]["share"].mean == pytest.approx(0.4)


def test_over_optimised_falls_while_its_own_score_does_not() -> None:
    record = run("plain", 0, 0, 0.0)
    record["gold"] = [[i, g, 0.0] for i, g in enumerate([0.0, 1.0, 1.0, 1.0, 0.2, 0.2, 0.2])]
    record["curves"]["score"] = [i / 10 for i in range(20)]
    assert over_optimised(record)
    record["curves"]["score"] = [-i / 10 for i in range(20)]
    assert not over_optimised(record)


def test_the_page_has_every_table_and_the_figures_are_drawn(tmp_path: Path) -> None:
    credited = [credit("m_seed-0"), credit("m_seed-1")]
    runs = [run(s, t, 0, 1.0 + t) for t in range(2) for s in ("plain", "ABC")]
    models = [{"name": f"m_seed-{i}", "test_sentences_accuracy": 0.8 + i / 10} for i in range(2)]
    summary = summarise(models, credited, runs)
    made = tables(summary)
    assert set(re.findall("begin: (.+?) -->", PAGE.read_text(encoding="utf-8"))) == set(made)
    assert "0.850 ± 0.100" in made["accuracy"]
    assert "0 of 2" in made["leads"]
    assert "too few" in made["leads"]
    figures.credit(credited, tmp_path / "credit.png")
    figures.leads(runs, tmp_path / "leads.png")
    figures.frontier(runs, tmp_path / "frontier.png")
    assert all((tmp_path / f"{n}.png").stat().st_size > 5000 for n in ("credit", "leads", "frontier"))


def test_an_empty_study_says_so() -> None:
    made = tables(summarise([], [], []))
    assert all(made[name] == "Not run yet." for name in ("accuracy", "credit", "signs", "rules", "leads"))
    assert "| reward models trained | 0 |" in made["state"]
