"""Where a reward model's text holds the policy's turns."""

from __future__ import annotations

from typing import Any

import pytest
from support.reward_models import tokenizer

from attnshape.text.turns import Messages, Turn, spans_in_text, turns_of

USER = [{"role": "user", "content": "ok"}]


def tagged(messages: Messages) -> str:
    return "".join(f"<{m['role']}> {str(m['content']).strip()}\n" for m in messages)


def told(*contents: Any) -> list[dict[str, Any]]:
    roles = ["assistant", "tool"] * len(contents)
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def test_turns_are_found_in_their_places() -> None:
    completion = told("ok", "ok", " ok ")
    text = tagged([*USER, *completion])
    places = [i for i in range(len(text)) if text.startswith("ok", i)]
    assert len(places) == 4
    first, last = (Turn(text="ok", low=places[1], high=places[1] + 2), (places[3], places[3] + 2))
    assert turns_of(tagged, USER, completion, text) == [first, Turn(" ok ", *last)]


def without_thoughts(messages: Messages) -> str:
    """As templates do: only the answer after the last thought, in upper case for some."""
    return tagged([{**m, "content": str(m["content"]).rpartition("</think>")[2]} for m in messages])


def test_a_template_that_drops_thoughts() -> None:
    completion = told("ok or ok?</think>ok")
    text = without_thoughts([*USER, *completion])
    (turn,) = turns_of(without_thoughts, USER, completion, text)
    assert turn is not None and text[turn.low : turn.high] == "ok" and turn.low == text.rindex("ok")
    tok = tokenizer()
    ids = tok.encode(completion[0]["content"], add_special_tokens=False)
    spans = spans_in_text(text, [turn], tok, ids, [1] * len(ids))
    assert spans is not None
    own = [tok.decode([i]) for i, (s, e) in zip(ids, spans, strict=True) if s < e]
    assert "".join(own).removeprefix(">") == "ok"
    assert {c for s, e in spans for c in range(s, e)} == set(range(turn.low, turn.high))


@pytest.mark.parametrize(
    "render",
    [
        lambda messages: tagged(messages) * 2,  # twice: which one is the turn?
        lambda messages: str(len(tagged(messages))) + tagged(messages),  # what is around depends on it
        lambda messages: "nothing",
    ],
)
def test_a_place_that_is_not_sure_is_none(render: Any) -> None:
    completion = told("a longer answer")
    assert turns_of(render, USER, completion, render([*USER, *completion])) == [None]


def test_content_that_is_no_text_is_none() -> None:
    completion = told([{"type": "text", "text": "ok"}], "ok", "ok")
    text = tagged([*USER, *completion])
    found = turns_of(tagged, USER, completion, text)
    assert found[0] is None and found[1] is not None


def test_runs_of_unmasked_tokens_are_the_turns() -> None:
    tok = tokenizer()
    parts = [tok.encode(t, add_special_tokens=False) for t in ("was", " It was great", " was great, not bad")]
    ids = [*parts[0], *parts[1], *parts[2]]
    mask = [*[1] * len(parts[0]), *[0] * len(parts[1]), *[1] * len(parts[2])]
    completion = told("was", " It was great", " was great, not bad")
    text = tagged([*USER, *completion])
    spans = spans_in_text(text, turns_of(tagged, USER, completion, text), tok, ids, mask)
    assert spans is not None
    first, last = text.index("was"), text.rindex("was great, not bad")
    covered = {c for s, e in spans for c in range(s, e)}
    assert covered == {*range(first, first + 3), *range(last, last + len("was great, not bad"))}
    assert all(s == e for (s, e), m in zip(spans, mask, strict=True) if not m)
    joined = [text[s:e] for (s, e), m in zip(spans, mask, strict=True) if m]
    assert "".join(joined) == "waswas great, not bad"


def test_another_text_than_was_sampled_is_none() -> None:
    tok = tokenizer()
    ids = tok.encode("awful plot", add_special_tokens=False)
    assert spans_in_text("<a> It was great", [Turn("It was great", 4, 16)], tok, ids, [1] * len(ids)) is None
    assert spans_in_text("awful plot", [None], tok, ids, [1] * len(ids)) is None
    assert spans_in_text("awful plot", [], tok, ids, [1] * len(ids)) is None
