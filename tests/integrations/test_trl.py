"""What the TRL adapter does around TRL's trainer; the real one runs it in ``parity/test_trl_adapter.py``."""

from __future__ import annotations

import importlib.metadata
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from attnshape import ShapingConfig, reference
from attnshape.integrations import trl as adapter

PENALTY = 0.25


class FakeTrainer:
    """Calls the methods in the order and with the arguments that TRL's ``step`` does; right padding."""

    items = 3
    is_encoder_decoder = False

    def __init__(self, lam: float = 0.9, whiten_rewards: bool = False) -> None:
        self.config = SimpleNamespace(gamma=0.97, lam=lam, whiten_rewards=whiten_rewards)
        self.seen: dict[str, Any] = {}

    def step(
        self,
        queries: list[Tensor],
        responses: list[Tensor],
        scores: list[Tensor],
        response_masks: list[Tensor] | None = None,
    ) -> dict[str, Any]:
        width = max(len(q) + len(r) for q, r in zip(queries, responses, strict=True)) - 1
        masks = torch.zeros(len(queries), width, dtype=torch.long)
        for i, (q, r) in enumerate(zip(queries, responses, strict=True)):
            masks[i, len(q) - 1 : len(q) - 1 + len(r)] = 1 if response_masks is None else response_masks[i]
        generator = torch.Generator().manual_seed(0)
        logprobs, values = (torch.randn(masks.shape, generator=generator) for _ in range(2))
        rewards, non_score, *_ = self.compute_rewards(torch.tensor(scores), logprobs, logprobs - 1, masks)
        _, advantages, returns = self.compute_advantages(values, rewards, masks)
        self.seen = {
            "masks": masks,
            "rewards": rewards,
            "non_score": non_score,
            "values": values,
            "advantages": advantages,
            "returns": returns,
        }
        return {"own": 1.0}

    def compute_rewards(
        self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, masks: Tensor
    ) -> tuple[Tensor, ...]:
        kl = logprobs - ref_logprobs
        rewards = -PENALTY * kl
        for row, score, mask in zip(rewards, scores, masks, strict=True):
            row[mask.nonzero()[-1]] += score
        return (rewards, -PENALTY * kl, kl)[: self.items]

    def compute_advantages(self, values: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return values, rewards, values


Trainer = adapter.shaped_trainer(FakeTrainer)
QUERIES = [torch.arange(3), torch.arange(1), torch.arange(2)]
RESPONSES = [torch.arange(4), torch.arange(2), torch.arange(1)]
SCORES = [torch.tensor(2.0), torch.tensor(-1.0), torch.tensor(0.5)]
CREDITS = [torch.tensor([1.0, 2.0, 0.0, 5.0]), torch.tensor([3.0, 1.0]), torch.tensor([0.5])]


def token_rewards(trainer: Any) -> Tensor:
    return trainer.seen["rewards"] - trainer.seen["non_score"]


@pytest.mark.parametrize("items", [2, 3])
def test_a_score_is_spread_by_its_credit(items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTrainer, "items", items)
    trainer = Trainer(dense_share=0.5)
    stats = trainer.step(QUERIES, RESPONSES, SCORES, credits=CREDITS)
    expected = torch.tensor(
        [[0, 0, 1 / 8, 2 / 8, 0, 1 + 5 / 8], [-3 / 8, -1 / 8 - 1 / 2, 0, 0, 0, 0], [0, 1 / 2, 0, 0, 0, 0]]
    )
    torch.testing.assert_close(token_rewards(trainer), expected)
    assert stats["own"] == 1.0
    entropy = sum(-p * math.log(p) for p in (1 / 8, 2 / 8, 5 / 8, 3 / 4, 1 / 4)) / 3
    assert stats["attnshape/credit_entropy"] == pytest.approx(entropy)


def test_a_tools_tokens_get_nothing() -> None:
    masks = [torch.tensor([1, 0, 1, 0]), torch.tensor([0, 1]), torch.tensor([1])]
    trainer = Trainer(dense_share=0.5)
    trainer.step(QUERIES, RESPONSES, SCORES, masks, credits=CREDITS)
    expected = torch.tensor([[0, 0, 1.0, 0, 1.0, 0], [0, -1.0, 0, 0, 0, 0], [0, 0.5, 0, 0, 0, 0]])
    torch.testing.assert_close(token_rewards(trainer), expected)


def test_tools_are_refused_where_trl_misplaces_them() -> None:
    masks = [torch.ones_like(response) for response in RESPONSES]
    trainer = adapter.shaped_trainer(FakeTrainer, takes_masks=False)()
    with pytest.raises(ValueError, match=r"response_masks: before 0\.9\.6 TRL reads them one token late"):
        trainer.step(QUERIES, RESPONSES, SCORES, masks, credits=CREDITS)
    assert trainer.step(QUERIES, RESPONSES, SCORES, masks)


def test_padded_credit_is_read_up_to_each_length() -> None:
    padded = torch.nn.utils.rnn.pad_sequence(CREDITS, batch_first=True, padding_value=math.nan)
    found = []
    for credits in (CREDITS, padded):
        trainer = Trainer()
        trainer.step(QUERIES, RESPONSES, SCORES, credits=credits)
        found.append(token_rewards(trainer))
    assert torch.equal(*found)


def test_advantages_are_the_references() -> None:
    trainer = Trainer()
    trainer.step(QUERIES, RESPONSES, SCORES, credits=CREDITS)
    seen = {name: x.double() for name, x in trainer.seen.items()}
    mask = seen["masks"]
    config = ShapingConfig(gamma=0.97, lam=0.9, mask_semantics="zero")
    advantages, returns, _ = reference.gae(seen["rewards"], seen["values"], mask, config)
    torch.testing.assert_close(seen["returns"], returns, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(seen["advantages"], reference.whiten(advantages, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("whiten_rewards", "credits"), [(True, CREDITS), (False, None)])
def test_left_to_trl(whiten_rewards: bool, credits: list[Tensor] | None) -> None:
    trainer = Trainer(whiten_rewards=whiten_rewards)
    trainer.step(QUERIES, RESPONSES, SCORES, credits=credits)
    assert trainer.seen["advantages"] is trainer.seen["rewards"]


def test_without_credit_nothing_changes() -> None:
    ours, theirs = Trainer(), FakeTrainer()
    ours.step(QUERIES, RESPONSES, SCORES, credits=CREDITS)
    assert ours.step(QUERIES, RESPONSES, SCORES) == theirs.step(QUERIES, RESPONSES, SCORES)
    assert all(torch.equal(ours.seen[name], x) for name, x in theirs.seen.items())


@pytest.mark.parametrize(
    ("credits", "error", "message"),
    [
        (CREDITS[:2], ValueError, r"credits: got 2, want one per response, 3"),
        ([*CREDITS[:2], [0.5]], TypeError, r"credits\[2\] must be a floating tensor, got list"),
        ([*CREDITS[:2], torch.tensor([1])], TypeError, r"credits\[2\] must be .* got torch.int64"),
        ([*CREDITS[:2], torch.ones(2)], ValueError, r"credits\[2\]: got shape \[2\] .* 1 token"),
        ([*CREDITS[:2], torch.ones(1, 1)], ValueError, r"credits\[2\]: got shape \[1, 1\]"),
        (torch.ones(3, 3), ValueError, r"credits\[0\]: got shape \[3\] .* 4 tokens"),
        ([*CREDITS[:2], torch.tensor([-1.0])], ValueError, r"credits\[2\]: .* negative or not finite"),
        ([*CREDITS[:2], torch.tensor([math.nan])], ValueError, r"credits\[2\]: .* negative or not finite"),
    ],
)
def test_credit_that_does_not_fit_is_refused_before_the_step(
    credits: Any, error: type[Exception], message: str
) -> None:
    trainer = Trainer()
    with pytest.raises(error, match=message):
        trainer.step(QUERIES, RESPONSES, SCORES, credits=credits)
    assert trainer.seen == {}


def test_another_mask_than_the_credits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer()
    theirs = FakeTrainer.step
    fewer = [torch.tensor([1, 0, 1, 0]), 1, 1]
    monkeypatch.setattr(FakeTrainer, "step", lambda self, q, r, s, m=None: theirs(self, q, r, s, fewer))
    with pytest.raises(ValueError, match=r"got 7 unmasked response tokens, TRL's masks have 5"):
        trainer.step(QUERIES, RESPONSES, SCORES, credits=CREDITS)
    monkeypatch.undo()
    assert "attnshape/credit_entropy" not in trainer.step(QUERIES, RESPONSES, SCORES)


def test_an_encoder_decoder_is_refused() -> None:
    class Sequence(FakeTrainer):
        is_encoder_decoder = True

    with pytest.raises(ValueError, match="encoder-decoder"):
        adapter.shaped_trainer(Sequence)()


def test_changed_methods_are_refused() -> None:
    class Changed(FakeTrainer):
        def compute_rewards(self, scores: Tensor, logprobs: Tensor, masks: Tensor) -> tuple[Tensor, ...]:
            return ()

    with pytest.raises(RuntimeError, match=r"compute_rewards takes \(self, scores, logprobs, masks\), want"):
        adapter.shaped_trainer(Changed)


@pytest.mark.parametrize("found", ["0.7.3", "0.12.0", "1.12.0"])
def test_other_versions_are_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnshape.integrations.framework.version", lambda name: found)
    with pytest.raises(RuntimeError, match=rf"trl {found} is not supported, want trl 0.7.4 or .* or 0.11.4"):
        _ = adapter.PPOTrainer


def test_a_missing_trl_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("attnshape.integrations.framework.version", version)
    with pytest.raises(RuntimeError, match="trl is not installed"):
        _ = adapter.PPOTrainer


def test_trl_is_imported_when_its_trainer_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "trl" not in sys.modules
    monkeypatch.setattr("attnshape.integrations.framework.version", lambda name: "0.11.4")
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(PPOTrainer=FakeTrainer))
    adapter._ppo_trainer.cache_clear()
    try:
        from attnshape.integrations.trl import PPOTrainer

        assert issubclass(PPOTrainer, FakeTrainer)
        assert PPOTrainer is adapter.PPOTrainer
    finally:
        adapter._ppo_trainer.cache_clear()
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        _ = adapter.Trainer
