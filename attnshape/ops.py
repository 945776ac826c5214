"""The public functions: checks, choice of backend, nothing else."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from attnshape import checks, vectorized
from attnshape import compile as compiling
from attnshape.config import GroupConfig, Normalization, ShapingConfig, Whitening
from attnshape.types import (
    KL,
    Advantages,
    AttentionInputs,
    AttentionLayers,
    Backend,
    CreditName,
    GroupAdvantages,
    Response,
    ShapedRewards,
    Status,
    TokenInputs,
    compute_dtype,
)

DEFAULT_CONFIG = ShapingConfig()
DEFAULT_GROUP = GroupConfig()


def chosen_backend(
    backend: Backend, device: torch.device, layers: Sequence[AttentionInputs], *tensors: Tensor | None
) -> tuple[Backend, str | None]:
    """What computes: Triton on a GPU where it can, loops on a CPU, else PyTorch; and why it is not Triton.

    Raises:
        ValueError: ``backend`` was asked for and cannot take these layers and tensors.
    """
    checks.check_choice("backend", backend)
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f'backend: got "cpu", but tensors are on {device}')
    if backend in ("cpu", "torch"):
        return backend, "another was asked for"
    if backend == "auto" and device.type != "cuda":
        return ("cpu" if device.type == "cpu" else "torch"), f"tensors are on {device.type}"
    from attnshape import triton_backend  # triton is there on Linux only

    reason = triton_backend.unsupported(layers, *tensors)
    if reason and backend == "triton":
        raise ValueError(f'backend: got "triton", but {reason}')
    return ("torch" if reason else "triton"), reason


def _function(
    name: str,
    backend: Backend,
    device: torch.device,
    layers: Sequence[AttentionInputs],
    *tensors: Tensor | None,
) -> Callable[..., Any]:
    """The function that computes."""
    chosen, _ = chosen_backend(backend, device, layers, *tensors)
    if chosen == "cpu":
        return _compiled_loop(name)
    if chosen == "torch":
        return getattr(vectorized, name)  # type: ignore[no-any-return]
    from attnshape import triton_backend

    function: Callable[..., Any] = getattr(triton_backend, name)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return functools.partial(_on_device, device, function)
    return function


@functools.cache
def _compiled_loop(name: str) -> Callable[..., Any]:
    from attnshape import cpu  # numba takes a while to import

    return getattr(cpu, name)  # type: ignore[no-any-return]


def _on_device(device: torch.device, function: Callable[..., Any], *arguments: object) -> Any:
    """A kernel is launched on the current device's stream, wherever its tensors are."""
    with torch.cuda.device(device):
        return function(*arguments)


