"""``gae`` against a loop over tokens on the same tensors; a wrong result is not timed."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import attnshape
from attnshape import reference
from attnshape.tolerance import error_fraction, gae_bound

GAMMA = 1.0
Gae = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def token_loop(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    """The textbook recurrence, all rows at once, one token after another."""
    advantage = next_value = torch.zeros_like(rewards[:, 0])
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        m = mask[:, t]
        step = rewards[:, t] + GAMMA * next_value - values[:, t] + GAMMA * lam * advantage
        next_value = m * values[:, t] + (1 - m) * next_value
        advantage = m * step + (1 - m) * advantage
        advantages[:, t] = advantage
    return advantages * mask, (advantages + values) * mask


def vectorised(rewards: Tensor, values: Tensor, mask: Tensor, lam: float) -> tuple[Tensor, Tensor]:
    return attnshape.gae(rewards, values, mask, gamma=GAMMA, lam=lam, mask_semantics="skip")


@pytest.mark.parametrize("lam", [1.0, 0.95])
@pytest.mark.parametrize(("rows", "width"), [(64, 128), (256, 1024)])
@pytest.mark.parametrize("gae", [vectorised, token_loop])
def test_gae(
    benchmark: BenchmarkFixture, device: torch.device, gae: Gae, rows: int, width: int, lam: float
) -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, rows, width, device=device)
    lengths = torch.randint(width // 2, width + 1, (rows, 1), device=device)
    mask = (torch.arange(width, device=device) < lengths).float()

    def run() -> tuple[Tensor, Tensor]:
        out = gae(rewards, values, mask, lam)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out

    sample = slice(0, 8)
    want = reference.gae(
        rewards[sample].double(),
        values[sample].double(),
        mask[sample],
        gamma=GAMMA,
        lam=lam,
        mask_semantics="skip",
    )
    for got, expected in zip(run(), want, strict=True):
        assert error_fraction(got[sample], expected, gae_bound(expected, GAMMA, lam)).max() <= 1
    benchmark.group = f"gae {rows}x{width} lam {lam}"
    benchmark.extra_info["bytes"] = 5 * rewards.numel() * rewards.element_size()  # read 3, write 2
    benchmark(run)
