"""What the OpenRLHF adapter does around OpenRLHF's classes; the real ones run it in ``parity``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, LlamaPreTrainedModel

from attnshape import AttentionTap, Response, ShapingConfig, reference
from attnshape.integrations import openrlhf as adapter
from attnshape.text.source import CreditSource

KL_COEF = 0.1
PENALTY = 0.25
"""Of completions of more than two actions: a length penalty, which no credit spreads."""


class Maker:
    """The methods of ``RemoteExperienceMaker`` that the adapter extends, and how they call each other."""

    def __init__(self, estimator: str = "gae", n: int = 1) -> None:
        self.seen: list[Tensor] = []
        self.strategy = SimpleNamespace(args=args(estimator=estimator, n=n))

    def make_experience(self, samples_list: list[Any]) -> list[Any]:
        for samples in samples_list:
            samples.rewards = samples.info["reward"] = samples.answer
        return samples_list

    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        estimator = self.strategy.args.algo.advantage.estimator
        for e in experiences:
            e.rewards = e.rewards + PENALTY * (e.action_mask.sum(1) > 2)
        rewards = torch.cat([e.rewards for e in experiences])
        if estimator == "rloo":
            rewards = rewards - (rewards.sum() - rewards) / (len(rewards) - 1)
        for e, r in zip(experiences, rewards.split([len(e.rewards) for e in experiences]), strict=True):
            clip = [-1.0, 1.0]
            reward = module.compute_reward(
                r, KL_COEF, e.kl, action_mask=e.action_mask, reward_clip_range=clip
            )
            self.seen.append(reward)
            if estimator != "gae":
                e.returns = self.get_cumulative_returns(reward, e.action_mask, 1.0)
                continue
            e.advantages, e.returns = self.get_advantages_and_returns(
                e.values, reward, e.action_mask, 0.98, 0.9
            )
        return experiences

    def get_advantages_and_returns(
        self, values: Tensor, rewards: Tensor, action_mask: Tensor, gamma: float, lambd: float
    ) -> tuple[Tensor, Tensor]:
        raise AssertionError("the adapter has its own")

    def get_cumulative_returns(self, rewards: Tensor, action_mask: Tensor, gamma: float) -> Tensor:
        return (rewards * action_mask).flip(1).cumsum(1).flip(1)


def compute_reward(
    r: Tensor,
    kl_coef: float,
    kl: Tensor,
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    assert action_mask is not None
    if reward_clip_range:
        r = r.clamp(*reward_clip_range)
    last = action_mask.shape[1] - 1 - action_mask.fliplr().argmax(1, keepdim=True)
    return (-kl_coef * kl).scatter_add(1, last, r[:, None])


module = SimpleNamespace(RemoteExperienceMaker=Maker, compute_reward=compute_reward)


def batch(scores: list[float], masks: list[list[int]], seed: int) -> SimpleNamespace:
    """Samples as the reward worker answers them: a score and a row over one token more than actions."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.tensor(masks)
    row = torch.rand(len(masks), mask.shape[1] + 1, generator=generator)
    kl, values = (torch.randn(mask.shape, generator=generator) for _ in range(2))
    answer = torch.cat([torch.tensor(scores)[:, None], row], 1)
    return SimpleNamespace(answer=answer, rewards=None, info={}, action_mask=mask, kl=kl, values=values)