@compiling.operator(compiling.attention_row)
def attention_row(
    inputs: AttentionLayers,
    *,
    process_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
    validate: bool = False,
) -> Tensor:
    """One attention row per sequence, averaged over heads (and layers, if several are given), not normalised.

    Sums to 1 over the visible keys, to less where heads have a sink. This is what travels between processes
    when the response's place is known elsewhere. Source: arXiv 2402.00782.

    Args:
        inputs: queries and keys, as ``AttentionTap.take()`` returns them; a list averages layers.
        process_group: tensor parallel ranks, each with some of the layers' heads, as many as it likes, and
            all the keys of the same sequences: the mean is over the heads of all ranks, by one all-reduce.
            Every rank must call and gets the result, equal to that of one process up to rounding.
        backend: ``"auto"``: ``"triton"`` on a GPU, ``"cpu"`` (compiled loops) on a CPU, else ``"torch"``.
        validate: check index values too, which synchronises with the device.

    Returns:
        ``[B, S]`` (packed ``[N]``) float32; float64 where query and key are. Detached.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit together.

    Examples:
        >>> import torch
        >>> attention_row(AttentionInputs(torch.zeros(1, 2, 8), torch.zeros(1, 1, 4, 8), scaling=0.35))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    layers = checks.layers_of(inputs)
    if any(isinstance(x.query_position, str) for x in layers):
        raise ValueError(
            'query_position: got "last_response", which attention_row cannot resolve, want int [B]'
        )
    checks.check_process_group(process_group)
    if validate:
        checks.validate_attention(layers)
    compute = _function("attention_row", backend, layers[0].key.device, layers)
    if process_group is not None:
        return _mean_over_ranks(process_group, layers, compute)
    out: Tensor = compute(layers)
    return out


def _mean_over_ranks(
    process_group: dist.ProcessGroup,
    layers: Sequence[AttentionInputs],
    compute: Callable[[Sequence[AttentionInputs]], Tensor],
) -> Tensor:
    """Mean over layers of the mean over all ranks' heads of what ``compute`` gives of a layer's own heads."""
    of_layers = torch.stack([compute([layer]) for layer in layers])
    heads = of_layers.new_tensor([layer.query.shape[1] for layer in layers])
    for count, layer in zip(heads, layers, strict=True):
        if layer.head_mask is not None:
            count.copy_((layer.head_mask != 0).sum())
    sums = torch.cat([of_layers.flatten(1) * heads[:, None], heads[:, None]], 1)
    dist.all_reduce(sums, group=process_group)
    means = sums[:, :-1] / sums[:, -1:].clamp(min=1)
    return means.mean(0).view(of_layers.shape[1:])


@compiling.operator(compiling.credit_of("inputs"))
def attention_credit(
    inputs: AttentionLayers,
    response: Response | Tensor,
    *,
    normalization: Normalization = "sum_to_one",
    process_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
    validate: bool = False,
) -> Tensor:
    """Credit of each response token: its share of one attention row of the reward model (ABC).

    The softmax runs over all visible keys, the credit over the unmasked response tokens. A row without a
    visible response key is ``sparse``: all on its last unmasked token. Source: arXiv 2402.00782.

    Args:
        inputs: queries and keys, as ``AttentionTap.take()`` returns them; a list averages layers.
        response: where the response's tokens are; needs ``start`` or ``index``.
        normalization: ``"sum_to_one"``, ``"sum_to_length"``, or ``"none"`` for the attention itself.
        process_group: as for ``attention_row``; normalised after the all-reduce, in a launch of its own.
        backend, validate: as for ``attention_row``.

    Returns:
        float32 of the mask's shape (float64 where query and key are), 0 where masked; NaN in a row whose
        indices point outside its keys. Detached.

    Raises:
        ValueError, TypeError: an argument does not fit the others, named with what it got and what it wants.

    Examples:
        >>> import torch
        >>> inputs = AttentionInputs(torch.zeros(1, 2, 8), torch.zeros(1, 1, 4, 8), scaling=0.35)
        >>> attention_credit(inputs, Response(torch.ones(1, 2), start=torch.tensor([2])))
        tensor([[0.5000, 0.5000]])
    """
    layers = checks.layers_of(inputs)
    checks.check_choice("normalization", normalization)
    response = Response.of(response)
    checks.check_response(response, layers[0].batch_size, layers[0].key)
    if validate:
        checks.validate_response(response, checks.validate_attention(layers))
    checks.check_process_group(process_group)
    compute = _function("attention_credit", backend, response.mask.device, layers)
    if process_group is not None:
        raw = _mean_over_ranks(process_group, layers, lambda layer: compute(layer, response, "none"))
        return _normalized(raw, response, normalization, backend)
    out: Tensor = compute(layers, response, normalization)
    return out


def _normalized(raw: Tensor, response: Response, normalization: Normalization, backend: Backend) -> Tensor:
    if normalization == "none":
        return raw
    score = raw.new_zeros(response.batch_size)
    config = ShapingConfig(normalization=normalization)
    return shape_rewards(score, raw, response, config=config, backend=backend).credit


def _all_queries(name: str, layers: Sequence[AttentionInputs]) -> None:
    for x in layers:
        if not x.has_all_queries:
            raise ValueError(
                f'{name}: got one query row per sequence, want every query (query_position="all")'
            )
        if x.mask_row is not None:
            raise ValueError(f"{name}: got a mask_row, which is of one query, want layers without")


@compiling.operator(compiling.credit_of("inputs"))
def attention_column_credit(
    inputs: AttentionInputs,
    response: Response | Tensor,
    *,
    variant: Literal["mean", "last"] = "mean",
    shift: Literal[0, 1] = 0,
    normalization: Normalization = "sum_to_one",
    backend: Backend = "auto",
    validate: bool = False,
) -> Tensor:
    """Credit from the attention among the response's own tokens, usually the policy's (ABC-D).

    ``variant="mean"``: token ``j`` gets the mean attention of the unmasked response tokens from ``j`` on;
    ``"last"``: that of the last one. ``shift=1`` is the paper's code: what generation saw of token ``j`` is
    written at ``j + 1``, and the last token asks nothing. Holds no ``[T, T]`` matrix. arXiv 2402.00782.

    Other arguments, returns and errors as for ``attention_credit``; ``inputs.query`` must hold every query.

    Examples:
        >>> import torch
        >>> inputs = AttentionInputs(torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8), scaling=0.35)
        >>> attention_column_credit(inputs, Response(torch.ones(1, 2), start=torch.tensor([1])))
        tensor([[0.5556, 0.4444]])
    """
    layers = checks.layers_of(inputs)
    if len(layers) != 1:
        raise ValueError(f"inputs: got {len(layers)} layers, want one")
    _all_queries("inputs.query", layers)
    for name, choice in (("variant", variant), ("shift", shift), ("normalization", normalization)):
        checks.check_choice(name, choice)
    response = Response.of(response)
    checks.check_response(response, layers[0].batch_size, layers[0].key)
    if validate:
        checks.validate_response(response, checks.validate_attention(layers))
    compute = _function("attention_column_credit", backend, response.mask.device, layers)
    out: Tensor = compute(layers[0], response, variant, shift, normalization)
    return out


@compiling.operator(compiling.credit_of("layers"))
def attention_rollout(
    layers: Sequence[AttentionInputs],
    response: Response | Tensor,
    *,
    normalization: Normalization = "sum_to_one",
    backend: Backend = "auto",
    validate: bool = False,
) -> Tensor:
    """Credit carried from the score's token down through all layers, in O(T) memory.

    Where the layers have no norms ``r[t] = (r[t] + sum_s r[s] mean_h a[h, s, t]) / 2`` (arXiv 2005.00928).
    With ``value_norm`` and ``residual_norm`` each layer's attention is weighted by the length of what it
    moves (arXiv 2004.10102), and the residual stream by its own (arXiv 2109.07152).

    Args:
        layers: every layer from the lowest to the highest, with every query; the row starts at the highest
            layer's ``query_position``. ``AttentionTap(model, source="rollout").take()`` returns them.

    Other arguments, returns and errors as for ``attention_credit``.

    Examples:
        >>> import torch
        >>> layer = AttentionInputs(torch.zeros(1, 2, 2, 8), torch.zeros(1, 1, 2, 8), scaling=0.35)
        >>> attention_rollout([layer, layer], Response(torch.ones(1, 2), start=torch.tensor([0])))
        tensor([[0.4375, 0.5625]])
    """
    checked = checks.layers_of(layers)
    _all_queries("layers", checked)
    checks.check_choice("normalization", normalization)
    norms = checks.check_rollout_norms(checked)
    response = Response.of(response)
    checks.check_response(response, checked[0].batch_size, checked[0].key)
    if validate:
        checks.validate_response(response, checks.validate_attention(checked))
    value_norms, residual_norms = norms or (None, None)
    given = [*(value_norms or ()), *(residual_norms or ())]
    compute = _function("attention_rollout", backend, response.mask.device, checked, *given)
    out: Tensor = compute(checked, response, value_norms, residual_norms, normalization)
    return out


@compiling.operator(compiling.shape_rewards, compiling.kl_coef_as_tensor)
def shape_rewards(
    score: Tensor,
    credit: Tensor | AttentionLayers | CreditName,
    response: Response | Tensor,
    *,
    values: Tensor | None = None,
    kl: KL | None = None,
    token_rewards: Tensor | None = None,
    terminal_reward: Tensor | None = None,
    bootstrap: Tensor | None = None,
    config: ShapingConfig = DEFAULT_CONFIG,
    backend: Backend = "auto",
    validate: bool = False,
) -> ShapedRewards:
    """From one score per completion to token rewards, advantages and returns.

    ``reward[j] = dense_share * score * credit[j] + (1 - dense_share) * score * [j == score_index]
    + token_reward[j] - kl.coef * kl[j]``, then GAE. Sources: arXiv 2402.00782, arXiv 1506.02438.

    Shaping is not differentiated: inputs may require grad, outputs are detached. Whitening is not part of it,
    since statistics of one micro-batch are wrong: call ``whiten`` on the whole batch.

    Args:
        score: ``[B]``, normalised by the caller; at least centred, since credit pays an offset that no
            preference depends on to every token that it names.
        credit: ``AttentionInputs`` (or a list of them: layers are averaged), non-negative weights of the
            mask's shape, ``"uniform"``, or ``"sparse"`` (the whole score on its token). A row with a negative
            weight is shaped as ``"sparse"`` and flagged: signed weights are ``token_rewards``.
        response: where the response's tokens are; token tensors have its mask's shape. ``start`` or ``index``
            are needed with ``AttentionInputs`` only.
        values: critic values; without them advantages are discounted rewards-to-go.
        kl: the KL penalty, ``KL(logprobs, ref_logprobs, coef)`` or ``KL.given(kl, coef)``.
        token_rewards: dense rewards, added as they are.
        terminal_reward: ``[B]``, added at the score's token, untouched by ``dense_share``.
        bootstrap: ``[B]``, value of the state after a truncated completion.
        config: how to shape, see ``ShapingConfig``.
        backend: as for ``attention_row``.
        validate: check index values, the credit's signs and lambdas too, which synchronises with the device.

    Returns:
        ``ShapedRewards``; float32, or float64 where every floating input is; 0 where masked (but see
        ``ShapingConfig.carry_masked``).

    Raises:
        ValueError, TypeError: an argument does not fit the others, named with what it got and what it wants.

    Examples:
        >>> import torch
        >>> out = shape_rewards(torch.tensor([1.0]), torch.tensor([[3.0, 1.0]]), torch.ones(1, 2))
        >>> out.rewards  # .8 of the score by credit, the rest on its token
        tensor([[0.6000, 0.4000]])
    """
    layers = None
    if isinstance(credit, AttentionInputs | list | tuple):
        layers = checks.layers_of(credit)
    response = Response.of(response)
    batch = checks.check_response(
        response, None if layers is None else layers[0].batch_size, None if layers is None else layers[0].key
    )
    if layers is None:
        checks.check_credit(credit, response.mask)  # type: ignore[arg-type]
    checks.check_score(score, batch, response.mask)
    tokens = TokenInputs(values, kl, token_rewards, terminal_reward, bootstrap)
    checks.check_tokens(tokens, batch, response.mask)
    checks.check_config(config, batch, response)
    if validate:
        lengths = None if layers is None else checks.validate_attention(layers)
        checks.validate_response(response, lengths, config.score_index)
        checks.validate_layout(response, config.mask_layout)
        checks.validate_config(config)
        if isinstance(credit, Tensor):
            checks.validate_credit(credit, response)
    compute = _function("shape_rewards", backend, response.mask.device, layers or (), score, *tokens.floating)
    shaped: ShapedRewards = compute(score, credit if layers is None else layers, tokens, response, config)
    return shaped


def redistribute(
    score: Tensor,
    credit: Tensor | CreditName,
    response: Response | Tensor,
    config: ShapingConfig = DEFAULT_CONFIG,
    *,
    backend: Backend = "auto",
    validate: bool = False,
) -> Tensor:
    """Token rewards that sum to the score: ``shape_rewards`` without KL and GAE, for loops with their own.

    Args and errors as for ``shape_rewards``.

    Returns:
        Rewards of the mask's shape, float32 (float64 where score and credit are), 0 where masked.

    Examples:
        >>> import torch
        >>> redistribute(torch.tensor([2.0]), "uniform", torch.ones(1, 4), ShapingConfig(dense_share=1.0))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    return shape_rewards(score, credit, response, config=config, backend=backend, validate=validate).rewards


