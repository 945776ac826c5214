"""Statistics over data parallel ranks and heads over tensor parallel ranks: as in one process, on gloo."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.problems import Problem, assert_within, make_problem, pack, to_float64
from support.ranks import failures_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import attnshape
from attnshape import (
    AttentionInputs,
    AttentionTap,
    GroupConfig,
    Response,
    ShapingConfig,
    Whitening,
    reference,
)
from attnshape.reference.whiten import row_moments
from attnshape.tolerance import credit_bound

WORLDS = (2, 4)
CASES: dict[str, Callable[[int, int], None]] = {}


def case(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """What every rank runs, ``(rank, world)``, in the order of this file."""
    CASES[function.__name__] = function
    return function


@pytest.fixture(scope="module", params=WORLDS)
def failures(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, str]]:
    return failures_of(CASES, request.param, tmp_path_factory.mktemp("ranks"))


# Data parallel: whitening ------------------------------------------------------------------------------

UNEVEN = [(4, 0.5), (2, 0.9), (0, 0.0), (3, 0.0)]  # rows and share of live tokens: an empty shard, none live


def shard_of(rank: int, live: float | None = None) -> tuple[Tensor, Tensor]:
    rows, share = UNEVEN[rank]
    g = torch.Generator().manual_seed(rank)
    mask = torch.rand(rows, 40, generator=g) < (share if live is None else live)
    x = torch.randn(rows, 40, generator=g) * (rank + 1) + 100 * rank
    return x.masked_fill(~mask, math.nan), mask


def check_whiten(
    ranks: list[int], rank: int, group: Any, live: float | None = None, config: Whitening | None = None
) -> None:
    config = config or Whitening()
    shards = [shard_of(r, live) for r in ranks]
    x, mask = shard_of(rank, live)
    whole = reference.whiten(
        torch.cat([x for x, _ in shards]).double(), torch.cat([mask for _, mask in shards]), config
    )
    before = sum(UNEVEN[r][0] for r in ranks[: ranks.index(rank)])
    for backend in ("cpu", "torch", "triton"):
        for moments in (None, row_moments(x.double(), Response(mask))):
            got = attnshape.whiten(x, mask, config, moments=moments, process_group=group, backend=backend)
            want = whole[before : before + len(x)]
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@case
def whiten_of_uneven_shards(rank: int, world: int) -> None:
    for config in (Whitening(), Whitening(bessel=False, eps_mode="clamp"), Whitening(shift_mean=False)):
        check_whiten(list(range(world)), rank, dist.group.WORLD, config=config)


@case
def whiten_without_any_token(rank: int, world: int) -> None:
    check_whiten(list(range(world)), rank, dist.group.WORLD, live=0.0)


@case
def whiten_over_some_ranks(rank: int, world: int) -> None:
    """Statistics are the group's, and a rank outside it is told."""
    ranks = list(range(1, world))
    group = dist.new_group(ranks)
    if rank in ranks:
        check_whiten(ranks, rank, group, live=0.7)
    else:
        with pytest.raises(
            TypeError, match=r"process_group: got .*, want a ProcessGroup that this rank is in"
        ):
            attnshape.whiten(*shard_of(rank), process_group=group)


@case
def whiten_of_a_gae_on_each_rank(rank: int, world: int) -> None:
    """The loop of a data parallel trainer: advantages here, statistics everywhere."""
    shards = [shard_of(r, 0.7) for r in range(world)]
    config = ShapingConfig(gamma=0.99, lam=0.95, mask_semantics="skip")
    rewards, mask = shards[rank]
    advantages, _, moments = attnshape.gae(rewards, None, mask, config)
    got = attnshape.whiten(advantages, mask, moments=moments, process_group=dist.group.WORLD)
    masks = torch.cat([mask for _, mask in shards])
    whole, _, _ = reference.gae(torch.cat([x for x, _ in shards]).double(), None, masks, config)
    before = sum(rows for rows, _ in UNEVEN[:rank])
    want = reference.whiten(whole, masks)[before : before + len(mask)]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


# Data parallel: groups of completions -----------------------------------------------------------------


