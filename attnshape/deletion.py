"""What a score does when tokens are deleted: leave-one-out as a source of credit, and what judges the others.

Nothing here looks into the model. Tokens are taken out of the text, not masked in it, so that any model that
scores text can be asked; a response's masked tokens stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from attnshape import checks
from attnshape.types import Response, compute_dtype
from attnshape.vectorized.layout import Rows

ScoreOf: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Scores ``[N]`` of texts: int64 ids ``[N, L]``, padded on the right, and their attention mask, int64."""

Cut: TypeAlias = tuple[int, tuple[int, ...]]
"""A row, and the key positions that are taken out of it, in order."""

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.5)


@torch.no_grad()
def leave_one_out(
    score_of: ScoreOf,
    input_ids: Tensor,
    response: Response,
    *,
    score: Tensor | None = None,
    attention_mask: Tensor | None = None,
    spans: Tensor | None = None,
    pad_token_id: int | None = None,
    batch_tokens: int = 16384,
) -> Tensor:
    """``score - score without the token``, for each response token: what the whole model says of it.

    Known as occlusion or erasure (arXiv 1612.08220). ``n`` forwards for ``n`` tokens, in batches; with
    ``spans`` as many as there are spans. Exact for one token at a time: two words that say the same may each
    look dispensable.

    Args:
        score_of: the reward model: ``lambda ids, mask: model(ids, attention_mask=mask).logits[:, 0]``. Called
            without gradients.
        input_ids: the texts, int ``[B, S]``.
        response: where the response is among them, with ``start`` or ``index``.
        score: ``[B]``, of the whole texts, if it is known.
        attention_mask: ``[B, S]``, non-zero where a token is the text's; all if not given.
        spans: int of the mask's shape: a row's unmasked tokens of the same number are deleted together, and
            share what that does equally.
        pad_token_id: pads texts of unequal lengths; if not given, only equal ones share a forward.
        batch_tokens: the most that a forward takes, padding counted; a longer text goes alone.

    Returns:
        Signed weights in units of the score, float32 (float64 where the scores are), 0 where masked, where a
        token has no key, and where nothing of the text would be left.

    Raises:
        ValueError, TypeError: arguments that do not fit together; positions outside the texts; a response
            token that ``attention_mask`` hides; scores of another shape.

    Examples:
        >>> value = torch.tensor([0.0, 2.0, -1.0])  # of each word
        >>> ids = torch.tensor([[0, 1, 2]])
        >>> response = Response(torch.ones(1, 2), start=torch.tensor([1]))
        >>> leave_one_out(lambda ids, mask: (value[ids] * mask).sum(1), ids, response)
        tensor([[ 2., -1.]])
    """
    texts = _Texts.of(score_of, input_ids, response, attention_mask, pad_token_id, batch_tokens)
    mask = response.mask
    if score is not None:
        checks.check_per_row("score", score, len(input_ids), mask)
    if spans is not None and (spans.shape != mask.shape or spans.dtype not in checks.INTEGERS):
        raise ValueError(
            f"spans: got {spans.dtype} {list(spans.shape)}, want int32 or int64 {list(mask.shape)}"
        )
    numbers = None if spans is None else texts.rows.padded(spans).tolist()
    groups: list[tuple[Cut, list[int]]] = []
    for b, tokens in enumerate(texts.tokens):
        together: dict[int, list[int]] = {}
        for j in tokens:
            together.setdefault(j if numbers is None else numbers[b][j], []).append(j)
        groups += [(texts.cut(b, members), members) for members in together.values()]
    groups = [(cut, members) for cut, members in groups if texts.left(cut)]
    whole: dict[int, Cut] = {cut[0]: (cut[0], ()) for cut, _ in groups}
    found = texts.scores([*(whole.values() if score is None else ()), *(cut for cut, _ in groups)])
    full = {b: found[cut] for b, cut in whole.items()} if score is None else score.double().tolist()
    out = torch.zeros(texts.rows.live.shape, dtype=torch.float64, device="cpu")
    for cut, members in groups:
        out[cut[0], members] = (full[cut[0]] - found[cut]) / len(members)
    dtype = torch.float64 if score is not None and score.dtype == torch.float64 else texts.dtype
    return texts.rows.restore(out.to(mask.device, dtype))


