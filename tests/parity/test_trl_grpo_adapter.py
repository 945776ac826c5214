"""TRL's own GRPOTrainer, run with the adapter: its advantages are those of eager attention's credit."""

from __future__ import annotations

import copy
import math
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
import trl
from datasets import Dataset
from parity.toys import Offline, save_policy, save_reward_model, small_gpt2
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GPT2LMHeadModel

from attnshape import CreditModel
from attnshape.integrations import trl as adapter

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS, GROUP, TOKENS = 20, 4, 10
PROMPTS = {
    "text": ["Was the film any good?", "Tell me about the plot. ", "the ending", "Let me look that up: "],
    "messages": [
        [{"role": "user", "content": "Was the film any good?"}],
        [{"role": "system", "content": "film"}, {"role": "user", "content": " Tell me about the plot. "}],
        [{"role": "user", "content": "the ending"}],
        [{"role": "user", "content": "good"}],
    ],
}


def rule(completions: list[Any], **_: Any) -> list[float]:
    """A reward without a model."""
    return [len(str(completion)) % 5 / 2 for completion in completions]


def sometimes(completions: list[Any], **_: Any) -> list[float | None]:
    """One that does not apply to every completion."""
    return [None if i % 3 == 0 else i / 4 for i in range(len(completions))]


def watched(base: type[Any]) -> type[Any]:
    class Watched(base):
        """Keeps what each generation gave."""

        def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, ids: Any) -> Tensor:
            self.rewards = super()._calculate_rewards(inputs, prompts, completions, ids)
            return self.rewards

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            out = super()._generate_and_score_completions(inputs)
            seen = self.__dict__.setdefault("seen", [])
            seen.append(
                {
                    "prompts": copy.deepcopy([x["prompt"] for x in inputs]),
                    "rewards": self.rewards.clone(),
                    **{k: v.clone() for k, v in out.items() if isinstance(v, Tensor)},
                }
            )
            return out

    return Watched


Plain, Shaped = watched(trl.GRPOTrainer), watched(adapter.GRPOTrainer)


