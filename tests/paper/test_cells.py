import itertools
from pathlib import Path
from typing import get_args

import pytest

from benchmarks.paper.cells import (
    DEEP_METHODS,
    EXPERIMENTS,
    FEW,
    LR_SEEDS,
    SEEDS,
    TRAINING_SEEDS,
    Cell,
    Length,
    Method,
    bounds,
    chosen,
)
from benchmarks.paper.sweep import RUNS


def test_names_are_unique_and_tell_settings_apart() -> None:
    cells = chosen()
    assert len({cell.name for cell in cells}) == len(cells) == len(set(cells))
    one = Cell(method="ABC, random weights", length="8-16", seed=3, lam=1.0)
    assert one.name == "8-16 ABC, random weights lam=1 seed=3"
    assert len({RUNS.new(Path(), cell.name) for cell in cells}) == len(cells)


def test_cells_are_sorted_by_length_then_setting_then_seed() -> None:
    cells = sorted(chosen(), key=lambda cell: cell.key)
    assert len({cell.key for cell in cells}) == len(cells)
    lengths = [bounds(cell.length) for cell in cells]
    assert lengths == sorted(lengths)
    for before, after in itertools.pairwise(cells):  # seeds of a setting stand together, in order
        assert before.setting != after.setting or before.seed < after.seed
    assert len(list(itertools.groupby(cells, lambda cell: cell.setting))) == len(
        {str(cell.setting) for cell in cells}
    )


def test_every_experiment_is_paired() -> None:
    """Every setting has all ten seeds, the first five or two, or those of the learning rate's choice."""
    for cells in EXPERIMENTS.values():
        by_setting: dict[str, set[int]] = {}
        for cell in cells:
            by_setting.setdefault(str(cell.setting), set()).add(cell.seed)
        for seeds in by_setting.values():
            assert seeds in ({*SEEDS}, {*FEW}, {*TRAINING_SEEDS}, {*LR_SEEDS})
    assert not set(LR_SEEDS) & set(SEEDS)


def test_every_method_is_run() -> None:
    assert {cell.method for cell in chosen()} == set(get_args(Method)) >= set(DEEP_METHODS)


def test_order_and_choice() -> None:
    cells = chosen(["main"])
    assert set(cells) == set(EXPERIMENTS["main"])
    late = [cell.seed not in FEW for cell in cells]
    assert late == sorted(late)
    with pytest.raises(ValueError, match=r"experiment: got \['nonsense'\]"):
        chosen(["nonsense"])


@pytest.mark.parametrize("length", get_args(Length))
def test_settings_reach_ppo(length: Length) -> None:
    low, high = bounds(length)
    ppo = Cell(method="ABC", length=length, seed=0, beta=0.3, lam=0.9, lr=1e-5, steps=7).ppo()
    assert (ppo.shortest, ppo.new_tokens, ppo.dense_share, ppo.lam, ppo.lr, ppo.steps) == (
        low,
        high,
        0.3,
        0.9,
        1e-5,
        7,
    )


def test_unknown_method_and_length() -> None:
    with pytest.raises(ValueError, match="method: got 'abc'"):
        Cell(method="abc", length="8-16", seed=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="length: got '8-15'"):
        Cell(method="ABC", length="8-15", seed=0)  # type: ignore[arg-type]
