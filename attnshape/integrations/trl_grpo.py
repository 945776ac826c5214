"""TRL's ``GRPOTrainer`` with credit: each advantage spread over the tokens that the reward model looked at.

    from attnshape import CreditModel
    from attnshape.integrations.trl import GRPOTrainer

    judge = CreditModel("reward-model")
    trainer = GRPOTrainer("policy", ["reward-model", rule], args, dataset, credit=judge, dense_share=0.8)

``A[i]`` is TRL's own, and ``A[i, t] = A[i] * (dense_share * n_i * credit[i, t] + 1 - dense_share)``: the mean
over a completion's tokens stays. With ``dense_share=0`` a run is the plain trainer's, to the bit. The reward
model is read in the forward that TRL scores with. With TRL's ``log_completions=True`` each table of
completions, every ``logging_steps``, has a page beside it, ``completions_00010.html``, coloured by credit.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from attnshape.config import GroupConfig, Signed
from attnshape.integrations.framework import require_parameters
from attnshape.ops import DEFAULT_CONFIG, group_advantages, shape_rewards
from attnshape.text.align import align
from attnshape.text.html import CreditItem, View, credit_page
from attnshape.text.model import CreditModel
from attnshape.text.place import Messages, whole
from attnshape.text.source import CreditSource
from attnshape.text.texts import decoded_spans
from attnshape.text.turns import Turn, spans_in_text, turns_of
from attnshape.types import Response, Status
from attnshape.vectorized.groups import completion_advantages

_METHODS = {
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("inputs",),
}
_OF_SIGNS = ("get_off_policy_mask", "get_gamma_weights")
"""Those that drop or weigh a whole completion by the sign of its advantage: off-policy masks, VESPO."""
_EPS = 1e-4
"""TRL's, added to standard deviations."""


class _Recorder:
    """A reward model's tokenizer that remembers what TRL has it read."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.options: list[dict[str, Any]] = []
        """Of the chat template, for each conversation; empty where texts were not conversations."""
        self.texts: list[str] = []
        self.offsets = torch.zeros(0, 0, 2, dtype=torch.int64)
        """``[B, S, 2]``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def apply_chat_template(self, conversation: Messages, **options: Any) -> Any:
        self.options.append({name: value for name, value in options.items() if name != "tokenize"})
        return self.tokenizer.apply_chat_template(conversation, **options)

    def __call__(self, text: list[str], **options: Any) -> Any:
        encoded = self.tokenizer(text=text, return_offsets_mapping=True, **options)
        self.texts, self.offsets = text, encoded.pop("offset_mapping")
        return encoded


class _Tapped(nn.Module):
    """A reward model that keeps what its credit is made of."""

    def __init__(self, model: nn.Module, source: CreditSource) -> None:
        super().__init__()
        self.model, self.source, self._tap = model, source, source.tap(model)
        self.taken: Any = None
        self.score = torch.zeros(0)

    def forward(self, **inputs: Any) -> Any:
        with self.source.opened(self._tap):
            out = self.model(**inputs)
            self.taken, self.score = self._tap.take(), out.logits[:, 0].float()
        return out

    def weights(self, response: Response) -> Tensor:
        """``[B, S]`` on the tokens that the model read; once."""
        taken, self.taken = self.taken, None
        return self.source.weights(taken, self.score, response)


class _Reading(NamedTuple):
    """One reward model's scoring of this process's completions."""

    tokenizer: _Recorder
    model: _Tapped


