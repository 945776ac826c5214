"""The slime adapter with slime's real functions, from the reward hook to whitened advantages, on a CPU.

Run in an environment that has slime, of which Megatron and SGLang are stubbed:
``python -m pytest tests/parity/test_slime_adapter.py``.
"""

from __future__ import annotations

import asyncio
import copy
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parity import slime_stubs  # noqa: F401

# isort: split
import pytest
import ray
import torch
import torch.distributed as dist
from parity.toys import Offline, another_server, save_policy, save_reward_model
from slime.backends.megatron_utils import cp_utils, loss
from slime.observability import train_metric_utils
from slime.ray.rollout import RolloutManager
from slime.rollout.rm_hub import async_rm, batched_async_rm
from slime.utils.data import process_rollout_data
from slime.utils.misc import load_function
from slime.utils.ppo_utils import vanilla_gae
from slime.utils.types import Sample

from attnshape.integrations.slime import ESTIMATORS

MODULE = "attnshape.integrations.slime"
SCRIPT: list[tuple[str | list[dict[str, str]], list[tuple[str, int]]]] = [
    ([{"role": "user", "content": "Was the film any good?"}], [("It was not bad.<|im_end|>", 1)]),
    (
        [{"role": "system", "content": "Judge films."}, {"role": "user", "content": "And the ending?"}],
        [
            ("Let me look that up.<|im_end|>", 1),
            ("\n<|im_start|>tool\nThe search found three reviews<|im_end|>\n<|im_start|>assistant\n", 0),
            ("All of them good; the actors were superb.<|im_end|>", 1),
        ],
    ),
    ("<|im_start|>user\nGood?<|im_end|>\n<|im_start|>assistant\n", [("  Yes\n", 1)]),
    ([{"role": "user", "content": "The end?"}], [("Weak.", 1), ("\n<|im_start|>tool\nthe last word", 0)]),
    ([{"role": "user", "content": "Plot?"}], [("<|im_end|>", 1)]),
]
TOKENS = [7, 3, 11, 5, 2]
"""Of each prompt, for slime; the reward model reads its text."""


