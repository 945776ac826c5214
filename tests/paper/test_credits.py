from pathlib import Path

import pytest
import torch
from support.paper_models import save_models, tiny_models
from transformers import AutoModelForSequenceClassification

import attnshape
from attnshape import credit
from attnshape.demo.ppo import ActorCritic, Judge, Rollout, source_of
from attnshape.tap.tap import Source as TapSource
from benchmarks.paper.cells import Method
from benchmarks.paper.credits import Profile, abc_credit, shuffle, source_for

Batch = tuple[ActorCritic, Judge, Rollout]


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder = tmp_path_factory.mktemp("models")
    save_models(folder)
    setup = tiny_models(folder).setups["testbed"]
    actor, judge = setup.load()
    judge.mean, judge.std = 0.5, 2.0
    torch.manual_seed(1)
    rollout = actor.sample(setup.prompts[:6], 14, 4)
    assert 4 < rollout.response_mask.sum(1).min() < 14  # rows of several lengths
    return actor, judge, rollout


def source(method: Method, **options: object):
    return source_for(method, **{"beta": 0.8, "seed": 0, **options})  # type: ignore[arg-type]


def shaped(batch: Batch, method: Method, **options: object) -> attnshape.ShapedRewards:
    actor, judge, rollout = batch
    judged = source(method, **options)(actor, judge, rollout)
    return attnshape.shape_rewards(
        judged.score if judged.redistributed is None else judged.redistributed,
        judged.credit,
        attnshape.Response(rollout.response_mask, start=judged.response_start),
        token_rewards=judged.token_rewards,
    )


def test_shuffled_credit_keeps_each_rows_multiset(batch: Batch) -> None:
    actor, judge, rollout = batch
    mask = rollout.response_mask
    plain = abc_credit(judge, rollout).credit
    moved = source("ABC shuffled")(actor, judge, rollout).credit
    assert not moved[~mask].any()
    torch.testing.assert_close(moved.sort(1).values, plain.sort(1).values, rtol=0, atol=0)
    for row, n in enumerate(mask.sum(1)):
        assert not torch.equal(moved[row, :n], plain[row, :n])


def test_every_order_is_as_likely() -> None:
    weights = torch.tensor([[1.0, 2.0, 9.0, 3.0]]).expand(3000, 4)
    mask = torch.tensor([[1, 1, 0, 1]]).bool().expand(3000, 4)
    out = shuffle(weights, mask, torch.Generator().manual_seed(0))
    assert (out[:, 2] == 9).all()
    _, counts = out.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert counts.min() > 400


def test_shuffling_leaves_the_samplings_stream_alone(batch: Batch) -> None:
    actor, judge, rollout = batch
    before = torch.get_rng_state()
    for method in ("ABC shuffled", "ABC profile", "ABC, random weights"):
        source(method)(actor, judge, rollout)
    assert torch.equal(torch.get_rng_state(), before)


def test_profile_by_hand() -> None:
    profile = Profile()
    mask = torch.tensor([[1, 1], [1, 1]]).bool()
    # In densities, weight times length: 1.2 and .8, .4 and 1.6; the halves' means are .8 and 1.2.
    out = profile.of(torch.tensor([[0.6, 0.4], [0.2, 0.8]]), mask)
    torch.testing.assert_close(out, torch.tensor([[0.4, 0.6], [0.4, 0.6]]))
    # A third completion: the means over all three are (1.2 + .4 + 2) / 3 and (.8 + 1.6 + 0) / 3.
    out = profile.of(torch.tensor([[1.0, 0.0]]), mask[:1])
    torch.testing.assert_close(out, torch.tensor([[0.6, 0.4]]))


def test_profile_knows_positions_only(batch: Batch) -> None:
    actor, judge, rollout = batch
    credit = source("ABC profile")(actor, judge, rollout).credit
    lengths = rollout.response_mask.sum(1)
    torch.testing.assert_close(credit.sum(1), torch.ones(len(credit)))
    for i, n in enumerate(lengths):
        for j in range(i):
            if lengths[j] == n:
                torch.testing.assert_close(credit[i], credit[j])


def test_random_weights_credit_but_do_not_score(batch: Batch) -> None:
    actor, judge, rollout = batch
    judged = source("ABC, random weights", seed=5)(actor, judge, rollout)
    torch.testing.assert_close(judged.score, judge(rollout, "sparse").score)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        untrained = AutoModelForSequenceClassification.from_config(judge.model.config)
    other = Judge(untrained, judge.tokenizer, judge.policy_tokenizer, lambda logits: logits[:, 0])
    torch.testing.assert_close(judged.credit, abc_credit(other, rollout).credit)
    assert not torch.allclose(judged.credit, abc_credit(judge, rollout).credit, atol=1e-3)