@case
def groups_lie_across_ranks(rank: int, world: int) -> None:
    """Four completions a prompt, three a rank, the last rank with what is left; by number and by ids."""
    total, width = 4 * world, 6
    g = torch.Generator().manual_seed(7)
    score, credit = torch.randn(total, generator=g), torch.rand(total, width, generator=g)
    mask, ids = torch.ones(total, width), torch.arange(total) // 4 % 3
    begin, end = 3 * rank, 3 * rank + 3 if rank < world - 1 else total
    for group, mine in ((4, 4), (ids, ids[begin:end])):
        for config in (GroupConfig.grpo(), GroupConfig.rloo(), GroupConfig(scale="batch", baseline="batch")):
            want = reference.group_advantages(
                score.double(), credit.double(), mask, group=group, config=config
            )
            got = attnshape.group_advantages(
                score[begin:end],
                credit[begin:end],
                mask[begin:end],
                group=mine,
                config=config,
                process_group=dist.group.WORLD,
            )
            torch.testing.assert_close(
                got.advantages.double(), want.advantages[begin:end], rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                got.completion.double(), want.completion[begin:end], rtol=1e-5, atol=1e-6
            )
    with pytest.raises(ValueError, match=r"group: got 5 completions per prompt for \d+ of all ranks"):
        attnshape.group_advantages(
            score[begin:end], None, mask[begin:end], group=5, process_group=dist.group.WORLD
        )


# Tensor parallel: heads --------------------------------------------------------------------------------

KV_HEADS = {2: [0, 3, 4], 4: [0, 2, 3, 5, 6]}
"""First key head of each rank, and their number: uneven."""


def local_heads(x: AttentionInputs, rank: int, world: int) -> AttentionInputs:
    """The heads of one rank."""
    lo, hi = KV_HEADS[world][rank : rank + 2]
    group = x.query.shape[1] // x.key.shape[1]
    mine = slice(lo * group, hi * group)

    def of(y: Tensor | None) -> Tensor | None:
        return None if y is None else y[mine]

    return dataclasses.replace(
        x, query=x.query[:, mine], key=x.key[:, lo:hi], sinks=of(x.sinks), head_mask=of(x.head_mask)
    )


def tensor_parallel_problem(world: int, **options: Any) -> Problem:
    kv_heads = KV_HEADS[world][-1]
    return make_problem(11, heads=2 * kv_heads, kv_heads=kv_heads, **options)


def check_heads(problem: Problem, layers: list[AttentionInputs], rank: int, world: int) -> None:
    mine = [local_heads(x, rank, world) for x in layers]
    response = problem.response
    backends: dict[str, tuple[str, ...]] = dict.fromkeys(
        ("cpu", "torch"), ("sum_to_one", "sum_to_length", "none")
    )
    if world == 2:  # the interpreter takes its time, in every process
        backends["triton"] = ("sum_to_one",)
    for backend, normalizations in backends.items():
        options: dict[str, Any] = {"process_group": dist.group.WORLD, "backend": backend}
        row = attnshape.attention_row(mine, **options)
        want = reference.attention_row(to_float64(layers))
        assert_within("row", row, want, credit_bound(want, problem.max_score))
        for normalization in normalizations:
            got = attnshape.attention_credit(mine, response, normalization=normalization, **options)
            expected = reference.attention_credit(to_float64(layers), response, normalization=normalization)
            for x, y in zip(problem.rows(got), problem.rows(expected), strict=True):
                assert_within("credit", x, y, credit_bound(y, problem.max_score))
        ranks = [torch.empty_like(got) for _ in range(world)]
        dist.all_gather(ranks, got)
        assert all(torch.equal(x.nan_to_num(7.0), got.nan_to_num(7.0)) for x in ranks)


@case
def credit_of_uneven_heads(rank: int, world: int) -> None:
    problem = tensor_parallel_problem(world)
    check_heads(problem, [problem.inputs], rank, world)


@case
def credit_of_packed_heads_and_several_layers(rank: int, world: int) -> None:
    problem = pack(tensor_parallel_problem(world))
    layers = [dataclasses.replace(problem.inputs, scaling=0.3 / (i + 1)) for i in range(2)]
    check_heads(problem, layers, rank, world)


