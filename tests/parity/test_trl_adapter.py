"""TRL's own PPOTrainer, run with the adapter: its token rewards are the credit of eager attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from parity.toys import CORPUS, Offline, save_policy, save_reward_model, small_gpt2
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2LMHeadModel

import attnshape
from attnshape.integrations import trl as adapter

pytestmark = pytest.mark.filterwarnings("ignore")

BATCH = 8
SCALE = 100.0
"""On the toy model's small scores, so that the KL does not drown them."""
HAS_TAP = tuple(map(int, transformers.__version__.split(".")[:2])) >= (4, 57)
"""TRL 0.7 needs an older transformers: there the credit comes from elsewhere, here from eager attention."""


TAKES_MASKS = adapter.VERSIONS.index(trl.__version__) >= adapter.VERSIONS.index("0.9.6")


class Watched(adapter.PPOTrainer):
    """Keeps what the trainer computed on its way."""

    def compute_rewards(self, *args: Any) -> tuple[Tensor, ...]:
        out = super().compute_rewards(*args)
        self.seen = {"scores": args[0], "masks": args[3], "rewards": out[0], "non_score": out[1]}
        return out

    def compute_advantages(self, *args: Any) -> tuple[Tensor, ...]:
        out = super().compute_advantages(*args)
        self.seen |= {"advantages": out[1], "given": args}
        return out


