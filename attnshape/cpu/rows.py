"""One loop over rows of tokens, from credit and a score to rewards, advantages and everything beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.core import types

from attnshape.cpu import advantages, blocks, layout, memory
from attnshape.cpu.advantages import WAYS
from attnshape.cpu.arithmetic import least, log, most
from attnshape.cpu.blocks import start_of
from attnshape.cpu.jit import called, entry, inner
from attnshape.cpu.lanes import fence
from attnshape.cpu.layout import BLOCK, HELD, LIVE, extent, survey
from attnshape.cpu.memory import ADDRESS, KIND, TOKEN, integers_at, places_at, scratch_at
from attnshape.cpu.rewards import clamp, credit_of, entropy_of, kl_of, mass_of, rewards_of
from attnshape.types import MIN_MASS, Status

# Rows of the table of places. Tokens that are read, [B, R] or packed [M]; of rows, [B]; and what is written.
MASK, RAW, VALUES, LOGPROBS, REF_LOGPROBS, KL, TOKEN_REWARDS = range(7)
SCORE, TERMINAL, BOOTSTRAP, GL, GL_VALUE, SCORE_INDEX = range(7, 13)
REWARDS, CREDIT, KL_OUT, ADVANTAGES, RETURNS = range(13, 18)
STATUS, STATS, MOMENTS = range(18, 21)
PLACES, WRITTEN = 21, frozenset(range(REWARDS, RETURNS + 1))

# What the loop is told beside the tensors, in integers and in numbers.
LENGTH, SOURCE, NORMALIZATION, KL_KIND, SCORE_AT, SKIP, KEEP_MASKED, ZERO_LOST, DECOUPLED, SHAPED = range(10)
SHARE, GAMMA, GL_ALL, GL_VALUE_ALL, SCORE_LOW, SCORE_HIGH, KL_INPUT, KL_OUTPUT, KL_COEF = range(9)

# Fields that what is read comes to, and that what is written lies in, by name.
FIELDS = (
    layout.LIVE, layout.CREDIT, layout.VALUES, layout.KL, layout.ADDEND, layout.KL, layout.REWARDS,
    *(0,) * 6, layout.REWARDS, layout.CREDIT, layout.KL, layout.REWARDS, layout.ADDEND,
)  # fmt: skip

WEIGHTS, UNIFORM, SPARSE = 0, 1, 2  # SOURCE
TO_ONE, TO_LENGTH, AS_IS = 0, 1, 2  # NORMALIZATION
LAST_UNMASKED, LAST_TOKEN, INDEXED = 0, 1, 2  # SCORE_AT

# What is known of each row in flight, in integers and in numbers. ``GIVEN + name`` is a row's own number.
(
    BASE, WIDTH, ANCHOR, BEGIN, END, COUNT, LAST, AT, ON_SCORE, TOP, BLOCKS, FLAGS, FINITE, KEEP, DENSE,
    DIRECT,
) = range(16)  # fmt: skip
SCALE, HOT, SCORE_SHARE, SCORE_TOKEN, AFTER, NEAR, STATS_OF, LATER, GIVEN = *range(7), 10, 12
ROW_INTEGERS, ROW_NUMBERS = 16, 32
_, row_at = memory.indexed(types.int64, ROW_INTEGERS)
_, of_row_at = memory.indexed(types.float64, ROW_NUMBERS)
# The scratch memory: blocks; what enters them, of advantages and of returns; what is known of rows.
CHAINS, NUMBERS, INTEGERS = (WAYS * x for x in (HELD, HELD + 2, HELD + 2 + ROW_NUMBERS))
ROOM = INTEGERS + WAYS * ROW_INTEGERS

FALLBACK, EMPTY, SCORE_MASKED, OUT_OF_RANGE, NONFINITE, NEGATIVE = [int(flag) for flag in Status]


# A row --------------------------------------------------------------------------------------------------


@called
def fill_row(places: Any, b: int, token: int, n: int, x: float) -> None:
    if n <= 0:
        return
    for name in range(REWARDS, RETURNS + 1):
        blocks.fill(places, name, start_of(places, name, b, token), n, x)


@inner
def lies_as_it_is(places: Any, name: int) -> Any:
    """Whether a tensor is float32 and a row's tokens are neighbours."""
    return places[name, KIND] == memory.F32 and places[name, TOKEN] == 1


