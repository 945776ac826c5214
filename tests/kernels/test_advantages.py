"""The recurrence in Triton against the float64 reference: long rows, its two scans, what underflows."""

import math

import pytest
import torch
from support import fast_interpreter
from support.shaping import DEVICE, assert_same_pattern, check_shape, expected, gae, problem, shape

from attnshape import reference
from attnshape.config import ShapingConfig
from attnshape.tolerance import CREDIT_SUM, credit_bound, error_fraction, gae_bound
from csrc_triton.host import attention


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CHUNK", 16)


@pytest.mark.parametrize("mask_semantics", ["skip", "zero"])
def test_long_rows_at_gamma_and_lam_one(mask_semantics: str) -> None:
    width = 131072 if DEVICE.type == "cuda" else 32768  # the interpreter: 64 chunks, four groups of them
    score, credit, mask, inputs = problem(width)
    config = ShapingConfig(lam=1.0, mask_semantics=mask_semantics)
    truth = expected(score, credit, mask, config, **inputs)
    actual = shape(score, credit, mask, config, **inputs)
    for name in ("advantages", "returns"):
        x, y = getattr(actual, name), getattr(truth, name)
        assert error_fraction(x, y, gae_bound(y, 1.0, 1.0)).max() <= 1
    assert abs(actual.credit.double().sum() - 1) <= CREDIT_SUM
    assert error_fraction(actual.credit, truth.credit, credit_bound(truth.credit)).max() <= 1


def test_the_general_scan_has_the_bits_of_the_unit_one_or_its_accuracy() -> None:
    score, credit, mask, inputs = problem(1100)
    rows = ShapingConfig(lam=torch.ones(1, device=DEVICE))
    number = ShapingConfig(lam=1.0)
    general, unit = (shape(score, credit, mask, config, **inputs) for config in (rows, number))
    truth = expected(score, credit, mask, number, **inputs)
    for name in ("advantages", "returns"):
        y = getattr(truth, name)
        for x in (getattr(general, name), getattr(unit, name)):
            assert error_fraction(x, y, gae_bound(y, 1.0, 1.0)).max() <= 1


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.skipif(DEVICE.type == "cuda", reason="kernels are compiled")
def test_scans_in_the_order_of_tritons_interpreter() -> None:
    """One element after another; the other tests scan by doubling."""
    score, credit, mask, inputs = problem(40, batch=2)
    config = ShapingConfig(lam=0.95, lam_value=0.9)
    with fast_interpreter.original_scan():
        check_shape(score, credit, mask, config, **inputs)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("lam", "left"), [(2.0**-10, math.inf), (0.0, math.nan)])
def test_infinity_reaches_the_left_end_where_powers_underflow(lam: float, left: float) -> None:
    rewards = torch.zeros(1, 200, device=DEVICE)
    rewards[0, 190] = math.inf
    mask = torch.ones(1, 200, device=DEVICE)
    actual = gae(rewards, torch.zeros_like(rewards), mask, 1.0, lam)
    truth, *_ = reference.gae(rewards.double(), torch.zeros(1, 200), mask, ShapingConfig(lam=lam))
    assert truth[0, 0] == left or truth[0, 0].isnan()
    assert_same_pattern(actual.advantages, truth)
