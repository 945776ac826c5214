"""From the policy's tokens to a score and their weights, by every source."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from parity.toys import Offline, save_policy, save_reward_model
from support.reward_models import save
from support.tap_models import offload
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import attnshape
from attnshape import AttentionTap, CreditModel, Response, credit
from attnshape.text.load import SourceName
from attnshape.text.source import CreditSource
from attnshape.text.turns import spans_of

TALK = [{"role": "user", "content": "Was the film any good?"}]
PROMPTS: list[Any] = ["Was the film any good? ", TALK, "the plot"]
TEXTS = ["It was not bad, but the ending was weak", " superb actors ", "not"]


class World:
    def __init__(self, folder: Path) -> None:
        self.policy = save_policy(folder / "policy")
        save_reward_model(folder / "reward")
        self.reward = str(folder / "reward")
        self.offline = Offline(folder / "reward", self.policy)
        end = self.policy.eos_token_id
        self.ids = [[*self.policy.encode(text, add_special_tokens=False), end] for text in TEXTS]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def normalised(row: Tensor) -> Tensor:
    return row.double() / row.double().sum()


def test_weights_are_eager_attention(world: World) -> None:
    masks = [[1] * len(ids) for ids in world.ids]
    masks[0][2:4] = [0, 0]
    out = CreditModel(world.reward)(PROMPTS, world.ids, world.policy, masks=masks)
    assert out.score.dtype == out.weights.dtype == torch.float32
    width = len(masks[0])
    assert out.mask.tolist() == [[*map(bool, mask), *[False] * (width - len(mask))] for mask in masks]
    for i, (prompt, ids, mask) in enumerate(zip(PROMPTS, world.ids, masks, strict=True)):
        score, expected = world.offline(prompt, ids, mask)
        assert out.score[i].item() == pytest.approx(score, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(normalised(out.weights[i])[: len(ids)], expected, rtol=1e-4, atol=1e-6)
        assert 0 < out.weights[i].sum() < 1  # of all that the scored token attends to
        assert not out.weights[i, len(ids) :].any()


@pytest.mark.parametrize("source", ["attention", "relevance", "leave_one_out"])
def test_a_model_that_is_being_trained_is_scored_without_dropout(world: World, source: SourceName) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(world.reward, attention_dropout=0.5)
    judge = CreditModel(model, AutoTokenizer.from_pretrained(world.reward), source=source)
    wanted = judge(PROMPTS, world.ids, world.policy)
    found = CreditModel(model.train(), judge.tokenizer, source=source)(PROMPTS, world.ids, world.policy)
    torch.testing.assert_close(found.score, wanted.score)
    torch.testing.assert_close(found.weights, wanted.weights)
    assert all(module.training for module in model.modules())


class Around(nn.Module):
    """A wrapper without a configuration, as data parallel has it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("source", ["attention", "relevance", "leave_one_out"])
def test_a_model_in_a_wrapper(world: World, source: SourceName) -> None:
    wanted = CreditModel(world.reward, source=source)(PROMPTS, world.ids, world.policy)
    model = AutoModelForSequenceClassification.from_pretrained(world.reward)
    judge = CreditModel(Around(model), AutoTokenizer.from_pretrained(world.reward), source=source)
    torch.testing.assert_close(judge(PROMPTS, world.ids, world.policy)[:2], wanted[:2])
    assert judge.reader().max_length == CreditModel(world.reward).reader().max_length


def test_a_wrapper_that_makes_the_score_itself(world: World) -> None:
    model = Around(AutoModelForSequenceClassification.from_pretrained(world.reward).base_model)
    tokenizer = AutoTokenizer.from_pretrained(world.reward)
    with pytest.raises(ValueError, match="which token Around scores is in its own code; want 'last_visible'"):
        CreditModel(model, tokenizer, score_fn="logit[0]")
    with pytest.raises(ValueError, match=r"Linear holds no transformers\.PreTrainedModel"):
        CreditModel(nn.Linear(1, 1), tokenizer)