@pytest.mark.parametrize("variant", ["mean", "last"])
def test_abc_d_is_the_policys_eager_attention(batch: Batch, variant: str) -> None:
    actor, judge, rollout = batch
    judged = source_of(f"ABC-D {variant}")(actor, judge, rollout)  # type: ignore[arg-type]
    actor.policy.set_attn_implementation("eager")
    start = rollout.prompt_length
    for b, n in enumerate(rollout.response_mask.sum(1).tolist()):
        ids = rollout.ids[b, rollout.mask[b].bool()][None]
        with torch.no_grad():
            rows = actor.policy(ids, output_attentions=True).attentions[-1][0].mean(0)[-n:, -n:]
        raw = rows[-1] if variant == "last" else rows.sum(0) / torch.arange(n, 0, -1)
        torch.testing.assert_close(judged.credit[b, :n], raw / raw.sum(), rtol=1e-4, atol=1e-5)
        assert not judged.credit[b, n:].any()
    actor.policy.set_attn_implementation("sdpa")
    assert start == rollout.ids.shape[1] - rollout.response_mask.shape[1]


def test_incremental_scores_stand_in_place_of_the_score(batch: Batch) -> None:
    _actor, judge, rollout = batch
    rewards = shaped(batch, "R3HF").rewards.sum(1)
    ids, _, start = judge.read(rollout)
    with torch.no_grad():
        of_prompt = [judge.model(ids[b : b + 1, :n]).logits[0, 0] for b, n in enumerate(start.tolist())]
    score = judge(rollout, "sparse").score
    expected = score - judge.standardized(torch.stack(of_prompt)[:, None])
    torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("method", "tap"), [("gradient x value, signed", "gradient_value"), ("relevance, signed", "relevance")]
)
def test_signed_sources_pay_what_the_tap_gives_and_leave_the_score_whole(
    batch: Batch, method: Method, tap: TapSource
) -> None:
    actor, judge, rollout = batch
    mask = rollout.response_mask
    out = shaped(batch, method)
    torch.testing.assert_close(out.rewards.sum(1), judge(rollout, "sparse").score, rtol=1e-4, atol=1e-4)
    ids, attention, start = judge.read(rollout)
    with torch.enable_grad(), attnshape.AttentionTap(judge.model, source=tap) as tapped:
        score = judge.standardized(judge.model(ids, attention_mask=attention).logits)
    weights = credit.gradient_weights(score, tapped.take(), attnshape.Response(mask, start=start))
    rewards = source(method)(actor, judge, rollout).token_rewards
    for row, expected, n in zip(rewards, weights, mask.sum(1).tolist(), strict=True):
        torch.testing.assert_close(row[:n], expected[:n] - expected[:n].mean(), rtol=1e-4, atol=1e-5)
        assert not row[n:].any()
        assert row.min() < 0 < row.max()


def test_rto_adds_log_ratios_in_the_scores_unit(batch: Batch, tmp_path: Path) -> None:
    actor, judge, rollout = batch
    save_models(tmp_path, seed=3)
    dpo, _ = tiny_models(tmp_path).setups["testbed"].load()
    rule = source("RTO", beta=0.75, dpo=dpo)
    judged = rule(actor, judge, rollout)
    with torch.no_grad():
        ratio = (dpo(rollout, 0)[0] - actor(rollout, 0)[0]).masked_fill(~rollout.response_mask, 0.0)
    expected = 0.75 * ratio / ratio.sum(1).std()
    torch.testing.assert_close(judged.token_rewards, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(judged.redistributed, 0.25 * judge(rollout, "sparse").score)
    with pytest.raises(ValueError, match="method: RTO needs a DPO-trained policy"):
        source("RTO")


def test_sources_that_read_the_models_inside_need_its_tokens(batch: Batch) -> None:
    actor, judge, rollout = batch
    other = Judge(judge.model, judge.tokenizer, judge.policy_tokenizer, judge.score_function)
    other.same_tokens = False
    with pytest.raises(ValueError, match="norm-weighted rollout needs a reward model with the policy's tok"):
        source("norm-weighted rollout")(actor, other, rollout)
