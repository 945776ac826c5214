"""Weights of one tokenizer's tokens, carried to another's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor


def align(
    source_offsets: Sequence[tuple[int, int]], target_offsets: Sequence[tuple[int, int]]
) -> Callable[[Tensor], Tensor]:
    """The map ``[S]`` to ``[T]`` of one sequence that carries weights by the characters tokens share."""

    def carry(weights: Tensor) -> Tensor:
        out = weights.new_zeros(len(target_offsets))
        if not target_offsets:
            return out
        wide = [t for t, (start, end) in enumerate(target_offsets) if start < end]
        here = 0
        for weight, (start, end) in zip(weights, source_offsets, strict=True):
            if start == end:
                start = end = here
            here = max(here, end)
            owners = [
                [t for t in wide if target_offsets[t][0] <= c < target_offsets[t][1]]
                for c in range(start, end)
            ]
            owners = [tokens for tokens in owners if tokens]
            for tokens in owners:
                for t in tokens:
                    out[t] += weight / len(owners) / len(tokens)
            if owners:
                continue
            after = [t for t in wide if target_offsets[t][0] >= end]
            before = [t for t in wide if target_offsets[t][0] < end]
            following = min(after, key=lambda t: target_offsets[t][0], default=None)
            preceding = max(before, key=lambda t: (target_offsets[t][0], t), default=None)
            if not wide:
                out[0] += weight
            elif preceding is None:
                out[following] += weight
            elif following is None:
                out[preceding] += weight
            else:
                gap_after = target_offsets[following][0] - end
                gap_before = max(start - target_offsets[preceding][1], 0)
                out[following if gap_after <= gap_before else preceding] += weight
        return out

    return carry
