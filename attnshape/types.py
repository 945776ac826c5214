"""What the public functions take and return, and the rules of dtype and rounding they share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from enum import IntFlag
from typing import Literal, NamedTuple, Self, TypeAlias

import torch
from torch import Tensor

Backend: TypeAlias = Literal["auto", "triton", "cpu", "torch"]
CreditName: TypeAlias = Literal["uniform", "sparse"]

MIN_MASS = 2.0**-100
"""Raw credit of a row that sums to less has underflowed: the row falls back to ``sparse``.

A negative weight counts as ``-inf`` in that sum."""


def compute_dtype(*tensors: object) -> torch.dtype:
    """float64 if every floating tensor among the arguments is, else float32."""
    floats = {x.dtype for x in tensors if isinstance(x, Tensor) and x.is_floating_point()}
    return torch.float64 if floats == {torch.float64} else torch.float32


@functools.lru_cache
def float32_rounded(x: float) -> float:
    """``gamma`` and ``gamma * lam`` are rounded to float32 once, before any arithmetic."""
    return torch.tensor(x, dtype=torch.float32, device="cpu").item()


def decay(gamma: float, lam: float | Tensor) -> float | Tensor:
    """``gamma * lam``, rounded to float32 once: a number, or float32 ``[B]`` where lam is per row."""
    return (gamma * lam.double()).float() if isinstance(lam, Tensor) else float32_rounded(gamma * lam)


class Status(IntFlag):
    """What happened to a row; ``ShapedRewards.status`` holds one value per row, 0 when nothing did."""

    FALLBACK = 1
    """No unmasked response key was visible, or the credit underflowed: the row was shaped as ``sparse``."""
    EMPTY = 2
    """The row has no unmasked token: its outputs are 0 and its score was dropped."""
    SCORE_MASKED = 4
    """``score_index`` names a masked token: what was due there was lost."""
    OUT_OF_RANGE = 8
    """An index of the row points outside its tensor: the row's outputs are NaN."""
    NONFINITE = 16
    """An output of the row is NaN or infinite (zeroed if ``on_nan="zero_row"``)."""
    NEGATIVE = 32
    """A weight of the row's credit is negative: the row was shaped as ``sparse``."""


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """Queries and keys of one attention layer, as the layer used them.

    Shapes: ``B`` sequences, ``S`` key positions, ``Hq`` query heads, ``Hkv`` key heads, ``D`` head width;
    ``N`` tokens in all when packed. Dtypes: float32, bfloat16, float16 (float64 on the torch backend).

    Args:
        query: the rows that are read, ``[B, Hq, D]``, or every query, ``[B, Hq, S, D]`` (packed:
            ``[N, Hq, D]``); after rotary embedding and query normalisation, before scaling.
        key: ``[B, Hkv, S, D]``, or ``[N, Hkv, D]`` with ``cu_seqlens``; before any GQA repeat, any strides.
        scaling: the layer's own factor on ``q . k``.
        key_start: first visible key of each row, int ``[B]``; 0 if not given.
        query_position: position of the query that is read among its row's keys, int ``[B]``; the last
            visible key if not given. ``"last_response"``: the row's last unmasked response token, resolved
            where the response is known; needs every query.
        attention_mask: ``[B, S]``, non-zero where a key may be seen; may have holes. Packed: ``[N]``.
        cu_seqlens: int32 ``[B + 1]``; sequence ``b`` owns keys ``cu_seqlens[b]:cu_seqlens[b + 1]``, and all
            positions count from its first key.
        softcap: ``c`` of ``c * tanh(s / c)``, if the layer has one.
        mask_row: what the layer's own mask adds to the scores of the row that is read, after the softcap;
            -inf hides a key. ``[B, S]``, or per head ``[B, Hq, S]`` (packed: ``[N]``, ``[N, Hq]``), floating.
        causal: False where a query also sees the keys after it (encoders).
        sliding_window: number of keys a query sees, itself included, if the layer has one; where it sees
            later keys as well, as many in either direction.
        sinks: one logit per query head, ``[Hq]``, if the layer has them.
        lse: natural log-sum-exp over the visible keys, sink not included, of the rows that are read,
            ``[B, Hq]``, or of every query, ``[B, Hq, S]`` (packed: ``[N, Hq]``).
        head_mask: ``[Hq]``, any dtype, non-zero where a head counts in the mean over heads; all, if not
            given. Where no head counts the mean is 0.
        value_norm: ``|W_O,h v[h, t]|``, ``[B, Hq, S]`` (packed: ``[N, Hq]``): how much each head moves from
            a key; for ``attention_rollout``.
        residual_norm: ``|x[s]|`` of the residual stream entering the layer, ``[B, S]`` (packed: ``[N]``).
    """

    query: Tensor
    key: Tensor
    scaling: float
    _: KW_ONLY
    key_start: Tensor | None = None
    query_position: Tensor | Literal["last_response"] | None = None
    attention_mask: Tensor | None = None
    mask_row: Tensor | None = None
    causal: bool = True
    cu_seqlens: Tensor | None = None
    softcap: float | None = None
    sliding_window: int | None = None
    sinks: Tensor | None = None
    lse: Tensor | None = None
    head_mask: Tensor | None = None
    value_norm: Tensor | None = None
    residual_norm: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether sequences lie end to end in one token axis."""
        return self.cu_seqlens is not None

    @property
    def batch_size(self) -> int:
        return self.key.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def has_all_queries(self) -> bool:
        """Whether ``query`` holds every query of the layer, not one row per sequence."""
        if self.cu_seqlens is None:
            return self.query.ndim == 4
        # With as many rows as tokens every sequence has one token, and the two readings agree.
        return self.query.shape[0] == self.key.shape[0]


class SignedInputs(NamedTuple):
    """A layer whose attention moves things for and against: for ``credit.signed_rollout``."""

    inputs: AttentionInputs
    """With every query."""
    value: Tensor
    """``[B, Hkv, S, Dv]`` (packed: ``[N, Hkv, Dv]``)."""
    pull: Tensor
    """``W_O,h^T y[s] / |y[s]|^2``, ``[B, Hq, S, Dv]`` (packed: ``[N, Hq, Dv]``), with ``y`` the residual
    stream after the attention: its product with a value is the share of ``y`` that the value makes up."""


@dataclass(frozen=True, eq=False)
class Response:
    """Where the response tokens are: among the token tensors, and among the reward model's keys.

    Token tensors (values, logprobs, credit, ...) have the shape of ``mask``. Where a function asks for a
    response a plain mask serves, if the rest is not needed.

    Args:
        mask: ``[B, R]``, bool, int or float, non-zero where a token is the policy's own; packed: ``[M]``.
        start: key position of each row's first response token, int ``[B]``, padding on the left included.
        index: or the key position of every response token, int of the mask's shape, -1 for none.
        cu_seqlens: int32 ``[B + 1]`` where tokens are packed: the bounds of the rows.

    Examples:
        >>> import torch
        >>> mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
        >>> Response(mask, start=torch.tensor([4, 2])).batch_size
        2
    """

    mask: Tensor
    _: KW_ONLY
    start: Tensor | None = None
    index: Tensor | None = None
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(cls, response: Self | Tensor) -> Self:
        """A plain mask as a response; a response as it is."""
        return response if isinstance(response, cls) else cls(response)  # type: ignore[arg-type]

    @property
    def batch_size(self) -> int:
        # Not `len`, which makes a size a constant where a compiler looks on.
        return self.mask.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1


@dataclass(frozen=True, eq=False)
class KL:
    """A KL penalty per token: ``-coef * kl[j]`` is added to the rewards.

    Args:
        logprobs, ref_logprobs: log-probabilities of the sampled tokens under policy and reference, of the
            response mask's shape, floating; the estimator is ``ShapingConfig.kl_estimator``.
        coef: a float, or a 0-d tensor on the device; it may change at every step without a recompilation.
        estimate: the penalty per token itself, in place of both; ``KL.given`` is the short form.

    Examples:
        >>> import torch
        >>> KL.given(torch.zeros(2, 3), 0.05).coef
        0.05
    """

    logprobs: Tensor | None
    ref_logprobs: Tensor | None
    coef: float | Tensor
    estimate: Tensor | None = None

    @classmethod
    def given(cls, kl: Tensor, coef: float | Tensor) -> Self:
        """A ready-made estimate per token, of the response mask's shape."""
        return cls(None, None, coef, kl)