def test_a_model_whose_weights_are_offloaded(world: World) -> None:
    wanted = CreditModel(world.reward)(PROMPTS, world.ids, world.policy)
    model = offload(AutoModelForSequenceClassification.from_pretrained(world.reward))
    found = CreditModel(model, AutoTokenizer.from_pretrained(world.reward))(PROMPTS, world.ids, world.policy)
    torch.testing.assert_close(found[:2], wanted[:2])


def by_hand(world: World, source: str, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Of the policy's text alone, which both tokenizers split into words: score, and the reader's weights."""
    model = AutoModelForSequenceClassification.from_pretrained(world.reward).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.reward)
    text = world.policy.decode(ids, skip_special_tokens=True)
    inputs = tokenizer(text, return_tensors="pt")
    mask = torch.ones_like(inputs["input_ids"])
    response = Response(mask, start=torch.zeros(1, dtype=torch.int32))
    if source == "leave_one_out":
        whole = inputs["input_ids"][0].tolist()
        texts = [whole] + [whole[:i] + whole[i + 1 :] for i in range(len(whole))]
        with torch.no_grad():
            scores = torch.stack(
                [model(torch.tensor([ids])).logits[0, 0] if ids else torch.tensor(0.0) for ids in texts]
            )
        moves = scores[0] - scores[1:]
        return scores[:1], moves if len(whole) > 1 else torch.zeros(1)
    options: Any = {"query_position": "all"} if source == "columns" else {}
    tapped: Any = "attention" if source == "columns" else source
    with AttentionTap(model, source=tapped, **options) as tap:
        score = model(**inputs).logits[:, 0]
        taken = tap.take()
    functions: dict[str, Any] = {
        "attention": lambda: attnshape.attention_credit(taken, response, normalization="none"),
        "columns": lambda: attnshape.attention_column_credit(taken, response, normalization="none"),
        "rollout": lambda: attnshape.attention_rollout(taken, response, normalization="none"),
        "signed_rollout": lambda: credit.signed_rollout(taken, response),
    }
    found = functions.get(source, lambda: credit.gradient_weights(score, taken, response))()
    return score.detach(), found[0]


@pytest.mark.parametrize("source", get_args(SourceName))
def test_every_source_is_its_own_function(world: World, source: SourceName) -> None:
    judge = CreditModel(world.reward, source=source)
    out = judge([""] * 3, world.ids, world.policy)
    signed = ("signed_rollout", "gradient_value", "gradient_embedding", "relevance", "leave_one_out")
    assert judge.signed == (source in signed)
    for i, ids in enumerate(world.ids):
        score, expected = by_hand(world, source, ids)
        torch.testing.assert_close(out.score[i], score[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.weights[i].sum(), expected.sum(), rtol=1e-4, atol=1e-5)
    assert not out.weights.requires_grad
    assert not out.score.requires_grad
    alone = [judge([""], [ids], world.policy) for ids in world.ids]
    for i, ids in enumerate(world.ids):
        torch.testing.assert_close(out.weights[i, : len(ids)], alone[i].weights[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("batch_tokens", "sizes"), [(10_000, [3]), (1, [1, 1, 1])])
def test_forwards_take_so_many_tokens(world: World, batch_tokens: int, sizes: list[int]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(world.reward).eval()
    judge = CreditModel(model, batch_tokens=batch_tokens)
    seen = []
    model.register_forward_pre_hook(lambda *x: seen.append(x[-1]["input_ids"].shape), with_kwargs=True)
    out = judge(PROMPTS, world.ids, world.policy)
    assert [shape[0] for shape in seen] == sizes
    assert [shape[1] for shape in seen] == sorted((shape[1] for shape in seen), reverse=True)
    whole = CreditModel(model)(PROMPTS, world.ids, world.policy)
    torch.testing.assert_close(out.weights, whole.weights, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("source", ["signed_rollout", "gradient_value", "leave_one_out"])
def test_a_signed_source_gives_token_rewards(world: World, source: SourceName) -> None:
    """Of the reward model's tokens, and of the policy's: those without text get none, and a row sums to 0."""
    judge = CreditModel(world.reward, source=source)
    ids = world.ids[0]
    score, weights = by_hand(world, source, ids)
    if source == "signed_rollout":
        weights = score * weights
    text, offsets = spans_of(world.policy, ids, [1] * len(ids))
    reader = judge.reader()
    own, policys = judge.score([reader.read("", text), reader.read("", text, offsets)])
    assert own.credit is policys.credit is None
    centred = weights - weights.mean()
    torch.testing.assert_close(torch.tensor(own.token_rewards), centred, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(sum(own.rewards), score.item(), rtol=1e-4, atol=1e-5)
    assert policys.token_rewards is not None
    assert policys.token_rewards[-1] == 0  # the end of the text has none
    assert sum(policys.token_rewards) == pytest.approx(0, abs=1e-5)
    carried = judge([""], [ids], world.policy).weights[0]
    if source == "signed_rollout":
        carried = score * carried
    expected = carried[:-1] - carried[:-1].mean()
    torch.testing.assert_close(torch.tensor(policys.token_rewards[:-1]), expected, rtol=1e-3, atol=1e-5)


def test_leave_one_out_by_spans(world: World) -> None:
    ids = world.ids[0]
    whole = CreditModel(world.reward, source="leave_one_out")
    spans = CreditModel(world.reward, source="leave_one_out", span=3)
    example = whole.reader().read("the plot", TEXTS[0])
    asked: list[int] = []
    spans.model.register_forward_pre_hook(lambda *x: asked.append(len(x[-1]["input_ids"])), with_kwargs=True)
    found = spans.weigh([example]).weights[0]
    n = len(example.positions)
    assert sum(asked) == 1 + -(-n // 3)
    with torch.no_grad():
        left = [x for i, x in enumerate(example.input_ids) if i not in example.positions[3:6]]
        scores = [whole.model(torch.tensor([x])).logits[0, 0] for x in (example.input_ids, left)]
    torch.testing.assert_close(found[3:6], ((scores[0] - scores[1]) / 3).expand(3), rtol=1e-4, atol=1e-5)
    assert whole([""], [ids], world.policy).weights.any()


def test_scored_is_the_sources_too(world: World) -> None:
    judge = CreditModel(world.reward, source="rollout")
    example = judge.reader().read(PROMPTS[0], TEXTS[0])
    (scored,) = judge.score([example])
    (of_attention,) = CreditModel(world.reward).score([example])
    mask = torch.ones(1, len(example.positions))
    response = Response(mask, index=torch.tensor([example.positions], dtype=torch.int32))
    with torch.no_grad(), AttentionTap(judge.model, source="rollout") as tap:
        judge.model(input_ids=torch.tensor([example.input_ids]))
    expected = attnshape.attention_rollout(tap.take(), response)[0]
    torch.testing.assert_close(torch.tensor(scored.credit), expected, rtol=1e-4, atol=1e-6)
    assert scored.credit != of_attention.credit
    assert scored.score == pytest.approx(of_attention.score, rel=1e-4, abs=1e-5)


def test_a_loaded_model_and_no_completions(world: World) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(world.reward).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.reward)
    for judge in (CreditModel(model), CreditModel(model, tokenizer)):
        assert judge.model is model
        assert judge.name == world.reward
        assert judge([], [], world.policy).weights.shape == (0, 0)


def test_what_does_not_fit_is_refused(world: World, tmp_path: Path) -> None:
    judge = CreditModel(world.reward)
    with pytest.raises(ValueError, match="got 2 prompts, 3 responses and 3 masks"):
        judge(["", ""], world.ids, world.policy)
    with pytest.raises(ValueError, match=r"masks\[0\]: got 1 for a response of"):
        judge([""], world.ids[:1], world.policy, masks=[[1]])
    with pytest.raises(ValueError, match="source: got 'magic', want one of"):
        CreditModel(world.reward, source="magic")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_tokens: got 0"):
        CreditModel(world.reward, batch_tokens=0)
    for options, message in (
        ({"source": "rollout", "layer": 1}, r"layer: got 1, want none for source='rollout'"),
        ({"source": "leave_one_out", "layer": 1}, r"layer: got 1, want none for source='leave_one_out'"),
        ({"source": "gradient_value", "layer": "all"}, "layer: got 'all', want one layer"),
        ({"layer": "every"}, "layer: got 'every', want an int, several, or 'all'"),
        ({"layer": 9}, "layer"),
        ({"span": 2}, "span: got 2, want 1 for source='attention'"),
        ({"source": "leave_one_out", "span": 0}, "span: got 0, want 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            CreditModel(world.reward, **options)
    with pytest.raises(ValueError, match="has 2 labels, so 'logit' alone is ambiguous"):
        CreditModel(str(save(tmp_path / "two", "two_labels")))
    with pytest.raises(ValueError, match=r"is no reward model: it lacks score\.weight"):
        CreditModel(str(save(tmp_path / "causal", "causal")))


def test_a_completion_without_a_score_costs_no_other(world: World) -> None:
    """Too long, no text, not finite: said, beside a score that is missing as where a function of TRL's is."""
    model = AutoModelForSequenceClassification.from_pretrained(world.reward).eval()
    judge = CreditModel(model)
    fine = judge([""], world.ids[:1], world.policy)
    with torch.no_grad():
        model.get_input_embeddings().weight[judge.tokenizer.encode(";", add_special_tokens=False)[0]] = (
            torch.nan
        )
    semicolon = world.policy.encode("good;", add_special_tokens=False)
    out = judge([""] * 4, [world.ids[0], world.ids[0] * 80, [], semicolon], world.policy)
    assert out.score.isnan().tolist() == [False, True, True, True]
    torch.testing.assert_close(out.score[0], fine.score[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.weights[0, : len(world.ids[0])], fine.weights[0], rtol=1e-4, atol=1e-6)
    assert not out.weights[1:].any()
    assert out.errors[0] is None
    for said, reason in zip(
        out.errors[1:], ("more than the 512", "the text has no token", "not finite"), strict=True
    ):
        assert said is not None
        assert reason in said
    advantages = attnshape.group_advantages(out.score, out.weights, out.mask, group=4).advantages
    assert not advantages[1:].any()
    assert advantages.isfinite().all()
    shaped = attnshape.shape_rewards(
        out.score, out.weights, out.mask, config=attnshape.ShapingConfig(on_nan="zero_row")
    )
    assert not shaped.rewards[1:].any()
    torch.testing.assert_close(shaped.rewards.sum(1)[0], out.score[0])


def test_a_model_that_can_be_read_for_nothing_is_an_error(world: World) -> None:
    judge = CreditModel(world.reward, query_position=-400)
    with pytest.raises(ValueError, match="query_position: got -400 for a text of"):
        judge([""] * 3, world.ids, world.policy)


@pytest.mark.parametrize("source", get_args(SourceName))
def test_a_policy_without_text_is_scored(world: World, source: SourceName) -> None:
    """One that ends at once: nothing of the response is read, and nothing gets credit."""
    judge = CreditModel(world.reward, source=source)
    reader = judge.reader()
    for response, offsets in (("", []), ("bad", [(1, 1)])):
        (scored,) = judge.score([reader.read("the plot", response, offsets)])
        assert scored.finite
        assert (scored.token_rewards if judge.signed else scored.credit) == [0.0] * len(offsets)


def test_leave_one_out_refuses_what_it_cannot_ask_again(world: World) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(world.reward).eval()
    ids = torch.tensor([[5, 6, 7]])
    for inputs, message in (
        (
            {"inputs_embeds": torch.ones(1, 3, 32)},
            "wants a forward of input_ids and attention_mask, got inputs_embeds",
        ),
        ({"input_ids": ids, "position_ids": ids}, "got position_ids"),
    ):
        tap = CreditSource("leave_one_out").tap(model)
        with torch.no_grad(), tap:
            model(**inputs)
        with pytest.raises(ValueError, match=message):
            tap.take()
    with pytest.raises(RuntimeError, match="exactly one forward since the last take"):
        tap.take()


def test_the_grad_mode_is_the_callers_again(world: World) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(world.reward).eval()
    names: list[SourceName] = ["attention", "gradient_value"]
    for name in names:
        source = CreditSource(name)
        with torch.inference_mode(), source.opened(source.tap(model)):
            assert torch.is_grad_enabled() == (name == "gradient_value")
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    assert not any(p.grad is not None for p in nn.Module.parameters(model))