@called
def open_row(
    places: Any, choices: Any, b: int, base: int, length: int, lost: bool, row: Any, i: int, s: Any
) -> None:
    """Finds the row's tokens and cuts them into blocks; outputs are 0 outside."""
    at = length - 1 if choices[SCORE_AT] == LAST_TOKEN else -1
    if choices[SCORE_AT] == INDEXED:
        at = blocks.load_index(places, SCORE_INDEX, 0, b)
    first, end, count, on_score = survey(places, MASK, b, base, length, at, s, i * HELD + LIVE)
    if choices[SCORE_AT] == LAST_UNMASKED:
        at, on_score = end - 1, 1
    lost = lost or (count > 0 and not 0 <= at < length)
    row[i, BASE], row[i, WIDTH], row[i, ANCHOR] = base, length, first
    row[i, COUNT], row[i, LAST] = count, end - 1
    row[i, AT], row[i, ON_SCORE], row[i, FINITE], row[i, BLOCKS] = at, on_score, 1, 0
    row[i, FLAGS] = OUT_OF_RANGE if lost else (EMPTY if count == 0 else (0 if on_score else SCORE_MASKED))
    row[i, KEEP] = choices[KEEP_MASKED] if not lost else 0
    row[i, BEGIN], row[i, END] = (0, length) if row[i, KEEP] != 0 else (first, end)
    if row[i, BEGIN] < row[i, END]:
        row[i, TOP] = (row[i, END] - 1 - first) // BLOCK
        row[i, BLOCKS] = row[i, TOP] + 1 + (first - row[i, BEGIN] + BLOCK - 1) // BLOCK
    row[i, DENSE] = count == row[i, END] - row[i, BEGIN]
    # 1: values are read, and advantages and returns written, where they lie; 2: token rewards are too.
    whole = row[i, DENSE] != 0 and row[i, KEEP] == 0 and not lost and choices[DECOUPLED] == 0
    whole = whole and lies_as_it_is(places, VALUES) and places[ADVANTAGES, KIND] != memory.F64
    row[i, DIRECT] = whole
    if whole and choices[SHAPED] == 0 and lies_as_it_is(places, TOKEN_REWARDS):
        row[i, DIRECT] = 2
    fill_row(places, b, base, row[i, BEGIN], 0.0)
    fill_row(places, b, base + row[i, END], length - row[i, END], 0.0)


@called
def weigh_row(places: Any, choices: Any, numbers: Any, b: int, row: Any, of: Any, i: int, s: Any) -> None:
    """From the row's raw weights to the factors that give each token's credit and share of the score."""
    count, on_score = row[i, COUNT], row[i, ON_SCORE] != 0
    total = 1.0 * count if choices[NORMALIZATION] == TO_LENGTH else 1.0
    source, mass, entropy, last_share, weight = choices[SOURCE], 0.0, 0.0, 0.0, 0.0
    if source == WEIGHTS:
        mass, xlogx, last = mass_of(
            places, MASK, RAW, b, row[i, BASE], row[i, ANCHOR], row[i, LAST] + 1, s, i * HELD
        )
        if mass == -np.inf:
            row[i, FLAGS] |= NEGATIVE
        if mass == -np.inf or (choices[NORMALIZATION] != AS_IS and mass < MIN_MASS):
            row[i, FLAGS] |= FALLBACK
            source = SPARSE
        else:
            of[i, SCALE] = 1.0 if choices[NORMALIZATION] == AS_IS else total / mass
            weight = mass * of[i, SCALE]
            entropy = entropy_of(mass, xlogx)
            last_share = last / mass if mass != 0.0 else 0.0
    elif source == UNIFORM:
        of[i, SCALE] = total / count
        weight = total
        entropy = log(1.0 * count)
        last_share = 1.0 / count
    if source == SPARSE and on_score:
        of[i, HOT] = weight = total
        last_share = 1.0 if row[i, AT] == row[i, LAST] else 0.0
    score = clamp(of[i, GIVEN + SCORE], numbers[SCORE_LOW], numbers[SCORE_HIGH])
    rest = (1.0 - numbers[SHARE]) * score if on_score else 0.0
    of[i, SCORE_SHARE] = numbers[SHARE] * score
    of[i, SCORE_TOKEN] = rest
    if on_score and places[TERMINAL, ADDRESS] != 0:
        of[i, SCORE_TOKEN] = rest + of[i, GIVEN + TERMINAL]
    of[i, STATS_OF], of[i, STATS_OF + 1], of[i, STATS_OF + 2] = entropy, last_share, mass
    of[i, STATS_OF + 3] = abs(of[i, SCORE_SHARE] * weight + rest - score)


