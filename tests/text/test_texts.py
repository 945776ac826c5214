"""`align_texts` on the reward model's own tokens: special ones, padding, conversations, what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.reward_models import save, tokenizer
from tokenizers import processors
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

import attnshape
from attnshape.tap import AttentionTap
from attnshape.text.texts import TextAlignment, align_texts, decoded_spans

RESPONSES = ["It was great, not bad at all!", "bad"]
PROMPTS = ["How was it?\n", "Was it bad, bad or great?\n"]
TEXTS = [prompt + response for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]


def with_special(eos: bool = False) -> PreTrainedTokenizerFast:
    """Adds BOS, and EOS if asked, as the tokenizers of Llama 3 and Gemma, and of T5, do."""
    tok = tokenizer()
    if eos:
        tok._tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A <|im_end|>", special_tokens=[("<s>", 0), ("<|im_end|>", 3)]
        )
    return tok


@pytest.fixture
def policy() -> PreTrainedTokenizerFast:
    return tokenizer()


def ids_of(policy: PreTrainedTokenizerFast) -> list[list[int]]:
    return [policy(response, add_special_tokens=False)["input_ids"] for response in RESPONSES]


def held(alignment: TextAlignment, tok: PreTrainedTokenizerFast) -> list[str]:
    """The text of each row's tokens that get weight."""
    return [
        tok.decode(ids[mask]) for ids, mask in zip(alignment.input_ids, alignment.source_mask, strict=True)
    ]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_ids_of_the_reward_model_say_where_its_tokens_are(
    policy: PreTrainedTokenizerFast, side: str, special: bool, eos: bool
) -> None:
    tok = with_special(eos)
    tok.padding_side = side
    batch = tok(TEXTS, padding="max_length", max_length=60, add_special_tokens=special, return_tensors="pt")
    starts = [len(prompt) for prompt in PROMPTS]
    alignment = align_texts(tok, TEXTS, policy, ids_of(policy), start=starts, input_ids=batch["input_ids"])
    assert torch.equal(alignment.input_ids, batch["input_ids"])
    assert torch.equal(alignment.attention_mask, batch["attention_mask"])
    assert held(alignment, tok) == RESPONSES
    # Every policy token of a response's text gets the weight of the reward model's token at its place.
    weights = torch.rand(alignment.source_shape) * alignment.source_mask
    carried = alignment(weights, batch["input_ids"])
    for row, mask, out in zip(weights, alignment.source_mask, carried, strict=True):
        n = int(mask.sum())
        torch.testing.assert_close(out[:n], row[mask])
        assert not out[n:].any()
    lists = align_texts(
        tok, TEXTS, policy, ids_of(policy), start=starts, input_ids=batch["input_ids"].tolist()
    )
    assert torch.equal(lists.source_mask, alignment.source_mask)


@pytest.mark.parametrize("eos", [True, False])
def test_tokens_are_handed_out_where_there_are_none(policy: PreTrainedTokenizerFast, eos: bool) -> None:
    tok = with_special(eos)
    alignment = align_texts(tok, TEXTS, policy, ids_of(policy), start=[len(prompt) for prompt in PROMPTS])
    batch = tok(TEXTS, padding=True, return_tensors="pt")
    assert torch.equal(alignment.input_ids, batch["input_ids"])
    assert torch.equal(alignment.attention_mask, batch["attention_mask"])
    assert held(alignment, tok) == RESPONSES
    # A text that begins with the tokenizer's own gets no second one.
    again = align_texts(tok, "<s>" + TEXTS[0], policy, ids_of(policy)[0])
    assert again.input_ids.tolist() == tok("<s>" + TEXTS[0], add_special_tokens=False)["input_ids"]
    assert again.input_ids.tolist().count(0) == 1


def test_the_credit_is_that_of_the_same_characters(tmp_path: Any, policy: PreTrainedTokenizerFast) -> None:
    """With a tokenizer that adds BOS and EOS, against eager attention."""
    tok = with_special(eos=True)
    model = LlamaForSequenceClassification.from_pretrained(save(tmp_path, "llama")).eval()
    eager = LlamaForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    alignment = align_texts(tok, TEXTS, policy, ids_of(policy), start=[len(prompt) for prompt in PROMPTS])
    with torch.no_grad(), AttentionTap(model) as tap:
        model(alignment.input_ids, attention_mask=alignment.attention_mask)
    start = torch.zeros(2, dtype=torch.int32)
    credit = attnshape.attention_credit(tap.take(), attnshape.Response(alignment.source_mask, start=start))
    carried = alignment(credit)
    for b, (text, response) in enumerate(zip(TEXTS, RESPONSES, strict=True)):
        encoded = tok(text, return_offsets_mapping=True)
        with torch.no_grad():
            out = eager(torch.tensor([encoded["input_ids"]]), output_attentions=True)
        row = out.attentions[-1][0, :, -1].mean(0)
        inside = torch.tensor([start >= len(PROMPTS[b]) for start, end in encoded["offset_mapping"]])
        inside &= torch.tensor([end > start for start, end in encoded["offset_mapping"]])
        want = row[inside] / row[inside].sum()
        torch.testing.assert_close(carried[b, : len(want)], want, rtol=1e-4, atol=1e-6)
        assert len(want) == len(policy(response, add_special_tokens=False)["input_ids"])


CONVERSATION = [{"role": "user", "content": "Was it bad?"}, {"role": "assistant", "content": " bad "}]