@compiling.operator(compiling.gae)
def gae(
    rewards: Tensor,
    values: Tensor | None,
    response: Response | Tensor,
    config: ShapingConfig = DEFAULT_CONFIG,
    *,
    bootstrap: Tensor | None = None,
    backend: Backend = "auto",
    validate: bool = False,
) -> Advantages:
    """Generalised advantage estimation over masked token rewards (arXiv 1506.02438).

    Args:
        rewards: of the response mask's shape, ``[B, R]`` or packed ``[M]``.
        values: likewise; None gives discounted rewards-to-go.
        response: a plain mask, or a ``Response`` where tokens are packed.
        config: its ``gamma``, ``lam``, ``lam_value``, ``mask_semantics`` and ``carry_masked``.
        bootstrap: ``[B]``, value after the last unmasked token.
        backend, validate: as for ``attention_row``.

    Returns:
        ``Advantages(advantages, returns, moments)``, float32 (float64 where every floating input is), 0 where
        masked (but see ``ShapingConfig.carry_masked``); detached.

    Raises:
        ValueError, TypeError: an argument does not fit the others, named with what it got and what it wants.

    Examples:
        >>> import torch
        >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]]), torch.ones(1, 2)).advantages
        tensor([[0.5000, 0.5000]])
    """
    response = Response.of(response)
    batch = checks.check_response(response, None, None)
    tokens = TokenInputs(values=values, token_rewards=rewards, bootstrap=bootstrap)
    checks.check_tokens(tokens, batch, response.mask)
    checks.check_config(config, batch, response)
    if validate:
        checks.validate_response(response, None)
        checks.validate_layout(response, config.mask_layout)
        checks.validate_config(config)
    compute = _function("gae", backend, response.mask.device, (), rewards, values, bootstrap)
    out: Advantages = compute(rewards, values, response, config, bootstrap)
    return out


