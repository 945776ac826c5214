"""``ShapingConfig`` as the PPO frameworks have it: each preset a dictionary of settings with its sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

KL: Mapping[str, str] = {"k1": "k1", "k2": "k2", "k3": "k3"}


def _kl(framework: str, got: str, names: Mapping[str, str]) -> str:
    """The estimator that a framework calls ``got``."""
    if got == "full":
        raise ValueError(
            'kl_estimator: got "full", which needs both models\' logits over the whole vocabulary; '
            "compute it there and give it to shape_rewards as kl"
        )
    if got not in names:
        raise ValueError(f"kl_estimator: got {got!r}, want one of {', '.join(names)}, as in {framework}")
    return names[got]


class Presets:
    """Class methods of ``ShapingConfig``: a framework's defaults, with ``overrides`` of any field.

    With ``credit="sparse"``, the framework's own masks and KL coefficient they give its rewards, advantages
    and returns, and ``whiten(advantages, mask, **config.whitening)`` its whitening; with any other credit
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
        names = {**KL, "kl": "k1", "abs": "abs", "mse": "k2", "low_var_kl": "k3"}
        estimator = _kl("verl", kl_estimator.removesuffix("+"), names)
        clips = {"kl_input_clip": 20.0, "kl_output_clip": 10.0} if estimator == "k3" else {}
        defaults = {
            "gamma": 1.0,
            "lam": 1.0,
            "mask_semantics": "skip",
            "zero_masked": False,
            "mask_layout": "response",
            "kl_estimator": estimator,
            "whitening": {"zero_masked": False},
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

        ``whiten_rewards=True`` is ``r = whiten(out.rewards, mask, shift_mean=False, **config.whitening)``
        and then ``gae(r, values, mask, ...)``. 0.11 does not mask rewards again after that, and makes masked
        tokens steps with what whitening left there: reproduced by ``gae(r, values * mask,
        torch.ones_like(mask), ...)``.

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
            "zero_masked": not classic,
            "mask_layout": "any" if classic else "prefix",
            "kl_estimator": _kl(f"TRL {version}", kl_estimator or next(iter(names)), names),
            "whitening": {"zero_masked": not classic},
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
            "zero_masked": False,
            "score_clip": 10.0,
            "kl_estimator": _kl("OpenRLHF", kl_estimator, KL),
            "kl_output_clip": 10.0,
            "whitening": {"bessel": False, "eps_mode": "clamp", "zero_masked": False},
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
            "kl_estimator": _kl("slime", kl_estimator, {**KL, "low_var_kl": "k3"}),
            "whitening": {"zero_masked": False},
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
            "zero_masked": False,
            "kl_estimator": _kl("NeMo-RL", kl_estimator, KL),
            "kl_input_clip": 20.0,
            "kl_output_clip": 10.0,
            "whitening": {},
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
            "zero_masked": False,
            "mask_layout": "rolled",
            "score_clip": 20.0,
            "kl_estimator": _kl("AReaL", kl_estimator, KL),
            "kl_output_clip": 10.0,
            "whitening": {"eps": 1e-5, "eps_mode": "add_to_std"},
        }
        return cls(**{**defaults, **overrides})