class World:
    """Policy and reward model with different tokenizers and chat templates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reward = str(folder / "reward")
        if not (folder / "reward").exists():
            save_policy(folder / "policy")
            save_reward_model(folder / "reward")
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
        self.offline = Offline(folder / "reward", self.tokenizer)
        torch.manual_seed(0)
        config = small_gpt2(self.tokenizer)
        policy = GPT2LMHeadModel(config)
        # Sampled text is to be text: whole characters, no special tokens but the last, not only spaces.
        pieces = [self.tokenizer.decode([i]) for i in range(len(self.tokenizer))]
        end = self.tokenizer.eos_token_id
        wanted = [bool(s.isascii() and s.isprintable() and s.strip()) for s in pieces]
        self.unwanted = [i for i, is_text in enumerate(wanted) if not is_text and i != end]
        with torch.no_grad():  # some completions are to end early: the embedding is tied to the head
            policy.transformer.wte.weight[end] = 0.6 * policy.transformer.ln_f.weight / 32**0.5
        # TRL loads the reference model of the KL from where the policy is from.
        self.model = str(folder / "model")
        policy.save_pretrained(self.model)

    def trained(self, *args: Any, **options: Any) -> Any:
        """A run from its seed to its end."""
        trainer = self.trainer(*args, **options)
        trainer.start = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        return trainer

    def trainer(
        self,
        cls: type[Any] = Shaped,
        form: str = "text",
        reward_funcs: Any = None,
        credit: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        settings = {
            "per_device_train_batch_size": 8,
            "num_generations": GROUP,
            "max_completion_length": TOKENS,
            "max_steps": STEPS,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "generation_kwargs": {"suppress_tokens": self.unwanted},
            **(settings or {}),
        }
        args = trl.GRPOConfig(
            output_dir=str(self.folder / "out"),
            report_to=[],
            use_cpu=True,
            bf16=False,
            seed=3,
            save_strategy="no",
            disable_tqdm=True,
            **settings,
        )
        if credit is not None:
            options["credit"] = CreditModel(self.reward, **credit)
        return cls(
            model=self.model,
            processing_class=self.tokenizer,
            reward_funcs=[self.reward] if reward_funcs is None else reward_funcs,
            train_dataset=Dataset.from_dict({"prompt": PROMPTS[form] * 8}),
            args=args,
            **options,
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def group_advantage(rewards: Tensor, scale: str = "group", baseline: str = "mean") -> Tensor:
    """``[N]`` from ``[N]``, float64, one group after the other."""
    grouped = rewards.double().view(-1, GROUP)
    mean = grouped.mean(1, keepdim=True)
    if baseline == "leave_one_out":
        mean = (grouped.sum(1, keepdim=True) - grouped) / (GROUP - 1)
    out = grouped - mean
    if scale == "group":
        out = out / (grouped.std(1, keepdim=True) + 1e-4)
    elif scale == "batch":
        out = out / (grouped.std() + 1e-4)
    return out.flatten()


def expected(world: World, seen: dict[str, Any], own: Tensor, of_model: Tensor, share: float) -> Tensor:
    """``own`` over the tokens, of which ``of_model`` by the credit of eager attention."""
    rows = []
    for b, prompt in enumerate(seen["prompts"]):
        ids, mask = seen["completion_ids"][b], seen["completion_mask"][b].clone()
        if "tool_mask" in seen:
            mask = mask * seen["tool_mask"][b]
        n = int(mask.sum())
        length = int(seen["completion_mask"][b].sum())
        row = torch.zeros(len(ids), dtype=torch.float64)
        if n:
            _, credit = world.offline(prompt, ids[:length].tolist(), mask[:length].tolist())
            row[:length] = own[b] + of_model[b] * share * (n * credit - 1)
        rows.append(row * mask)
    return torch.stack(rows)


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def same_run(one: Any, other: Any) -> None:
    for (name, a), (_, b) in zip(one.model.named_parameters(), other.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    times = ("time", "runtime", "per_second", "credit")
    for a, b in zip(one.state.log_history, other.state.log_history, strict=True):
        keep = [{k: v for k, v in x.items() if not any(t in k for t in times)} for x in (a, b)]
        assert keep[0] == keep[1]


@pytest.mark.parametrize("form", PROMPTS)
def test_nothing_spread_is_trls_own_run(world: World, form: str) -> None:
    plain, shaped = world.trained(Plain, form), world.trained(form=form, credit={}, dense_share=0.0)
    same_run(plain, shaped)
    assert any(not torch.equal(x, plain.start[name]) for name, x in plain.model.state_dict().items())
    for a, b in zip(plain.seen, shaped.seen, strict=True):
        assert torch.equal(a["advantages"], b["advantages"])
    assert shaped.state.log_history[0]["credit/entropy"] > 0


@pytest.mark.parametrize("form", PROMPTS)
def test_advantages_are_the_credit_of_eager_attention(world: World, form: str) -> None:
    trainer = world.trainer(form=form, credit={}, dense_share=0.8)
    forwards = []
    trainer.reward_funcs[0].register_forward_hook(lambda *_: forwards.append(1))
    trainer.train()
    assert len(trainer.seen) == len(forwards) == STEPS  # no second forward
    lengths = set()
    for seen in trainer.seen:
        offline = [
            world.offline(p, ids[m.bool()].tolist(), [1] * int(m.sum()))[0]
            for p, ids, m in zip(
                seen["prompts"], seen["completion_ids"], seen["completion_mask"], strict=True
            )
        ]
        torch.testing.assert_close(seen["rewards"][:, 0], torch.tensor(offline), rtol=1e-4, atol=1e-5)
        own = group_advantage(seen["rewards"][:, 0])
        close(seen["advantages"], expected(world, seen, own, own, 0.8))
        n = seen["completion_mask"].sum(1)
        close(seen["advantages"].sum(1) / n, own)
        lengths |= set(n.tolist())
    assert len(lengths) > 2  # some ended, some were cut off
    assert TOKENS in lengths
    log = trainer.state.log_history[0]
    assert log["credit/fallback"] == 0
    assert 0 < log["credit/response_attention"] < 1


def test_it_learns_otherwise_than_without_credit(world: World) -> None:
    settings = {"max_steps": 2}
    plain, shaped = world.trained(Plain, settings=settings), world.trained(credit={}, settings=settings)
    assert torch.equal(plain.seen[0]["completion_ids"], shaped.seen[0]["completion_ids"])
    assert any(
        not torch.equal(a, b)
        for a, b in zip(plain.model.parameters(), shaped.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_only_the_models_part_is_spread(world: World, scale: str) -> None:
    settings = {"scale_rewards": scale, "reward_weights": [2.0, -0.5, 1.0], "max_steps": 3}
    funcs = [rule, world.reward, sometimes]
    trainer = world.trained(reward_funcs=funcs, credit={}, dense_share=0.6, settings=settings)
    plain = world.trained(Plain, reward_funcs=[rule, world.reward, sometimes], settings=settings)
    assert funcs == [rule, world.reward, sometimes]
    close(trainer.seen[0]["rewards"].nan_to_num(), plain.seen[0]["rewards"].nan_to_num().double())
    for i, seen in enumerate(trainer.seen):
        weighted = (seen["rewards"] * torch.tensor([2.0, -0.5, 1.0])).nan_to_num().double()
        total = weighted.sum(1)
        own = group_advantage(total, scale)
        if i == 0:
            close(plain.seen[0]["advantages"], own)
        grouped = total.view(-1, GROUP)
        std = {"group": grouped.std(1, keepdim=True).expand_as(grouped), "batch": grouped.std()}.get(scale)
        centred = group_advantage(weighted[:, 1], "none")
        part = centred if std is None else centred / (std.expand_as(grouped).flatten() + 1e-4)
        close(seen["advantages"], expected(world, seen, own, part, 0.6))


def test_rewards_that_are_normalised_one_by_one(world: World) -> None:
    settings = {"multi_objective_aggregation": "normalize_then_sum", "max_steps": 2}
    trainer = world.trained(reward_funcs=[rule, world.reward], credit={}, dense_share=0.6, settings=settings)
    for seen in trainer.seen:
        each = torch.stack([group_advantage(seen["rewards"][:, k]) for k in range(2)], 1)
        std = each.sum(1).std() + 1e-4
        own, part = ((x - x.mean()) / std for x in (each.sum(1), each[:, 1]))
        close(seen["advantages"], expected(world, seen, own, part, 0.6))


def test_leave_one_out(world: World) -> None:
    settings = {"scale_rewards": "none", "max_steps": 2, "log_completions": True}
    trainer = world.trained(credit={}, dense_share=0.5, baseline="leave_one_out", settings=settings)
    for seen in trainer.seen:
        own = group_advantage(seen["rewards"][:, 0], "none", "leave_one_out")
        close(seen["advantages"], expected(world, seen, own, own, 0.5))
    table = pandas.read_parquet(world.folder / "out" / "completions" / "completions_00002.parquet")
    close(torch.tensor(table["advantage"]), own)
    assert (table["credit/entropy"] > 0).all()
    page = (world.folder / "out" / "completions" / "completions_00002.html").read_text()
    assert page.count("<section id=") == len(own)


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo"])
def test_every_loss(world: World, loss: str) -> None:
    """Accumulated gradients, and two iterations over what was generated."""
    settings = {
        "loss_type": loss,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "beta": 0.02,
    }
    plain = world.trained(Plain, settings=settings)
    none = world.trained(credit={}, dense_share=0.0, settings=settings)
    shaped = world.trained(credit={}, dense_share=0.8, settings=settings)
    same_run(plain, none)
    assert all(torch.isfinite(p).all() for p in shaped.model.parameters())
    # A loss that sums over tokens has the same value, since means stay; its gradient is another.
    both = zip(plain.model.parameters(), shaped.model.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in both)
    assert len(shaped.seen) == 2
    for seen in shaped.seen:
        own = group_advantage(seen["rewards"][:, 0])
        close(seen["advantages"], expected(world, seen, own, own, 0.8))


def test_truncated_completions_that_are_masked(world: World) -> None:
    settings = {"mask_truncated_completions": True, "max_steps": 3}
    trainer = world.trained(credit={}, dense_share=0.8, settings=settings)
    empty = 0
    for seen in trainer.seen:
        own = group_advantage(seen["rewards"][:, 0])
        close(seen["advantages"], expected(world, seen, own, own, 0.8))
        empty += int((seen["completion_mask"].sum(1) == 0).sum())
    assert empty


@pytest.mark.parametrize(
    "source", ["columns", "rollout", "signed_rollout", "gradient_value", "relevance", "leave_one_out"]
)
def test_other_sources(world: World, source: str) -> None:
    """The forward of TRL gives what a forward of one's own gives, and the same score."""
    trainer = world.trained(
        form="messages", credit={"source": source}, dense_share=0.8, settings={"max_steps": 2}
    )
    own_model = CreditModel(world.reward, source=source)
    plain = world.trained(Plain, "messages", settings={"max_steps": 1})
    assert torch.equal(plain.seen[0]["completion_ids"], trainer.seen[0]["completion_ids"])
    close(plain.seen[0]["rewards"], trainer.seen[0]["rewards"].double())
    for seen in trainer.seen:
        masks = seen["completion_mask"].bool()
        ids = [row[m].tolist() for row, m in zip(seen["completion_ids"], masks, strict=True)]
        scored = own_model(seen["prompts"], ids, world.tokenizer)
        own = group_advantage(seen["rewards"][:, 0])
        n = scored.mask.sum(1, keepdim=True)
        w = scored.weights.double()
        if own_model.signed:
            if own_model.source.of_score:
                w = w * own.sign()[:, None]
            w = w / w.abs().sum(1, keepdim=True)
            spread = 1 + 0.8 * n * (w - w.sum(1, keepdim=True) / n)
        else:
            spread = 0.8 * n * w / w.sum(1, keepdim=True) + 0.2
        close(seen["advantages"], own[:, None] * spread * scored.mask)