@compiling.operator(compiling.group_advantages)
def group_advantages(
    score: Tensor,
    credit: Any,
    response: Response | Tensor,
    *,
    group: int | Tensor,
    weights: Tensor | None = None,
    config: GroupConfig = DEFAULT_GROUP,
    process_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
    validate: bool = False,
) -> GroupAdvantages:
    """Advantages without a critic: of each completion within its group, spread over its tokens by credit.

    ``A[i, t] = A[i] * (dense_share * n_i * credit[i, t] + 1 - dense_share)``, with ``A[i]`` that of GRPO
    (arXiv 2402.03300), Dr. GRPO (2503.20783), RLOO (2402.14740) or REINFORCE++ (2501.03262): see
    ``GroupConfig``. The mean over a completion's ``n_i`` unmasked tokens is ``A[i]``. Giving ``redistribute``
    an advantage in place of the score is another thing: what it does not spread goes to one token.

    Args:
        score: ``[B]``, or ``[B, K]`` for several rewards: their weighted sum is what the group compares. NaN
            where a reward function gave none; a completion without any has advantage 0.
        credit: as for ``shape_rewards``, or None for all tokens alike; for ``K`` rewards a list of ``K``:
            each reward's part is spread by its own.
        response: where the response's tokens are; ``start`` or ``index`` with ``AttentionInputs`` only.
        group: completions per prompt, neighbours in the batch; or int ids ``[B]``, for groups of any sizes.
        weights: ``[K]``, of the rewards; 1 if not given.
        config: how to compare and to spread, see ``GroupConfig``.
        process_group: ranks whose completions are compared with each other; every rank must call. Groups may
            lie across ranks: an int ``group`` counts in the order of the ranks.
        backend, validate: as for ``shape_rewards``.

    Returns:
        ``GroupAdvantages(advantages, completion, credit, status, moments)``; float32 (float64 where every
        floating input is), 0 where masked. A row whose credit underflows or is negative is spread uniformly
        and flagged.

    Raises:
        ValueError, TypeError: an argument does not fit the others, named with what it got and what it wants.

    Examples:
        >>> import torch
        >>> score, credit = torch.tensor([1.0, 0.0]), torch.tensor([[3.0, 1.0], [1.0, 1.0]])
        >>> config = GroupConfig.dr_grpo(dense_share=0.5)
        >>> group_advantages(score, credit, torch.ones(2, 2), group=2, config=config).advantages
        tensor([[ 0.6250,  0.3750],
                [-0.5000, -0.5000]])
    """
    response = Response.of(response)
    checks.check_response(response, None, None)
    sources = checks.check_groups(score, credit, group, weights, config, response)
    checks.check_process_group(process_group)
    attention = [x for x in sources if x is not None and not isinstance(x, Tensor)]
    if validate:
        lengths = checks.validate_attention(attention[0]) if attention else None
        checks.validate_response(response, lengths)
        for source in sources:
            if isinstance(source, Tensor) and not config.signed:
                checks.validate_credit(source, response)
    scores, ids, place = score, group, slice(None)
    if process_group is not None:
        scores, ids, place = _of_all_ranks(process_group, score, group)
    elif isinstance(group, int) and len(score) % group:
        raise ValueError(
            f"group: got {group} completions per prompt for {len(score)}, want a divisor of that"
        )
    parts = vectorized.completion_advantages(scores, ids, config, weights)[place]
    floating = [x for x in sources if isinstance(x, Tensor)]
    layers = [layer for source in attention for layer in source]
    parts = parts.to(compute_dtype(score, *floating, *[x.key for x in layers]))
    if config.signed == "score":
        sources = [
            vectorized.turned(x, parts[:, k] < 0, response) if isinstance(x, Tensor) else x
            for k, x in enumerate(sources)
        ]
    compute = _function("spread", backend, response.mask.device, layers, parts, *floating)
    out: GroupAdvantages = compute(parts, sources, response, config)
    status = out.status | (~score.isfinite().view(len(score), -1).any(1)) * int(Status.NONFINITE)
    return out._replace(status=status.to(torch.int32))


