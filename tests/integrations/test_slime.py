"""The slime adapter without slime: rewards, GAE, settings. With slime's real functions: tests/parity."""

from __future__ import annotations

import asyncio
import sys
from argparse import Namespace
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from parity.toys import save_policy
from torch import Tensor

from attnshape import ShapingConfig, reference
from attnshape.integrations import framework, slime
from attnshape.integrations.reward import Unscored
from attnshape.text.model import Scored

MODULE = "attnshape.integrations.slime"


@dataclass
class Sample:
    """Of slime's, what the hooks read."""

    tokens: list[int]
    response_length: int
    prompt: Any = "Good? "
    loss_mask: list[int] | None = None
    reward: float | None = None
    remove_sample: bool = False
    metadata: dict[str, Any] | None = field(default_factory=dict)

    def get_reward_value(self, args: Namespace) -> float:
        assert self.reward is not None
        return self.reward


def arguments(**changes: Any) -> Namespace:
    return Namespace(
        **{
            "advantage_estimator": "ppo",
            "custom_reward_post_process_path": f"{MODULE}.post_process_rewards",
            "custom_advantage_function_path": f"{MODULE}.compute_advantages",
            "custom_convert_samples_to_train_data_path": None,
            "megatron_config_path": None,
            "hf_checkpoint": "policy",
            "rm_url": None,
            "gamma": 1.0,
            "lambd": 0.95,
            "kl_coef": 0.1,
            **changes,
        }
    )


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """slime 0.3.1 without context parallelism, as far as the hooks ask."""
    monkeypatch.setattr(slime, "_check_slime", lambda: None)
    monkeypatch.setattr(slime, "_context_parallel", lambda: (lambda x, *at: x, lambda x, *at: x))
    tokenizer = save_policy(tmp_path)
    monkeypatch.setattr(slime, "_tokenizer", lambda name: tokenizer)


def test_another_slime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    slime._check_slime.cache_clear()
    monkeypatch.setattr(framework, "version", lambda name: "0.2.0")
    with pytest.raises(RuntimeError, match=r"slime 0\.2\.0 is not supported, want slime 0\.3\.1"):
        asyncio.run(slime.custom_rm(arguments(), Sample([1], 1)))
    with pytest.raises(RuntimeError, match=r"slime 0\.2\.0 is not supported"):
        slime.post_process_rewards(arguments(), [])
    monkeypatch.setattr(framework, "version", version)
    with pytest.raises(RuntimeError, match="slime is not installed"):
        slime.compute_advantages(arguments(), {})


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage_estimator": "gspo"}, "--advantage-estimator: got gspo, want one of ppo, grpo, cispo"),
        (
            {"custom_advantage_function_path": None},
            f"--custom-advantage-function-path: got None, want {MODULE}.compute_advantages",
        ),
        ({"custom_reward_post_process_path": "a.b"}, "--custom-reward-post-process-path: got a.b"),
        ({"custom_convert_samples_to_train_data_path": "a.b"}, "got a.b, want none"),
        ({"reward_key": "score"}, "--reward-key: got score, want none"),
        ({"megatron_config_path": "roles.yaml"}, "--megatron-config-path: got roles.yaml, want none"),
        ({"advantage_estimator": "grpo", "use_opsm": True}, "--use-opsm: drops what is off policy"),
    ],
)
def test_settings_that_lose_token_rewards(changes: dict[str, Any], message: str) -> None:
    args = arguments(**changes)
    for use in (
        lambda: asyncio.run(slime.custom_rm(args, Sample([1], 1))),
        lambda: slime.post_process_rewards(args, []),
        lambda: slime.compute_advantages(args, {}),
    ):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize(
    "changes", [{}, {"advantage_estimator": "grpo", "attnshape": {"dense_share": 0}}], ids=["critic", "off"]
)
def test_off_policy_masks_where_signs_are_slimes(changes: dict[str, Any]) -> None:
    """GAE's advantages have a sign of their own for every token, without credit too."""
    slime.check_args(arguments(use_opsm=True, **changes))


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize("settings", [None, {"dense_share": 0.5, "layer": -2}])
def test_scores_and_what_the_reward_model_is_asked(monkeypatch: pytest.MonkeyPatch, settings: Any) -> None:
    asked: dict[str, Any] = {}

    async def judge(prompt: Any, response: str, offsets: list[tuple[int, int]]) -> Scored:
        asked[prompt] = response, offsets
        return Scored(float(prompt), [0.5] * len(offsets), {})

    def reward_model(**given: Any) -> Any:
        assert given == {"url": "http://rm", **({} if settings is None else {"layer": -2})}
        return judge

    monkeypatch.setattr(slime, "reward_model", reward_model)
    args = arguments(rm_url="http://rm", attnshape=settings)
    ids = slime._tokenizer("policy")("It was not bad.")["input_ids"]
    mask = [i % 2 for i in range(len(ids))]
    whole = Sample([5, 6, *ids], len(ids), prompt="1", metadata=None)
    holes = Sample([5, 6, *ids], len(ids), prompt="2", loss_mask=mask)
    aborted = Sample([5, 6], 0, prompt="3")
    assert asyncio.run(slime.custom_rm(args, whole)) == 1.0
    assert asyncio.run(slime.custom_rm(args, [holes, aborted])) == [2.0, 3.0]
    response, spans = asked["1"]
    assert response == "It was not bad."
    assert "".join(response[s:e] for s, e in spans) == response
    assert asked["2"] == (response, [(s, e if m else s) for (s, e), m in zip(spans, mask, strict=True)])
    assert asked["3"] == ("", [])
    assert whole.metadata == {slime.CREDIT: [0.5] * len(ids), slime.METRICS: {}}


