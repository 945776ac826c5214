"""The numerical bounds in hand-computed cases."""

import pytest
import torch

from attnshape.tolerance import credit_bound, error_fraction, gae_bound, kl_bound, reward_bound

inf, nan = float("inf"), float("nan")


def close(got: torch.Tensor, want: list) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


def test_credit_bound() -> None:
    close(credit_bound(torch.tensor([[0.5, 0.25, 0.0]])), [[5e-6 + 5e-8, 2.5e-6 + 5e-8, 5e-8]])
    logits = torch.tensor([1.0, 3.0])
    close(credit_bound(torch.ones(2, 1), logits), [[2e-5 + 1e-7], [4e-5 + 1e-7]])


def test_reward_bound_counts_summands_that_cancel() -> None:
    close(reward_bound(torch.tensor([[0.0, 1.0]])), [[1e-7, 1e-5 + 1e-7]])
    close(reward_bound(torch.tensor([[0.0]]), torch.tensor([[-2.0]]), max_logit=1.0), [[4e-5 + 2e-7]])


def test_kl_bound() -> None:
    close(kl_bound(torch.tensor([0.5, 0.0]), torch.tensor([-1.0, 0.0])), [1e-6 * (1 + 2 * 0.5), 0.0])


def test_gae_bound() -> None:
    expected = torch.tensor([[0.5, -0.25], [3.0, -4.0]])
    close(gae_bound(expected, 1.0, 1.0), [[1e-5, 1e-5], [4e-5, 4e-5]])
    close(gae_bound(expected, 1.0, 0.99999), [[1e-5, 1e-5], [4e-5, 4e-5]])
    close(gae_bound(expected, 0.5, 1.0), [[1e-5, 1e-5], [4e-5, 4e-5]])
    lam = torch.tensor([1.0, 0.0])
    got = gae_bound(expected, 1 - 2.0**-20, lam)
    close(got, [[1e-5 * 1e-3 * 2**20] * 2, [4e-5, 4e-5]])


def test_non_finite_references_leave_the_bounds_of_their_row_finite() -> None:
    close(credit_bound(torch.tensor([[nan, 1.0], [inf, -inf]])), [[1e-7, 1e-5 + 1e-7], [0.0, 0.0]])
    close(gae_bound(torch.tensor([[nan, 2.0]]), 1.0, 1.0), [[2e-5, 2e-5]])


def test_empty_rows() -> None:
    assert credit_bound(torch.zeros(2, 0)).shape == (2, 0)
    assert gae_bound(torch.zeros(2, 0), 0.9, 0.9).shape == (2, 0)


def test_error_fraction() -> None:
    actual = torch.tensor([1.0, 2.0, 0.0, 1.0, nan, inf, -inf, nan, 1.0])
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0, nan, inf, inf, 1.0, nan])
    bound = torch.tensor([1.0, 4.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    close(error_fraction(actual, expected, bound), [0.0, 0.25, 0.0, inf, 0.0, 0.0, inf, inf, inf])


def test_error_fraction_wants_equal_shapes() -> None:
    with pytest.raises(ValueError, match=r"actual \(1,\) and expected \(1, 1\)"):
        error_fraction(torch.zeros(1), torch.zeros(1, 1), torch.ones(1))
