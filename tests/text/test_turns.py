"""Where a reward model's text holds the policy's turns."""

from __future__ import annotations

from typing import Any

import pytest
from support.reward_models import tokenizer

from attnshape.text.place import whole
from attnshape.text.turns import Turn, spans_in_text, turns_of

USER = [{"role": "user", "content": "ok"}]
TAGGED = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] | trim }}\n{% endfor %}"
WITHOUT_THOUGHTS = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'].split('</think>')[-1] }}\n{% endfor %}"
)


def told(*contents: Any) -> list[dict[str, Any]]:
    roles = ["assistant", "tool"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def read(template: str, completion: list[dict[str, Any]]) -> tuple[str, list[Turn | None]]:
    tok = tokenizer()
    tok.chat_template = template
    text = tok.apply_chat_template([*USER, *completion], tokenize=False)
    return text, turns_of(tok, USER, completion, text, {})


def ids_of(text: str) -> list[int]:
    found: list[int] = tokenizer().encode(text, add_special_tokens=False)
    return found


def test_turns_are_found_in_their_places() -> None:
    text, turns = read(TAGGED, told("ok", "ok", " ok "))
    places = [i for i in range(len(text)) if text.startswith("ok", i)]
    assert len(places) == 4
    assert [turn and (turn.place.low, turn.place.high) for turn in turns] == [
        (places[1], places[1] + 2),
        (places[3], places[3] + 2),
    ]


def test_options_are_the_templates() -> None:
    template = TAGGED + "{% if shout %}!{{ messages[-1]['content'] }}{% endif %}"
    tok = tokenizer()
    tok.chat_template = template
    text = tok.apply_chat_template([*USER, *told("good")], tokenize=False, shout=True)
    (turn,) = turns_of(tok, USER, told("good"), text, {"shout": True})
    assert turn is not None
    assert turn.place == whole("good", text.index("good"))


def test_a_template_that_drops_thoughts() -> None:
    text, turns = read(WITHOUT_THOUGHTS, told("ok or ok?</think>ok"))
    ids = ids_of("ok or ok?</think>ok")
    spans = spans_in_text(turns, tokenizer(), ids, [1] * len(ids))
    assert spans is not None
    low = text.rindex("ok")
    assert {c for s, e in spans for c in range(s, e)} == {low, low + 1}
    assert all(s == e for s, e in spans[: -len(ids_of("ok")) - 1])


def test_a_parser_that_keeps_the_answer() -> None:
    """The message holds less than was sampled."""
    text, turns = read(TAGGED, told("was great"))
    ids = [*ids_of("was great?</think>"), *ids_of("was great")]
    spans = spans_in_text(turns, tokenizer(), ids, [1] * len(ids))
    assert spans is not None
    low = text.rindex("was great")
    first = len(ids) - len(ids_of("was great"))
    assert all(s == e for s, e in spans[:first])
    assert {c for s, e in spans[first:] for c in range(s, e)} == set(range(low, low + len("was great")))


def test_content_that_is_no_text_is_none() -> None:
    text, turns = read(TAGGED, told([{"type": "text", "text": "ok"}], "ok", " ok"))
    assert turns[0] is None
    assert turns[1] is not None
    assert turns[1].place.low == text.rindex("ok")


def test_runs_of_unmasked_tokens_are_the_turns() -> None:
    said = ("was", " It was great", " was great, not bad")
    text, turns = read(TAGGED, told(*said))
    parts = [ids_of(part) for part in said]
    mask = [own for own, part in zip((1, 0, 1), parts, strict=True) for _ in part]
    spans = spans_in_text(turns, tokenizer(), [i for part in parts for i in part], mask)
    assert spans is not None
    first, last = text.index("was"), text.rindex("was great, not bad")
    covered = {c for s, e in spans for c in range(s, e)}
    assert covered == {*range(first, first + 3), *range(last, last + len("was great, not bad"))}
    assert all(s == e for (s, e), m in zip(spans, mask, strict=True) if not m)
    assert "".join(text[s:e] for s, e in spans) == "waswas great, not bad"


@pytest.mark.parametrize("turns", [[Turn("It was great", whole("It was great", 4))], [None], []])
def test_another_text_than_was_sampled_is_none(turns: list[Turn | None]) -> None:
    ids = ids_of("awful plot")
    assert spans_in_text(turns, tokenizer(), ids, [1] * len(ids)) is None
