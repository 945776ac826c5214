"""What the public functions take and return, and the rules of dtype and rounding they share."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import IntFlag
from typing import Literal, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor

from attnshape.config import Presets

Backend: TypeAlias = Literal["auto", "triton", "torch"]
CreditName: TypeAlias = Literal["uniform", "sparse"]
EpsMode: TypeAlias = Literal["add", "clamp", "add_to_std"]
KLEstimator: TypeAlias = Literal["k1", "abs", "k2", "k3"]
MaskLayout: TypeAlias = Literal["any", "response", "prefix", "rolled"]
MaskSemantics: TypeAlias = Literal["skip", "zero"]
Normalization: TypeAlias = Literal["sum_to_one", "sum_to_length", "none"]
OnNaN: TypeAlias = Literal["propagate", "zero_row"]
ScoreIndex: TypeAlias = Literal["last_unmasked", "last_token"]

MIN_MASS = 2.0**-100
"""Raw credit of a row that sums to less has underflowed: the row falls back to ``sparse``."""


def compute_dtype(*tensors: object) -> torch.dtype:
    """float64 if every floating tensor among the arguments is, else float32."""
    floats = {x.dtype for x in tensors if isinstance(x, Tensor) and x.is_floating_point()}
    return torch.float64 if floats == {torch.float64} else torch.float32


@functools.lru_cache
def float32_rounded(x: float) -> float:
    """``gamma`` and ``gamma * lam`` are rounded to float32 once, before any arithmetic."""
    return torch.tensor(x, dtype=torch.float32).item()


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


class SignedLayer(NamedTuple):
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
    """Where the response tokens are: among the token tensors, and among the keys."""

    mask: Tensor
    """``[B, R]``, or ``[M]`` with ``cu_seqlens``; non-zero where a token is the policy's own."""
    start: Tensor | None = None
    index: Tensor | None = None
    cu_seqlens: Tensor | None = None


class TokenInputs(NamedTuple):
    """What ``shape_rewards`` adds to the redistributed score, and what GAE needs."""

    values: Tensor | None = None
    logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    kl: Tensor | None = None
    kl_coef: float | Tensor = 0.0
    token_rewards: Tensor | None = None
    terminal_reward: Tensor | None = None
    bootstrap: Tensor | None = None


Attention: TypeAlias = AttentionInputs | Sequence[AttentionInputs]
"""One layer, or several whose head means are averaged."""


class Whitening(TypedDict, total=False):
    """Arguments of ``whiten``; what is not there keeps its default."""

    bessel: bool
    eps: float
    eps_mode: EpsMode
    shift_mean: bool
    zero_masked: bool


@dataclass(frozen=True, kw_only=True, eq=False)
class ShapingConfig(Presets):
    """How a score becomes token rewards, and rewards become advantages.

    Defaults are those of "Dense Reward for Free in RLHF" (arXiv 2402.00782). ``ShapingConfig.verl()``,
    ``.trl()``, ``.openrlhf()``, ``.slime()``, ``.nemo_rl()`` and ``.areal()`` are those of the frameworks.

    Args:
        beta: share of the score that is redistributed by the credit; the rest stays on the score's token.
        gamma: discount per token.
        lam: GAE's lambda, a float or one per row, ``[B]``.
        lam_value: lambda of the returns where it differs from ``lam`` (decoupled GAE).
        mask_semantics: what a masked token inside a response is to GAE. ``"skip"``: nothing, values and
            advantages pass through (verl, NeMo-RL, AReaL). ``"zero"``: a step with reward and value 0 (TRL,
            OpenRLHF, slime).
        zero_masked: False leaves at masked tokens what frameworks leave there: advantages that the recurrence
            carries past them, and returns that are their sum with the value (``"zero"``: 0). Padded tokens
            only.
        mask_layout: what ``validate=True`` holds ``response_mask`` to. ``"response"``: a row's first token is
            unmasked. ``"prefix"``: no masked token stands before an unmasked one. ``"rolled"``: the last
            token is masked.
        normalization: of the credit: ``"sum_to_one"``, ``"sum_to_length"`` or ``"none"``.
        score_index: the score's token: ``"last_unmasked"``, ``"last_token"`` (masked or not), or int ``[B]``.
        score_clip: the score is clamped to ``[-score_clip, score_clip]``, or to this pair, before use.
        kl_estimator: ``"k1"``, ``"abs"``, ``"k2"`` or ``"k3"`` (http://joschu.net/blog/kl-approx.html).
        kl_input_clip: ``logprobs - ref_logprobs`` is clamped to ``[-c, c]``.
        kl_output_clip: the estimate is clamped to ``[-c, c]``.
        on_nan: a row with a non-finite output keeps it, or becomes 0; flagged in ``status`` either way.
        whitening: for the caller: ``whiten(out.advantages, mask, **config.whitening)``.
    """

    beta: float = 0.8
    gamma: float = 1.0
    lam: float | Tensor = 0.95
    lam_value: float | Tensor | None = None
    mask_semantics: MaskSemantics = "skip"
    zero_masked: bool = True
    mask_layout: MaskLayout = "any"
    normalization: Normalization = "sum_to_one"
    score_index: ScoreIndex | Tensor = "last_unmasked"
    score_clip: float | tuple[float, float] | None = None
    kl_estimator: KLEstimator = "k1"
    kl_input_clip: float | None = None
    kl_output_clip: float | None = None
    on_nan: OnNaN = "propagate"
    whitening: Whitening = field(default_factory=dict)  # type: ignore[assignment]  # the compiler traces it

    @property
    def score_bounds(self) -> tuple[float, float]:
        """``score_clip`` as ``(low, high)``; infinite where the score is not clamped."""
        if self.score_clip is None:
            return -math.inf, math.inf
        if isinstance(self.score_clip, tuple):
            return self.score_clip
        return -self.score_clip, self.score_clip

    def share(self, credit: object) -> float:
        """``beta``; 1 where all credit is on the score's token, whose reward is then the score, unrounded."""
        sparse = isinstance(credit, str) and credit == "sparse" and self.normalization != "sum_to_length"
        return 1.0 if sparse else self.beta


