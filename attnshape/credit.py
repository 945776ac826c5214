"""Every source of credit in one place: where the reward of each token comes from.

Non-negative credit goes to ``shape_rewards(score, credit, ...)``, which normalises it; signed token rewards
go to ``shape_rewards(..., token_rewards=...)``, which adds them as they are. The documentation's page "Where
credit comes from" says which is which, what each costs, and which leave the return of a completion, and so
the optimal policy, alone.

``response`` is a ``Response``, or a plain mask ``[B, R]``; token tensors have the mask's shape. Outputs have
it too, are float32 (float64 where every floating input is), detached, and 0 where masked; what
stands at masked positions reaches nothing, so that a row's tokens are its unmasked ones, whatever lies
between them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnshape import checks, vectorized
from attnshape import compile as compiling
from attnshape.deletion import deletion_scores, leave_one_out
from attnshape.ops import attention_column_credit, attention_credit, attention_rollout
from attnshape.types import Response, SignedInputs, compute_dtype
from attnshape.vectorized.attention import at_response
from attnshape.vectorized.layout import Mask, Rows

__all__ = [
    "attention_column_credit",
    "attention_credit",
    "attention_rollout",
    "centered",
    "deletion_scores",
    "discriminator_rewards",
    "gradient_weights",
    "incremental_rewards",
    "leave_one_out",
    "log_ratio_rewards",
    "segment_rewards",
    "signed_rollout",
    "sparse",
    "top_overlap",
    "uniform",
]


def _rows(response: Response) -> Rows:
    """The response tokens in padded form."""
    checks.check_response(response, None, None)
    return Rows.of(response)


def _pad(rows: Rows, x: Tensor) -> Tensor:
    return x if rows.packing is None else rows.packing.pad(x)


def _places(rows: Rows) -> Tensor:
    return torch.arange(rows.live.shape[1], device=rows.live.device)


def _is_last(rows: Rows) -> Tensor:
    """bool ``[B, R]``: the last unmasked token of each row."""
    return rows.live & (_places(rows) == Mask(rows.live).last[:, None])


# Without a model -------------------------------------------------------------------------------------


@torch.no_grad()
def uniform(response: Response | Tensor) -> Tensor:
    """``1 / n`` on each of a row's ``n`` unmasked tokens; ``shape_rewards`` also takes it as ``"uniform"``.

    Args:
        response: a mask, non-zero where a token is the policy's own; a ``Response`` where tokens are packed.

    Returns:
        float32 credit of the mask's shape.

    Raises:
        ValueError, TypeError: as for every function here, an argument that does not fit, by name.

    Examples:
        >>> uniform(torch.tensor([[1, 0, 1]]))
        tensor([[0.5000, 0.0000, 0.5000]])
    """
    response = Response.of(response)
    rows = _rows(response)
    each = rows.live.float() / rows.live.sum(1, keepdim=True).clamp(min=1)
    return rows.restore(each)


@torch.no_grad()
def sparse(response: Response | Tensor) -> Tensor:
    """All credit on a row's last unmasked token; ``shape_rewards`` also takes it as ``"sparse"``.

    Arguments and returns as for ``uniform``.

    Examples:
        >>> sparse(torch.tensor([[1, 1, 0]]))
        tensor([[0., 1., 0.]])
    """
    response = Response.of(response)
    rows = _rows(response)
    return rows.restore(_is_last(rows).float())


# Signed token rewards from other models' outputs -----------------------------------------------------


@torch.no_grad()
def incremental_rewards(
    token_scores: Tensor,
    prompt_score: Tensor,
    response: Response | Tensor,
) -> Tensor:
    """``R(x, y<=t) - R(x, y<t)``: what each token adds to a reward head that is read at every position.

    Source: RED, first named R3HF (arXiv 2411.08302). ``y<t`` ends with the last unmasked token before ``t``,
    so a row's rewards sum to its last token's score less ``prompt_score``: a potential, which leaves the
    optimal policy alone at ``gamma = 1``. They replace the score: give ``shape_rewards`` a score of zeros
    beside them, or a share of both.

    Args:
        token_scores: the head's score after each response token.
        prompt_score: ``[B]``, its score after the prompt, before the first of them.
        response: as for ``uniform``.

    Returns:
        Signed token rewards.

    Examples:
        >>> incremental_rewards(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([0.5]), torch.ones(1, 3))
        tensor([[ 0.5000,  2.0000, -1.0000]])
    """
    response = Response.of(response)
    rows = _rows(response)
    checks.check_like_mask("token_scores", token_scores, response.mask)
    checks.check_per_row("prompt_score", prompt_score, len(rows.live), response.mask)
    dtype = compute_dtype(token_scores, prompt_score)
    # With the prompt's score in front, the score before a token is at one more than the last token's place.
    scores = torch.cat([prompt_score.to(dtype)[:, None], _pad(rows, token_scores).to(dtype)], 1)
    seen = torch.where(rows.live, _places(rows) + 1, 0)
    before = torch.nn.functional.pad(seen, (1, 0)).cummax(1).values[:, :-1]
    return rows.restore((scores[:, 1:] - scores.gather(1, before)).masked_fill(~rows.live, 0.0))


@torch.no_grad()
def log_ratio_rewards(
    logprobs: Tensor, ref_logprobs: Tensor, response: Response | Tensor, *, scale: float
) -> Tensor:
    """``scale * (log pi_dpo - log pi_ref)`` of each token: the reward a DPO-trained model implies.

    Source: RTO (arXiv 2404.18922), whose ``beta_1`` is ``scale``; added to the score, which it does not
    replace.

    Args:
        logprobs: of the response tokens under the DPO-trained model; padded or packed.
        ref_logprobs: under the model that its training started from.
        response: as for ``uniform``.
        scale: a finite number.

    Returns:
        Signed token rewards.

    Examples:
        >>> logprobs, ref_logprobs = torch.tensor([[-1.0, -3.0]]), torch.tensor([[-2.0, -2.0]])
        >>> log_ratio_rewards(logprobs, ref_logprobs, torch.ones(1, 2), scale=0.5)
        tensor([[ 0.5000, -0.5000]])
    """
    response = Response.of(response)
    for name, x in (("logprobs", logprobs), ("ref_logprobs", ref_logprobs)):
        checks.check_like_mask(name, x, response.mask)
    checks.check_number("scale", scale)
    dtype = compute_dtype(logprobs, ref_logprobs)
    return torch.where(response.mask != 0, scale * (logprobs.to(dtype) - ref_logprobs.to(dtype)), 0.0)


@torch.no_grad()
def discriminator_rewards(good: Tensor, response: Response | Tensor, *, validate: bool = False) -> Tensor:
    """``2 * P(good) - 1`` of each token, from a token discriminator.

    Source: TLCR (arXiv 2407.16574).

    Args:
        good: probability that a token is good, from 0 to 1; padded or packed.
        response: as for ``uniform``.
        validate: check the probabilities too, which synchronises with the device.

    Returns:
        Signed token rewards, from -1 to 1.

    Examples:
        >>> discriminator_rewards(torch.tensor([[0.75, 0.25]]), torch.ones(1, 2))
        tensor([[ 0.5000, -0.5000]])
    """
    response = Response.of(response)
    checks.check_like_mask("good", good, response.mask)
    live, good = response.mask != 0, good.to(compute_dtype(good))
    if validate and (live & ~((good >= 0) & (good <= 1))).any():
        raise ValueError("good: got a value outside 0 to 1 at an unmasked token, want probabilities")
    return torch.where(live, 2 * good - 1, 0.0)


@torch.no_grad()
def segment_rewards(
    token_scores: Tensor,
    entropy: Tensor,
    response: Response | Tensor,
    *,
    cutoff: float,
    mean: tuple[float, float] = (0.0, 0.0),
    std: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """``(r_seg - mu(p)) / sigma(p) / len``: a segment's normalised reward, in equal shares on its tokens.

    A segment ends after each token whose entropy exceeds ``cutoff``, and with the row. ``r_seg`` is the score
    at its last token; ``mu`` and ``sigma`` are ``w * log(p) + b`` at ``p = k / K`` for the ``k``-th of a
    row's ``K`` segments. Source: Yin et al. 2025 (arXiv 2501.02790), who fit ``w`` and ``b`` to the reward
    model's scores on its training data; the defaults leave the scores as they are.

    Args:
        token_scores: a segment reward model's score after each token; read where segments end.
        entropy: in nats, of the distribution that each token was drawn from, under the model that segments.
        response: as for ``uniform``; masked tokens belong to no segment.
        cutoff: in nats; infinity makes the row one segment.
        mean, std: ``(w, b)`` of ``mu`` and ``sigma``.

    Returns:
        Signed token rewards, which replace the score.

    Examples:
        >>> scores, entropy = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[0.0, 2.0, 0.0]])
        >>> segment_rewards(scores, entropy, torch.ones(1, 3), cutoff=1.0)  # two tokens, then one
        tensor([[1., 1., 6.]])
    """
    response = Response.of(response)
    rows = _rows(response)
    for name, x in (("token_scores", token_scores), ("entropy", entropy)):
        checks.check_like_mask(name, x, response.mask)
    for name, line in (("mean", mean), ("std", std)):
        if not isinstance(line, tuple) or len(line) != 2:
            raise ValueError(f"{name}: got {line!r}, want (w, b)")
        for coefficient in line:
            checks.check_number(name, coefficient)
    if not isinstance(cutoff, int | float) or math.isnan(cutoff):
        raise ValueError(f"cutoff: got {cutoff!r}, want a number of nats")
    place, live = _places(rows), rows.live
    ends = live & (_pad(rows, entropy) > cutoff) | _is_last(rows)
    segment = (ends.cumsum(1) - ends.long()).clamp(max=max(len(place) - 1, 0))
    end = torch.zeros_like(segment).scatter_reduce(1, segment, torch.where(ends, place, 0), "amax")
    length = torch.zeros_like(segment).scatter_add(1, segment, live.long())
    p = (segment + 1).double() / ends.sum(1, keepdim=True).clamp(min=1)
    mu, sigma = (w * p.log() + b for w, b in (mean, std))
    dtype = compute_dtype(token_scores)
    score = _pad(rows, token_scores).gather(1, end.gather(1, segment)).to(dtype)
    rewards = ((score - mu) / sigma / length.gather(1, segment)).to(dtype)
    return rows.restore(rewards.masked_fill(~live, 0.0))


@torch.no_grad()
def centered(weights: Tensor, response: Response | Tensor) -> Tensor:
    """``weights - mean of the row's weights``: signed token rewards that sum to zero in each row.

    Beside a score they move reward between the tokens of a completion and leave its sum alone, so that with
    ``shape_rewards(score, "uniform", mask, token_rewards=centered(weights, mask), config=config)`` and
    ``dense_share`` 1 token ``j`` gets ``score / n + weights[j] - mean``. Weights keep their unit: those of
    ``gradient_weights`` are in units of the score, multiply others by what they should weigh.

    Args:
        weights: signed, padded or packed.
        response: as for ``uniform``.

    Returns:
        Signed token rewards.

    Examples:
        >>> centered(torch.tensor([[3.0, 1.0, -9.0]]), torch.tensor([[1, 1, 0]]))
        tensor([[ 1., -1.,  0.]])
    """
    response = Response.of(response)
    rows = _rows(response)
    checks.check_like_mask("weights", weights, response.mask)
    padded = _pad(rows, weights).double().masked_fill(~rows.live, 0.0)
    mean = padded.sum(1, keepdim=True) / rows.live.sum(1, keepdim=True).clamp(min=1)
    return rows.restore((padded - mean).masked_fill(~rows.live, 0.0).to(compute_dtype(weights)))


@torch.no_grad()
def top_overlap(
    first: Tensor,
    second: Tensor,
    response: Response | Tensor,
    *,
    share: float = 0.1,
) -> Tensor:
    """How far two sources agree on which tokens matter, which needs no truth.

    Of a row's ``n`` unmasked tokens each source picks the ``max(1, round(share * n))`` with the largest
    weights, signs aside; returned is the share that both picked, in expectation over ties broken at random.
    Sources that know nothing of each other reach about ``share``. Held against ``gradient_weights`` it tells
    an attention row that points at the words that moved the score from one that does not, which the entropy
    in ``metrics`` cannot: so it was over the reward models of the paper's study.

    Args:
        first, second: weights of either sign, padded or packed.
        share: of the tokens to compare, above 0, at most 1.
        response: as for ``uniform``.

    Returns:
        float32 ``[B]``, 0 to 1; NaN in rows that are empty or hold a NaN.

    Examples:
        >>> first, second = torch.tensor([[5.0, 4.0, 1.0, 0.0]]), torch.tensor([[0.0, -4.0, 1.0, 3.0]])
        >>> top_overlap(first, second, torch.ones(1, 4), share=0.5)  # the first two, the second and the last
        tensor([0.5000])
    """
    response = Response.of(response)
    rows = _rows(response)
    checks.check_like_mask("first", first, response.mask)
    checks.check_like_mask("second", second, response.mask)
    checks.check_number("share", share)
    if not 0 < share <= 1:
        raise ValueError(f"share: got {share}, want a number above 0, at most 1")
    count = rows.live.sum(1, keepdim=True)
    k = (share * count).round().clamp(min=1).minimum(count)
    one, other = (picked(_pad(rows, x).double().abs(), rows.live, k) for x in (first, second))
    return ((one * other).sum(1) / k[:, 0]).float()


def picked(sizes: Tensor, live: Tensor, k: Tensor) -> Tensor:
    """Probability of each live token to be among its row's ``k`` largest, ties broken at random.

    ``[B, R]``, with ``k`` ``[B, 1]``; NaN in rows where a live one is NaN.
    """
    sizes = sizes.masked_fill(~live, -torch.inf)
    places = torch.arange(sizes.shape[1], device=sizes.device)
    cut = sizes.sort(1, descending=True).values.where(places == k - 1, 0.0).sum(1, keepdim=True)
    above, tied = sizes > cut, live & (sizes == cut)
    chosen = above + tied * (k - above.sum(1, keepdim=True)) / tied.sum(1, keepdim=True)
    return chosen.masked_fill(sizes.isnan().any(1, keepdim=True), torch.nan)


# Signed weights from the reward model's inside -------------------------------------------------------


def _at_response(column: Tensor, response: Response, invalid: Tensor) -> Tensor:
    """Weights over key positions ``[B, S]`` read at the response tokens; NaN in rows out of range."""
    rows = Rows.of(response)
    lengths = torch.full((len(column),), column.shape[1], device=column.device)
    return rows.restore(at_response(column, rows, rows.key_positions(), invalid, lengths)[0])


def gradient_weights(
    score: Tensor,
    inputs: Tensor,
    response: Response | Tensor,
    *,
    validate: bool = False,
) -> Tensor:
    """``sum of (d score / d input) * input`` of each response token: how far its input moves the score.

    Gradient times input (arXiv 1605.01713). ``AttentionTap(model, source="gradient_value")`` takes the values
    of a layer, the first if not told otherwise: its attention is the first to mix tokens, so those are the
    last that belong to one token each. At the last layer this is the last row's attention, each head's weight
    times how far the value it moves carries the score. ``source="gradient_embedding"`` takes the embeddings.
    ``source="relevance"`` takes the hidden states that enter a layer, a third of the way up, of a forward in
    which attention and norms are constants (arXiv 2202.07304): a norm's own gradient leaves out what points
    along the token.

    Costs a backward pass from the score down to the inputs, without gradients of parameters, whose ``.grad``
    is left alone; the forward must have kept its graph, and this frees it. Keys are padded.

    Args:
        score: ``[B]``, from a forward with gradients enabled.
        inputs: what ``take()`` returned: values ``[B, Hkv, S, D]``, or embeddings or hidden states
            ``[B, S, hidden]``.
        response, validate: as for ``attention_credit``.

    Returns:
        Signed weights in units of the score: their ``abs()`` is credit for ``shape_rewards``, ``centered``
        makes them token rewards. NaN in a row whose positions are out of range.

    Examples:
        >>> embeddings = torch.tensor([[[1.0], [2.0], [3.0]]], requires_grad=True)  # [B, S, hidden]
        >>> score = embeddings.square().sum([1, 2])
        >>> gradient_weights(score, embeddings, Response(torch.ones(1, 2), start=torch.tensor([1])))
        tensor([[ 8., 18.]])
    """
    response = Response.of(response)
    checks.check_differentiable("inputs", inputs)
    batch = checks.check_response(response, len(inputs), inputs)
    checks.check_per_row("score", score, batch, response.mask)
    length = inputs.shape[-2]
    if validate:
        checks.validate_response(response, [length] * batch)
    if not score.requires_grad:
        raise ValueError(
            "score: got a tensor without a graph, want it from a forward under torch.enable_grad()"
        )
    with torch.inference_mode(False):  # the caller's mode may be another than the forward's
        (gradient,) = torch.autograd.grad(score, inputs, torch.ones_like(score), allow_unused=True)
    if gradient is None:
        raise ValueError("inputs: got a tensor that the score does not depend on, want that forward's take()")
    with torch.no_grad():
        dtype = compute_dtype(inputs)
        moved = (gradient.to(dtype) * inputs.to(dtype)).sum(-1)
        column = moved.sum(1) if inputs.ndim == 4 else moved
        return _at_response(column, response, torch.zeros(batch, dtype=torch.bool, device=column.device))


@torch.no_grad()
def signed_rollout(
    layers: Sequence[SignedInputs],
    response: Response | Tensor,
    *,
    validate: bool = False,
) -> Tensor:
    """``attention_rollout`` with signs: a value counts by its share of the stream that it is added to.

    With ``y[s]`` the residual stream after a layer's attention, ``m[s, t] = sum over h of a[h, s, t]
    (W_O,h v[h, t]) . y[s] / |y[s]|^2`` is the share of ``y[s]`` that came from ``t``, negative where it
    points the other way, and ``r'[t] = sum over s of r[s] m[s, t] + r[t] (1 - sum over t' of m[t, t'])``:
    over all tokens, prompt included, the shares keep summing to 1. One attention forward per layer and as
    much again for the products with values, in PyTorch; O(T) memory.

    Args:
        layers: every layer from the lowest to the highest, from ``AttentionTap(model,
            source="signed_rollout")``.
        response, validate: as for ``attention_credit``.

    Returns:
        Signed shares, not normalised: their ``abs()`` is credit for ``shape_rewards``; ``score[:, None]``
        times them, ``centered``, are token rewards.

    Examples:
        >>> from attnshape import AttentionInputs
        >>> inputs = AttentionInputs(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), scaling=0.5)
        >>> value, pull = torch.tensor([2.0, -1.0]).view(1, 1, 2, 1), torch.full((1, 1, 2, 1), 0.5)
        >>> response = Response(torch.ones(1, 2), start=torch.tensor([0]))
        >>> signed_rollout([SignedInputs(inputs, value, pull)], response)
        tensor([[0.5000, 0.5000]])
    """
    checks.check_signed_layers(layers)
    checked = checks.layers_of([layer.inputs for layer in layers])
    if any(layer.mask_row is not None for layer in checked):
        raise ValueError("layers: got a mask_row, which is of one query, want layers without")
    response = Response.of(response)
    checks.check_response(response, checked[0].batch_size, checked[0].key)
    if validate:
        checks.validate_response(response, checks.validate_attention(checked))
    with compiling.in_full():
        return vectorized.signed_rollout(layers, response)
