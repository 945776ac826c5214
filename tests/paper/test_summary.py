import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.cells import LAM, LR_SEEDS, LRS, Cell, Method
from benchmarks.paper.claims import claims
from benchmarks.paper.depth import CONFIG
from benchmarks.paper.runs import Lead, Results, Run, best_of, estimate, group, median_steps, paired
from benchmarks.paper.store import collect
from benchmarks.paper.summary import (
    credit_by_depth,
    credit_by_quality,
    summarise,
    to_json,
    without_the_truth,
)
from benchmarks.paper.sweep import RUNS

INITIAL = {"mean": 0.0, "std": 1.0, "true_mean": 1.0, "true_std": 2.0}


SPARSE = ("sparse", "lam", "lr")


def run(
    rewards: list[float],
    seed: int = 0,
    method: Method = "ABC",
    kl: list[float] | None = None,
    **settings: Any,
) -> Run:
    cell = Cell(method=method, length="40-60", seed=seed, **settings)
    n = len(rewards)
    curves = {
        "true_reward": rewards,
        "score": [x / 2 for x in rewards],
        "kl": kl or [float(i) for i in range(n)],
        "end_mass": [0.1] * n,
        "length": [math.e**2] * n,
        "credit_entropy": [0.5, *[1.5] * (n - 1)],
        "precision_at_k": [math.nan, *[0.5] * (n - 1)],
    }
    return Run(cell, INITIAL, curves)


def test_estimate() -> None:
    # sd of 1, 2, 4, 5 is sqrt(10 / 3); twice its standard error over 4 is the sd itself
    found = estimate([1.0, 2.0, 4.0, 5.0])
    assert found == pytest.approx((3.0, math.sqrt(10 / 3), math.sqrt(10 / 3), 4))
    assert math.isnan(estimate([1.0]).two_se)


def test_marks_are_in_units_of_the_initial_policys_spread() -> None:
    # mean 1, sd 2: +1 sd is 3, +2 sd is 5; five-step means of 0, 1, 2, ... reach 3 at the 6th step
    risen = run([float(i) for i in range(20)])
    assert (risen.mark(1), risen.mark(2)) == (3.0, 5.0)
    assert (risen.steps_to(1), risen.steps_to(2)) == (6, 8)
    assert run([0.0] * 20).steps_to(1) is None
    without = Run(risen.cell, INITIAL, {name: c for name, c in risen.curves.items() if name != "true_reward"})
    assert (without.mark(1), without.steps_to(1)) == (1.0, 5)


def test_collapse() -> None:
    """From its best 10-step mean, 4, a run may lose 2, the initial policy's standard deviation."""
    assert not run([0.0] * 10 + [4.0] * 10 + [2.0] * 10).collapsed
    assert run([0.0] * 10 + [4.0] * 10 + [1.9] * 10).collapsed
    assert not run([4.0] * 10 + [4.0] * 9 + [-5.0]).collapsed  # one bad step is none


def test_a_run_away_is_told_by_where_it_ends() -> None:
    assert run([0.0] * 20, kl=[500.0] * 10 + [90.0] * 10).ran_away is False
    assert run([0.0] * 20, kl=[5.0] * 10 + [110.0] * 10).ran_away


def test_reward_at_kl_is_read_where_the_smoothed_kl_gets_there() -> None:
    assert run([float(10 * i) for i in range(12)]).reward_at_kl(4.0) == 40.0  # steps 4-8 have mean 6...
    assert run([1.0] * 12).reward_at_kl(99.0) is None


def test_paired_over_shared_seeds() -> None:
    abc = [run([3.0] * 10, 0), run([5.0] * 10, 1), run([9.0] * 10, 7)]
    sparse = [run([1.0] * 10, 1, "sparse"), run([4.0] * 10, 0, "sparse"), run([0.0] * 10, 8, "sparse")]
    # leads -1 and 4: mean 1.5, sd 5 / sqrt(2), twice the standard error 5
    assert paired(abc, sparse) == pytest.approx((1.5, 5.0, 1, 2))
    assert paired(abc[:1], sparse[:1]) is None


@pytest.mark.parametrize(
    ("lead", "verdict"),
    [
        (Lead(1.0, 0.9, 5, 5), "holds"),
        (Lead(1.0, 1.1, 4, 5), "not shown"),
        (Lead(-1.0, 0.9, 0, 5), "fails"),
        (Lead(1.0, 0.1, 4, 4), "4 seeds only"),
    ],
)
def test_verdicts(lead: Lead, verdict: str) -> None:
    assert lead.verdict == verdict


def test_medians_count_runs_that_never_arrive_last() -> None:
    assert median_steps([10, None, 30]) == 30
    assert median_steps([10, 20, None, None]) is None
    assert median_steps([None, None, 10]) is None
    assert median_steps([10, 21]) == 15.5


def test_group() -> None:
    rows = group([run([3.0] * 20, 0), run([5.0] * 20, 1)], [run([1.0] * 20, 0, "sparse")])
    assert rows["n"] == 2
    assert rows["mean"] == pytest.approx((4.0, 2.0, math.sqrt(2), 2))
    assert rows["penalised"].mean == pytest.approx(4 / 2 - 0.1 * 9.5)
    assert rows["kl_end"].mean == pytest.approx(14.5)
    assert rows["steps"] == {"1": 1.0, "2": None}
    assert rows["precision_at_k"].mean == 0.5
    assert rows["entropy"].mean == pytest.approx((0.25 + 19 * 0.75) / 20)  # over log e^2
    assert "entropy" not in group([run([3.0] * 20, 0, "R3HF")])  # its credit is not what it pays by
    assert rows["lead"][:1] == (2.0,)
    assert rows["lead_sd"][:1] == (1.0,)
    assert rows["lead"].n == 1
    assert group([]) == {"n": 0}


