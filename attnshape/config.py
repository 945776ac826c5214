"""How rewards are shaped: ``ShapingConfig``, and the same as the PPO frameworks have it.

Each preset is a dictionary of settings with its sources.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias, get_args

from torch import Tensor

Baseline: TypeAlias = Literal["mean", "leave_one_out", "batch", "none"]
EpsMode: TypeAlias = Literal["add", "clamp", "add_to_std"]
KLEstimator: TypeAlias = Literal["k1", "abs", "k2", "k3"]
MaskLayout: TypeAlias = Literal["any", "response", "prefix", "rolled"]
MaskSemantics: TypeAlias = Literal["skip", "zero"]
Normalization: TypeAlias = Literal["sum_to_one", "sum_to_length", "none"]
OnNaN: TypeAlias = Literal["propagate", "zero_row"]
Scale: TypeAlias = Literal["group", "batch", "none"]
ScoreIndex: TypeAlias = Literal["last_unmasked", "last_token"]
Signed: TypeAlias = Literal["shares", "score"]

ESTIMATORS: Mapping[str, str] = {"k1": "k1", "k2": "k2", "k3": "k3"}


CLIP = "a positive number or (low, high)"
TINY = math.ulp(0.0)


def check_choice(name: str, x: object, choices: Collection[object]) -> None:
    if x not in choices:
        raise ValueError(f"{name}: got {x!r}, want one of {', '.join(repr(choice) for choice in choices)}")


def _check_number(name: str, x: object, low: float, high: float, want: str) -> None:
    if isinstance(x, bool) or not isinstance(x, int | float):
        raise TypeError(f"{name}: got {type(x).__name__}, want {want}")
    if not low <= x <= high:
        raise ValueError(f"{name}: got {x}, want {want}")


def _check_unit(name: str, x: object) -> None:
    _check_number(name, x, 0.0, 1.0, "a number from 0 to 1")


def _check_eps(eps: object) -> None:
    _check_number("eps", eps, 0.0, sys.float_info.max, "a finite number of 0 or more")


@dataclass(frozen=True, kw_only=True)
class Whitening:
    """``(x - mean) * rsqrt(var + eps)`` over the unmasked tokens of a batch.

    Args:
        bessel: divide the variance by ``n - 1``.
        eps, eps_mode: added to the variance (``"add"``), its lower bound (``"clamp"``), or added to the
            standard deviation (``"add_to_std"``).
        shift_mean: False keeps the mean.
        whiten_masked: True whitens masked positions too, by the statistics of the others; else they are 0.
    """

    bessel: bool = True
    eps: float = 1e-8
    eps_mode: EpsMode = "add"
    shift_mean: bool = True
    whiten_masked: bool = False

    def __post_init__(self) -> None:
        _check_eps(self.eps)
        check_choice("eps_mode", self.eps_mode, get_args(EpsMode))


def _whitening() -> Whitening:
    """The default, by a function: Dynamo cannot trace an instance that is a default argument."""
    return Whitening()


def _kl(framework: str, got: str, names: Mapping[str, str]) -> str:
    """The estimator that a framework calls ``got``."""
    if got == "full":
        raise ValueError(
            'kl_estimator: got "full", which needs both models\' logits over the whole vocabulary; '
            "compute it there and give it to shape_rewards as kl=KL.given(kl, coef)"
        )
    if got not in names:
        raise ValueError(f"kl_estimator: got {got!r}, want one of {', '.join(names)}, as in {framework}")
    return names[got]


class _Presets:
    """Class methods of ``ShapingConfig``: a framework's defaults, with ``overrides`` of any field.

    With ``credit="sparse"``, the framework's own masks and KL coefficient they give its rewards, advantages
    and returns, and ``whiten(advantages, mask, config.whitening)`` its whitening; with any other credit
    the same estimator on dense rewards. ``rewards`` are 0 at masked tokens in all of them. Names of
    ``kl_estimator`` are the framework's.
    """

    @classmethod
    def verl(cls, *, kl_estimator: str = "k1", **overrides: Any) -> Self:
        """verl 0.9.1: ``apply_kl_penalty``, ``compute_gae_advantage_return``, ``masked_whiten``.

        ``response_mask [B, R]`` is verl's. ``kl_coef`` is 0 there unless ``use_kl_in_reward``, then 0.001.

        verl puts the score on the last attended token, be it a tool's, and loses it where that one is masked
        (verl#6392). Here it is on the last unmasked token; to lose it likewise, flagged in ``status``, give
        ``score_index=attention_mask[:, -R:].sum(1) - 1``. Fewer than two unmasked tokens make verl's
        whitening raise, and ``whiten`` return 0.

        Args:
            kl_estimator: ``kl`` or ``k1``, ``abs``, ``mse`` or ``k2``, ``low_var_kl`` or ``k3``; a trailing
                ``+`` changes gradients only.
        """
        names = {**ESTIMATORS, "kl": "k1", "abs": "abs", "mse": "k2", "low_var_kl": "k3"}
        estimator = _kl("verl", kl_estimator.removesuffix("+"), names)
        clips = {"kl_input_clip": 20.0, "kl_output_clip": 10.0} if estimator == "k3" else {}
        defaults = {
            "gamma": 1.0,
            "lam": 1.0,
            "mask_semantics": "skip",
            "carry_masked": True,
            "mask_layout": "response",
            "kl_estimator": estimator,
            "whitening": Whitening(whiten_masked=True),
            **clips,
        }
        return cls(**{**defaults, **overrides})

    @classmethod
    def trl(
        cls, *, version: Literal["0.11", "1.12"] = "0.11", kl_estimator: str | None = None, **overrides: Any
    ) -> Self:
        """TRL: ``PPOTrainer.compute_rewards`` and ``.compute_advantages``, or what 1.12 has inline.

        ``version="0.11"``: 0.7.4 to 0.11.4. Tensors and masks ``[B, S - 1]`` are those of the whole
        sequence, shifted by one token; ``kl_coef`` is 0.2, adaptive.

        ``version="1.12"``: the rewritten trainer, checked with 1.12.0. The score lands one token past the
        last one, the padding, unless the row is full (trl#3750). So ``response_mask`` is
        ``~padding_mask_p1``, ``whiten`` takes ``~padding_mask``, and log-probabilities of padding are equal
        (TRL sets them to 1); ``kl_coef`` is 0.05.

        ``whiten_rewards=True`` is ``r = whiten(out.rewards, mask, whitening)`` with ``shift_mean=False`` in
        ``config.whitening``, and then ``gae(r, values, mask, config)``. 0.11 does not mask rewards again
        after that, and makes masked tokens steps with what whitening left there: ``gae(r, values * mask,
        torch.ones_like(mask), config)``.

        Args:
            kl_estimator: ``kl`` (default), ``abs`` or ``mse``; 1.12: ``k1`` (default) or ``k3``. ``full``
                needs logits and raises.
        """
        if version not in ("0.11", "1.12"):
            raise ValueError(f'version: got {version!r}, want "0.11" or "1.12"')
        classic = version == "0.11"
        names = {"kl": "k1", "abs": "abs", "mse": "k2"} if classic else {"k1": "k1", "k3": "k3"}
        defaults = {
            "gamma": 1.0,
            "lam": 0.95,
            "mask_semantics": "zero",
            "carry_masked": classic,
            "mask_layout": "any" if classic else "prefix",
            "kl_estimator": _kl(f"TRL {version}", kl_estimator or next(iter(names)), names),
            "whitening": Whitening(whiten_masked=classic),
        }
        return cls(**{**defaults, **overrides})

    @classmethod
    def openrlhf(cls, *, kl_estimator: str = "k1", **overrides: Any) -> Self:
        """OpenRLHF 0.11.2: ``compute_reward``, ``get_advantages_and_returns``, and its whitening.

        ``response_mask`` is ``action_mask``, holes allowed; the whitening's statistics are over all
        experiences; ``kl_coef`` is 0.01, adaptive.

        Args:
            kl_estimator: ``k1``, ``k2`` or ``k3``.
        """
        defaults = {
            "gamma": 1.0,
            "lam": 1.0,
            "mask_semantics": "zero",
            "carry_masked": True,
            "score_clip": 10.0,
            "kl_estimator": _kl("OpenRLHF", kl_estimator, ESTIMATORS),
            "kl_output_clip": 10.0,
            "whitening": Whitening(bessel=False, eps_mode="clamp", whiten_masked=True),
        }
        return cls(**{**defaults, **overrides})

    @classmethod
    def slime(cls, *, kl_estimator: str = "k1", **overrides: Any) -> Self:
        """slime 624b824: ``compute_advantages_and_returns`` of its Megatron backend, ``chunked_gae``.

        slime does not mask GAE: a tool's token is a step with its KL and value (slime#1370 says so of
        REINFORCE++). So ``response_mask`` is 1 on every token of a response, and ``loss_masks`` go to
        ``whiten`` alone; padded or packed, the last token of a response carries the score. ``kl_coef`` is 0;
        advantages are whitened only with ``--normalize-advantages``.

        Args:
            kl_estimator: ``k1``, ``k2``, ``k3``, or ``low_var_kl``, which is ``k3`` clamped.
        """
        clip = {"kl_output_clip": 10.0} if kl_estimator == "low_var_kl" else {}
        defaults = {
            "gamma": 1.0,
            "lam": 1.0,
            "mask_semantics": "zero",
            "mask_layout": "prefix",
            "kl_estimator": _kl("slime", kl_estimator, {**ESTIMATORS, "low_var_kl": "k3"}),
            "whitening": Whitening(whiten_masked=True),
            **clip,
        }
        return cls(**{**defaults, **overrides})

    @classmethod
    def nemo_rl(cls, *, kl_estimator: str = "k3", **overrides: Any) -> Self:
        """NeMo-RL 7ea279a: ``GeneralizedAdvantageEstimator``.

        ``response_mask`` is its token mask over ``[B, S]``. ``lam`` is ``gae_lambda_policy``, or per row
        ``1 - 1 / (alpha * length)``; ``lam_value`` is ``gae_lambda_value``. ``kl_coef`` is 0 unless
        ``use_kl_in_reward``. At masked tokens its returns are kept and its advantages 0, as after ``whiten``.

        Args:
            kl_estimator: ``k1``, ``k2`` or ``k3``.
        """
        defaults = {
            "gamma": 1.0,
            "lam": 0.95,
            "mask_semantics": "skip",
            "carry_masked": True,
            "kl_estimator": _kl("NeMo-RL", kl_estimator, ESTIMATORS),
            "kl_input_clip": 20.0,
            "kl_output_clip": 10.0,
            "whitening": Whitening(),
        }
        return cls(**{**defaults, **overrides})

    @classmethod
    def areal(cls, *, kl_estimator: str = "k1", **overrides: Any) -> Self:
        """AReaL 1.0.4: ``PPOActor._compute_advantages`` and ``Normalization``.

        Masks and log-probabilities ``[B, S]`` are rolled by -1, as AReaL has them by then; a full row goes
        on: ``bootstrap=values[:, -1] * (attention_mask.sum(1) == S)``. ``kl_coef`` is 0.1; advantages are
        not normalised unless ``adv_norm`` is set.

        AReaL puts the score on the place of the last attended token and loses it where that one is masked.
        Here it is on the last unmasked token; to lose it likewise, flagged in ``status``, give
        ``score_index=(attention_mask.sum(1) - 2).clamp(min=0)``.

        Args:
            kl_estimator: ``k1``, ``k2`` or ``k3``.
        """
        defaults = {
            "gamma": 1.0,
            "lam": 1.0,
            "mask_semantics": "skip",
            "carry_masked": True,
            "mask_layout": "rolled",
            "score_clip": 20.0,
            "kl_estimator": _kl("AReaL", kl_estimator, ESTIMATORS),
            "kl_output_clip": 10.0,
            "whitening": Whitening(eps=1e-5, eps_mode="add_to_std"),
        }
        return cls(**{**defaults, **overrides})


@dataclass(frozen=True, kw_only=True, eq=False)
class ShapingConfig(_Presets):
    """How a score becomes token rewards, and rewards become advantages.

    ``dense_share`` is that of "Dense Reward for Free in RLHF" (arXiv 2402.00782), ``lam`` that of verl,
    OpenRLHF and slime. ``ShapingConfig.verl()``, ``.trl()``, ``.openrlhf()``, ``.slime()``, ``.nemo_rl()``
    and ``.areal()`` are the frameworks' own.

    Args:
        dense_share: share of the score that is redistributed by the credit, 0 to 1 (the paper's beta); the
            rest stays on the score's token.
        gamma: discount per token.
        lam: GAE's lambda, a float or one per row, ``[B]``.
        lam_value: lambda of the returns where it differs from ``lam`` (decoupled GAE).
        mask_semantics: what a masked token inside a response is to GAE. ``"skip"``: nothing, values and
            advantages pass through (verl, NeMo-RL, AReaL). ``"zero"``: a step with reward and value 0 (TRL,
            OpenRLHF, slime).
        carry_masked: True leaves at masked tokens what frameworks leave there: advantages that the recurrence
            carries past them, and returns that are their sum with the value (``"zero"``: 0). Padded tokens
            only. Else masked tokens are 0.
        mask_layout: what ``validate=True`` holds the response mask to. ``"response"``: a row's first token is
            unmasked. ``"prefix"``: no masked token stands before an unmasked one. ``"rolled"``: the last
            token is masked.
        normalization: of the credit: ``"sum_to_one"``, ``"sum_to_length"`` or ``"none"``.
        score_index: the score's token: ``"last_unmasked"``, ``"last_token"`` (masked or not), or int ``[B]``.
        score_clip: the score is clamped to ``[-score_clip, score_clip]``, or to this pair, before use.
        kl_estimator: ``"k1"``, ``"abs"``, ``"k2"`` or ``"k3"`` (http://joschu.net/blog/kl-approx.html).
        kl_input_clip: ``logprobs - ref_logprobs`` is clamped to ``[-c, c]``.
        kl_output_clip: the estimate is clamped to ``[-c, c]``.
        on_nan: a row with a non-finite output keeps it, or becomes 0; flagged in ``status`` either way.
        whitening: for the caller: ``whiten(out.advantages, response, config.whitening)``.

    Raises:
        ValueError, TypeError: a value out of its range, or none of its choices.

    Examples:
        >>> ShapingConfig(dense_share=1.5)
        Traceback (most recent call last):
        ValueError: dense_share: got 1.5, want a number from 0 to 1
    """

    dense_share: float = 0.8
    gamma: float = 1.0
    lam: float | Tensor = 1.0
    lam_value: float | Tensor | None = None
    mask_semantics: MaskSemantics = "skip"
    carry_masked: bool = False
    mask_layout: MaskLayout = "any"
    normalization: Normalization = "sum_to_one"
    score_index: ScoreIndex | Tensor = "last_unmasked"
    score_clip: float | tuple[float, float] | None = None
    kl_estimator: KLEstimator = "k1"
    kl_input_clip: float | None = None
    kl_output_clip: float | None = None
    on_nan: OnNaN = "propagate"
    whitening: Whitening = field(default_factory=_whitening)

    def __post_init__(self) -> None:
        _check_unit("dense_share", self.dense_share)
        _check_unit("gamma", self.gamma)
        for name in ("lam", "lam_value"):
            x = getattr(self, name)
            if x is not None and not isinstance(x, Tensor):
                _check_unit(name, x)
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        if not isinstance(self.score_index, Tensor) and self.score_index not in get_args(ScoreIndex):
            raise ValueError(
                f'score_index: got {self.score_index!r}, want "last_unmasked", "last_token" or int [B]'
            )
        for name in ("kl_input_clip", "kl_output_clip"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), TINY, math.inf, "a positive number or None")
        bounds = self.score_bounds
        for bound in bounds:
            _check_number("score_clip", bound, -math.inf, math.inf, CLIP)
        if len(bounds) != 2 or not bounds[0] <= bounds[1]:
            raise ValueError(f"score_clip: got {self.score_clip}, want {CLIP}")
        if not isinstance(self.whitening, Whitening):
            raise TypeError(f"whitening: got {type(self.whitening).__name__}, want Whitening")

    @property
    def score_bounds(self) -> tuple[float, float]:
        """``score_clip`` as ``(low, high)``; infinite where the score is not clamped."""
        if self.score_clip is None:
            return -math.inf, math.inf
        if isinstance(self.score_clip, tuple):
            return self.score_clip
        _check_number("score_clip", self.score_clip, TINY, math.inf, CLIP)
        return -self.score_clip, self.score_clip

    def share(self, credit: object) -> float:
        """``dense_share``; 1 where all credit is on the score's token, whose reward is then exact."""
        sparse = isinstance(credit, str) and credit == "sparse" and self.normalization != "sum_to_length"
        return 1.0 if sparse else self.dense_share


CHOICES = {
    "mask_semantics": get_args(MaskSemantics),
    "mask_layout": get_args(MaskLayout),
    "normalization": get_args(Normalization),
    "kl_estimator": get_args(KLEstimator),
    "on_nan": get_args(OnNaN),
}


class _GroupPresets:
    """Class methods of ``GroupConfig``: an estimator as a framework has it, with ``overrides``."""

    @classmethod
    def grpo(cls, *, framework: Literal["trl", "verl", "openrlhf"] = "trl", **overrides: Any) -> Self:
        """GRPO (arXiv 2402.03300): ``(s - mean of the group) / (std of the group + eps)``.

        TRL 1.16.0 ``GRPOTrainer``: eps 1e-4. verl 0.9.1 ``compute_grpo_outcome_advantage``: 1e-6, and a group
        of one keeps its score. OpenRLHF 0.11.2 ``group_norm``: 1e-9.
        """
        eps = {"trl": 1e-4, "verl": 1e-6, "openrlhf": 1e-9}
        check_choice("framework", framework, tuple(eps))
        lone: Any = "score" if framework == "verl" else "zero"
        defaults = {"baseline": "mean", "scale": "group", "eps": eps[framework], "lone": lone}
        return cls(**{**defaults, **overrides})

    @classmethod
    def dr_grpo(cls, **overrides: Any) -> Self:
        """Dr. GRPO (arXiv 2503.20783): ``s - mean of the group``."""
        return cls(**{"baseline": "mean", "scale": "none", **overrides})

    @classmethod
    def rloo(cls, **overrides: Any) -> Self:
        """RLOO (arXiv 2402.14740): ``s - mean of the group's others``; a group of one keeps its score."""
        return cls(**{"baseline": "leave_one_out", "scale": "none", "lone": "score", **overrides})

    @classmethod
    def reinforce_plus_plus(cls, *, baseline: bool = False, **overrides: Any) -> Self:
        """REINFORCE++ (arXiv 2501.03262): ``s``, or ``s - mean of the group``; then ``config.whitening``.

        The whitening is over the batch's tokens, by the caller: ``whiten(out.advantages, response,
        config.whitening)``. With a KL penalty in the rewards use ``shape_rewards`` without values.
        """
        return cls(**{"baseline": "mean" if baseline else "none", "scale": "none", **overrides})


@dataclass(frozen=True, kw_only=True)
class GroupConfig(_GroupPresets):
    """How scores become advantages without a critic, and an advantage is spread over its tokens.

    ``A[i, t] = A[i] * (dense_share * n_i * credit[i, t] + 1 - dense_share)``: the mean over a row's ``n_i``
    unmasked tokens is ``A[i]``, and ``dense_share=0`` is the framework's own run.

    Args:
        baseline: what is subtracted from a score: the mean of its ``"group"``'s (``"mean"``), of the group's
            others (``"leave_one_out"``), of the batch (``"batch"``), or nothing (``"none"``).
        scale: what it is divided by: the standard deviation of the group's scores (``"group"``), of the
            batch's (``"batch"``), or nothing (``"none"``).
        eps: added to the standard deviation.
        bessel: divide the variance by ``n - 1``.
        lone: what a group of one gives: its ``"score"``, as if its mean were 0 and its deviation 1, or
            ``"zero"``.
        dense_share: share of the advantage that the credit spreads, 0 to 1.
        signed: given weights have signs, and enter centred, with ``sum |w| = 1``. ``"shares"``: they say
            which share of the advantage is a token's (``credit.signed_rollout``):
            ``A[i] + dense_share * A[i] * n_i * (w - mean w)``. ``"score"``: they say what raised the score
            and what lowered it (gradient × value, process rewards), which a negative ``A[i]`` must not
            turn around: ``A[i] + dense_share * |A[i]| * n_i * (w - mean w)``.
        whitening: for the caller, after it.

    Raises:
        ValueError, TypeError: a value out of its range, or none of its choices.

    Examples:
        >>> GroupConfig.grpo().scale
        'group'
    """

    baseline: Baseline = "mean"
    scale: Scale = "group"
    eps: float = 1e-4
    bessel: bool = True
    lone: Literal["score", "zero"] = "zero"
    dense_share: float = 0.8
    signed: Signed | None = None
    whitening: Whitening = field(default_factory=_whitening)

    def __post_init__(self) -> None:
        _check_unit("dense_share", self.dense_share)
        check_choice("baseline", self.baseline, get_args(Baseline))
        check_choice("scale", self.scale, get_args(Scale))
        check_choice("lone", self.lone, ("score", "zero"))
        check_choice("signed", self.signed, (None, *get_args(Signed)))
        _check_eps(self.eps)
        if not isinstance(self.whitening, Whitening):
            raise TypeError(f"whitening: got {type(self.whitening).__name__}, want Whitening")