def test_scores_are_spread_over_actions() -> None:
    # A hole in the first row, and micro-batches that are not of one size.
    batches = [batch([0.5, -3.0], [[0, 1, 1, 0, 1], [0, 0, 1, 1, 0]], 0), batch([0.25], [[1, 0, 1]], 1)]
    for each in batches:
        each.index = list(range(len(each.answer)))
    maker = adapter.shaped_maker(module, dense_share=0.75)()
    experiences = maker.compute_advantages_and_returns(maker.make_experience(batches))
    assert module.compute_reward is compute_reward
    for e, seen in zip(experiences, maker.seen, strict=True):
        score, row = e.answer[:, 0], e.answer[:, 2:]
        penalty = PENALTY * (e.action_mask.sum(1) > 2)
        assert torch.equal(e.rewards, score + penalty)
        assert torch.equal(e.info["reward"], score)
        assert not hasattr(e, "attention_row")
        spread = (score + penalty).double().clamp(-1, 1) - penalty
        expected = -KL_COEF * e.kl.double()
        for b, mask in enumerate(e.action_mask):
            credit = row[b].double() * mask
            expected[b] += 0.75 * spread[b] * credit / credit.sum()
            expected[b, mask.nonzero()[-1]] += 0.25 * spread[b] + penalty[b]
        torch.testing.assert_close(seen.double(), expected, rtol=1e-6, atol=1e-6)
        config = ShapingConfig(gamma=0.98, lam=0.9, mask_semantics="zero")
        advantages, returns, _ = reference.gae(seen.double(), e.values.double(), e.action_mask, config)
        torch.testing.assert_close(e.advantages.double(), advantages, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(e.returns.double(), returns, rtol=1e-5, atol=1e-5)
        attended = torch.where(e.action_mask != 0, row, 0).sum(1)
        torch.testing.assert_close(e.info["response_attention"], attended)
        assert e.info["credit_entropy"].shape == e.info["credit_last_share"].shape == score.shape
        assert not bool(e.info["credit_fallback"].any())


@pytest.mark.parametrize("enters", ["advantages", "rewards"])
def test_an_advantage_is_spread_over_actions(enters: Any) -> None:
    """Of three completions, two in one micro-batch, out of order; a penalty's part stays uniform."""
    batches = [batch([0.5, -0.5], [[0, 1, 1, 0, 1], [0, 0, 1, 1, 0]], 0), batch([0.25], [[1, 0, 1]], 1)]
    batches[0].index, batches[1].index = [2, 0], [1]
    maker = adapter.shaped_maker(module, 0.75, enters)("rloo", 3)
    experiences = maker.compute_advantages_and_returns(maker.make_experience(batches))
    whole = torch.tensor([0.5 + PENALTY, -0.5, 0.25]).double()
    own = whole - (whole.sum() - whole) / 2
    of_penalty = torch.tensor([PENALTY, -PENALTY / 2, -PENALTY / 2]).double()
    own = own.clamp(-1, 1)
    rows = [(e, b) for e in experiences for b in range(len(e.answer))]
    for a, p, (e, b) in zip(own, of_penalty, rows, strict=True):
        mask = e.action_mask[b].double()
        credit = e.answer[b, 2:].double() * mask
        credit /= credit.sum()
        kl = (-KL_COEF * e.kl[b] * mask).double().flip(0).cumsum(0).flip(0)
        if enters == "advantages":
            last = (mask.flip(0).cumsum(0).flip(0) > 0).double()  # OpenRLHF's returns end with the last
            want = kl + a * last + 0.75 * (a - p) * (mask.sum() * credit - 1) * mask
        else:
            paid = 0.75 * (a - p) * credit
            paid[mask.nonzero()[-1]] += a - 0.75 * (a - p)
            want = kl + paid.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(e.returns[b].double(), want, rtol=1e-5, atol=1e-5)
        assert e.info["credit_entropy"].shape == e.rewards.shape


def test_a_row_without_attention_on_its_actions_falls_back() -> None:
    samples = batch([0.5], [[0, 1, 1]], 0)
    samples.answer[:, 1:] = torch.tensor([[0.6, 0.4, 0.0, 0.0]])
    maker = adapter.shaped_maker(module, dense_share=0.75)()
    [e] = maker.compute_advantages_and_returns(maker.make_experience([samples]))
    assert e.info["credit_fallback"].tolist() == [1.0]
    torch.testing.assert_close(maker.seen[0] + KL_COEF * e.kl, torch.tensor([[0.0, 0.0, 0.5]]))


def test_openrlhfs_function_is_back_after_an_error() -> None:
    maker = adapter.shaped_maker(module, dense_share=0.75)()
    [samples] = maker.make_experience([batch([0.5], [[0, 1, 1]], 0)])
    samples.values = None  # the recurrence of rewards alone; then a shape that does not fit
    samples.kl = torch.zeros(1, 7)
    with pytest.raises(RuntimeError):
        maker.compute_advantages_and_returns([samples])
    assert module.compute_reward is compute_reward


def test_rewards_from_elsewhere_are_refused() -> None:
    samples = batch([0.5], [[0, 1, 1]], 0)
    samples.rewards = torch.tensor([0.5])
    with pytest.raises(ValueError, match="the samples bring their own"):
        adapter.shaped_maker(module, dense_share=0.75)().make_experience([samples])


class RewardModel(LlamaPreTrainedModel):
    """Scores the last attended token; packs its input on the way to its base model, if at all."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.packing = False
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = attention_mask.cumsum(1) - 1
        if self.packing:
            live = attention_mask != 0
            self.model(input_ids[live][None], position_ids=positions[live][None])
        else:
            self.model(input_ids, attention_mask=attention_mask, position_ids=positions.clamp(min=0))
        return torch.arange(len(input_ids), dtype=torch.bfloat16) - 0.5


class RewardActor:
    def init_model_from_pretrained(self, strategy: Any, pretrain: str) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
            initializer_range=0.3,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.model = torch.nn.Sequential(RewardModel(config).eval())  # an engine is around it

    @torch.no_grad()
    def forward(
        self,
        sequences: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_lens: None = None,
        pad_sequence: bool = False,
    ) -> Tensor:
        score: Tensor = self.model[0](sequences, attention_mask)
        return score


def args(**changed: Any) -> SimpleNamespace:
    found = {
        "remote_url": None,
        "agent_func_path": None,
        "ring_attn_size": 1,
        "tensor_parallel_size": 1,
        "policy_loss_type": "ppo",
        "estimator": "gae",
        "n": 1,
    } | changed
    return SimpleNamespace(
        actor=SimpleNamespace(policy_loss_type=found["policy_loss_type"]),
        algo=SimpleNamespace(advantage=SimpleNamespace(estimator=found["estimator"])),
        rollout=SimpleNamespace(n_samples_per_prompt=found["n"]),
        reward=SimpleNamespace(remote_url=found["remote_url"]),
        train=SimpleNamespace(agent_func_path=found["agent_func_path"]),
        ds=SimpleNamespace(
            ring_attn_size=found["ring_attn_size"], tensor_parallel_size=found["tensor_parallel_size"]
        ),
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("lengths", [[9, 4, 1], [6]])
def test_the_reward_worker_answers_score_and_row(packing: bool, layer: int, lengths: list[int]) -> None:
    class Actor(RewardActor):
        init_model_from_pretrained = adapter._with_tap(
            RewardActor.init_model_from_pretrained, CreditSource("attention", layer)
        )
        forward = adapter._with_row(RewardActor.forward)

    actor = Actor()
    actor.init_model_from_pretrained(SimpleNamespace(args=args()), "folder")
    model = actor.model[0]
    model.packing = packing
    width, left = 11, 2
    ids = torch.randint(1, 50, (len(lengths), width))
    mask = torch.tensor([[left <= i < left + n for i in range(width)] for n in lengths]).long()
    answer = actor.forward(sequences=ids, attention_mask=mask, pad_sequence=True)
    assert answer.dtype == torch.float32
    assert answer[:, 0].tolist() == [i - 0.5 for i in range(len(lengths))]
    model.set_attn_implementation("eager")
    for b, n in enumerate(lengths):
        with torch.no_grad():
            alone = model.model(ids[b : b + 1, left : left + n], output_attentions=True)
        expected = torch.zeros(width, dtype=torch.float64)
        expected[left : left + n] = alone.attentions[layer][0].double().mean(0)[-1]
        torch.testing.assert_close(answer[b, 1:].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("packing", [False, True])
def test_the_reward_worker_answers_a_rollout(packing: bool) -> None:
    class Actor(RewardActor):
        init_model_from_pretrained = adapter._with_tap(
            RewardActor.init_model_from_pretrained, CreditSource("rollout")
        )
        forward = adapter._with_row(RewardActor.forward)

    actor, lengths, width, left = Actor(), [9, 4], 11, 2
    actor.init_model_from_pretrained(SimpleNamespace(args=args()), "folder")
    model = actor.model[0]
    model.packing = packing
    ids = torch.randint(1, 50, (len(lengths), width))
    places = torch.arange(width)
    mask = torch.stack([(places >= left) & (places < left + n) for n in lengths]).long()
    answer = actor.forward(sequences=ids, attention_mask=mask, pad_sequence=True)
    for b, n in enumerate(lengths):
        with torch.no_grad(), AttentionTap(model.model, source="rollout") as tap:
            model.model(ids[b : b + 1, left : left + n])
        everywhere = Response(torch.ones(1, n), start=torch.zeros(1).long())
        expected = torch.zeros(width)
        expected[left : left + n] = reference.attention_rollout(tap.take(), everywhere, normalization="none")[
            0
        ]
        torch.testing.assert_close(answer[b, 1:], expected, rtol=1e-4, atol=1e-6)
        assert answer[b, 1:].sum() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("remote_url", ["http://127.0.0.1:8000"]),
        ("agent_func_path", "agent.py"),
        ("ring_attn_size", 2),
        ("tensor_parallel_size", 4),
    ],
)
def test_settings_without_an_attention_row_are_refused_at_start(name: str, value: Any) -> None:
    adapter.check_arguments(args())
    strategy = SimpleNamespace(args=args(**{name: value}))
    worker = adapter._with_tap(RewardActor.init_model_from_pretrained, CreditSource())
    with pytest.raises(ValueError, match=name):
        worker(RewardActor(), strategy, "folder")
    trainer = adapter._with_shaped_rewards(lambda self, pretrain, strategy: None, 0.8, "advantages")
    with pytest.raises(ValueError, match=name):
        trainer(object(), "folder", strategy)


def test_one_ratio_per_completion_is_refused_without_a_critic() -> None:
    adapter.check_arguments(args(policy_loss_type="gspo"))
    with pytest.raises(ValueError, match="policy_loss_type: got gspo, whose loss has one ratio"):
        adapter.check_arguments(args(policy_loss_type="gspo", estimator="rloo"))


@pytest.fixture
def openrlhf(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """OpenRLHF's modules with classes of the same signatures, as Ray's decorator leaves them."""

    def actor(cls: type[Any]) -> Any:
        return SimpleNamespace(
            __ray_metadata__=SimpleNamespace(modified_class=cls, last_export_cluster_and_job=None)
        )

    class Reward(RewardActor):
        init_model_from_pretrained = RewardActor.init_model_from_pretrained
        forward = RewardActor.forward

    class Trainer:
        def __init__(self, pretrain: str, strategy: Any, *groups: Any, **options: Any) -> None:
            self.maker = sys.modules["openrlhf.trainer.ppo_trainer"].RemoteExperienceMaker()

    class Training(Trainer):
        def __init__(self, pretrain: str, strategy: Any, *, queue: Any) -> None:
            super().__init__(pretrain, strategy)

    class FreshMaker(Maker):
        pass

    names = {
        "openrlhf.trainer.ray.launcher": {"RewardModelActor": actor(Reward)},
        "openrlhf.trainer.ppo_utils.experience_maker": {
            "RemoteExperienceMaker": FreshMaker,
            "compute_reward": compute_reward,
        },
        "openrlhf.trainer.ppo_trainer": {"PPOTrainer": actor(Trainer), "RemoteExperienceMaker": FreshMaker},
        "openrlhf.trainer.ppo_trainer_async": {"TrainingActor": actor(Training)},
    }
    for parent in ("openrlhf", "openrlhf.trainer", "openrlhf.trainer.ray", "openrlhf.trainer.ppo_utils"):
        names.setdefault(parent, {})
    for name, members in names.items():
        made = ModuleType(name)
        vars(made).update(members)
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setattr("attnshape.integrations.framework.version", lambda name: "0.11.2")
    return SimpleNamespace(
        reward=names["openrlhf.trainer.ray.launcher"]["RewardModelActor"],
        trainer=names["openrlhf.trainer.ppo_trainer"]["PPOTrainer"],
        training=names["openrlhf.trainer.ppo_trainer_async"]["TrainingActor"],
        maker=FreshMaker,
    )


def test_install_reaches_both_trainers_and_the_reward_worker(
    openrlhf: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter.install(dense_share=0.5, layer=-2)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "OpenRLHF 0.11.2's RewardModelActor, PPOTrainer, TrainingActor spread 0.5" in said
    assert "by the reward model's attention, layer -2" in said
    for options, message in (
        ({"source": "gradient_value"}, "source: got 'gradient_value', want one of 'attention', 'rollout'"),
        ({"source": "rollout", "layer": 0}, "layer: got 0, want none"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.install(**options)
    strategy = SimpleNamespace(args=args())
    for actor, options in ((openrlhf.trainer, {}), (openrlhf.training, {"queue": None})):
        sys.modules["openrlhf.trainer.ppo_trainer"].RemoteExperienceMaker = openrlhf.maker
        made = actor.__ray_metadata__.modified_class("policy", strategy, **options).maker
        assert type(made).__name__ == "ShapedExperienceMaker"
        assert isinstance(made, openrlhf.maker)
    worker = openrlhf.reward.__ray_metadata__.modified_class()
    worker.init_model_from_pretrained(strategy, "reward")
    ids = torch.ones(2, 3, dtype=torch.long)
    assert worker.forward(sequences=ids, attention_mask=ids).shape == (2, 4)


def refuse(change: Callable[[SimpleNamespace], None], openrlhf: SimpleNamespace, message: str) -> None:
    init = openrlhf.trainer.__ray_metadata__.modified_class.__init__
    change(openrlhf)
    with pytest.raises(RuntimeError, match=message):
        adapter.install()
    assert openrlhf.trainer.__ray_metadata__.modified_class.__init__ is init


def test_changed_methods_are_refused(openrlhf: SimpleNamespace) -> None:
    def change(x: SimpleNamespace) -> None:
        x.maker.make_experience = lambda self, rollouts: rollouts

    refuse(change, openrlhf, r"takes \(self, rollouts\), want \(self, samples_list\)")


def test_a_changed_reward_worker_is_refused(openrlhf: SimpleNamespace) -> None:
    def change(x: SimpleNamespace) -> None:
        x.reward.__ray_metadata__.modified_class.forward = lambda self, sequences, action_mask: sequences

    refuse(
        change, openrlhf, r"takes \(self, sequences, action_mask\), want \(self, sequences, attention_mask"
    )


def test_actors_made_before_are_refused(openrlhf: SimpleNamespace) -> None:
    def change(x: SimpleNamespace) -> None:
        x.training.__ray_metadata__.last_export_cluster_and_job = ("cluster", "job")

    refuse(change, openrlhf, r"TrainingActor: Ray has sent this class .* want install\(\) before")


def test_a_class_that_is_no_actor_is_refused(openrlhf: SimpleNamespace) -> None:
    def change(x: SimpleNamespace) -> None:
        sys.modules["openrlhf.trainer.ppo_trainer"].PPOTrainer = object

    refuse(change, openrlhf, "PPOTrainer is no actor class")


def test_another_version_is_refused(openrlhf: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnshape.integrations.framework.version", lambda name: "0.12.0")
    with pytest.raises(RuntimeError, match=r"openrlhf 0.12.0 is not supported, want openrlhf 0.11.2"):
        adapter.install()


def test_a_missing_openrlhf_is_said() -> None:
    with pytest.raises(RuntimeError, match="openrlhf is not installed"):
        adapter.install()


def test_the_command_line_passes_openrlhfs_arguments_on(
    openrlhf: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        "attnshape.integrations.openrlhf.runpy.run_module",
        lambda name, **options: seen.update(name=name, argv=sys.argv[1:]),
    )
    monkeypatch.setattr(adapter, "install", lambda *given: seen.update(given=given))
    argv = [
        "--actor.num_nodes",
        "1",
        "--abc.dense_share",
        "0.3",
        "--abc.layer=0,1",
        "--abc.source",
        "attention",
        "--abc.enters",
        "rewards",
        "--reward.clip_range",
        "-5",
        "5",
    ]
    monkeypatch.setattr(sys, "argv", ["openrlhf", *argv])
    adapter.main()
    assert seen == {
        "name": "openrlhf.cli.train_ppo_ray",
        "argv": ["--actor.num_nodes", "1", "--reward.clip_range", "-5", "5"],
        "given": (0.3, (0, 1), "rewards", "attention"),
    }
