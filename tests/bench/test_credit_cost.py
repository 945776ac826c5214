"""That costs are counted right, and what the committed counts say."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import credit_cost
from benchmarks.credit_cost import Count
from benchmarks.paper.sources import SOURCES

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "credit_cost.json"


def test_products_and_live_bytes_are_counted() -> None:
    known = nn.Linear(8, 4, bias=False)
    with torch.no_grad(), Count(known) as count:
        x = torch.ones(16, 8)  # 512 bytes
        y = known(x)  # 256
        assert count.flops == 2 * 16 * 8 * 4
        assert count.peak == 512 + 256
        del x, y
        for _ in range(3):
            kept = torch.ones(64)  # 256, one beside the next
        kept.view(8, 8).sum()
    assert count.peak == 512 + 256


def test_attention_and_its_gradient_are_counted() -> None:
    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    with Count(nn.Identity()) as count:
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        product = 2 * 2 * 16 * 16 * 8
        assert count.flops == 2 * product
        torch.autograd.grad(out.sum(), v)
        assert count.flops == 7 * product  # with the scores computed again


@pytest.mark.parametrize("name", ["norm-weighted rollout", "signed rollout", "gradient x value"])
def test_memory_is_linear_in_the_length(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnshape.vectorized.attention.SCORE_ELEMENTS", 1)
    monkeypatch.setattr("attnshape.compile.is_traced", lambda: False)
    model = credit_cost.reward_model()
    short, long = (credit_cost.costs(name, model, length).peak_bytes for length in (64, 128))
    assert long < 2.1 * short


def test_committed_counts() -> None:
    result = json.loads(COMMITTED.read_text())
    rows = {(row["source"], row["length"]): row for row in result["rows"]}
    assert {source for source, _ in rows} == {"forward alone", *SOURCES}
    longest = max(credit_cost.LENGTHS)
    for source in SOURCES:
        assert rows[source, longest]["peak_bytes"] < 2.1 * rows[source, longest // 2]["peak_bytes"]
    assert credit_cost.table(result).count("\n") == len(SOURCES) + 2