class TokenInputs(NamedTuple):
    """What ``shape_rewards`` adds to the redistributed score, and what GAE needs."""

    values: Tensor | None = None
    kl: KL | None = None
    token_rewards: Tensor | None = None
    terminal_reward: Tensor | None = None
    bootstrap: Tensor | None = None

    @property
    def floating(self) -> list[Tensor]:
        """Those whose dtype chooses that of the outputs."""
        kl = () if self.kl is None else (self.kl.logprobs, self.kl.ref_logprobs, self.kl.estimate)
        given = (self.values, *kl, self.token_rewards, self.terminal_reward, self.bootstrap)
        return [x for x in given if x is not None]


AttentionLayers: TypeAlias = AttentionInputs | Sequence[AttentionInputs]
"""One layer, or several whose head means are averaged."""


class Advantages(NamedTuple):
    """What ``gae`` and ``group_advantages`` return; detached."""

    advantages: Tensor
    """Of the mask's shape, float32 (float64 where every floating input is), 0 where masked."""
    returns: Tensor
    """The same, of values plus advantages (of ``lam_value`` where it is set): what a critic learns."""
    moments: Tensor
    """``[B, 3]``: unmasked tokens of each row, mean and sum of squared deviations of their advantages, as
    ``whiten`` takes them. NaN where the advantages are; of an empty row 0."""