class World:
    """Policy and reward model with different tokenizers and chat templates, and TRL's trainer."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = save_policy(folder / "policy")
        save_reward_model(folder / "reward")
        self.reward_tokenizer = AutoTokenizer.from_pretrained(folder / "reward", padding_side="left")
        self.reward_model = AutoModelForSequenceClassification.from_pretrained(folder / "reward").eval()
        self.offline = Offline(folder / "reward", self.tokenizer)
        torch.manual_seed(0)
        config = small_gpt2(self.tokenizer)
        self.policy = GPT2LMHeadModel(config)
        # Sampled text is to be text: whole characters, no special tokens, something other than spaces.
        pieces = [self.tokenizer.decode([i]) for i in range(len(self.tokenizer))]
        self.unwanted = [
            i for i, s in enumerate(pieces) if not (s.isascii() and s.isprintable() and s.strip())
        ]

    def trainer(
        self,
        cls: type[Any] = Watched,
        padding_side: str = "left",
        dense_share: float | None = None,
        **settings: Any,
    ) -> Any:
        self.tokenizer.padding_side = padding_side
        config = trl.PPOConfig(batch_size=BATCH, mini_batch_size=2, learning_rate=1e-3, seed=3, **settings)
        model = trl.AutoModelForCausalLMWithValueHead.from_pretrained(copy.deepcopy(self.policy))
        torch.manual_seed(1)
        torch.nn.init.normal_(model.v_head.summary.weight)
        share = {} if dense_share is None else {"dense_share": dense_share}
        return cls(config, model, None, self.tokenizer, **share)

    def queries(self, prompts: list[list[dict[str, str]]]) -> list[Tensor]:
        texts = [
            self.tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts
        ]
        return [torch.tensor(self.tokenizer(text)["input_ids"]) for text in texts]

    @torch.no_grad()
    def reward(
        self, prompts: list[list[dict[str, str]]], responses: list[Tensor], masks: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Scores and credits, in two micro-batches that are not of one size."""
        if not HAS_TAP:
            found = [self.offline(*row) for row in zip(prompts, responses, masks, strict=True)]
            return [torch.tensor(SCALE * score) for score, _ in found], [credit for _, credit in found]
        scores, credits = [], []
        for part in (slice(0, 3), slice(3, BATCH)):
            conversations = [
                [*prompt, {"role": "assistant", "content": self.text(response)}]
                for prompt, response in zip(prompts[part], responses[part], strict=True)
            ]
            alignment = attnshape.align_texts(
                self.reward_tokenizer, conversations, self.tokenizer, responses[part]
            )
            with attnshape.AttentionTap(self.reward_model) as tap:
                logits = self.reward_model(
                    alignment.input_ids, attention_mask=alignment.attention_mask
                ).logits
            scores += SCALE * logits[:, 0]
            zeros = torch.zeros(len(conversations), dtype=torch.int32)
            response = attnshape.Response(alignment.source_mask, start=zeros)
            credit = attnshape.attention_credit(tap.take(), response)
            credits += [row[: len(r)] for row, r in zip(alignment(credit), responses[part], strict=True)]
        return scores, credits

    def text(self, ids: Tensor) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("trl"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def conversations(step: int) -> list[list[dict[str, str]]]:
    """Prompts of unequal lengths, some with a system message."""
    words = CORPUS[0].split()
    prompts = []
    for i in range(BATCH):
        user = {"role": "user", "content": " ".join(words[: 1 + (3 * i + step) % len(words)])}
        prompts.append([{"role": "system", "content": CORPUS[1][:20]}, user] if i % 3 == 0 else [user])
    return prompts


def check_token_rewards(
    world: World,
    trainer: Any,
    prompts: list[list[dict[str, str]]],
    responses: list[Tensor],
    masks: list[Tensor],
    dense_share: float,
) -> None:
    """What the trainer added to its KL penalty is the offline redistribution, at every token."""
    seen = trainer.seen
    for row in range(BATCH):
        mask = masks[row] != 0
        offline_score, credit = world.offline(prompts[row], responses[row].tolist(), masks[row].tolist())
        score = seen["scores"][row].double()
        torch.testing.assert_close(score, torch.tensor(SCALE * offline_score).double(), rtol=1e-4, atol=1e-3)
        expected = dense_share * score * credit
        expected[mask.nonzero()[-1]] += (1 - dense_share) * score
        rewards, penalty = seen["rewards"][row].double(), seen["non_score"][row].double()
        live = seen["masks"][row] != 0
        atol = 1e-6 * float(expected.abs().max() + penalty.abs().max())
        torch.testing.assert_close(rewards[live] - penalty[live], expected[mask], rtol=2e-5, atol=atol)
        assert torch.equal(rewards[~live], penalty[~live])


def test_twenty_steps(world: World) -> None:
    trainer = world.trainer(dense_share=0.7)
    before = copy.deepcopy(trainer.model.state_dict())
    lengths = set()
    for step in range(20):
        prompts = conversations(step)
        queries = world.queries(prompts)
        responses = trainer.generate(
            queries,
            batch_size=BATCH,
            return_prompt=False,
            max_new_tokens=24,
            min_new_tokens=3,
            do_sample=True,
            suppress_tokens=world.unwanted,
            pad_token_id=world.tokenizer.pad_token_id,
        )
        # An early end, which an untrained policy seldom finds.
        responses = [r[: 3 + (5 * i + step) % 22] for i, r in enumerate(responses)]
        masks = [torch.ones(len(r), dtype=torch.long) for r in responses]
        scores, credits = world.reward(prompts, responses, masks)
        stats = trainer.step(queries, responses, scores, credits=credits)
        check_token_rewards(world, trainer, prompts, responses, masks, dense_share=0.7)
        assert all(math.isfinite(stats[name]) for name in ("ppo/loss/total", "objective/kl"))
        assert stats["attnshape/fallback_rows"] == 0
        assert 0 < stats["attnshape/credit_entropy"] < math.log(24)
        lengths |= {len(r) for r in responses}
    assert len(lengths) > 8
    after = trainer.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_tool_turn(world: World, padding_side: str) -> None:
    trainer = world.trainer(padding_side=padding_side, dense_share=1.0)
    prompts = conversations(0)

    def ids(text: str) -> Tensor:
        return torch.tensor(world.tokenizer(text)["input_ids"], dtype=torch.long)

    def words(text: str, n: int) -> str:
        return "".join(" " + word for word in text.split()[:n])

    turns = [
        (
            ids("Let me look."),
            ids(words(" The search found three of them", i)),
            ids(words(" It was good, but the ending", 1 + i)),
        )
        for i in range(BATCH)
    ]
    responses = [torch.cat(turn) for turn in turns]
    masks = [torch.cat([torch.ones_like(a), torch.zeros_like(b), torch.ones_like(c)]) for a, b, c in turns]
    scores, credits = world.reward(prompts, responses, masks)
    queries = world.queries(prompts)
    if not TAKES_MASKS:
        with pytest.raises(ValueError, match=r"response_masks: .* want TRL 0\.9\.6"):
            trainer.step(queries, responses, scores, masks, credits=credits)
        return
    trainer.step(queries, responses, scores, masks, credits=credits)
    assert any(int((mask == 0).sum()) > 3 for mask in masks)
    check_token_rewards(world, trainer, prompts, responses, masks, dense_share=1.0)


def some_step(world: World) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(7)

    def draw(n: int) -> Tensor:
        return torch.randint(3, len(world.tokenizer), (n,), generator=generator)

    queries, responses = [draw(2 + i % 5) for i in range(BATCH)], [draw(1 + 2 * i) for i in range(BATCH)]
    return queries, responses, list(torch.randn(BATCH, generator=generator))


@pytest.mark.parametrize("settings", [{}, {"kl_penalty": "full"}, {"whiten_rewards": True}])
def test_without_credit_every_bit_is_trls(world: World, settings: dict[str, Any]) -> None:
    runs = []
    # The first trainer of a process takes other steps than the next, TRL's own too.
    for cls in (trl.PPOTrainer, trl.PPOTrainer, adapter.PPOTrainer):
        trainer = world.trainer(cls, **settings)
        stats = [trainer.step(*some_step(world)) for _ in range(2)]
        runs.append((trainer.model.state_dict(), stats))
    _, (theirs, their_stats), (ours, our_stats) = runs
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    for a, b in zip(their_stats, our_stats, strict=True):
        assert a.keys() == b.keys()
        assert all(
            a[k] == b[k]
            for k in a
            if k.startswith(("ppo/loss", "ppo/policy", "objective"))
            and a[k] is not None
            and isinstance(a[k], float)
        )


@pytest.mark.parametrize("kl_penalty", ["kl", "abs", "mse", "full"])
def test_all_credit_on_the_last_token_is_trls_reward(world: World, kl_penalty: str) -> None:
    rewards = []
    for last in (False, True):
        trainer = world.trainer(kl_penalty=kl_penalty)
        queries, responses, scores = some_step(world)
        one_hot = [torch.eye(len(r))[-1] for r in responses] if last else None
        for parameter in trainer.model.pretrained_model.parameters():  # away from the reference: a KL not 0
            parameter.data += 0.05 * parameter.data.cos()
        trainer.step(queries, responses, scores, credits=one_hot)
        rewards.append(trainer.seen["rewards"])
        assert trainer.seen["non_score"].abs().max() > 1e-4
    torch.testing.assert_close(rewards[1], rewards[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_advantages_are_trls(world: World, whiten_rewards: bool) -> None:
    trainer = world.trainer(whiten_rewards=whiten_rewards, lam=0.9, gamma=0.97)
    queries, responses, scores = some_step(world)
    trainer.step(queries, responses, scores, credits=[torch.rand(len(r)) + 0.1 for r in responses])
    values, rewards, mask = trainer.seen["given"]
    mask = mask.clone()
    mask[-1, mask[-1].nonzero()[2:5]] = 0  # a tool's turn
    trainer._credit = torch.ones(int(mask.sum()))
    found = trainer.compute_advantages(values, rewards, mask)
    trainer._credit = None
    theirs = trainer.compute_advantages(values, rewards, mask)
    for a, b in zip(found, theirs, strict=True):
        torch.testing.assert_close(a[mask != 0], b[mask != 0], rtol=2e-5, atol=2e-6)


def test_score_clipping_is_trls(world: World) -> None:
    trainer = world.trainer(score_clip=0.5)
    queries, responses, scores = some_step(world)
    trainer.step(queries, responses, scores, credits=[torch.ones(len(r)) for r in responses])
    seen = trainer.seen
    assert seen["scores"].abs().max() == 0.5
    torch.testing.assert_close(
        (seen["rewards"] - seen["non_score"]).sum(1), seen["scores"], rtol=1e-5, atol=1e-6
    )
