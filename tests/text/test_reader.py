"""Completions as a reward model reads them, and credit on the policy's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.reward_models import LIMIT, save, tokenizer
from transformers import LlamaForSequenceClassification

from attnshape.text.load import load_reward_model
from attnshape.text.model import CreditModel, Scored
from attnshape.text.reader import Example, Reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def reader(folder: Path) -> Reader:
    model, tok = load_reward_model(str(folder), "cpu")
    return Reader(tok, model.config)


def score(folder: Path, *examples: Example) -> list[Scored]:
    return CreditModel(str(folder)).score(examples)


def by_characters(
    folder: Path, text: str, low: int, policy: list[tuple[int, int]]
) -> tuple[float, list[float]]:
    """Score, and credit per policy token (spans from ``low`` on), of eager attention by characters."""
    encoded = tokenizer()(text, add_special_tokens=False, return_offsets_mapping=True)
    model = LlamaForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        out = model(input_ids=torch.tensor([encoded["input_ids"]]), output_attentions=True)
    attention = out.attentions[-1][0, :, -1].double().mean(0).tolist()
    owners: dict[int, list[int]] = {}
    for j, (start, end) in enumerate(policy):
        for c in range(low + start, low + end):
            owners.setdefault(c, []).append(j)
    credit = [0.0] * len(policy)
    for weight, (start, end) in zip(attention, encoded["offset_mapping"], strict=True):
        characters = [c for c in range(start, end) if c in owners]
        for c in characters:
            for j in owners[c]:
                credit[j] += weight / len(characters) / len(owners[c])
    return out.logits[0, 0].item(), [c / sum(credit) for c in credit]


RESPONSE = "It was great 😀, not bad!"
POLICY = {
    "words": [(0, 2), (2, 6), (6, 12), (12, 13), (13, 14), (14, 15), (15, 19), (19, 24)],
    "bytes of an emoji": [(0, 13), (13, 14), (13, 14), (13, 14), (13, 14), (14, 24)],
    "ends in eos": [(0, 12), (12, 24), (0, 0)],
    "a tool's turn between": [(0, 6), (14, 19), (19, 24)],
    "one character": [(7, 8)],
}


@pytest.mark.parametrize("policy", POLICY.values(), ids=POLICY)
def test_credit_reaches_the_policys_tokens(
    folder: Path, reader: Reader, policy: list[tuple[int, int]]
) -> None:
    prompt = "<s>How was the film? "
    example = reader.read(prompt, RESPONSE, policy)
    alone, *_ = score(folder, example)
    expected, credit = by_characters(folder, prompt + RESPONSE, len(prompt), policy)
    assert alone.score == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert alone.credit == pytest.approx(credit, rel=2e-4, abs=1e-6)
    assert sum(alone.credit) == pytest.approx(1, abs=1e-6)
    # The same beside a longer one, which pads it, and beside one whose credit stays where it is.
    longer = reader.read(prompt * 2, RESPONSE)
    together, other = score(folder, example, longer)
    assert together.credit == pytest.approx(alone.credit, rel=1e-4, abs=1e-7)
    assert len(other.credit) == len(longer.positions)


def test_a_stripped_response_keeps_its_own_characters(folder: Path, reader: Reader) -> None:
    messages = [{"role": "user", "content": "Was it bad?"}, {"role": "assistant", "content": "  not bad \n"}]
    policy = [(0, 2), (2, 5), (5, 10), (10, 11)]
    example = reader.read_messages(messages, policy)
    text = tokenizer().apply_chat_template(messages, tokenize=False)
    low = text.rindex("not bad")
    (scored,) = score(folder, example)
    # Of the given response two characters before and two after are not in the text.
    expected, credit = by_characters(folder, text, low, [(0, 0), (0, 3), (3, 7), (0, 0)])
    assert scored.score == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert scored.credit == pytest.approx(credit, rel=2e-4, abs=1e-6)
    own = reader.read_messages(messages)
    assert (own.prompt, own.response) == (text[:low], "  not bad \n")
    assert "".join(own.response[start:end] for start, end in own.offsets) == "not bad"


def test_a_stripped_response_may_begin_the_text(folder: Path) -> None:
    model, tok = load_reward_model(str(folder), "cpu")
    tok.chat_template = "{{ messages[-1]['content'] | trim }}<|im_end|>"
    messages = [{"role": "assistant", "content": "   not bad"}]
    example = Reader(tok, model.config).read_messages(messages, [(0, 1), (6, 10)])
    assert [example.response[start:end] for start, end in example.offsets] == [" bad"]
    assert score(folder, example)[0].credit == [0, 1]


def test_special_tokens_are_added_once(reader: Reader) -> None:
    plain, templated = reader.read("bad ", "plot"), reader.read("<s>bad ", "plot")
    assert plain.input_ids == templated.input_ids
    assert plain.input_ids[:2].count(0) == 1
    assert plain.offsets == templated.offsets


def test_the_limit_may_be_a_shorter_one(folder: Path) -> None:
    model, tok = load_reward_model(str(folder), "cpu")
    assert Reader(tok, model.config).max_length == LIMIT
    short = Reader(tok, model.config, max_length=4)
    assert short.max_length == 4
    assert len(short.read("", "bad").input_ids) <= 4
    with pytest.raises(ValueError, match="tokens are more than the 4 that the model takes"):
        short.read("How was the film?", "bad")


def test_what_can_never_fit_is_not_tokenised(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tok = load_reward_model(str(folder), "cpu")
    reader = Reader(tok, model.config)
    monkeypatch.setattr(type(tok), "__call__", lambda *args, **kwargs: pytest.fail("tokenised"))
    with pytest.raises(ValueError, match="characters are more than the 64 tokens that the model takes"):
        reader.read("", "é" * 10_000)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([(0, 3), (2, 25)], r"offsets\[1\]: got \[2, 25\], want 0 <= start <= end <= 24"),
        ([(-1, 3)], r"offsets\[0\]: got \[-1, 3\]"),
        ([(3, 2)], r"offsets\[0\]: got \[3, 2\]"),
        ([(0, 5), (4, 6), (3, 7)], r"offsets\[2\]: got \[3, 7\] after \[4, 6\], want them in order"),
        ([(0, 5), (1, 4)], r"offsets\[1\]: got \[1, 4\] after \[0, 5\]"),
        ([(0, 24)] * 9, "offsets: got 216 characters in all for a response of 24"),
    ],
)
def test_offsets_that_are_none(reader: Reader, offsets: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reader.read("How was the film? ", RESPONSE, offsets)


@pytest.mark.parametrize(("response", "policy"), [("", [(0, 0)]), ("", []), (RESPONSE, [(0, 0), (4, 4)])])
def test_a_policy_without_text_is_scored_without_credit(
    folder: Path, reader: Reader, response: str, policy: list[tuple[int, int]]
) -> None:
    prompt = "How was the film? "
    example = reader.read(prompt, response, policy)
    expected = score(folder, reader.read("", prompt + response))[0].score
    for scored in (score(folder, example)[0], score(folder, example, reader.read(prompt, RESPONSE))[0]):
        assert scored.score == pytest.approx(expected, rel=1e-5)
        assert scored.credit == [0.0] * len(policy)
        assert scored.metrics["fallback"] is True
        assert scored.finite


def test_scores_that_are_not_finite_say_so() -> None:
    assert Scored(0.5, [1.0], {}).finite
    assert not Scored(float("nan"), [1.0], {}).finite
    assert not Scored(0.5, [float("inf")], {}).finite


def test_a_completion_by_names(reader: Reader) -> None:
    record = {"prompt": "How was it? ", "response": "great", "messages": None, "other": 1}
    assert reader.read_record(record) == reader.read("How was it? ", "great")
    messages = [{"role": "assistant", "content": "great"}]
    record = {"prompt": None, "messages": messages}
    assert reader.read_record(record, [(0, 5)]) == reader.read_messages(messages, [(0, 5)])
    for bad, message in [
        ({}, "want prompt and response, or messages, got neither"),
        ({"prompt": "a", "messages": []}, "got messages and prompt"),
        ({"prompt": "a", "response": 1}, '"response" must be a string, got int'),
    ]:
        with pytest.raises(ValueError, match=message):
            reader.read_record(bad)


def test_content_that_the_template_does_not_know(reader: Reader, folder: Path) -> None:
    """Parts, as chat APIs have them: a text model's template writes them like Python."""
    part = {"type": "text", "text": "How was it?"}
    reply = {"role": "assistant", "content": "great"}
    with pytest.raises(ValueError, match=r"messages\[1\]: got a list as content.*want a string"):
        reader.read_messages(
            [{"role": "system", "content": "hm"}, {"role": "user", "content": [part]}, reply]
        )
    tok = tokenizer()
    tok.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %} {% endfor %}"
    )
    model, _ = load_reward_model(str(folder), "cpu")
    knows = Reader(tok, model.config)
    assert knows.read_messages([{"role": "user", "content": [part]}, reply]).prompt == "How was it? "


