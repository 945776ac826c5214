"""What stands at masked tokens with ``carry_masked``: against loops written as frameworks do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import formulas
from torch import Tensor

import attnshape
from attnshape import KL, Response, ShapingConfig, Status, reference

BACKENDS = [attnshape, reference]


@pytest.mark.parametrize("library", BACKENDS)
def test_by_hand(library: object) -> None:
    rewards, values = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0]]), torch.tensor([[5.0, 0.5, 7.0, 0.25, 3.0]])
    mask = torch.tensor([[0, 1, 0, 1, 0]])
    how = {"gamma": 1.0, "lam": 0.5, "carry_masked": True}
    # A: 2 - .25 = 1.75, then 1 + .25 - .5 + .5 * 1.75 = 1.625
    config = ShapingConfig(mask_semantics="skip", **how)
    advantages, returns, moments = library.gae(rewards, values, mask, config)
    assert advantages.tolist() == [[1.625, 1.625, 1.75, 1.75, 0.0]]
    assert returns.tolist() == [[6.625, 2.125, 8.75, 2.0, 3.0]]
    assert moments.tolist() == [[2.0, 1.6875, 2 * 0.0625**2]]  # of the unmasked tokens alone
    # A: 1.75; .25 + .5 * 1.75 = 1.125; 1 - .5 + .5 * 1.125 = 1.0625; .5 + .5 * 1.0625 = 1.03125
    config = ShapingConfig(mask_semantics="zero", **how)
    advantages, returns, _ = library.gae(rewards, values, mask, config)
    assert advantages.tolist() == [[1.03125, 1.0625, 1.125, 1.75, 0.0]]
    assert returns.tolist() == [[1.03125, 1.5625, 1.125, 2.0, 0.0]]


def frameworks_gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float,
    lam: float | Tensor,
    semantics: str,
    last: Tensor,
) -> tuple[Tensor, Tensor]:
    if semantics == "skip":
        advantages = formulas.carried_gae(rewards, values, mask, gamma, lam, last)
        return advantages, advantages + values
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = formulas.gae(rewards, values, gamma, lam)
    return advantages, advantages + values


@settings(max_examples=60)
@given(
    st.integers(0, 2**20),
    st.integers(0, 4),
    st.integers(0, 12),
    st.sampled_from(["skip", "zero"]),
    st.sampled_from([1.0, 0.9]),
    st.sampled_from([1.0, 0.95, 0.0]),
    st.sampled_from([None, 1.0, 0.5]),
    st.booleans(),
    st.sampled_from([torch.bool, torch.int32, torch.float32]),
)
def test_gae(
    seed: int,
    batch: int,
    width: int,
    semantics: str,
    gamma: float,
    lam: float | Tensor,
    lam_value: float | None,
    per_row: bool,
    mask_dtype: torch.dtype,
) -> None:
    g = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, batch, width, generator=g, dtype=torch.float64)
    mask = torch.rand(batch, width, generator=g) < 0.6
    last = torch.randn(batch, generator=g, dtype=torch.float64) if semantics == "skip" else torch.zeros(batch)
    if per_row:
        lam = torch.linspace(0, lam, batch, dtype=torch.float64)
    config = ShapingConfig(
        gamma=gamma, lam=lam, lam_value=lam_value, mask_semantics=semantics, carry_masked=True
    )
    of_returns = lam if lam_value is None else lam_value
    want, _ = frameworks_gae(rewards, values, mask, gamma, lam, semantics, last)
    _, want_returns = frameworks_gae(rewards, values, mask, gamma, of_returns, semantics, last)
    for library in BACKENDS:
        bootstrap = last if semantics == "skip" else None
        advantages, returns, _ = library.gae(
            rewards, values, mask.to(mask_dtype), config, bootstrap=bootstrap
        )
        # gamma and gamma * lam are rounded to float32
        torch.testing.assert_close(advantages, want, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(returns, want_returns, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("semantics", ["skip", "zero"])
def test_rewards_to_go(semantics: str) -> None:
    rewards, mask = torch.tensor([[9.0, 1.0, 9.0, 2.0, 9.0]]), torch.tensor([[0, 1, 0, 1, 0]])
    want = {"skip": [[2.0, 2.0, 2.0, 2.0, 0.0]], "zero": [[0.75, 1.5, 1.0, 2.0, 0.0]]}[semantics]
    config = ShapingConfig(gamma=0.5, lam=0.3, mask_semantics=semantics, carry_masked=True)
    for library in BACKENDS:
        out = library.gae(rewards, None, mask, config)
        assert out.advantages.tolist() == want
        assert out.returns.tolist() == want


def test_only_advantages_and_returns_change() -> None:
    g = torch.Generator().manual_seed(0)
    values, logprobs, ref_logprobs = torch.randn(3, 4, 7, generator=g)
    mask = torch.rand(4, 7, generator=g) < 0.6
    both = [
        attnshape.shape_rewards(
            torch.ones(4),
            "uniform",
            mask,
            values=values,
            kl=KL(logprobs, ref_logprobs, 0.1),
            config=ShapingConfig(lam=0.95, carry_masked=carry_masked),
        )
        for carry_masked in (False, True)
    ]
    for name in ("rewards", "credit", "kl", "status"):
        assert torch.equal(getattr(both[0], name), getattr(both[1], name))
    for name in ("advantages", "returns"):
        zeroed, kept = getattr(both[0], name), getattr(both[1], name)
        assert torch.equal(zeroed[mask], kept[mask])
        assert not torch.equal(zeroed, kept)
    assert torch.equal(both[0].moments, both[1].moments)


def test_a_zeroed_row_stays_zero() -> None:
    values, mask = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), torch.tensor([[0, 1, 0], [0, 1, 0]])
    config = ShapingConfig(lam=0.95, carry_masked=True, on_nan="zero_row", score_index=torch.tensor([1, 1]))
    score = torch.tensor([float("nan"), 1.0])
    for library in BACKENDS:
        out = library.shape_rewards(score, "sparse", mask, values=values, config=config)
        assert out.status.tolist() == [Status.NONFINITE, 0]
        assert out.returns[0].tolist() == [0.0, 0.0, 0.0]
        assert out.returns[1].tolist() == [0.0, 1.0, 3.0]


def test_packed_tokens_are_refused() -> None:
    ones = torch.ones(3)
    response = Response(ones, cu_seqlens=torch.tensor([0, 3], dtype=torch.int32))
    message = "carry_masked: got True with packed tokens, want padded ones"
    with pytest.raises(ValueError, match=message):
        attnshape.gae(ones, ones, response, ShapingConfig(carry_masked=True))
    with pytest.raises(ValueError, match=message):
        attnshape.shape_rewards(torch.ones(1), "sparse", response, config=ShapingConfig.verl())


@pytest.mark.parametrize("semantics", ["skip", "zero"])
@pytest.mark.parametrize("backend", ["cpu", "torch"])
def test_an_infinite_value_before_a_masked_token(backend: attnshape.types.Backend, semantics: str) -> None:
    """Found by the soak: what passes a masked token cannot be told from the advantage after it."""
    rewards, values = torch.tensor([[9.0, 1.0, 2.0]]), torch.tensor([[5.0, torch.inf, 0.5]])
    mask = torch.tensor([[0, 1, 1]])
    config = ShapingConfig(lam=0.5, mask_semantics=semantics, carry_masked=True)
    got = attnshape.gae(rewards, values, mask, config, backend=backend)
    want = reference.gae(rewards.double(), values.double(), mask, config)
    for x, y in zip(got[:2], want[:2], strict=True):
        torch.testing.assert_close(x.double(), y, equal_nan=True)