def test_what_drops_or_weighs_a_completion_by_its_sign(world: World) -> None:
    """TRL's functions, on the real run's advantages: a completion is taken as a whole, as TRL's own is."""
    trainer = world.trained(credit={"source": "relevance"}, dense_share=1.0, settings={"max_steps": 1})
    (seen,) = trainer.seen
    mask, own = seen["completion_mask"], group_advantage(seen["rewards"][:, 0]).float()[:, None]
    assert ((seen["advantages"] > 0) & (own < 0)).any()
    logps = torch.linspace(-2, -1, mask.numel()).view(mask.shape)
    for name, options in {
        "get_off_policy_mask": {
            "per_token_logps": logps - 1,
            "sampling_per_token_logps": logps,
            "off_policy_threshold": 0.5,
        },
        "get_gamma_weights": {"log_ratio_per_token": logps / 50, "importance_sampling_ratio": None},
    }.items():
        spread = getattr(trainer, name)(advantages=seen["advantages"], mask=mask, **options)
        theirs = getattr(trl.GRPOTrainer, name)(advantages=own, mask=mask, **options)
        assert torch.equal(spread, theirs), name
    settings = {"off_policy_mask_threshold": 0.01, "num_iterations": 2, "max_steps": 4}
    world.trained(credit={"source": "relevance"}, dense_share=0.8, settings=settings)