_FLAGS = {
    "fallback_rows": Status.FALLBACK,
    "negative_rows": Status.NEGATIVE,
    "empty_rows": Status.EMPTY,
    "score_masked_rows": Status.SCORE_MASKED,
    "out_of_range_rows": Status.OUT_OF_RANGE,
    "nan_rows": Status.NONFINITE,
}


def _flagged_rows(status: Tensor) -> dict[str, Tensor]:
    return {name: (status & int(flag) != 0).sum() for name, flag in _FLAGS.items()}


class GroupAdvantages(NamedTuple):
    """What ``group_advantages`` returns; detached."""

    advantages: Tensor
    """Of the mask's shape, float32 (float64 where every floating input is), 0 where masked."""
    completion: Tensor
    """``[B]``: the advantage of the whole completion, the mean of its row's."""
    credit: Tensor
    """Of the mask's shape: what spread it, summing to one; of several rewards the first's."""
    status: Tensor
    """int32 ``[B]``: ``Status`` flags; a row that fell back is spread uniformly."""
    moments: Tensor
    """``[B, 3]`` of the advantages, as ``whiten`` takes them."""

    @property
    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors on the device, computed when read: flagged rows, as in ``ShapedRewards.metrics``.

        Padded rows have ``credit_entropy`` too: in nats, of the credit's sizes, over rows that have any.
        """
        out = _flagged_rows(self.status)
        if self.credit.ndim == 2:
            sizes = self.credit.abs()
            total = sizes.sum(1, keepdim=True)
            has_credit = total[:, 0].isfinite() & (total[:, 0] > 0)
            entropy = torch.special.entr(sizes / total).sum(1)
            out["credit_entropy"] = torch.where(has_credit, entropy, 0).sum() / has_credit.sum().clamp(min=1)
        return out


class RowStats(NamedTuple):
    """What ``ShapedRewards.metrics`` averages: per row, ``[B]``, on the device; views, made when read."""

    numbers: Tensor
    """``[B, 4]``: ``entropy``, ``last_share``, the credit's mass as it came, and ``score_error``."""
    of_attention: bool
    """Whether the credit came as attention."""

    @property
    def entropy(self) -> Tensor:
        """Entropy of the row's normalised credit, in nats."""
        return self.numbers[:, 0]

    @property
    def last_share(self) -> Tensor:
        """Share of the row's credit on its last unmasked token."""
        return self.numbers[:, 1]

    @property
    def response_share(self) -> Tensor | None:
        """Share of the query's attention that falls on unmasked response tokens; None without attention."""
        return self.numbers[:, 2] if self.of_attention else None

    @property
    def score_error(self) -> Tensor:
        """``|sum of the redistributed score - score|``."""
        return self.numbers[:, 3]


class ShapedRewards(NamedTuple):
    """What ``shape_rewards`` returns; all detached, 0 at masked positions (but see ``carry_masked``).

    ``[B, R]`` (packed: ``[M]``), float32, or float64 where every floating input is.
    On a GPU small outputs of one shape may share an allocation, of at most 1 MiB: clone what is kept or saved
    alone.
    """

    rewards: Tensor
    """The score spread by credit, token and terminal rewards added, the KL penalty taken off."""
    advantages: Tensor
    """Of those rewards, not whitened: GAE, or without values discounted rewards-to-go."""
    returns: Tensor
    """What a critic learns: values plus advantages (of ``lam_value`` where it is set)."""
    credit: Tensor
    """Share of the score that each token gets credit for; a row sums to one."""
    kl: Tensor | None
    """The KL estimate per token, before ``kl_coef``; None if no KL input was given."""
    status: Tensor
    """int32 ``[B]``: ``Status`` flags."""
    moments: Tensor
    """``[B, 3]`` of the advantages, as in ``Advantages``: ``whiten`` takes them."""
    row_stats: RowStats
    """What ``metrics`` averages, per row."""

    @property
    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors on the device, computed when read; means are over rows that have a live token.

        ``credit_entropy`` (nats) and ``credit_last_share`` tell dense credit from sparse;
        ``response_attention`` is the share of attention that falls on the response; ``fallback_rows``,
        ``negative_rows``, ``empty_rows``, ``score_masked_rows``, ``out_of_range_rows`` and ``nan_rows`` count
        flagged rows;
        ``score_error`` is the largest error of a row's redistributed sum against its score.
        """
        out = _flagged_rows(self.status)
        live = self.status & int(Status.EMPTY | Status.OUT_OF_RANGE | Status.NONFINITE) == 0
        count = live.sum().clamp(min=1)

        def mean(x: Tensor) -> Tensor:
            return torch.where(live, x, 0).sum() / count

        out["credit_entropy"] = mean(self.row_stats.entropy)
        out["credit_last_share"] = mean(self.row_stats.last_share)
        share = self.row_stats.response_share
        if share is not None:
            out["response_attention"] = mean(share)
        error = torch.where(live, self.row_stats.score_error, 0)
        out["score_error"] = error.max() if error.numel() else error.sum()
        return out
