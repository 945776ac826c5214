import math

import pytest
import torch

from attnshape.demo.agreement import auc, mean_agreement, precision_at_k


@pytest.mark.parametrize(
    ("credit", "effects", "precision", "area"),
    [
        ([0.5, 0.3, 0.2, 0.0], [1.0, -2.0, 0.0, 0.0], 1.0, 1.0),
        ([0.5, 0.3, 0.2, 0.0], [0.0, 0.0, 1.0, 1.0], 0.0, 0.0),
        ([0.5, 0.3, 0.2, 0.0], [1.0, 0.0, 1.0, 0.0], 0.5, 0.75),
        # uniform credit is worth what chance is worth: k / n, and one half
        ([0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], 0.25, 0.5),
        ([0.2] * 5, [1.0, 1.0, 0.0, 0.0, 0.0], 0.4, 0.5),
        # sparse: the last token is wrong, the second of two places is one of the four others, drawn at random
        ([0.0, 0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0, 0.0], (0 + 2 / 4) / 2, 4 / 12),
    ],
)
def test_by_hand(credit: list[float], effects: list[float], precision: float, area: float) -> None:
    assert precision_at_k(torch.tensor(credit), torch.tensor(effects)) == pytest.approx(precision)
    assert auc(torch.tensor(credit), torch.tensor(effects)) == pytest.approx(area)


def test_undefined_without_tokens_of_both_kinds() -> None:
    credit = torch.tensor([0.4, 0.6])
    assert precision_at_k(credit, torch.zeros(2)) is None
    assert auc(credit, torch.zeros(2)) is None
    assert auc(credit, torch.ones(2)) is None


def test_mean_skips_masked_tokens_and_undefined_rows() -> None:
    credit = torch.tensor([[0.9, 0.1, 5.0], [0.5, 0.5, 0.0], [0.2, 0.8, 0.0]])
    effects = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1]])
    assert mean_agreement(credit, effects, mask) == pytest.approx(
        {"precision_at_k": (1 + 0) / 2, "auc": (1 + 0.5) / 2}
    )
    nothing = mean_agreement(credit, torch.zeros(3, 3), mask)
    assert all(math.isnan(x) for x in nothing.values())