def test_a_conversation_knows_where_its_reply_is(policy: PreTrainedTokenizerFast) -> None:
    tok = with_special()
    tok.chat_template += "Was it bad?"
    ids = policy(" bad ", add_special_tokens=False)["input_ids"]
    one = align_texts(tok, CONVERSATION, policy, ids)
    text = tok.apply_chat_template(CONVERSATION, tokenize=False)
    assert one.input_ids.tolist() == tok(text, add_special_tokens=False)["input_ids"]
    assert one.changed.item() is True  # it is stripped
    own = one.input_ids[one.source_mask]
    assert tok.decode(own) == "bad"
    assert int(one.source_mask.nonzero()[0]) < len(one.input_ids) - 5
    both = align_texts(tok, [CONVERSATION, CONVERSATION], policy, [" bad ", ids])
    assert both.changed.tolist() == [True, True]
    assert torch.equal(both.input_ids[0], one.input_ids)
    carried = both(both.source_mask.double())
    _, spans = decoded_spans(policy, ids)
    for j, (start, end) in enumerate(spans):
        assert (carried[1, j] > 0) == (start < 4 and end > 1), spans


def test_content_that_the_template_writes_like_python(policy: PreTrainedTokenizerFast) -> None:
    parts = [{**CONVERSATION[0], "content": [{"type": "text", "text": "hm"}]}, *CONVERSATION[1:]]
    with pytest.raises(ValueError, match=r"messages\[0\]: got a list as content"):
        align_texts(with_special(), parts, policy, "polite")


def test_a_reply_that_the_template_lost_gets_no_weight(policy: PreTrainedTokenizerFast) -> None:
    """A training run goes on: the credit is nothing, and `shape_rewards` falls back to sparse."""
    tok = with_special()
    tok.chat_template = "{{ messages[0]['content'] }}"
    alignment = align_texts(tok, [CONVERSATION], policy, ["polite"])
    assert alignment.changed.tolist() == [True]
    assert not alignment.source_mask.any()
    carried = alignment(torch.zeros(alignment.source_shape))
    assert carried.shape == (1, len(policy("polite", add_special_tokens=False)["input_ids"]))
    assert not carried.any()


def test_a_text_that_holds_its_response_twice_needs_its_place(policy: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="source 1 holds its response 'bad' 3 times: want start=") as caught:
        align_texts(tokenizer(), TEXTS, policy, RESPONSES)
    assert "\n" not in str(caught.value)
    alignment = align_texts(tokenizer(), TEXTS[1], policy, "bad", start=7)
    assert tokenizer().decode(alignment.input_ids[: int(alignment.source_mask.nonzero())]) == "<s>Was it"
    with pytest.raises(ValueError, match=r"'bad' is not in 'Was it bad, bad or great.* at 8"):
        align_texts(tokenizer(), TEXTS[1], policy, "bad", start=8)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[1, 2, 3]], r"input_ids: got torch.int64 \[1, 3\] for 2 texts"),
        ([[0.5], [0.5]], r"input_ids: got torch.float32 \[2, 1\] for 2 texts"),
        ("other", "input_ids: sequence 0 is not source 0 tokenised by source_tokenizer and padded"),
        ("cut", "input_ids: sequence 0 is not source 0 tokenised by source_tokenizer and padded"),
        ("no padding", "input_ids: sequence 1 is not source 1 tokenised"),
        ("padded within", "input_ids: sequence 0 is not source 0 tokenised"),
    ],
)
def test_other_ids_are_an_error(policy: PreTrainedTokenizerFast, ids: Any, message: str) -> None:
    tok = with_special()
    batch = tok(TEXTS, padding=True, return_tensors="pt")["input_ids"]
    if ids == "other":
        ids = batch.flip(0)
    elif ids == "cut":
        ids = batch[:, :-3]
    elif ids == "no padding":
        ids = torch.where(batch == tok.pad_token_id, 7, batch)
    elif ids == "padded within":
        ids = torch.cat([batch[:, :4], torch.full((2, 1), tok.pad_token_id), batch[:, 4:]], 1)
    with pytest.raises(ValueError, match=message):
        align_texts(tok, TEXTS, policy, RESPONSES, start=[12, 26], input_ids=ids)


def test_weights_of_other_tokens_are_an_error(policy: PreTrainedTokenizerFast) -> None:
    tok = with_special()
    alignment = align_texts(tok, TEXTS, policy, RESPONSES, start=[12, 26])
    ids = alignment.input_ids
    weights = torch.rand(ids.shape)
    alignment(weights, ids)
    with pytest.raises(ValueError, match="weights must have shape"):
        alignment(weights[:, 1:])
    for other in (ids[:, 1:], ids.flip(0), ids + 1):
        with pytest.raises(ValueError, match=r"input_ids: got .* that are not the .* tokens"):
            alignment(weights, other)


def test_arguments_that_are_not_as_many(policy: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="source and target must be as many, got 2 and 1"):
        align_texts(tokenizer(), TEXTS, policy, ["a"])
    with pytest.raises(ValueError, match="source and start must be as many, got 2 and 1"):
        align_texts(tokenizer(), TEXTS, policy, RESPONSES, start=[0])
    with pytest.raises(ValueError, match="source_tokenizer has no padding token"):
        align_texts(tokenizer(None), TEXTS, policy, RESPONSES, start=[12, 26])