@pytest.mark.usefixtures("present")
def test_a_sample_without_a_score_is_taken_out_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    async def judge(prompt: Any, response: str, offsets: list[tuple[int, int]]) -> Scored:
        if prompt == "long":
            raise Unscored("too long")
        if prompt == "down":
            raise ValueError("no such server")
        return Scored(2.0, None, {}, [0.5] + [0.0] * (len(offsets) - 2) + [-0.5])

    monkeypatch.setattr(slime, "reward_model", lambda **_: judge)
    ids = slime._tokenizer("policy")("It was not bad.")["input_ids"]
    long, fine, down = (Sample(ids, len(ids), prompt=prompt) for prompt in ("long", "fine", "down"))
    assert asyncio.run(slime.custom_rm(arguments(), [long, fine])) == [0.0, 2.0]
    assert (long.remove_sample, fine.remove_sample) == (True, False)
    assert long.metadata == {slime.METRICS: {"unscored": "too long"}}
    long.reward, fine.reward = 0.0, 2.0
    raw, (of_long, of_fine) = slime.post_process_rewards(
        arguments(attnshape={"dense_share": 0.5}), [long, fine]
    )
    assert raw == [0.0, 2.0]
    assert not of_long.any()
    even = 1.0 / len(ids)
    expected = [even + 0.25] + [even] * (len(ids) - 2) + [even - 0.25 + 1.0]
    assert of_fine.tolist() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="no such server"):
        asyncio.run(slime.custom_rm(arguments(), down))


@pytest.mark.usefixtures("present")
def test_rewards_per_token() -> None:
    samples = [
        Sample([0] * 6, 4, loss_mask=[1, 1, 0, 1], reward=2.0, metadata={slime.CREDIT: [0.5, 0.3, 0.1, 0.1]}),
        Sample([0] * 4, 3, reward=-1.0, metadata=None),
        Sample([0] * 3, 1, reward=0.5, metadata={slime.CREDIT: [1.0]}),
        Sample([0] * 3, 0, reward=0.5, metadata={slime.CREDIT: []}),
    ]
    raw, rewards = slime.post_process_rewards(arguments(attnshape={"dense_share": 0.75}), samples)
    assert raw == [2.0, -1.0, 0.5, 0.5]
    expected = [[1.5 * 0.5 / 0.9, 1.5 * 0.3 / 0.9, 0.0, 1.5 * 0.1 / 0.9 + 0.5], [0.0, 0.0, -1.0], [0.5], []]
    for row, values in zip(rewards, expected, strict=True):
        assert row.dtype == torch.float32
        assert row.tolist() == pytest.approx(values, rel=1e-6)


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize("off", ["dense_share", "credit"])
def test_without_credit_the_rewards_are_slimes(off: str) -> None:
    credit = {} if off == "credit" else {slime.CREDIT: [0.5, 0.5]}
    samples = [Sample([0] * 3, 2, reward=reward, metadata=dict(credit)) for reward in (1.0, 2.0)]
    settings = {"dense_share": 0} if off == "dense_share" else None
    assert slime.post_process_rewards(arguments(attnshape=settings), samples) == ([1.0, 2.0], [1.0, 2.0])