@called
def close_row(places: Any, choices: Any, b: int, row: Any, of: Any, i: int, s: Any) -> None:
    """Status, stats and moments of a row that has been swept."""
    count = row[i, COUNT]
    mean, m2 = advantages.moments_of(count, of[i, NEAR], s, i * HELD)
    if row[i, FINITE] == 0:
        row[i, FLAGS] |= NONFINITE
        if choices[ZERO_LOST] != 0:
            fill_row(places, b, row[i, BASE], row[i, WIDTH], 0.0)
            mean = m2 = 0.0
    if places[STATUS, ADDRESS] != 0:
        memory.write_i32(places[STATUS, ADDRESS], b, row[i, FLAGS])
        for j in range(4):
            blocks.store_one(places, STATS, 4 * b + j, of[i, STATS_OF + j])
    if places[MOMENTS, ADDRESS] != 0:
        blocks.store_one(places, MOMENTS, 3 * b, count)
        blocks.store_one(places, MOMENTS, 3 * b + 1, mean)
        blocks.store_one(places, MOMENTS, 3 * b + 2, m2)


# A block of a row's tokens ------------------------------------------------------------------------------


@inner
def tokens_of(row: Any, i: int, step: int) -> tuple[int, int]:
    """First token and number of tokens of a row's block, the last block first."""
    low = row[i, ANCHOR] + (row[i, TOP] - step) * BLOCK
    t = most(low, row[i, BEGIN])
    return t, least(low + BLOCK, row[i, END]) - t


@called
def write_block(places: Any, first: int, last: int, b: int, t: int, n: int, row: Any, i: int, s: Any) -> None:
    """Writes the block's outputs of these names, and notes whether all are finite."""
    o = i * HELD
    for name in range(first, last + 1):
        if places[name, ADDRESS] == 0:
            continue
        start = start_of(places, name, b, row[i, BASE] + t)
        if not blocks.store(places, name, start, n, s, o + FIELDS[name]):
            for j in range(n):
                if s[o + LIVE + j] != 0.0 and not abs(s[o + FIELDS[name] + j]) < blocks.highest(places, name):
                    row[i, FINITE] = 0


@called
def open_block(
    places: Any, choices: Any, numbers: Any, b: int, t: int, n: int, row: Any, of: Any, i: int, s: Any
) -> None:
    """Reads a block, computes and writes its credit, KL and rewards."""
    o, at, token = i * HELD, row[i, AT] - t, row[i, BASE] + t
    weighted = choices[SOURCE] == WEIGHTS and row[i, FLAGS] & FALLBACK == 0
    for name in range(RAW, TOKEN_REWARDS + 1):
        if name == TOKEN_REWARDS or (places[name, ADDRESS] != 0 and (name != RAW or weighted)):
            blocks.load(places, name, start_of(places, name, b, token), n, s, o + FIELDS[name])
    if choices[SHAPED] == 0:
        for j in range(n):
            s[o + layout.REWARDS + j] = s[o + layout.REWARDS + j] if s[o + LIVE + j] != 0.0 else 0.0
    else:
        if not weighted:
            for j in range(n):
                s[o + layout.CREDIT + j] = 1.0
        credit_of(n, of[i, SCALE], of[i, HOT], at, s, o)
        if places[KL_OUT, ADDRESS] != 0:
            kl_of(n, choices[KL_KIND], numbers[KL_INPUT], numbers[KL_OUTPUT], s, o)
        rewards_of(n, of[i, SCORE_SHARE], of[i, SCORE_TOKEN], at, numbers[KL_COEF], s, o)
    if row[i, FLAGS] & OUT_OF_RANGE != 0:
        for name in (REWARDS, CREDIT, KL_OUT):
            if name != KL_OUT or places[KL_OUT, ADDRESS] != 0:  # without a KL its field stays 0
                for j in range(n):
                    s[o + FIELDS[name] + j] = np.nan if s[o + LIVE + j] != 0.0 else 0.0
    write_block(places, REWARDS, KL_OUT, b, t, n, row, i, s)
    if 0 <= row[i, LAST] - t < n:
        s[o + layout.REWARDS + row[i, LAST] - t] += of[i, AFTER]