def test_an_environments_tokens_get_none(world: World) -> None:
    answer = world.tokenizer.encode(" The search found three reviews", add_special_tokens=False)

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(trainer.state.global_step)
        wanted = [i for i in range(len(world.tokenizer)) if i not in world.unwanted]
        wanted.remove(world.tokenizer.eos_token_id)
        out: dict[str, Any] = {"prompt_ids": [], "completion_ids": [], "logprobs": None, "env_mask": []}
        for i, prompt in enumerate(prompts):
            drawn = torch.randint(len(wanted), (5 + i % 3,), generator=generator).tolist()
            own = [wanted[j] for j in drawn]
            out["prompt_ids"].append(world.tokenizer.encode(prompt))
            out["completion_ids"].append([*own[:2], *answer, *own[2:]])
            out["env_mask"].append([1, 1, *[0] * len(answer), *[1] * len(own[2:])])
        return out

    trainer = world.trained(credit={}, dense_share=0.8, settings={"max_steps": 2}, rollout_func=rollout)
    for seen in trainer.seen:
        assert "tool_mask" in seen
        own = group_advantage(seen["rewards"][:, 0])
        close(seen["advantages"], expected(world, seen, own, own, 0.8))


def test_the_example_runs() -> None:
    found = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "grpo_with_trl.py"))
    losses = [line["loss"] for line in found["trainer"].state.log_history if "loss" in line]
    assert len(losses) == 3
    assert all(map(math.isfinite, losses))


