"""``whiten`` and the moments it takes, of every backend against the float64 reference."""

import dataclasses

import torch
from hypothesis import strategies as st
from support.backends import DEVICE, drawn, each_backend, each_backend_with, here, there
from support.problems import Problem, mapped, problems, to_float64

import attnshape
from attnshape import Response, ShapingConfig, Whitening, reference
from attnshape.reference.whiten import row_moments


@drawn(problems(), st.sampled_from([torch.float32, torch.float64]), cpu=40, torch=40, triton=10)
def test_moments_are_those_of_the_advantages(backend: str, problem: Problem, dtype: torch.dtype) -> None:
    if backend == "triton":
        dtype = torch.float32
    problem = mapped(problem, lambda x: x.to(dtype) if x.is_floating_point() else x)
    problem = dataclasses.replace(problem, config=to_float64(problem.config))
    place = Response(problem.response.mask, cu_seqlens=problem.response.cu_seqlens)
    given = there(dataclasses.replace(problem, credit=torch.ones(place.mask.shape, dtype=dtype)))
    out = here(given.shaped(attnshape.shape_rewards, backend=backend))
    assert out.moments.dtype == dtype
    want = row_moments(out.advantages.double(), place)
    torch.testing.assert_close(out.moments.double(), want, rtol=1e-5, atol=1e-5)
    rewards = out.rewards.masked_fill(place.mask == 0, float("nan"))
    rewards, placed = there([rewards, place])
    advantages, _, moments = attnshape.gae(rewards, None, placed, backend=backend)
    want = row_moments(here(advantages).double(), place)
    torch.testing.assert_close(here(moments).double(), want, rtol=1e-5, atol=1e-5)
    whitened = attnshape.whiten(advantages, placed, moments=moments, backend=backend)
    once_more = attnshape.whiten(advantages, placed, backend=backend)
    torch.testing.assert_close(whitened, once_more, rtol=1e-5, atol=1e-5)


@each_backend
def test_moments_of_lost_and_of_zeroed_rows(backend: str) -> None:
    values = torch.tensor([[1.0, float("nan")], [1.0, 2.0]], device=DEVICE)
    score, mask = torch.ones(2, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    for on_nan, (mean, m2) in (("propagate", (float("nan"),) * 2), ("zero_row", (0.0, 0.0))):
        config = ShapingConfig(on_nan=on_nan)  # type: ignore[arg-type]
        out = attnshape.shape_rewards(score, "sparse", mask, values=values, config=config, backend=backend)
        want = torch.tensor([2.0, mean, m2])
        torch.testing.assert_close(out.moments[0].cpu(), want, equal_nan=True)
        assert out.moments[1].isfinite().all()


@each_backend_with(
    bessel=[True, False],
    eps_mode=["add", "clamp", "add_to_std"],
    shift_mean=[True, False],
    count=[0, 1, 2, 40],
)
def test_whiten(backend: str, bessel: bool, eps_mode: str, shift_mean: bool, count: int) -> None:
    g = torch.Generator().manual_seed(count)
    x = torch.randn(5, 8, generator=g) * 3 + 100
    mask = torch.zeros(40)
    mask[torch.randperm(40, generator=g)[:count]] = 1
    mask = mask.view(5, 8)
    config = Whitening(bessel=bessel, eps_mode=eps_mode, shift_mean=shift_mean)  # type: ignore[arg-type]

    def whitened(x: torch.Tensor, config: Whitening, **options: torch.Tensor) -> torch.Tensor:
        return here(attnshape.whiten(there(x), there(mask), config, **there(options), backend=backend))

    with_nan = x.masked_fill(mask == 0, float("nan"))
    got, want = whitened(with_nan, config), reference.whiten(x.double(), mask, config)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    moments = row_moments(x.double(), Response(mask)).float()
    torch.testing.assert_close(whitened(with_nan, config, moments=moments), got, rtol=1e-4, atol=1e-4)
    config = dataclasses.replace(config, whiten_masked=True)
    want = reference.whiten(x.double(), mask, config)
    torch.testing.assert_close(whitened(x, config).double(), want, rtol=1e-6, atol=1e-6)


@each_backend
def test_whiten_long_rows(backend: str) -> None:
    """Of whole stretches that are masked, that are not, and that are in part; NaN where masked."""
    g = torch.Generator().manual_seed(0)
    ends = torch.tensor([[400], [0], [131], [256], [300]])
    mask = torch.arange(400) < ends
    mask[4, 130:140] = False
    x = torch.where(mask, torch.randn(5, 400, generator=g) + 10, float("nan"))
    want = reference.whiten(x.double(), mask, Whitening())
    got = here(attnshape.whiten(there(x), there(mask), backend=backend))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