class _Page(NamedTuple):
    """What a page shows of one generation: this process's completions."""

    prompts: Sequence[Any]
    ids: Sequence[Sequence[int]]
    mask: Tensor
    """``[B, T]``."""
    scores: Tensor
    """``[B, K]``, of the reward models that have credit."""
    credits: dict[str, tuple[Tensor, dict[str, Tensor]]]
    """Of each of them what each token is paid, ``[B, T]``, summing to the score; and the credit's metrics."""
    advantages: Tensor
    """``[B, T]``, or ``[B]`` where nothing is spread."""

    def items(self, tokenizer: Any) -> list[CreditItem]:
        out = []
        count = self.mask.sum(1, keepdim=True).clamp(min=1)
        advantages = self.advantages if self.advantages.ndim == 2 else self.advantages[:, None] * self.mask
        for b, (prompt, ids) in enumerate(zip(self.prompts, self.ids, strict=True)):
            text, offsets = decoded_spans(tokenizer, list(ids))
            columns = [(name, paid[b], metrics) for name, (paid, metrics) in self.credits.items()]
            columns.append(("advantage", (advantages / count)[b], {}))
            views = [
                View(
                    name,
                    _on_pieces(offsets, text, column.tolist())[1],
                    {key: float(x[b]) for key, x in metrics.items() if not math.isnan(x[b])},
                )
                for name, column, metrics in columns
            ]
            if not isinstance(prompt, str):
                prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
            pieces, _ = _on_pieces(offsets, text, [0.0] * len(ids))
            note = f"advantage {float(advantages[b].sum() / count[b]):.4g}"
            out.append(CreditItem(prompt, pieces, float(self.scores[b, 0]), views, note))
        return out


def _on_pieces(
    offsets: Sequence[tuple[int, int]], text: str, column: Sequence[float]
) -> tuple[list[str], list[float]]:
    """What each token adds to ``text``, and what that is paid; a token without text joins the last."""
    pieces, paid, shown = [""], [0.0], 0
    for (_, end), x in zip(offsets, column, strict=False):
        if end > shown:
            pieces.append(text[shown:end])
            paid.append(x)
            shown = end
        else:
            paid[-1] += x
    return pieces, paid


class _Credit(NamedTuple):
    """Of one reward model on the policy's tokens."""

    weights: Tensor
    """``[B, T]``; all 0 where the policy's text is not found in what the reward model read."""
    metrics: dict[str, Tensor]
    """``[B]`` each; NaN in completions that have none."""