@torch.no_grad()
def deletion_scores(
    score_of: ScoreOf,
    input_ids: Tensor,
    weights: Tensor,
    response: Response,
    *,
    fractions: Sequence[float] = FRACTIONS,
    attention_mask: Tensor | None = None,
    pad_token_id: int | None = None,
    batch_tokens: int = 16384,
    seed: int = 0,
) -> Tensor:
    """Scores of texts without the response tokens of the largest weights: a deletion curve.

    Of a row's ``n`` unmasked tokens the ``max(1, round(fraction * n))`` with the largest weights are deleted
    together, ties broken at random. The caller decides what is compared: ``weights.abs()``, or signed
    weights, whose first tokens hold the score up; weights that are all equal delete at random, another draw
    with each ``seed``. A source is faithful if the score moves further than at random (arXiv 1911.03429).

    Args:
        score_of, input_ids, response, attention_mask, pad_token_id, batch_tokens: as for ``leave_one_out``.
        weights: of the mask's shape.
        fractions: of the tokens to delete, each above 0, at most 1.
        seed: of the ties.

    Returns:
        ``[B, len(fractions)]``, float32 (float64 where the scores are). NaN where a row has no token to
        delete, a weight that is not a number, or nothing left.

    Raises:
        ValueError, TypeError: as for ``leave_one_out``.

    Examples:
        >>> value = torch.tensor([0.0, 2.0, -1.0])  # of each word
        >>> ids = torch.tensor([[0, 1, 2]])
        >>> response = Response(torch.ones(1, 2), start=torch.tensor([1]))
        >>> deletion_scores(
        ...     lambda ids, mask: (value[ids] * mask).sum(1), ids, torch.tensor([[0.9, 0.1]]), response,
        ...     fractions=(0.5, 1.0),
        ... )
        tensor([[-1.,  0.]])
    """
    texts = _Texts.of(score_of, input_ids, response, attention_mask, pad_token_id, batch_tokens)
    checks.check_like_mask("weights", weights, response.mask)
    for fraction in fractions:
        checks.check_number("fractions", fraction)
        if not 0 < fraction <= 1:
            raise ValueError(f"fractions: got {fraction}, want numbers above 0, at most 1")
    generator = torch.Generator("cpu").manual_seed(seed)
    rows = texts.rows.padded(weights).double().cpu()
    cuts: list[list[Cut | None]] = []
    for b, tokens in enumerate(texts.tokens):
        shuffled = [
            tokens[i] for i in torch.randperm(len(tokens), generator=generator, device="cpu").tolist()
        ]
        values = rows[b, shuffled]
        order = [shuffled[i] for i in values.argsort(descending=True, stable=True).tolist()]
        known = bool(order) and not bool(values.isnan().any())
        counts = [max(1, round(fraction * len(order))) for fraction in fractions]
        chosen = [texts.cut(b, order[:k]) if known else None for k in counts]
        cuts.append([cut if cut is not None and texts.left(cut) else None for cut in chosen])
    found = texts.scores([cut for row in cuts for cut in row if cut is not None])
    out = [[torch.nan if cut is None else found[cut] for cut in row] for row in cuts]
    shape = (len(cuts), len(fractions))
    return torch.tensor(out, dtype=texts.dtype, device=weights.device).view(shape)