@called
def open_mask(places: Any, choices: Any, b: int, t: int, n: int, row: Any, of: Any, i: int, s: Any) -> None:
    """Which of a block's tokens are unmasked, and what the recurrence multiplies by at each of them."""
    o, live, skip = i * HELD, i * HELD + LIVE, choices[SKIP] != 0
    if row[i, DENSE] == 2:
        return  # as in the block before
    if row[i, DENSE] == 0:
        blocks.load_mask(places, MASK, start_of(places, MASK, b, row[i, BASE] + t), n, s, live)
    else:
        row[i, DENSE] = 2 if n == BLOCK else 1
        for j in range(n):
            s[live + j] = 1.0
    for j in range(n, BLOCK):
        s[live + j] = 0.0
    for k in range(1 + choices[DECOUPLED]):
        gl, factor = of[i, GIVEN + GL + k], layout.FACTOR + k * BLOCK
        advantages.set_factors(n, gl, 1.0 if skip else gl, factor, s, o)


@inner
def link_block(choices: Any, gamma: float, of: Any, i: int, s: Any) -> None:
    """What the recurrence adds at each token of a block, once its rewards are written."""
    o = i * HELD
    advantages.add_terms(gamma, of[i, GIVEN + GL], layout.ADDEND, s, o)
    if choices[DECOUPLED] != 0:
        advantages.add_terms(gamma, of[i, GIVEN + GL_VALUE], layout.ADDEND_VALUE, s, o)
    advantages.subtract_values(s, o)


@inner
def add_block_of_memory(
    places: Any, gamma: float, b: int, t: int, n: int, row: Any, of: Any, i: int, s: Any
) -> None:
    """``open_block`` and ``link_block`` where rewards and values are taken as they lie in memory."""
    token, last, o, gl = row[i, BASE] + t, row[i, LAST] - t, i * HELD, of[i, GIVEN + GL]
    rewards, at_reward = places[TOKEN_REWARDS, ADDRESS], start_of(places, TOKEN_REWARDS, b, token)
    values, at_value = places[VALUES, ADDRESS], start_of(places, VALUES, b, token)
    advantages.add_terms_of_memory(gamma, gl, rewards, at_reward, values, at_value, n, s, o)
    more = of[i, AFTER]
    if last < n and more != 0.0:
        advantages.add_term_of_memory(gamma, gl, rewards, at_reward, values, at_value, more, last, s, o)


@called
def close_block(places: Any, choices: Any, b: int, t: int, n: int, row: Any, of: Any, i: int, s: Any) -> None:
    """Advantages and returns of a block, once the chains have run over it."""
    o, last, token = i * HELD, row[i, LAST] - t, row[i, BASE] + t
    of_returns = layout.ADDEND_VALUE if choices[DECOUPLED] != 0 else layout.ADDEND
    if 0 <= last < n:
        of[i, NEAR] = s[o + layout.REWARDS + last] + s[o + layout.ADDEND + last]
    if row[i, DIRECT] != 0:
        finite = advantages.settle_into_memory(
            places[ADVANTAGES, KIND] == memory.F32_PAST, places[ADVANTAGES, ADDRESS],
            places[RETURNS, ADDRESS], start_of(places, ADVANTAGES, b, token), places[VALUES, ADDRESS],
            start_of(places, VALUES, b, token), n, of[i, NEAR], s, o,
        )  # fmt: skip
        row[i, FINITE] = row[i, FINITE] if finite else 0
        return
    if row[i, KEEP] != 0:
        of[i, LATER], of[i, LATER + 1] = advantages.settle_all(
            n, of_returns, choices[SKIP] != 0, of[i, LATER], of[i, LATER + 1], s, o
        )
    else:
        advantages.settle(of_returns, s, o)
    write_block(places, ADVANTAGES, RETURNS, b, t, n, row, i, s)
    advantages.add_moments(of[i, NEAR], s, o)