def shaped_grpo_trainer(base: type[Any]) -> type[Any]:
    """``base``, which is TRL's ``GRPOTrainer`` or a subclass of it, with credit.

    Raises:
        RuntimeError: a method that is extended takes other arguments than in the releases that were tested.
    """
    for name, parameters in _METHODS.items():
        require_parameters(getattr(base, name), "self", *parameters)

    class GRPOTrainer(base):  # type: ignore[misc]
        """TRL's ``GRPOTrainer`` whose advantages are spread over tokens by a reward model's credit.

        Args:
            credit: a ``CreditModel``, or several, each of a model that is one of ``reward_funcs``: the same
                folder, hub name or module. The other functions' parts of an advantage stay uniform.
            dense_share: share of a reward's part of the advantage that its credit spreads, 0 to 1.
            baseline: ``"mean"`` of the group, as TRL has it, or of the group's others: ``"leave_one_out"``,
                which with ``scale_rewards="none"`` is RLOO's advantage.

        Other arguments are TRL's.

        Raises:
            ValueError: a credit model that is none of ``reward_funcs``, or whose score is not the first
                logit, which is TRL's; importance sampling at sequence level.
        """

        reward_funcs: Any
        reward_processing_classes: Any

        def __init__(
            self,
            *args: Any,
            credit: CreditModel | Sequence[CreditModel] | None = None,
            dense_share: float = DEFAULT_CONFIG.dense_share,
            baseline: Literal["mean", "leave_one_out"] = "mean",
            **kwargs: Any,
        ) -> None:
            if baseline not in ("mean", "leave_one_out"):
                raise ValueError(f"baseline: got {baseline!r}, want 'mean' or 'leave_one_out'")
            credits = [credit] if isinstance(credit, CreditModel) else list(credit or ())
            signed = {_signed(each.source) for each in credits} or {None}
            if len(signed) > 1:
                raise ValueError("credit: got signed and unsigned sources, want all of one kind")
            bound = inspect.signature(base.__init__).bind(self, *args, **kwargs)
            self._credits = _place_credits(credits, bound.arguments)
            super().__init__(*bound.args[1:], **bound.kwargs)
            if credits:
                _check_loss(self, base)
            self._baseline = baseline
            self._spread = GroupConfig(
                baseline="none", scale="none", dense_share=dense_share, signed=signed.pop()
            )
            self._readings: dict[int, _Reading] = {}
            self._completions: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
            self._rewards = torch.zeros(0, 0)
            self._page: _Page | None = None

        def _calculate_rewards(
            self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
        ) -> Tensor:
            functions, tokenizers = self.reward_funcs, self.reward_processing_classes
            self._readings = {
                i: _Reading(_Recorder(tokenizers[i]), _Tapped(functions[i], source))
                for i, source in self._credits.items()
            }
            self.reward_funcs, self.reward_processing_classes = list(functions), list(tokenizers)
            for i, reading in self._readings.items():
                self.reward_funcs[i], self.reward_processing_classes[i] = reading.model, reading.tokenizer
            try:
                rewards: Tensor = super()._calculate_rewards(
                    inputs, prompts, completions, completion_ids_list
                )
            finally:
                self.reward_funcs, self.reward_processing_classes = functions, tokenizers
            self._completions = (prompts, completions, completion_ids_list)
            self._rewards = rewards
            return rewards

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            out: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if not self._credits and self._baseline == "mean":
                return out
            everyone = self._parts().to(out["advantages"].device)
            rows = len(out["advantages"])
            place = slice(self.accelerator.process_index * rows, (self.accelerator.process_index + 1) * rows)
            parts, own = everyone[place], out["advantages"]
            if self._baseline == "leave_one_out":
                own = out["advantages"] = parts.sum(1).to(own.dtype)
                _replace_last(self._logs["advantages"], everyone.sum(1).float().tolist())
            else:
                _check_parts(parts, own, self._rewards)
            mask = out["completion_mask"]
            if "tool_mask" in out:
                mask = mask * out["tool_mask"]
            names = self.reward_func_names
            spreads: list[Tensor | None] = []
            shown: dict[str, tuple[Tensor, dict[str, Tensor]]] = {}
            for i, reading in self._readings.items():
                found = self._credit_of(reading, mask)
                self._log_credit("credit" if len(self._credits) == 1 else f"credit/{names[i]}", found)
                spreads.append(found.weights)
                shown[names[i]] = found.weights, found.metrics
            self._readings = {}
            if self._credits and self.log_completions and self.accelerator.is_main_process:
                self._page = self._page_of(shown, mask, place, out)
            if self._spread.dense_share == 0 or not self._credits:
                return out
            if parts.shape[1] == 1:
                scores = own[:, None]
            else:
                with_credit = parts[:, list(self._credits)]
                scores = torch.cat([with_credit, own[:, None] - with_credit.sum(1, keepdim=True)], 1)
                spreads.append(None)
            out["advantages"] = group_advantages(
                scores.float(), spreads, mask, group=1, config=self._spread
            ).advantages
            if self._page is not None:
                self._page = self._page._replace(advantages=out["advantages"])
            return out

        def _page_of(
            self,
            credits: dict[str, tuple[Tensor, dict[str, Tensor]]],
            mask: Tensor,
            place: slice,
            out: dict[str, Any],
        ) -> _Page:
            scores = self._rewards[place][:, list(self._credits)].to(mask.device).float()
            whole, count = dataclasses.replace(self._spread, dense_share=1.0), mask.sum(1, keepdim=True)
            paid = {
                name: (
                    group_advantages(scores[:, k], weights, mask, group=1, config=whole).advantages
                    / count.clamp(min=1),
                    {key: x for key, x in metrics.items() if key in ("entropy", "response_attention")},
                )
                for k, (name, (weights, metrics)) in enumerate(credits.items())
            }
            prompts, _, ids = self._completions
            return _Page(prompts, ids, mask, scores, paid, out["advantages"])

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            """TRL's; beside its completions table (``log_completions``) a page, coloured by credit."""
            super().log(logs, *args, **kwargs)
            if self._page is not None:
                step, folder = self.state.global_step, Path(self.args.output_dir, "completions")
                folder.mkdir(parents=True, exist_ok=True)
                policy = getattr(self.processing_class, "tokenizer", self.processing_class)
                page = credit_page(f"Completions at step {step}", self._page.items(policy))
                (folder / f"completions_{step:05d}.html").write_text(page, encoding="utf-8")
                self._page = None

        def _parts(self) -> Tensor:
            """``[N, K]`` float64: each reward's part of each advantage, over all processes."""
            mode = "train" if self.model.training else "eval"
            group = self.num_generations if mode == "train" else self.num_generations_eval
            rewards, weights = self._rewards, self.reward_weights.to(self._rewards.device)
            scale: Any = {True: "group", False: "none"}.get(self.scale_rewards, self.scale_rewards)
            each = GroupConfig(baseline=self._baseline, scale=scale, eps=_EPS, bessel=True, lone="zero")
            if getattr(self, "multi_objective_aggregation", "sum_then_normalize") == "sum_then_normalize":
                return completion_advantages(rewards, group, each, weights)
            each = GroupConfig(baseline=self._baseline, scale="group", eps=_EPS, bessel=True, lone="zero")
            normalized = torch.cat(
                [completion_advantages(column, group, each, None) for column in rewards.T], 1
            )
            normalized[rewards.isnan().all(1)] = math.nan
            whole = GroupConfig(baseline="batch", scale="batch", eps=_EPS, bessel=True)
            return completion_advantages(normalized, group, whole, weights)

        def _credit_of(self, reading: _Reading, mask: Tensor) -> _Credit:
            recorder, tapped = reading
            policy = getattr(self.processing_class, "tokenizer", self.processing_class)
            spans, found = [], []
            for b, (prompt, completion, ids) in enumerate(zip(*self._completions, strict=True)):
                text = recorder.texts[b]
                turns: list[Turn | None] = []
                if recorder.options:
                    turns = turns_of(recorder.tokenizer, prompt, completion, text, recorder.options[b])
                elif text == prompt + completion:
                    turns = [Turn(completion, whole(completion, len(prompt)))]
                placed = spans_in_text(turns, policy, ids, mask[b, : len(ids)].tolist())
                found.append(placed is not None)
                spans.append([(0, 0)] * len(ids) if placed is None else placed)
            carry = align(recorder.offsets, spans)
            device = tapped.score.device
            response = Response(
                carry.source_mask.to(device), start=torch.zeros(len(spans), dtype=torch.int32, device=device)
            )
            of_reader = tapped.weights(response)
            weights = of_reader.new_zeros(mask.shape)
            carried = carry(of_reader)
            weights[:, : carried.shape[1]] = carried
            weights = weights.to(mask.device)
            # A completion that the model has no number for keeps TRL's advantage, which is 0 if none has.
            weights[~weights.isfinite().all(1)] = 0.0
            shaped = shape_rewards(weights.new_zeros(len(weights)), weights.abs(), mask)
            empty = (shaped.status & int(Status.EMPTY)) != 0
            lost = ((shaped.status & int(Status.FALLBACK)) != 0) | ~torch.tensor(found, device=mask.device)
            metrics = {
                "entropy": shaped.row_stats.entropy.masked_fill(lost | empty, math.nan),
                "last_share": shaped.row_stats.last_share.masked_fill(lost | empty, math.nan),
                "fallback": lost.float().masked_fill(empty, math.nan),
            }
            if tapped.source.name == "attention":
                attention = of_reader.sum(1).to(mask.device)
                metrics["response_attention"] = attention.masked_fill(lost | empty, math.nan)
            return _Credit(weights, metrics)

        def _log_credit(self, prefix: str, credit: _Credit) -> None:
            """Means over all processes' completions, and a column of the completions table."""
            mode = "train" if self.model.training else "eval"
            for name, column in credit.metrics.items():
                given = ~column.isnan()
                sums = torch.stack([column.nan_to_num().sum(), given.sum().float()])
                total, count = self.accelerator.gather(sums).view(-1, 2).sum(0).tolist()
                self._metrics[mode][f"{prefix}/{name}"].append(total / count if count else math.nan)
            if "extra" in self._logs:
                entropies = self.accelerator.gather(credit.metrics["entropy"]).tolist()
                self._logs["extra"][f"{prefix}/entropy"].extend(entropies)

    GRPOTrainer.__qualname__ = "GRPOTrainer"
    for name in _OF_SIGNS:
        if hasattr(base, name):
            setattr(GRPOTrainer, name, staticmethod(_of_completions(getattr(base, name))))
    return GRPOTrainer