class Setup:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy = save_policy(folder / "policy")
        save_reward_model(folder / "reward_model")
        self.offline = Offline(folder / "reward_model", self.policy)
        self.url: str | None = None
        """Of a server that is asked in the place of the model in this process."""

    def args(self, **changes: Any) -> Namespace:
        """Those of slime's arguments that its functions read here."""
        return Namespace(
            **{
                "advantage_estimator": "ppo",
                "custom_rm_path": f"{MODULE}.custom_rm",
                "custom_reward_post_process_path": f"{MODULE}.post_process_rewards",
                "custom_advantage_function_path": f"{MODULE}.compute_advantages",
                "custom_convert_samples_to_train_data_path": None,
                "megatron_config_path": None,
                "hf_checkpoint": str(self.folder / "policy"),
                "rm_url": self.url,
                "attnshape": {} if self.url else {"model": str(self.folder / "reward_model")},
                "reward_key": None,
                "rewards_normalization": True,
                "grpo_std_normalization": True,
                "n_samples_per_prompt": len(SCRIPT),
                "rollout_batch_size": 1,
                "gamma": 1.0,
                "lambd": 0.95,
                "kl_coef": 0.05,
                "kl_loss_type": "k1",
                "use_rollout_logprobs": False,
                "normalize_advantages": True,
                "use_opd": False,
                "global_batch_size": len(SCRIPT),
                "use_dynamic_batch_size": True,
                "max_tokens_per_gpu": 90,
                "balance_data": False,
                "balance_by_flops": False,
                "ci_test": False,
                "log_multi_turn": False,
                "log_passrate": False,
                "log_correct_samples": False,
                **changes,
            }
        )

    def script(self, i: int) -> tuple[list[int], list[int]]:
        parts = [(self.policy(text, add_special_tokens=False)["input_ids"], m) for text, m in SCRIPT[i][1]]
        return [t for ids, _ in parts for t in ids], [m for ids, m in parts for _ in ids]

    def samples(self) -> list[Sample]:
        out = []
        for i, (prompt, _) in enumerate(SCRIPT):
            ids, mask = self.script(i)
            out.append(
                Sample(
                    index=i,
                    prompt=prompt,
                    tokens=[9] * TOKENS[i] + ids,
                    response=self.policy.decode(ids, skip_special_tokens=True),
                    response_length=len(ids),
                    loss_mask=None if all(mask) else mask,
                    status=Sample.Status.COMPLETED,
                )
            )
        return out

    def expected(self, i: int) -> torch.Tensor:
        """Token rewards of the ``i``-th response from eager attention."""
        ids, mask = self.script(i)
        if not self.policy.decode(ids, skip_special_tokens=True):
            return torch.eye(len(ids))[-1].double() * self.offline(SCRIPT[i][0], ids, mask)[0]
        return self.offline.rewards(SCRIPT[i][0], ids, mask)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    ray.init(num_cpus=1, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    made = Setup(tmp_path_factory.mktemp("slime"))
    with another_server(made.folder / "reward_model") as made.url:
        yield made
    dist.destroy_process_group()
    ray.shutdown()


def converted(args: Namespace, samples: list[Sample], dp_size: int) -> list[dict[str, Any]]:
    """What each data-parallel rank gets, through slime's conversion, split and object store."""
    manager = object.__new__(RolloutManager.__ray_metadata__.modified_class)
    manager.args = args
    path = args.custom_reward_post_process_path
    manager.custom_reward_post_process_func = load_function(path) if path else None
    manager.custom_convert_samples_to_train_data_func = None
    manager.train_parallel_config = {
        "dp_size": dp_size,
        "cp_size": 1,
        "vpp_size": 1,
        "microbatch_group_size_per_vp_stage": 1,
    }
    boxes = manager._split_train_data_by_dp(manager._convert_samples_to_train_data(samples))
    return [process_rollout_data(args, boxes, rank, dp_size) for rank in range(dp_size)]


def with_models(data: dict[str, Any]) -> dict[str, Any]:
    """What the actor, the reference and the critic add, drawn per sample."""
    for j, name in enumerate(("log_probs", "ref_log_probs", "values")):
        generators = [torch.Generator().manual_seed(10 * i + j) for i in data["sample_indices"]]
        data[name] = [
            torch.randn(n, generator=g) for n, g in zip(data["response_lengths"], generators, strict=True)
        ]
    return data


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    bound = 2e-5 * max([1.0, *expected.abs().tolist()])
    assert torch.allclose(found.double(), expected, rtol=0, atol=bound)


def in_float64(
    args: Namespace, data: dict[str, Any], rewards: list[torch.Tensor]
) -> list[list[torch.Tensor]]:
    """slime's ``vanilla_gae`` in float64 on given token rewards: advantages before whitening, and returns."""
    out: list[list[torch.Tensor]] = [[], []]
    for reward, log_prob, ref, value in zip(
        rewards, data["log_probs"], data["ref_log_probs"], data["values"], strict=True
    ):
        shaped = reward - args.kl_coef * (log_prob.double() - ref.double())
        rows = vanilla_gae(shaped[None], value[None].double(), args.gamma, args.lambd)
        for results, row in zip(out, rows, strict=True):
            results.append(row[0])
    return out


def test_token_rewards_reach_the_advantages(setup: Setup) -> None:
    args = setup.args(normalize_advantages=False)
    samples = setup.samples()
    for sample in samples:
        sample.reward = asyncio.run(async_rm(args, sample))
    ranks = converted(args, samples, dp_size=2)
    assert sorted(len(data["rewards"]) for data in ranks) == [1, 4]
    for data in ranks:
        expected = [setup.expected(i) for i in data["sample_indices"]]
        for found, row in zip(data["rewards"], expected, strict=True):
            close(found, row)
        scores = [row.sum().item() for row in expected]
        assert data["local_raw_reward"] == pytest.approx(scores, rel=1e-5)
        assert all(isinstance(score, float) for score in data["raw_reward"])
        loss.compute_advantages_and_returns(args, with_models(data))
        for name, rows in zip(("advantages", "returns"), in_float64(args, data, expected), strict=True):
            for found, row in zip(data[name], rows, strict=True):
                close(found, row)


def test_slime_whitens_and_logs_them(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    args = setup.args()
    samples = setup.samples()
    for sample, reward in zip(samples, asyncio.run(batched_async_rm(args, samples)), strict=True):
        sample.reward = reward
    (data,) = converted(args, samples, dp_size=1)
    loss.compute_advantages_and_returns(args, with_models(data))
    advantages, _ = in_float64(args, data, [setup.expected(i) for i in data["sample_indices"]])
    mask = torch.cat(data["loss_masks"]).bool()
    flat = torch.cat(advantages)
    std, mean = torch.std_mean(flat[mask])
    close(torch.cat(data["advantages"]), (flat - mean) / std)
    logged: dict[str, Any] = {}
    monkeypatch.setattr(
        train_metric_utils, "gather_log_data", lambda name, args, step, values: logged.update(values)
    )
    train_metric_utils.log_rollout_data(0, args, data)
    total, count = logged["rewards"]
    assert total / count == pytest.approx(torch.cat(data["rewards"]).mean().item(), rel=1e-5)


def test_without_credit_slime_has_its_own_numbers(setup: Setup) -> None:
    args = setup.args(attnshape={"model": str(setup.folder / "reward_model"), "dense_share": 0})
    own = setup.args(custom_reward_post_process_path=None, custom_advantage_function_path=None)
    samples = setup.samples()
    for sample in samples:
        sample.reward = asyncio.run(async_rm(args, sample))
    (ours,), (theirs,) = converted(args, samples, 1), converted(own, copy.deepcopy(samples), 1)
    assert ours["sample_indices"] == theirs["sample_indices"]
    assert ours["rewards"] == theirs["rewards"] == [samples[i].reward for i in ours["sample_indices"]]
    loss.compute_advantages_and_returns(args, with_models(ours))
    loss.compute_advantages_and_returns(own, with_models(theirs))
    for name in ("advantages", "returns"):
        for found, row in zip(ours[name], theirs[name], strict=True):
            close(found, row.double())


@pytest.mark.parametrize("estimator", [x for x in ESTIMATORS if x != "ppo"])
def test_without_a_critic(setup: Setup, estimator: str) -> None:
    """slime's own advantage, and what its credit adds; all samples are one group."""
    model = str(setup.folder / "reward_model")
    spread, none, own = (
        setup.args(advantage_estimator=estimator, normalize_advantages=False, **changes)
        for changes in (
            {},
            {"attnshape": {"model": model, "dense_share": 0}},
            {"custom_reward_post_process_path": None, "custom_advantage_function_path": None},
        )
    )
    samples = setup.samples()
    for sample in samples:
        sample.reward = asyncio.run(async_rm(spread, sample))
    ours, unspread, theirs = (
        with_models(converted(args, copy.deepcopy(samples), 1)[0]) for args in (spread, none, own)
    )
    for args, data in ((spread, ours), (none, unspread), (own, theirs)):
        del data["values"]
        loss.compute_advantages_and_returns(args, data)
    scores = torch.tensor([sample.reward for sample in samples]).double()
    parts = scores
    if estimator != "reinforce_plus_plus":
        parts = scores - scores.mean()
    if estimator in ("grpo", "cispo"):
        parts = parts / (scores.std() + 1e-6)
    for k, i in enumerate(ours["sample_indices"]):
        ids, mask = setup.script(i)
        live = torch.tensor(mask).double()
        credit = live / live.sum()
        if setup.policy.decode(ids, skip_special_tokens=True):
            _, credit = setup.offline(SCRIPT[i][0], ids, mask)
        for name in ("advantages", "returns"):
            assert torch.equal(unspread[name][k], theirs[name][k])
            change = 0.8 * parts[i] * (live.sum() * credit - 1) * live
            close(ours[name][k], theirs[name][k].double() + change)
    assert any(not torch.equal(*x) for x in zip(ours["advantages"], theirs["advantages"], strict=True))


def test_a_sample_without_credit_keeps_its_score_on_the_last_token(setup: Setup) -> None:
    args = setup.args()
    samples = setup.samples()[:2]
    samples[0].reward = asyncio.run(async_rm(args, samples[0]))
    samples[1].reward = 0.5
    _, rewards = load_function(args.custom_reward_post_process_path)(args, samples)
    assert torch.equal(rewards[1], 0.5 * torch.eye(samples[1].response_length)[-1])
    close(rewards[0], setup.expected(0))


def shards(rank: int, file: str, folder: Path, results: Any) -> None:
    """A rank of context parallelism: slime's shards of KL and values in, shards of advantages out."""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found = []
    for args, data in torch.load(folder / "given.pt", weights_only=False):
        lengths = list(zip(data["total_lengths"], data["response_lengths"], strict=True))
        for name in ("log_probs", "ref_log_probs", "values"):
            data[name] = [
                cp_utils.slice_log_prob_with_cp(x, *at) for x, at in zip(data[name], lengths, strict=True)
            ]
        loss.compute_advantages_and_returns(args, data)
        found.append({name: [x.tolist() for x in data[name]] for name in ("advantages", "returns")})
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def test_context_parallel_shards(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes; some responses lie on one rank alone."""
    samples = setup.samples()
    for sample in samples:
        sample.reward = asyncio.run(async_rm(setup.args(), sample))
    keys = (
        "total_lengths",
        "response_lengths",
        "rewards",
        "loss_masks",
        "log_probs",
        "ref_log_probs",
        "values",
    )
    given, whole = [], []
    for estimator in ("ppo", "grpo", "reinforce_plus_plus"):
        args = setup.args(advantage_estimator=estimator)
        (data,) = converted(args, samples, 1)
        with_models(data)
        given.append((args, {key: data[key] for key in keys}))
        whole.append(data)
    torch.save(given, tmp_path / "given.pt")
    for (args, _), data in zip(given, whole, strict=True):
        loss.compute_advantages_and_returns(args, data)
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    ranks = [
        context.Process(target=shards, args=(rank, str(tmp_path / "store"), tmp_path, results))
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get() for _ in ranks)
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    assert any(not row for rank in found.values() for row in rank[0]["advantages"])
    monkeypatch.setattr(cp_utils.mpu, "get_context_parallel_world_size", lambda: 2)
    for rank, each in found.items():
        monkeypatch.setattr(cp_utils.mpu, "get_context_parallel_rank", lambda rank=rank: rank)
        for rows, data in zip(each, whole, strict=True):
            for name in ("advantages", "returns"):
                for i, at in enumerate(zip(data["total_lengths"], data["response_lengths"], strict=True)):
                    shard = cp_utils.slice_log_prob_with_cp(data[name][i], *at)
                    close(torch.tensor(rows[name][i]), shard.double())
