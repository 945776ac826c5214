"""What the loop over rows is told, and what it gives back."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attnshape.config import Normalization, ShapingConfig
from attnshape.cpu import memory, rewards, rows
from attnshape.cpu.advantages import WAYS
from attnshape.cpu.attention import raw_credit
from attnshape.cpu.layout import NO_BOUNDS, bounds_of
from attnshape.cpu.memory import COLUMNS, F32_PAST, KIND, counted, place_of
from attnshape.cpu.threads import over_rows, scratch
from attnshape.types import (
    KL,
    Advantages,
    AttentionInputs,
    CreditName,
    Response,
    RowStats,
    ShapedRewards,
    TokenInputs,
    compute_dtype,
    decay,
    float32_rounded,
)
from attnshape.vectorized import groups

NORMALIZATIONS = {"sum_to_one": rows.TO_ONE, "sum_to_length": rows.TO_LENGTH, "none": rows.AS_IS}
ESTIMATORS = {"k1": rewards.K1, "abs": rewards.ABS, "k2": rewards.K2, "k3": rewards.K3}
SOURCES = {"uniform": rows.UNIFORM, "sparse": rows.SPARSE}
SCORE_PLACES = {"last_unmasked": rows.LAST_UNMASKED, "last_token": rows.LAST_TOKEN}
NO_ROWS = np.empty(0, np.uint8)


class Call:
    """The arguments of one sweep over the rows of a response."""

    def __init__(self, response: Response, dtype: torch.dtype) -> None:
        mask, self.response = response.mask, response
        self.mask = counted(mask)
        self.dtype = dtype
        self.tensors: dict[int, Tensor] = {rows.MASK: self.mask}
        self.choices = [0] * 10
        self.numbers = [0.0] * 9
        self.bounds, self.lost, self.whole = NO_BOUNDS, NO_ROWS, True
        if response.cu_seqlens is None:
            self.batch, self.width = mask.shape
            self.choices[rows.LENGTH] = self.width
            return
        self.bounds, outside = bounds_of(response.cu_seqlens, len(mask))
        self.batch = len(self.bounds)
        self.width = len(mask) // max(self.batch, 1)
        covered = self.bounds[:, 1].sum() == len(mask)
        self.whole = bool(covered and not outside.any())
        if outside.any():
            self.lost = outside

    def read(self, name: int, x: Tensor | None) -> None:
        if x is not None:
            self.tensors[name] = x

    def tokens(self, name: int) -> Tensor:
        """An output of the mask's shape; 0 at packed tokens of no row."""
        make = torch.empty if self.whole else torch.zeros
        out = self.tensors[name] = make(self.mask.shape, dtype=self.dtype, device="cpu")
        return out

    def of_rows(self, name: int, columns: int) -> Tensor:
        out = self.tensors[name] = torch.empty((self.batch, columns), dtype=self.dtype, device="cpu")
        return out

    def recurrence(
        self, values: Tensor | None, bootstrap: Tensor | None, config: ShapingConfig
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sets what GAE needs; the outputs advantages, returns and moments."""
        self.read(rows.VALUES, values)
        self.read(rows.BOOTSTRAP, bootstrap)
        self.choices[rows.SKIP] = config.mask_semantics == "skip"
        self.choices[rows.KEEP_MASKED] = config.carry_masked
        self.numbers[rows.GAMMA] = float32_rounded(config.gamma)
        lams: list[float | Tensor] = [1.0] if values is None else [config.lam]
        if values is not None and config.lam_value is not None:
            self.choices[rows.DECOUPLED] = 1
            lams.append(config.lam_value)
        places = ((rows.GL, rows.GL_ALL), (rows.GL_VALUE, rows.GL_VALUE_ALL))
        for lam, (name, number) in zip(lams, places, strict=False):
            gl = decay(config.gamma, lam)
            if isinstance(gl, Tensor):
                self.tensors[name] = gl
            else:
                self.numbers[number] = gl
        advantages, returns = self.tokens(rows.ADVANTAGES), self.tokens(rows.RETURNS)
        return advantages, returns, self.of_rows(rows.MOMENTS, 3)

    def attended(self, inputs: Sequence[AttentionInputs]) -> Tensor:
        """The output credit, which holds the attention row at the response tokens until it is normalised."""
        out = self.tokens(rows.CREDIT)
        self.tensors[rows.RAW] = out
        lost = raw_credit(inputs, self.response, self.bounds, out)
        self.lost = lost if self.lost is NO_ROWS else lost | self.lost
        return out

    def run(self) -> None:
        tensors = self.tensors
        flat = [0] * (COLUMNS * rows.PLACES)
        for name, x in tensors.items():
            flat[COLUMNS * name : COLUMNS * name + COLUMNS] = place_of(x)
        written = rows.WRITTEN & tensors.keys()
        if self.dtype == torch.float32 and 4 * len(written) * self.mask.numel() >= memory.PAST:
            for name in written:
                flat[COLUMNS * name + KIND] = F32_PAST
        places = np.frombuffer(array("q", flat), np.int64).reshape(-1, COLUMNS)
        choices, numbers = np.array(self.choices), np.array(self.numbers)
        bounds, lost = self.bounds, self.lost

        def compute(low: int, high: int, held: object = tensors) -> None:
            rows.sweep(places, bounds, lost, choices, numbers, scratch(rows.ROOM), low, high)

        over_rows(compute, self.batch, self.width, WAYS)


def attention_credit(
    inputs: Sequence[AttentionInputs], response: Response, normalization: Normalization
) -> Tensor:
    call = Call(response, compute_dtype(*[x.key for x in inputs]))
    credit = call.attended(inputs)
    call.choices[rows.SHAPED] = 1
    call.choices[rows.NORMALIZATION] = NORMALIZATIONS[normalization]
    call.read(rows.SCORE, torch.zeros(call.batch, device="cpu"))
    call.run()
    return credit


def shape_rewards(
    score: Tensor,
    credit: Tensor | Sequence[AttentionInputs] | CreditName,
    tokens: TokenInputs,
    response: Response,
    config: ShapingConfig,
) -> ShapedRewards:
    raw = credit if isinstance(credit, Tensor) else None
    layers = [] if isinstance(credit, Tensor | str) else credit
    kl = tokens.kl or KL(None, None, 0.0)
    call = Call(response, compute_dtype(score, raw, *tokens.floating, *[x.key for x in layers]))
    credited = call.attended(layers) if layers else call.tokens(rows.CREDIT)
    call.read(rows.RAW, raw)
    call.read(rows.SCORE, score)
    call.read(rows.TERMINAL, tokens.terminal_reward)
    call.read(rows.TOKEN_REWARDS, tokens.token_rewards)
    call.read(rows.KL, kl.estimate)
    call.read(rows.LOGPROBS, kl.logprobs)
    call.read(rows.REF_LOGPROBS, kl.ref_logprobs)
    choices, numbers = call.choices, call.numbers
    choices[rows.SHAPED] = 1
    choices[rows.SOURCE] = SOURCES[credit] if isinstance(credit, str) else rows.WEIGHTS
    choices[rows.NORMALIZATION] = NORMALIZATIONS[config.normalization]
    choices[rows.KL_KIND] = ESTIMATORS[config.kl_estimator] if kl.estimate is None else rewards.GIVEN
    choices[rows.ZERO_LOST] = config.on_nan == "zero_row"
    if isinstance(config.score_index, Tensor):
        choices[rows.SCORE_AT] = rows.INDEXED
        call.read(rows.SCORE_INDEX, config.score_index)
    else:
        choices[rows.SCORE_AT] = SCORE_PLACES[config.score_index]
    numbers[rows.SHARE] = config.share(credit)
    numbers[rows.SCORE_LOW], numbers[rows.SCORE_HIGH] = config.score_bounds
    for name, clip in ((rows.KL_INPUT, config.kl_input_clip), (rows.KL_OUTPUT, config.kl_output_clip)):
        numbers[name] = float("inf") if clip is None else clip
    numbers[rows.KL_COEF] = float(kl.coef)
    out = call.tokens(rows.REWARDS)
    penalty = None if tokens.kl is None else call.tokens(rows.KL_OUT)
    advantages, returns, moments = call.recurrence(tokens.values, tokens.bootstrap, config)
    stats = call.of_rows(rows.STATS, 4)
    status = call.tensors[rows.STATUS] = torch.empty(call.batch, dtype=torch.int32, device="cpu")
    call.run()
    return ShapedRewards(
        out,
        advantages,
        returns,
        credited,
        penalty,
        status,
        moments,
        RowStats(stats, bool(layers)),
    )


def gae(
    rewards: Tensor,
    values: Tensor | None,
    response: Response,
    config: ShapingConfig,
    bootstrap: Tensor | None,
) -> Advantages:
    call = Call(response, compute_dtype(rewards, values, bootstrap))
    call.read(rows.TOKEN_REWARDS, rewards)
    out = Advantages(*call.recurrence(values, bootstrap, config))
    call.run()
    return out


spread = functools.partial(groups.spread, shape_rewards=shape_rewards)
