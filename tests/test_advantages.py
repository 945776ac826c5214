"""``gae`` of every backend against the float64 reference."""

from typing import Any

import pytest
import torch
from support.backends import INTERPRETED, each_backend, each_backend_with, here, there
from support.problems import assert_within, to_float64

import attnshape
from attnshape import ShapingConfig, reference
from attnshape.tolerance import gae_bound

DECAYS = [(1.0, 1.0), (1.0, 0.95), (0.9999, 1.0), (0.5, 0.25), (0.9, 0.0)]


def drawn_rows(rows: int, width: int, holes: bool) -> dict[str, Any]:
    g = torch.Generator().manual_seed(width + holes)
    mask = torch.ones(rows, width, dtype=torch.bool)
    if holes:
        mask = torch.rand(rows, width, generator=g) > 0.1
    return {
        "rewards": torch.randn(rows, width, generator=g),
        "values": torch.randn(rows, width, generator=g),
        "response": mask,
        "bootstrap": torch.randn(rows, generator=g),
    }


def check(backend: str, given: dict[str, Any], config: ShapingConfig) -> list[torch.Tensor]:
    got = here(attnshape.gae(**there(given), config=there(config), backend=backend))
    want = reference.gae(**to_float64(given), config=to_float64(config))
    lam_value = config.lam if config.lam_value is None else config.lam_value
    for name, lam in (("advantages", config.lam), ("returns", lam_value)):
        expected = getattr(want, name)
        assert_within(name, getattr(got, name), expected, gae_bound(expected, config.gamma, lam))
    return list(got)


@each_backend_with(
    interpreted={"width": [1, 511, 513, 1025]},
    width=[1, 31, 32, 33, 511, 512, 513, 1024, 1025, 5000],
    decays=DECAYS,
    semantics=["skip", "zero"],
    holes=[True, False],
)
def test_exact_at_any_length(
    backend: str, width: int, decays: tuple[float, float], semantics: str, holes: bool
) -> None:
    gamma, lam = decays
    check(
        backend,
        drawn_rows(2, width, holes),
        ShapingConfig(gamma=gamma, lam=lam, mask_semantics=semantics),  # type: ignore[arg-type]
    )


@each_backend
@pytest.mark.parametrize(("gamma", "lam"), DECAYS[:3])
def test_exact_in_long_rows(backend: str, gamma: float, lam: float) -> None:
    interpreted = INTERPRETED and backend == "triton"  # 32 chunks there, two groups of them
    given = drawn_rows(1, 16384 if interpreted else 131072, True)
    check(backend, given, ShapingConfig(gamma=gamma, lam=lam))
    given["rewards"] = given["rewards"] / 10 + 1  # sums that grow, and with them a float32 carry's errors
    check(backend, given, ShapingConfig(gamma=gamma, lam=lam, mask_semantics="zero"))


@each_backend
def test_lam_per_row_and_decoupled(backend: str) -> None:
    lam, lam_value = torch.tensor([0.0, 0.01, 0.95, 1.0]), torch.tensor([1.0, 0.0, 1.0, 0.5])
    check(backend, drawn_rows(4, 700, True), ShapingConfig(gamma=0.99, lam=lam, lam_value=lam_value))


@each_backend_with(
    value=[float("nan"), float("inf"), float("-inf")],
    lam=[1.0, 0.95, 0.5, 0.01, 0.0],
    semantics=["skip", "zero"],
)
def test_the_non_finite_goes_where_the_recurrence_carries_it(
    backend: str, value: float, lam: float, semantics: str
) -> None:
    given = drawn_rows(3, 2000, True)
    given["response"][:, 1900] = True
    given["rewards"][0, 1900] = value
    given["values"][1, 1900] = value
    config = ShapingConfig(lam=lam, mask_semantics=semantics)  # type: ignore[arg-type]
    advantages, *_ = check(backend, given, config)
    assert advantages[2].isfinite().all()