def _of_all_ranks(
    process_group: dist.ProcessGroup, score: Tensor, group: int | Tensor
) -> tuple[Tensor, int | Tensor, slice]:
    """Scores and groups of all ranks, in their order, and which are this rank's."""
    sizes = _gathered(process_group, torch.tensor([len(score)], device=score.device)).flatten().tolist()
    rank, longest = dist.get_rank(process_group), max(sizes)

    def together(x: Tensor) -> Tensor:
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: len(x)] = x
        return torch.cat([row[:n] for row, n in zip(_gathered(process_group, padded), sizes, strict=True)])

    if isinstance(group, int) and sum(sizes) % group:
        raise ValueError(f"group: got {group} completions per prompt for {sum(sizes)} of all ranks")
    begin = sum(sizes[:rank])
    ids = group if isinstance(group, int) else together(group)
    return together(score), ids, slice(begin, begin + len(score))


@compiling.operator(compiling.whiten)
def whiten(
    x: Tensor,
    response: Response | Tensor,
    config: Whitening = DEFAULT_CONFIG.whitening,
    *,
    moments: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``(x - mean) * rsqrt(var + eps)`` over the unmasked tokens of the whole batch.

    One unmasked token has variance 0, none gives zeros: neither divides by zero.

    Args:
        x: any shape, floating.
        response: a mask of its shape, non-zero where a token counts, or a ``Response`` with that mask.
        config: ``ShapingConfig.whitening``.
        moments: counts, means and sums of squared deviations, ``[..., 3]``, of the parts that the statistics
            are over, so that ``x`` is read only once: ``out.moments`` of ``shape_rewards`` or ``gae`` where
            ``x`` is ``out.advantages``, or those of all micro-batches, concatenated.
        process_group: statistics over all its ranks; every rank must call, also one without a token.
        backend: as for ``attention_row``.

    Returns:
        float32 (float64 where ``x`` is) of ``x``'s shape, 0 where masked (but see ``Whitening``); detached.

    Raises:
        ValueError, TypeError: an argument does not fit the others, named with what it got and what it wants.

    Examples:
        >>> import torch
        >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]]), Whitening(bessel=False))
        tensor([[-1.,  1.,  0.]])
    """
    mask = Response.of(response).mask
    checks.check_whiten(x, mask, config, moments)
    checks.check_process_group(process_group)
    gather = None if process_group is None else functools.partial(_gathered, process_group)
    compute = _function("whiten", backend, x.device, (), x)
    out: Tensor = compute(x, mask, config, moments, gather)
    return out


def _gathered(process_group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """``x`` of all ranks, ``[ranks, ...]``."""
    ranks = [torch.empty_like(x) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(ranks, x, group=process_group)
    return torch.stack(ranks)