def _of_completions(theirs: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``theirs``, given ``[B, 1]`` of the same sign as TRL's own in the place of advantages ``[B, T]``.

    Signed credit gives a bad completion tokens above zero too; taken by themselves they would be kept of one
    that is dropped, and it would be rewarded.
    """
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def of_completions(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs)
        advantages, mask = given.arguments["advantages"], given.arguments["mask"]
        if advantages.shape[1] > 1:
            given.arguments["advantages"] = (advantages * mask).sum(1, keepdim=True)
        return theirs(*given.args, **given.kwargs)

    return of_completions


def _signed(source: CreditSource) -> Signed | None:
    if source.signed:
        return "score" if source.of_score else "shares"
    return None


def _place_credits(credits: Sequence[CreditModel], given: dict[str, Any]) -> dict[int, CreditSource]:
    """Which reward function each is of; a folder among TRL's arguments becomes the model that is loaded."""
    functions = given.get("reward_funcs")
    functions = list(functions) if isinstance(functions, list) else [functions]
    tokenizers = given.get("reward_processing_classes")
    if not isinstance(tokenizers, list):
        tokenizers = [tokenizers] * (1 if tokenizers is not None else len(functions))
    tokenizers = list(tokenizers)
    sources: dict[int, CreditSource] = {}
    for credit in credits:
        at = [i for i, f in enumerate(functions) if f is credit.model or f == credit.name]
        if len(at) != 1 or at[0] in sources:
            names = [f if isinstance(f, str) else getattr(f, "__name__", type(f).__name__) for f in functions]
            raise ValueError(
                f"credit: {credit.name!r} must be one of reward_funcs, once, got {names}; a function that "
                "asks a reward model itself hides the forward that is read: give the model in its place"
            )
        if credit.score_fn.terms not in (((1.0, None),), ((1.0, 0),)):
            raise ValueError(
                "credit: got a score_fn, but TRL's score is the first logit: want score_fn='logit[0]'"
            )
        i = at[0]
        sources[i] = credit.source
        functions[i] = credit.model
        if i < len(tokenizers) and tokenizers[i] is None:
            tokenizers[i] = credit.tokenizer
    if credits:
        given["reward_funcs"], given["reward_processing_classes"] = functions, tokenizers
    return dict(sorted(sources.items()))


def _check_loss(trainer: Any, base: type[Any]) -> None:
    if trainer.importance_sampling_level == "sequence":
        raise ValueError(
            "importance_sampling_level: got 'sequence' (GSPO), whose loss has one ratio and one advantage "
            "per completion, so that credit per token means nothing there; want 'token', or no credit"
        )
    if getattr(trainer, "use_liger_kernel", False) and hasattr(base, "compute_liger_loss"):
        raise ValueError(
            "use_liger_kernel: that loss takes one advantage per completion, want False with credit"
        )


def _check_parts(parts: Tensor, own: Tensor, rewards: Tensor) -> None:
    """Raises RuntimeError where TRL's advantages are not made as those that are spread."""
    rounding = 1e-2 * rewards.nan_to_num().abs().amax()  # of float32, over TRL's eps
    off = (parts.sum(1) - own).abs() - 1e-3 * (1 + own.abs()) - rounding
    if bool((off > 0).any()):
        i = int(off.argmax())
        raise RuntimeError(
            f"TRL's advantage of completion {i} is {own[i].item():.6g}, by the rewards it is "
            f"{parts[i].sum().item():.6g}: another version of TRL, or a subclass that changes advantages?"
        )


def _replace_last(log: Any, values: Sequence[float]) -> None:
    """In a log that was just extended by as many values, of which it may have dropped the first."""
    for _ in range(min(len(values), len(log))):
        log.pop()
    log.extend(values)