@pytest.fixture
def slimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What slime makes of rewards in groups of three."""

    class RolloutManager:
        def _post_process_rewards(self: Any, samples: Any) -> tuple[list[float], list[float]]:
            raw = torch.tensor([x.reward for x in samples]).view(-1, 3)
            mean, std = raw.mean(1, keepdim=True), raw.std(1, keepdim=True)
            return raw.flatten().tolist(), ((raw - mean) / (std + 1e-6)).flatten().tolist()

    rollout = ModuleType("slime.ray.rollout")
    actor = SimpleNamespace(__ray_metadata__=SimpleNamespace(modified_class=RolloutManager))
    rollout.RolloutManager = actor  # type: ignore[attr-defined]
    for name, module in {"slime": None, "slime.ray": None, "slime.ray.rollout": rollout}.items():
        monkeypatch.setitem(sys.modules, name, module or ModuleType(name))


GRPO = {
    "advantage_estimator": "grpo",
    "n_samples_per_prompt": 3,
    "rollout_batch_size": 2,
    "rewards_normalization": True,
    "grpo_std_normalization": True,
}


@pytest.mark.usefixtures("present", "slimes")
def test_advantages_of_a_group_are_spread() -> None:
    weights = [[0.5, 0.5], [0.1, 0.3, 0.6], None, [0.2, 0.2, 0.6], [0.5, -0.5], []]
    samples = []
    for i, row in enumerate(weights):
        key = slime.SIGNED if i == 4 else slime.CREDIT
        n = 2 if row is None else len(row)
        of = {} if row is None else {key: row}
        samples.append(Sample([0] * 9, n, reward=float(i * i), metadata=of))
    samples[3].loss_mask = [1, 0, 1]
    _, own = slime.post_process_rewards(arguments(**GRPO, attnshape={"dense_share": 0}), samples)
    groups = torch.tensor([0.0, 1, 4, 9, 16, 25]).view(2, 3)
    want = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-6)
    assert own == pytest.approx(want.flatten().tolist(), rel=1e-6)
    raw, rows = slime.post_process_rewards(arguments(**GRPO, attnshape={"dense_share": 0.5}), samples)
    assert raw == groups.flatten().tolist()
    a = want.flatten().tolist()
    expected = [
        [a[0]] * 2,
        [a[1] * (0.5 + 0.5 * 3 * w) for w in (0.1, 0.3, 0.6)],
        [a[2]] * 2,
        [a[3] * (0.5 + 0.5 * 2 * w) for w in (0.25, 0.75)],
        [a[4] + 0.5 * abs(a[4]) * 2 * w for w in (0.5, -0.5)],
        [],
    ]
    expected[3].insert(1, a[3])  # masked
    for row, values in zip(rows, expected, strict=True):
        assert row.dtype == torch.float32
        assert row.tolist() == pytest.approx(values, rel=1e-5, abs=1e-6)


@pytest.mark.usefixtures("present", "slimes")
def test_a_sample_without_a_score_is_in_no_group() -> None:
    samples = [Sample([0] * 3, 2, reward=x, metadata={slime.CREDIT: [0.5, 0.5]}) for x in (1.0, 0.0, 4.0) * 2]
    samples[1].metadata = {slime.METRICS: {"unscored": "too long"}}
    _, rows = slime.post_process_rewards(arguments(**GRPO), samples)
    half = 1.5 / (torch.tensor([1.0, 4.0]).std().item() + 1e-6)
    for row, value in zip(rows[:3], (-half, 0.0, half), strict=True):
        assert row.tolist() == pytest.approx([value] * 2, rel=1e-6)


LENGTHS = [4, 1, 7]


def drawn(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in LENGTHS]


@pytest.mark.usefixtures("present")
@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.5)])
def test_advantages(dense: bool, gamma: float, lam: float) -> None:
    kl, values, rewards = drawn(0), drawn(1), drawn(2)
    last = [torch.eye(n)[-1] * row.sum() for n, row in zip(LENGTHS, rewards, strict=True)]
    data: dict[str, Any] = {
        "kl": kl,
        "values": values,
        "rewards": rewards if dense else [row.sum().item() for row in rewards],
        "total_lengths": [n + 2 for n in LENGTHS],
        "response_lengths": LENGTHS,
    }
    slime.compute_advantages(arguments(gamma=gamma, lambd=lam), data)
    for i, row in enumerate(rewards if dense else last):
        shaped = (row - 0.1 * kl[i]).double()[None]
        config = ShapingConfig(gamma=gamma, lam=lam, mask_semantics="zero")
        expected = reference.gae(shaped, values[i].double()[None], torch.ones(1, LENGTHS[i]), config)
        for name in ("advantages", "returns"):
            found = getattr(expected, name)
            assert data[name][i].dtype == torch.float32
            assert torch.allclose(data[name][i].double(), found[0], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("present")
def test_a_reward_of_another_length() -> None:
    data: dict[str, Any] = {"kl": drawn(0), "values": drawn(1), "rewards": drawn(2)}
    data |= {"total_lengths": LENGTHS, "response_lengths": LENGTHS}
    data["rewards"][2] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"rewards: got \(6,\) for a response of 7 tokens"):
        slime.compute_advantages(arguments(), data)
