"""One score out of a reward model's logits: a linear expression such as ``logit[1] - 0.5 * logit[0]``."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

_TERM = re.compile(r"([+-]?)(?:(\d+\.?\d*|\.\d+)\*)?logit(?:\[(\d+)\])?")


@dataclass(frozen=True)
class ScoreFn:
    """``logits [B, L]`` to scores ``[B]`` in the logits' dtype; made by ``parse_score_fn``."""

    terms: tuple[tuple[float, int | None], ...]
    """Coefficient and label of each logit; no label: the only one."""

    def check(self, labels: int) -> None:
        """Raises ValueError where the expression does not fit a model with this many labels."""
        for _, label in self.terms:
            if label is None and labels != 1:
                raise ValueError(
                    f"score_fn: the model has {labels} labels, so 'logit' alone is ambiguous; "
                    "want an expression such as 'logit[1] - logit[0]'"
                )
            if label is not None and label >= labels:
                raise ValueError(f"score_fn: got logit[{label}], but the model has {labels} labels")

    def __call__(self, logits: Tensor) -> Tensor:
        self.check(logits.shape[-1])
        return sum((weight * logits[..., label or 0] for weight, label in self.terms), logits.new_zeros(()))


LOGIT = ScoreFn(((1.0, None),))
"""The only logit."""


def parse_score_fn(expression: str) -> ScoreFn:
    """The function that ``expression`` writes: a sum of ``[number *] logit`` or ``[number *] logit[index]``.

    Raises:
        ValueError: anything else.
    """
    text = "".join(expression.split())
    terms: list[tuple[float, int | None]] = []
    position = 0
    while position < len(text) or not terms:
        match = _TERM.match(text, position)
        if match is None or (terms and not match[1]):
            raise ValueError(
                f"score_fn: got {expression!r}, want a sum of terms such as 'logit', 'logit[1] - logit[0]' "
                "or '2 * logit[0]'"
            )
        weight = float(match[2] or 1) * (-1 if match[1] == "-" else 1)
        terms.append((weight, None if match[3] is None else int(match[3])))
        position = match.end()
    return ScoreFn(tuple(terms))