def test_a_text_without_tokens(folder: Path) -> None:
    model, tok = load_reward_model(str(folder), "cpu")
    tok.add_bos_token = False
    tok._tokenizer.post_processor = None
    with pytest.raises(ValueError, match="the text has no token"):
        Reader(tok, model.config).read("", "", [])


THOUGHT = "<think>bad</think>\n\nnot bad"


@pytest.fixture
def thoughtless(folder: Path) -> Reader:
    """A template that drops thoughts, and asks a question that holds the reply."""
    model, tok = load_reward_model(str(folder), "cpu")
    tok.chat_template = (
        "{% for m in messages %}{{ m['content'].split('</think>')[-1] | trim }}<|im_end|>{% endfor %}not bad?"
    )
    return Reader(tok, model.config)


def test_credit_of_what_a_template_left(folder: Path, thoughtless: Reader) -> None:
    """It lies on the reply, not on the question behind it; what was dropped gets none, and it is said."""
    messages = [{"role": "user", "content": "Was it?"}, {"role": "assistant", "content": THOUGHT}]
    policy = [(0, 7), (7, 10), (10, 18), (18, 20), (20, 23), (23, 27)]
    example = thoughtless.read_messages(messages, policy)
    text = "Was it?<|im_end|>not bad<|im_end|>not bad?"
    assert example.prompt == "Was it?<|im_end|>"
    (scored,) = score(folder, example)
    expected, credit = by_characters(
        folder, text, len(example.prompt), [(0, 0), (0, 0), (0, 0), (0, 0), (0, 3), (3, 7)]
    )
    assert scored.score == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert scored.credit == pytest.approx(credit, rel=2e-4, abs=1e-6)
    assert scored.credit[:4] == [0.0] * 4
    assert scored.metrics["changed"] is True
    assert scored.metrics["fallback"] is False
    own = thoughtless.read_messages(messages)
    assert "".join(THOUGHT[start:end] for start, end in own.offsets) == "not bad"


@pytest.mark.parametrize("reply", ["", "   ", "<think>not bad</think>"])
def test_a_reply_of_which_nothing_is_left_is_scored_without_credit(
    folder: Path, thoughtless: Reader, reply: str
) -> None:
    messages = [{"role": "assistant", "content": reply}]
    example = thoughtless.read_messages(messages, [(0, len(reply)), (len(reply), len(reply))])
    (scored,) = score(folder, example)
    assert scored.credit == [0.0, 0.0]
    assert scored.metrics["fallback"] is True
    assert scored.metrics["changed"] is (reply != "")
    assert scored.finite