def test_gspo_is_refused(world: World) -> None:
    with pytest.raises(ValueError, match=r"importance_sampling_level: got 'sequence' \(GSPO\)"):
        world.trainer(credit={}, settings={"importance_sampling_level": "sequence"})


def test_a_model_that_is_loaded_and_one_that_is_no_reward_function(world: World) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(world.reward).eval()
    options: dict[str, Any] = {"dense_share": 0.8, "settings": {"max_steps": 1}}
    loaded = world.trained(shaped_by(model), reward_funcs=model, **options)
    named = world.trained(credit={}, **options)
    assert torch.equal(loaded.seen[0]["advantages"], named.seen[0]["advantages"])
    with pytest.raises(ValueError, match="must be one of reward_funcs"):
        world.trainer(reward_funcs=[rule], credit={})


def shaped_by(model: Any) -> Any:
    """The trainer with the credit of a model that is loaded."""
    return lambda **kwargs: Shaped(**{**kwargs, "credit": CreditModel(model)})


def test_two_processes_compare_their_completions(world: World, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    runs = []
    for rank in range(2):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = os.environ | {k: str(v) for k, v in variables.items()} | {"MASTER_ADDR": "localhost"}
        command = [sys.executable, __file__, str(world.folder), str(tmp_path / f"{rank}.pt")]
        runs.append(subprocess.Popen(command, env=environment))
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*[r["weights"] for r in ranks], strict=True))
    assert ranks[0]["log"] == ranks[1]["log"]
    for both in zip(*[r["seen"] for r in ranks], strict=True):
        assert torch.equal(both[0]["rewards"], both[1]["rewards"])  # of both ranks
        weighted = both[0]["rewards"].double()
        own = group_advantage(weighted.sum(1))
        std = weighted.sum(1).view(-1, GROUP).std(1).repeat_interleave(GROUP) + 1e-4
        part = group_advantage(weighted[:, 0], "none") / std
        for rank, seen in enumerate(both):
            rows = slice(2 * rank, 2 * rank + 2)
            close(seen["advantages"], expected(world, seen, own[rows], part[rows], 0.8))


def run_rank(folder: str, out: str) -> None:
    """One of two processes: a group of four lies across both."""
    world = World(Path(folder))
    settings = {"max_steps": 3, "per_device_train_batch_size": 2}
    trainer = world.trained(
        form="messages",
        reward_funcs=[world.reward, rule],
        credit={},
        dense_share=0.8,
        settings=settings,
    )
    log = trainer._metrics["train"], trainer.state.log_history
    torch.save(
        {
            "seen": trainer.seen,
            "weights": [p.detach() for p in trainer.model.parameters()],
            "log": [x.get("credit/entropy") for x in log[1]],
        },
        out,
    )
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_rank(*sys.argv[1:])