@case
def credit_of_chosen_heads(rank: int, world: int) -> None:
    """Sinks, and a layer whose chosen heads all lie on the last rank; another layer chooses otherwise."""
    heads = 2 * KV_HEADS[world][-1]
    on_last = torch.arange(heads) >= heads - 2
    problem = tensor_parallel_problem(world, sinks=True, softcap=5.0)
    layers = [
        dataclasses.replace(problem.inputs, head_mask=chosen)
        for chosen in (on_last, torch.arange(heads) % 3 == 0, torch.zeros(heads))
    ]
    check_heads(problem, layers, rank, world)


@case
def a_row_that_is_not_finite_stays_alone(rank: int, world: int) -> None:
    problem = tensor_parallel_problem(world, holes=False, attention_mask=False)
    x = local_heads(problem.inputs, rank, world)
    key, start = x.key.clone(), problem.response.start
    assert start is not None
    if rank == world - 1:
        key[1, 0, int(start[1])] = math.nan
    x = dataclasses.replace(x, key=key)
    credit = attnshape.attention_credit(x, problem.response, process_group=dist.group.WORLD)
    live = problem.response.mask != 0
    assert live[1].any()
    assert credit[1][live[1]].isnan().all()
    assert credit[[0, 2]].isfinite().all()
    assert (credit[~live] == 0).all()


@case
def credit_is_compiled_in_one_graph(rank: int, world: int) -> None:
    if world > 2:  # the compiler takes seconds to import, in every process
        return
    problem = tensor_parallel_problem(world)
    x = local_heads(problem.inputs, rank, world)

    def credit() -> Tensor:
        return attnshape.attention_credit(x, problem.response, process_group=dist.group.WORLD)

    compiled = torch.compile(credit, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(), credit(), rtol=0, atol=0, equal_nan=True)


@case
def tapped_tensor_parallel_reward_model(rank: int, world: int) -> None:
    """Score and credit of a Llama whose heads torch shards, shaped: as of the whole model."""
    if world > 2:  # transformers takes seconds to import, in every process
        return
    from support.tap_models import build

    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    torch.manual_seed(0)
    model = build("llama", **heads)
    ids = torch.randint(5, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    response = Response(torch.ones(3, 7), start=torch.tensor([5, 5, 5], dtype=torch.int32))
    config = ShapingConfig(lam=0.9)

    def run(group: Any) -> tuple[Tensor, Tensor, attnshape.ShapedRewards]:
        with AttentionTap(model) as tap, torch.no_grad():
            score = model(ids, attention_mask=torch.ones_like(ids)).logits[:, 0]
        inputs = tap.take()
        if group is not None:
            assert inputs.query.shape[1] == 8 // world
        credit = attnshape.attention_credit(inputs, response, process_group=group)
        return score, credit, attnshape.shape_rewards(score, credit, response, config=config)

    score, credit, shaped = run(None)
    plan = {name: ColwiseParallel() for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        parallelize_module(layer, mesh, {**plan, "self_attn.o_proj": RowwiseParallel()})
    got_score, got_credit, got_shaped = run(dist.group.WORLD)
    torch.testing.assert_close(got_score, score, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_credit, credit, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got_shaped.advantages, shaped.advantages, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got_credit.sum(1), torch.ones(3))


@pytest.mark.parametrize("name", CASES)
def test_ranks(failures: list[dict[str, str]], name: str) -> None:
    found = {rank: errors[name] for rank, errors in enumerate(failures) if name in errors}
    assert not found, "\n".join(f"rank {rank}: {text}" for rank, text in found.items())


def test_a_group_that_is_none() -> None:
    problem = make_problem(0)
    for call in (
        lambda group: attnshape.attention_row(problem.inputs, process_group=group),
        lambda group: attnshape.attention_credit(problem.inputs, problem.response, process_group=group),
        lambda group: attnshape.whiten(torch.ones(2), torch.ones(2), process_group=group),
    ):
        with pytest.raises(TypeError, match="process_group: got str, want a ProcessGroup"):
            call("world")