def store(folder: Path, runs: list[Run]) -> None:
    where = {"commit": "abc1234", "versions": {"torch": "2.13"}, "machine": {"cpus": 2}}
    for one in runs:
        record = {"cell": vars(one.cell), "initial": one.initial, **where, "curves": one.curves}
        RUNS.add(record, folder, one.cell.name)
    collect(folder, [RUNS])


def test_from_files_to_summary(tmp_path: Path) -> None:
    runs = [run([2.0 + seed] * 20, seed, "sparse", kl=[1.0] * 20) for seed in (0, 1, 2)]
    runs += [run([4.0 + 2 * seed] * 20, seed, kl=[1.0] * 20) for seed in (0, 1, 2)]
    for lam in (LAM, 1.0):
        for lr in LRS:
            for seed in LR_SEEDS:
                level = 9.0 if (lam, lr) == (1.0, LRS[1]) else 3.0
                runs.append(run([level] * 20, seed, "sparse", kl=[2.0] * 20, lam=lam, lr=lr))
    runs += [run([8.0 * beta] * 20, seed, "RTO", beta=beta) for beta in (0.1, 0.4) for seed in LR_SEEDS]
    store(tmp_path, runs)
    results = Results(tmp_path)
    assert len(results.runs) == len(runs)
    assert [r.cell.seed for r in results.of("sparse", "40-60")] == [0, 1, 2]  # none of the choice's seeds
    assert [r.cell.seed for r in results.selection(*SPARSE)[1.0, LRS[1]]] == list(LR_SEEDS)
    assert best_of(results.selection(*SPARSE)) == (1.0, LRS[1])
    assert best_of(results.selection(*SPARSE), lambda run: -run.mean())[0] == LAM  # a first of equal ones
    assert best_of(results.selection("RTO", "beta")) == (0.4,)
    found = summarise(results)
    # half of the reward, which is the score, less a tenth of KL 2
    chosen = found["learning rates"][f"sparse, lambda 1, lr {LRS[1]:g}"]
    assert (chosen["mean"].mean, chosen["penalised"].mean) == pytest.approx((9.0, 4.3))
    # leads 2, 3, 4: mean 3, sd 1
    assert found["methods 40-60"]["ABC"]["lead"] == pytest.approx((3.0, 2 / math.sqrt(3), 3, 3))
    assert set(found["RTO's share"]) == {"RTO, beta 0.1", "RTO, beta 0.4"}
    assert found["coverage"]["main"][0] == 6
    groups = claims(results).values()
    verdicts = {c["claim"]: c["verdict"] for group in groups for c in group}
    assert len(verdicts) == sum(map(len, groups))  # no two claims have one name
    assert verdicts["ABC is ahead of sparse, 40-60 tokens"] == "3 seeds only"
    assert verdicts["ABC is ahead of uniform, 40-60 tokens"] == "not run"
    assert verdicts["ABC has more reward than sparse, where KL first reaches 1"] == "3 seeds only"
    assert verdicts["ABC has more reward than sparse, where KL first reaches 2"] == "not reached"
    text = to_json(found)
    assert "NaN" not in text
    assert json.loads(text)["methods 40-60"]["sparse"]["n"] == 3
    rows = [line for line in text.splitlines() if line.startswith('  "ABC": {"n": 3, "mean": [')]
    assert len(rows) == 2  # a line each, among the methods at 40-60 tokens and in the table of KL


def test_no_best_setting_before_one_has_all_its_seeds(tmp_path: Path) -> None:
    store(tmp_path, [run([1.0] * 20, LR_SEEDS[0], "sparse")])
    assert best_of(Results(tmp_path).selection(*SPARSE)) is None
    assert summarise(Results(tmp_path))["headline"] == {}


def reward_model(layers: int, seed: int, precision: float, steps: int = CONFIG.rm_steps) -> dict[str, Any]:
    """What ``depth`` writes of a reward model: entropy falls and overlap rises with the precision."""
    measures = {"precision_at_k": precision, "signed": 0.0, "entropy": 1 - precision, "overlap": precision**2}
    found = {"chance": 0.1, "sources": {"last row": measures}}
    return {
        "layers": layers,
        "seed": seed,
        "reward": "lexical",
        "steps": steps,
        "accuracy": 0.5 + precision / 2,
        "lengths": {"12": found, "50": found},
    }


def test_reward_models(tmp_path: Path) -> None:
    """Quality is no depth; what needs no truth is held against what does."""
    results = Results(tmp_path)
    assert without_the_truth(results) == {}
    results.models = [
        reward_model(1, 0, 0.8),
        reward_model(4, 0, 0.2),
        reward_model(4, 1, 0.4),
        reward_model(4, 0, 0.6, steps=1200),
    ]
    depths = credit_by_depth(results)
    assert set(depths) == {"lexical, 12 tokens", "lexical, 50 tokens"}
    four = depths["lexical, 50 tokens"]["4"]
    assert (four["n"], four["accuracy"]) == (2, 0.65)
    assert four["sources"]["last row"]["precision_at_k"][:2] == pytest.approx((0.3, 0.2))
    quality = credit_by_quality(results)
    assert {steps: found["n"] for steps, found in quality.items()} == {"400": 2, "1200": 1}
    seen = without_the_truth(results)
    assert seen["models"] == 4
    for name in ("entropy", "overlap"):
        assert seen[name] == pytest.approx({"correlation": 1.0, "below": 0.3, "above": 0.7})
