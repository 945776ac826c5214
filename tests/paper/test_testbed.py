from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.paper_models import save_models
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from attnshape.demo.corpus import VALUES, true_reward, vocabulary
from attnshape.demo.models import ModelConfig, PreferencePairs
from attnshape.demo.run import Setup
from benchmarks.paper import testbed as testbed_module
from benchmarks.paper.cells import DEEP, Cell
from benchmarks.paper.testbed import SeparateCritic, own_models, train_dpo, whole_folder

TINY = ModelConfig(
    hidden_size=16,
    heads=2,
    positions=48,
    reviews=300,
    review_words=(8, 16),
    pair_words=(4, 16),
    lm_steps=3,
    rm_steps=3,
    held_out_pairs=64,
)


def test_dpo_moves_the_policy_towards_what_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testbed_module, "DPO_LR", 1e-2)
    save_models(tmp_path)
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    few = replace(TINY, reviews=24, pair_words=(12, 16))  # so few that a tiny model learns them by heart
    after = train_dpo(AutoModelForCausalLM.from_pretrained(tmp_path / "policy"), few, steps=60)
    ids, _ = PreferencePairs(few, seed=few.seed + 3).draw(200)
    with torch.no_grad():
        ratio = testbed_module._sequence_logprobs(after, ids) - testbed_module._sequence_logprobs(before, ids)
    assert (ratio[0] > ratio[1]).float().mean() > 0.75
    flat = ids[0, :3]
    with torch.no_grad():
        whole = before(flat).logits.log_softmax(-1)
    expected = [sum(whole[b, t, flat[b, t + 1]] for t in range(flat.shape[1] - 1)) for b in range(3)]
    with torch.no_grad():
        got = testbed_module._sequence_logprobs(before, ids[:, :3])[0]
    torch.testing.assert_close(got, torch.stack(expected))


def test_preferences_follow_the_reward_they_are_given() -> None:
    words = vocabulary()

    def praise(review: object) -> float:
        return float(sum(VALUES.get(w, 0.0) > 0 for w in review))  # type: ignore[attr-defined]

    for reward in (praise, true_reward):
        pairs, margin = PreferencePairs(TINY, seed=1, reward=reward).draw(50)
        for first, second, m in zip(*pairs.tolist(), margin.tolist(), strict=True):
            reviews = [[words[i] for i in row if words[i][0] != "<"] for row in (first, second)]
            assert m == pytest.approx(reward(reviews[0]) - reward(reviews[1]))


def test_own_models_are_trained_once_and_only_where_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testbed_module, "MODELS", TINY)
    monkeypatch.setattr(testbed_module, "DPO_STEPS", 1)
    monkeypatch.setattr(testbed_module, "_save_dpo", lambda policy, new: (new.mkdir(), save_models(new)))
    (tmp_path / "depth" / DEEP).mkdir(parents=True)
    steps: list[str] = []
    models = own_models(["testbed"], tmp_path, lambda stage, *_: steps.append(stage))
    assert set(models.setups) == {"testbed", DEEP}
    assert models.setups[DEEP].policy == models.setups["testbed"].policy
    assert models.setups[DEEP].reward_model == str(tmp_path / "depth" / DEEP)
    assert len(steps) == 6
    assert 0 <= models.training["testbed"].accuracy <= 1
    steps.clear()
    again = own_models(["testbed"], tmp_path, lambda stage, *_: steps.append(stage))
    assert (again.setups, steps) == (models.setups, [])
    steps.clear()
    other = own_models(["training 2"], tmp_path, lambda stage, *_: steps.append(stage))
    assert steps == ["reward model"] * 3
    assert other.setups["training 2"].policy == models.setups["testbed"].policy
    scores = [
        AutoModelForSequenceClassification.from_pretrained(setup.reward_model).score.weight
        for setup in other.setups.values()
        if DEEP not in setup.reward_model
    ]
    assert len(scores) == 2
    assert not torch.equal(*scores)
    own_models(["training 2"], tmp_path, lambda stage, *_: steps.append(stage))
    assert len(steps) == 3
    assert models.dpo is not None
    assert models.dpo_policy(Cell(method="ABC", length="8-16", seed=0)) is None
    folder = Path(models.dpo())
    assert folder.is_dir()
    assert models.dpo() == str(folder)


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fails(new: Path) -> None:
        new.mkdir()
        (new / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        whole_folder(tmp_path / "a" / "b", fails)
    assert list((tmp_path / "a").iterdir()) == []


def test_a_separate_critic_starts_with_the_policys_states_and_leaves_the_policy_alone(tmp_path: Path) -> None:
    """With its trunk still the policy's, it gives the shared head's values; its loss moves its own trunk."""
    save_models(tmp_path)
    actor, _ = Setup(
        str(tmp_path / "policy"), str(tmp_path / "reward_model"), ["the"], "logit", "cpu", None
    ).load()
    torch.manual_seed(0)
    rollout = actor.sample(["the plot was", "the"], 6, 3)
    both = SeparateCritic(actor)
    nn.init.normal_(both.value_head.weight)
    actor.value_head.load_state_dict(both.value_head.state_dict())
    for got, want in zip(both(rollout, 3), actor(rollout, 3), strict=True):
        torch.testing.assert_close(got[rollout.response_mask], want[rollout.response_mask])
    both(rollout, 3)[1].sum().backward()
    assert all(p.grad is None for p in both.policy.parameters())
    assert any(p.grad is not None and p.grad.any() for p in both.critic.parameters())
