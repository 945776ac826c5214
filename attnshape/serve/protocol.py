"""What ``POST /score`` takes and gives, as JSON."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from attnshape.text.model import NOT_FINITE, Scored
from attnshape.text.reader import Example, Reader, check_form

SHOWN_PROBLEMS = 3


class Completion(BaseModel):
    """One completion: ``prompt`` and ``response``, or ``messages`` that end with the assistant's."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: Annotated[str | None, Field(description="Text before the response, read as one with it.")] = None
    response: str | None = None
    messages: Annotated[
        list[dict[str, Any]] | None,
        Field(description="Rendered with the reward model's chat template; the last one is the response."),
    ] = None
    offsets: Annotated[
        list[tuple[int, int]] | None,
        Field(
            description="[start, end] of each of the policy's tokens in characters (code points) of the "
            "response, in order. Text that none covers, such as a tool's turn, gets no credit. Without them "
            "credit is per token of the reward model."
        ),
    ] = None
    label: Annotated[Any, Field(description="Not read; some frameworks send it along.")] = None

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        check_form(dict(self))
        return self

    def read(self, reader: Reader) -> Example:
        """Raises ValueError if it cannot be scored."""
        return reader.read_record(dict(self), self.offsets)


class Metrics(BaseModel):
    """Where the reward model looked, over its own tokens."""

    entropy: Annotated[float, Field(description="Of the credit, or of the weights' sizes, in nats.")]
    last_share: Annotated[float, Field(description="That on the last token.")]
    response_attention: Annotated[
        float | None, Field(description="Share of the attention on the response; of --source attention only.")
    ] = None
    fallback: Annotated[bool, Field(description="It was nothing: all credit is on the last token.")]
    changed: Annotated[
        bool, Field(description="The chat template changed the response; what it dropped has no credit.")
    ]


class Answer(BaseModel):
    """Score of one completion, and credit or token rewards."""

    score: float
    credit: Annotated[
        list[float] | None,
        Field(
            description="Sums to 1; all 0 where no token of the policy has text. Null where the server's "
            "--source has signs."
        ),
    ]
    token_rewards: Annotated[
        list[float] | None,
        Field(
            description="Of a source with signs, in units of the score: they sum to 0, and are added beside "
            "a score that is spread evenly. Otherwise not there."
        ),
    ] = None
    offsets: Annotated[
        list[tuple[int, int]] | None,
        Field(description="Of the reward model's tokens, where the request gave none."),
    ] = None
    metrics: Metrics


class Failure(BaseModel):
    """Why there is no answer."""

    error: str


_ONE, _MANY = TypeAdapter(Completion), TypeAdapter(list[Completion])


def _form(*names: str) -> dict[str, Any]:
    """Schema of a completion that is given by these fields."""
    every = Completion.model_json_schema()["properties"]
    given = {name: {**every[name]["anyOf"][0], "title": every[name]["title"]} for name in names}
    rest = {name: every[name] for name in ("offsets", "label")}
    return {
        "type": "object",
        "properties": given | rest,
        "required": list(names),
        "additionalProperties": False,
    }


_FORMS = [_form("prompt", "response"), _form("messages")]
BODY = {"anyOf": [*_FORMS, {"type": "array", "items": {"anyOf": _FORMS}, "minItems": 1}]}
"""Schema of a request's body."""
EXAMPLE = {"prompt": "Was it good? ", "response": "Not bad.", "offsets": [[0, 3], [3, 7], [7, 8]]}
"""Such a body."""


def parse(body: bytes) -> Completion | list[Completion]:
    """One completion or a list of them.

    Raises:
        SyntaxError: the body is not JSON.
        ValueError: it is something else.
    """
    adapter: TypeAdapter[Any] = _MANY if body.lstrip()[:1] == b"[" else _ONE
    try:
        parsed: Completion | list[Completion] = adapter.validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        text = "; ".join(map(_problem, problems[:SHOWN_PROBLEMS]))
        if len(problems) > SHOWN_PROBLEMS:
            text += f"; and {len(problems) - SHOWN_PROBLEMS} more"
        raise (SyntaxError if problems[0]["type"] == "json_invalid" else ValueError)(text) from None
    if parsed == []:
        raise ValueError("want a completion, or a list of at least one")
    return parsed


def _problem(problem: Any) -> str:
    place = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in problem["loc"]).lstrip(".")
    message = problem["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def answer(example: Example, scored: Scored | str) -> dict[str, Any]:
    """An ``Answer`` or a ``Failure`` as JSON."""
    if isinstance(scored, str):
        return {"error": scored}
    if not scored.finite:
        return {"error": NOT_FINITE}
    offsets = {"offsets": example.offsets} if example.policy_offsets is None else {}
    return {"score": scored.score, **scored.values, **offsets, "metrics": scored.metrics}