@called
def sweep_rows(places: Any, choices: Any, numbers: Any, b: int, ways: int, row: Any, of: Any, s: Any) -> None:
    """The blocks of rows ``b : b + ways`` that have been opened, side by side, each row's last one first."""
    chains = 0 if places[ADVANTAGES, ADDRESS] == 0 else 1 + choices[DECOUPLED]
    steps = 0
    for i in range(ways):
        steps = most(steps, row[i, BLOCKS])
    for step in range(steps):
        for i in range(ways):
            if step >= row[i, BLOCKS]:
                continue
            t, n = tokens_of(row, i, step)
            open_mask(places, choices, b + i, t, n, row, of, i, s)
            if row[i, DIRECT] == 2:
                add_block_of_memory(places, numbers[GAMMA], b + i, t, n, row, of, i, s)
            else:
                if step + 1 < row[i, BLOCKS]:
                    for name in range(MASK if row[i, DENSE] == 0 else RAW, TOKEN_REWARDS + 1):
                        blocks.fetch_block(places, name, b + i, row[i, BASE] + t - BLOCK, BLOCK)
                open_block(places, choices, numbers, b + i, t, n, row, of, i, s)
                if chains > 0:
                    link_block(choices, numbers[GAMMA], of, i, s)
        for k in range(chains):
            addend = layout.ADDEND if k == 0 else layout.ADDEND_VALUE
            advantages.carry(layout.FACTOR + k * BLOCK, addend, s, CHAINS + k * WAYS)
        for i in range(ways):
            if chains > 0 and step < row[i, BLOCKS]:
                t, n = tokens_of(row, i, step)
                close_block(places, choices, b + i, t, n, row, of, i, s)


@entry
def sweep(
    places: Any, bounds: Any, lost: Any, choices: Any, numbers: Any, scratch: Any, low: int, high: int
) -> None:
    """Rows ``low:high``, ``WAYS`` of them side by side; each is read from its last block to its first.

    Args:
        places: int64 ``[PLACES, COLUMNS]``, see ``memory.place_of``.
        bounds: first token and length of each packed row, int64 ``[B, 2]``; ``[0, 2]`` where rows are padded.
        lost: uint8 ``[B]``, rows whose indices are out of range; ``[0]`` for none.
        choices, numbers: by the names above.
        scratch: ``ROOM`` numbers. The caller holds all of these: here nothing would.
    """
    places, choices, numbers = (
        places_at(places, 0),
        integers_at(choices, 0),
        scratch_at(numbers, 0),
    )
    s, of, row = scratch_at(scratch, 0), of_row_at(scratch, NUMBERS), row_at(scratch, INTEGERS)
    for i in range(WAYS):  # what is not read stays 0
        for field in (layout.VALUES, layout.KL, layout.SUM, layout.SUM_2):
            for t in range(BLOCK):
                s[i * HELD + field + t] = 0.0
    for b in range(low, high, WAYS):
        ways = least(WAYS, high - b)
        for t in range(CHAINS, INTEGERS):
            s[t] = 0.0
        for i in range(ways):
            base, length = extent(bounds, b + i, choices[LENGTH])
            bad = len(lost) > 0 and lost[b + i] != 0
            of[i, GIVEN + GL], of[i, GIVEN + GL_VALUE] = numbers[GL_ALL], numbers[GL_VALUE_ALL]
            for name in range(SCORE, GL_VALUE + 1):
                if places[name, ADDRESS] != 0:
                    blocks.load(places, name, start_of(places, name, 0, b + i), 1, s, i * HELD)
                    of[i, GIVEN + name] = s[i * HELD]
            of[i, AFTER] = numbers[GAMMA] * of[i, GIVEN + BOOTSTRAP]
            open_row(places, choices, b + i, base, length, bad, row, i, s)
            if choices[SHAPED] != 0 and row[i, FLAGS] & (EMPTY | OUT_OF_RANGE) == 0:
                weigh_row(places, choices, numbers, b + i, row, of, i, s)
        sweep_rows(places, choices, numbers, b, ways, row, of, s)
        for i in range(ways):
            close_row(places, choices, b + i, row, of, i, s)
    fence()