@dataclass(eq=False)
class _Texts:
    """Rows of tokens, and the scores of what is left of them."""

    score_of: ScoreOf
    ids: list[Tensor]
    """Each row's, padding too."""
    own: list[Tensor]
    """bool: which of them are the text's."""
    lengths: list[int]
    rows: Rows
    tokens: list[list[int]]
    """Of each row, the unmasked response tokens that have a key."""
    positions: list[list[int]]
    pad_token_id: int | None
    batch_tokens: int
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(
        cls,
        score_of: ScoreOf,
        input_ids: Tensor,
        response: Response,
        attention_mask: Tensor | None,
        pad_token_id: int | None,
        batch_tokens: int,
    ) -> _Texts:
        if not callable(score_of):
            raise TypeError(f"score_of: got {type(score_of).__name__}, want a function of ids and mask")
        if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
            shape = (
                f"{input_ids.dtype} {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else input_ids
            )
            raise ValueError(f"input_ids: got {shape}, want int [B, S]")
        if not isinstance(response, Response):
            raise TypeError(f"response: got {type(response).__name__}, want Response with start or index")
        checks.check_response(response, len(input_ids), input_ids)
        checks.validate_response(response, [input_ids.shape[1]] * len(input_ids))
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask: got {list(attention_mask.shape)}, want {list(input_ids.shape)}, "
                "as input_ids"
            )
        if not isinstance(batch_tokens, int) or batch_tokens < 1:
            raise ValueError(f"batch_tokens: got {batch_tokens!r}, want 1 or more")
        rows, own = Rows.of(response), attention_mask.bool()
        positions = rows.key_positions().tolist()
        live = rows.live.tolist()
        tokens = [
            [j for j, x in enumerate(row) if x and at[j] >= 0]
            for row, at in zip(live, positions, strict=True)
        ]
        shown = own.tolist()
        for b, of_row in enumerate(tokens):
            for j in of_row:
                if not shown[b][positions[b][j]]:
                    place = f"token {j} of response {b}, at {positions[b][j]}"
                    raise ValueError(f"attention_mask: hides {place}, want it shown")
        return cls(
            score_of=score_of,
            ids=list(input_ids.long()),
            own=list(own),
            lengths=own.sum(1).tolist(),
            rows=rows,
            tokens=tokens,
            positions=positions,
            pad_token_id=pad_token_id,
            batch_tokens=batch_tokens,
        )

    def cut(self, b: int, members: Sequence[int]) -> Cut:
        return b, tuple(sorted({self.positions[b][j] for j in members}))

    def left(self, cut: Cut) -> int:
        """Tokens of the text without them."""
        return self.lengths[cut[0]] - len(cut[1])

    def scores(self, cuts: Sequence[Cut]) -> dict[Cut, float]:
        """Of texts that are not empty; each different one once, the longest first."""
        found: dict[Cut, float] = {}
        waiting = sorted(dict.fromkeys(cuts), key=self.left, reverse=True)
        lengths = [self.left(cut) for cut in waiting]
        start = 0
        while start < len(waiting):
            longest = lengths[start]
            end = min(start + max(self.batch_tokens // longest, 1), len(waiting))
            if self.pad_token_id is None:
                end = start + sum(length == longest for length in lengths[start:end])
            batch = waiting[start:end]
            found |= zip(batch, self._forward(batch, longest), strict=True)
            start = end
        return found

    def _forward(self, batch: Sequence[Cut], longest: int) -> list[float]:
        device = self.ids[0].device
        ids = torch.full((len(batch), longest), self.pad_token_id or 0, dtype=torch.int64, device=device)
        mask = torch.zeros_like(ids)
        for i, (b, positions) in enumerate(batch):
            keep = self.own[b].clone()
            keep[list(positions)] = False
            text = self.ids[b][keep]
            ids[i, : len(text)], mask[i, : len(text)] = text, 1
        scores = self.score_of(ids, mask)
        if not isinstance(scores, Tensor) or scores.shape != (len(batch),) or not scores.is_floating_point():
            got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"score_of: got {got} for {len(batch)} texts, want floating [{len(batch)}]")
        self.dtype = compute_dtype(scores)
        out: list[float] = scores.double().tolist()
        return out
