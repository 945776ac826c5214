"""What a request may say, and what it is told otherwise."""

from __future__ import annotations

import json
from typing import Any

import pytest

from attnshape.serve.protocol import BODY, Completion, answer, parse
from attnshape.text.model import Scored
from attnshape.text.reader import Example

PAIR = b'{"prompt": "a", "response": "b"}'


def test_one_or_a_list() -> None:
    assert parse(PAIR) == Completion(prompt="a", response="b")
    assert parse(b" \n[" + PAIR + b"]") == [Completion(prompt="a", response="b")]
    told = parse(
        b'{"messages": [{"role": "assistant", "content": "b"}], "offsets": [[0, 1]], "label": {"x": 1}}'
    )
    assert isinstance(told, Completion)
    assert told.messages == [{"role": "assistant", "content": "b"}]
    assert told.offsets == [(0, 1)]


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"prompt": "\\ud800"}', b"[" * 100_000, b"[" + PAIR])
def test_no_json(body: bytes) -> None:
    with pytest.raises(SyntaxError, match="Invalid JSON"):
        parse(body)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{}", "want prompt and response, or messages, got neither"),
        (b'{"prompt": "a"}', "want prompt and response, or messages, got prompt"),
        (
            b'{"prompt": "a", "response": "b", "messages": []}',
            "want prompt and response, or messages, got messages and prompt and response",
        ),
        (b'{"prompt": 1, "response": "b"}', "prompt: Input should be a valid string"),
        (b'{"prompt": "a", "response": "b", "x": 1}', "x: Extra inputs are not permitted"),
        (b'{"messages": ["a"]}', r"messages\[0\]: Input should be an object"),
        (
            b'{"prompt": "a", "response": "b", "offsets": [[0, 1, 2]]}',
            r"offsets\[0\]: Tuple should have at most",
        ),
        (b'{"prompt": "a", "response": "b", "offsets": [[0]]}', r"offsets\[0\]\[1\]: Field required"),
        (b'{"prompt": "a", "response": "b", "offsets": [[0, true]]}', r"offsets\[0\]\[1\]: .* valid integer"),
        (b'{"prompt": "a", "response": "b", "offsets": [[0, NaN]]}', r"offsets\[0\]\[1\]: .* valid integer"),
        (b"[" + PAIR + b", 1]", r"\[1\]: Input should be an object"),
        (b"1", "Input should be an object"),
        (b"[]", "a list of at least one"),
        (b"[1, 2, 3, 4, 5]", "; and 2 more"),
    ],
)
def test_json_of_another_shape(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse(body)
    assert not isinstance(caught.value, SyntaxError)


def test_the_schema_says_what_is_taken() -> None:
    *forms, items = BODY["anyOf"]
    assert items["items"] == {"anyOf": forms}
    assert [form["required"] for form in forms] == [["prompt", "response"], ["messages"]]
    for form in forms:
        assert set(form["properties"]) == {*form["required"], "offsets", "label"}
        assert form["additionalProperties"] is False
        assert all("anyOf" not in form["properties"][name] for name in form["required"])  # null is none
    assert forms[0]["properties"]["prompt"]["type"] == "string"
    assert "$ref" not in json.dumps(BODY)  # there would be nothing to refer to


def test_offsets_are_answered_where_the_request_gave_none() -> None:
    metrics: dict[str, Any] = {
        "entropy": 0.0,
        "last_share": 1.0,
        "response_attention": 0.5,
        "fallback": False,
    }
    scored = Scored(0.5, [1.0], metrics)
    own = Example("a", "b", [1], [0], [(0, 1)])
    assert answer(own, scored) == {"score": 0.5, "credit": [1.0], "offsets": [(0, 1)], "metrics": metrics}
    policys = Example("a", "b", [1], [0], [(0, 1)], [(0, 1)])
    assert answer(policys, scored) == {"score": 0.5, "credit": [1.0], "metrics": metrics}


def test_what_is_not_finite_is_an_error() -> None:
    example = Example("a", "b", [1], [0], [(0, 1)])
    for scored in (Scored(float("nan"), [1.0], {}), Scored(0.5, [float("inf")], {})):
        assert answer(example, scored) == {"error": "the model's score or attention is not finite"}
    assert answer(example, "out of memory") == {"error": "out of memory"}