@dataclass(frozen=True, eq=False)
class RowStats:
    """Per row, ``[B]`` if not said otherwise, on the device; what ``ShapedRewards.metrics`` averages."""

    entropy: Tensor
    """Entropy of the row's normalised credit, in nats."""
    last_share: Tensor
    """Share of the row's credit on its last unmasked token."""
    response_share: Tensor | None
    """Share of the query's attention that falls on unmasked response tokens; None without attention."""
    score_error: Tensor
    """``|sum of the redistributed score - score|``."""
    advantage_moments: Tensor
    """``[B, 3]``: unmasked tokens of the row, mean and sum of squared deviations of their advantages, for
    ``whiten``. NaN where the advantages are; of an empty row 0."""


@dataclass(frozen=True, eq=False)
class ShapedRewards:
    """What ``shape_rewards`` returns; all detached, 0 at masked positions (but see ``zero_masked``).

    ``[B, R]`` (packed: ``[M]``), float32, or float64 where every floating input is.
    """

    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    credit: Tensor
    kl: Tensor | None
    """The KL estimate per token, before ``kl_coef``; None if no KL input was given."""
    status: Tensor
    """int32 ``[B]``: ``Status`` flags."""
    row_stats: RowStats

    @property
    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors on the device, computed when read; means are over rows that have a live token.

        ``credit_entropy`` (nats) and ``credit_last_share`` tell dense credit from sparse;
        ``response_attention`` is the share of attention that falls on the response; ``fallback_rows``,
        ``empty_rows``, ``score_masked_rows``, ``out_of_range_rows`` and ``nan_rows`` count flagged rows;
        ``score_error`` is the largest error of a row's redistributed sum against its score.
        """
        flags = {
            "fallback_rows": Status.FALLBACK,
            "empty_rows": Status.EMPTY,
            "score_masked_rows": Status.SCORE_MASKED,
            "out_of_range_rows": Status.OUT_OF_RANGE,
            "nan_rows": Status.NONFINITE,
        }
        out = {name: (self.status & int(flag) != 0).sum() for name, flag in flags.items()}
        live = self.status & int(Status.EMPTY | Status.OUT_OF_RANGE | Status.NONFINITE) == 0
        count = live.sum().clamp(min=1)

        def mean(x: Tensor) -> Tensor:
            return torch.where(live, x, 0).sum() / count

        out["credit_entropy"] = mean(self.row_stats.entropy)
        out["credit_last_share"] = mean(self.row_stats.last_share)
        if self.row_stats.response_share is not None:
            out["response_attention"] = mean(self.row_stats.response_share)
        error = torch.where(live, self.row_stats.score_error, 0)
        out["score_error"] = error.max() if error.numel() else error.sum()
        return out
