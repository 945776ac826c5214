"""The paths a call may take: the same bits whichever is chosen, and in whatever order programs run.

And with what kernels say in PTX, or without it.
"""

import dataclasses
import itertools
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ptx
from support.problems import Problem, check_shaped, make_problem, mapped, pack, problems, to_float64
from torch import Tensor
from triton.runtime.errors import InterpreterError

import attnshape
from attnshape import AttentionInputs, GroupConfig, Response, ShapedRewards, ShapingConfig, reference
from csrc_triton.device import advantages, layout, scan
from csrc_triton.host import attention, rewards

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = pytest.mark.skipif(DEVICE.type == "cuda", reason="looks into Triton's interpreter")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch, launches: list[str]) -> None:
    monkeypatch.setattr(attention, "CHUNK", 16)


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the launchers take a path."""

    def chosen(
        one_launch: bool = True, in_chunks: bool = False, split: int | None = None, step: int | None = 1
    ) -> None:
        monkeypatch.setattr(attention, "ONE_LAUNCH", 1 << 30 if one_launch else -1)
        monkeypatch.setattr(rewards, "in_chunks", lambda *_: in_chunks)
        if split is not None:
            monkeypatch.setattr(attention, "chunks_per_program", lambda *_: (split, step))

    return chosen


def shaped(problem: Problem) -> ShapedRewards:
    there = mapped(problem, lambda x: x.to(DEVICE))
    return there.shaped(attnshape.shape_rewards, backend="triton")


def assert_same_bits(a: Any, b: Any, name: str = "") -> None:
    if isinstance(a, Tensor):
        # NaN by its bits: every one of them is the same.
        bits = torch.int32 if a.dtype == torch.float32 else a.dtype
        a, b = (torch.where(x.isnan(), torch.nan, x) if x.is_floating_point() else x for x in (a, b))
        assert a.view(bits).equal(b.view(bits)), name
    elif isinstance(a, tuple):
        for field, *both in zip(type(a)._fields, a, b, strict=True):  # type: ignore[attr-defined]
            assert_same_bits(*both, field)
    else:
        assert a == b, name


EVERY_PATH = [
    {"one_launch": one_launch, "in_chunks": in_chunks, "split": split, "step": step}
    for one_launch, in_chunks, split, step in [
        (True, False, 1, 1),
        (True, False, 8, None),
        (False, False, 4, None),
        (False, True, 3, 3),
    ]
]


def long_problem(seed: int, **options: Any) -> Problem:
    arguments = {"batch": 2, "keys": 140, "width": 60, "heads": 6, "kv_heads": 2, "head_dim": 16}
    return make_problem(seed, **arguments | options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_index": True, "holes": True},
        {"lse": True, "sinks": True, "attention_mask": False},
        {"config": ShapingConfig(lam=1.0, lam_value=0.9, gamma=0.99, on_nan="zero_row")},
        {"config": ShapingConfig(lam=1.0, mask_semantics="zero", kl_estimator="k3")},
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_path_has_the_same_bits(
    options: dict[str, Any], packed: bool, choose: Callable[..., None], launches: list[str]
) -> None:
    problem = long_problem(len(str(options)), **options)
    problem.response.mask[0, 20:40] = 0
    if packed:
        problem = pack(problem)
    if problem.config.on_nan == "zero_row":
        problem.score[1] = float("nan")
    results = []
    for path in EVERY_PATH:
        choose(**path)
        results.append(shaped(problem))
    for result in results[1:]:
        assert_same_bits(results[0], result)
    check_shaped(problem, "triton", DEVICE)
    apart, one = ["attend_kernel scores", "means_kernel"], ["attend_kernel shape"]
    rows, chunks = [*apart, "rows_kernel"], [*apart, "chunks_kernel"]
    assert [x for x in launches if x != "prepare_kernel"] == [*one * 2, *rows, *chunks, *chunks]


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_out_of_range_is_the_same_on_every_path(packed: bool, choose: Callable[..., None]) -> None:
    """NaN at its tokens that count, and 0 at the others: in chunks of both kinds, and in those of one."""
    problem = long_problem(5, attention_mask=False)
    problem.response.mask[0] = torch.arange(60) % 3 != 0
    problem.response.mask[0, 20:40] = 0
    problem.response.start[0] = 1000
    problem = pack(problem) if packed else problem
    results = []
    for path in EVERY_PATH:
        choose(**path)
        results.append(shaped(problem))
    width = problem.response.mask.shape[-1] if not packed else int(problem.response.cu_seqlens[1])
    masked = problem.response.mask.flatten()[:width] == 0
    for result in results:
        assert_same_bits(results[0], result)
        of_row = result.advantages.flatten()[:width].cpu()
        assert of_row[masked].eq(0).all()
        assert of_row[~masked].isnan().all()


@settings(max_examples=15)
@given(problems(), st.booleans())
def test_long_paths_are_the_reference(problem: Problem, in_chunks: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "ONE_LAUNCH", -1)
        patch.setattr(rewards, "in_chunks", lambda *_: in_chunks)
        check_shaped(problem, "triton", DEVICE)


@pytest.mark.parametrize("path", EVERY_PATH[1:])
@pytest.mark.parametrize("packed", [False, True])
def test_several_layers_and_chosen_heads(path: dict, packed: bool, choose: Callable[..., None]) -> None:
    problem = long_problem(3, width=20)
    if packed:
        problem = pack(problem)
    heads = torch.tensor([True, False, False, True, False, False])
    layers = [
        problem.inputs,
        dataclasses.replace(problem.inputs, scaling=0.1, head_mask=heads),
        dataclasses.replace(problem.inputs, scaling=0.2, head_mask=torch.zeros(6)),
    ]
    choose(**path)
    many = dataclasses.replace(problem, credit=layers)
    got = shaped(many)
    want = to_float64(many).shaped(attnshape.reference.shape_rewards)
    torch.testing.assert_close(got.credit.cpu().double(), want.credit, rtol=1e-4, atol=1e-6)
    assert got.status.cpu().equal(want.status)
    row = attnshape.attention_row(mapped(layers, lambda x: x.to(DEVICE)), backend="triton").cpu()
    torch.testing.assert_close(
        row.double(), attnshape.reference.attention_row(layers).double(), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("path", EVERY_PATH[1:])
def test_credit_and_row_alone_have_the_bits_of_the_fused_result(
    path: dict, choose: Callable[..., None]
) -> None:
    problem = mapped(long_problem(4), lambda x: x.to(DEVICE))
    choose()
    want = shaped(problem)
    choose(**path)
    mask = problem.response.mask
    assert_same_bits(
        attnshape.attention_credit(problem.inputs, problem.response, backend="triton"), want.credit, "credit"
    )
    options = {"normalization": "none", "backend": "triton"}
    raw = attnshape.attention_credit(problem.inputs, problem.response, **options)
    row = attnshape.attention_row(problem.inputs, backend="triton")
    at = problem.response.start[:, None] + torch.arange(mask.shape[1], device=DEVICE)
    assert_same_bits(raw, torch.where(mask != 0, row.gather(1, at.long()), 0.0), "row")
    two_steps = shaped(dataclasses.replace(problem, credit=raw))
    for name in ("rewards", "advantages", "returns", "credit"):
        assert_same_bits(getattr(two_steps, name), getattr(want, name), name)


@pytest.mark.parametrize("packed", [False, True])
def test_a_groups_advantages_are_one_launch(
    packed: bool, choose: Callable[..., None], launches: list[str]
) -> None:
    """Queries and keys to advantages of tokens; and the long paths, which give the same bits."""
    problem = long_problem(9, holes=True, attention_mask=False)
    problem.response.mask[1] = 0
    problem = pack(problem) if packed else problem
    there = mapped(problem, lambda x: x.to(DEVICE))
    options = {"group": 2, "config": GroupConfig(scale="none", lone="score", dense_share=0.7)}
    want = reference.group_advantages(
        *map(to_float64, (problem.score, problem.inputs, problem.response)), **options
    )
    results = []
    for path in EVERY_PATH:
        choose(**path)
        results.append(
            attnshape.group_advantages(there.score, there.inputs, there.response, backend="triton", **options)
        )
    for result in results:
        assert [
            x for x, y in zip(result, results[0], strict=True) if not x.nan_to_num().equal(y.nan_to_num())
        ] == []
    assert results[0].status.cpu().equal(want.status)
    for name in ("advantages", "credit", "moments"):
        got = getattr(results[0], name).cpu().double()
        torch.testing.assert_close(got, getattr(want, name), rtol=1e-4, atol=1e-6)
    assert launches[:2] == ["attend_kernel shape"] * 2


@pytest.mark.parametrize("lam", [0.9, 1.0])
def test_rows_have_the_same_bits_by_one_warp_two_or_four(lam: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whom two exchange both numbers of a step of the recurrence at once."""
    g = torch.Generator().manual_seed(3)
    score = torch.randn(2, generator=g).to(DEVICE)
    weights, values = (torch.rand(2, 300, generator=g).to(DEVICE) for _ in range(2))
    response = Response((torch.rand(2, 300, generator=g) < 0.8).to(DEVICE))
    config = ShapingConfig(lam=lam, gamma=0.99, dense_share=0.8)
    found = []
    for warps in (1, 2, 4):
        monkeypatch.setattr(rewards, "warps_of", lambda *_, warps=warps: warps)
        monkeypatch.setattr(rewards, "in_chunks", lambda *_: False)
        every = attnshape.shape_rewards(
            score, weights, response, values=values, config=config, backend="triton"
        )
        found.append((every, attnshape.gae(weights, values, response, config, backend="triton")))
    for shaped, estimated in found[1:]:
        assert_same_bits(shaped, found[0][0])
        assert_same_bits(estimated, found[0][1])


@pytest.mark.parametrize(
    ("width", "lam"), [*itertools.product([15, 16, 17, 257], [1.0, 0.9]), (256, 1.0), (530, 0.9999)]
)
def test_a_row_keeps_its_bits_in_any_batch(width: int, lam: float, choose: Callable[..., None]) -> None:
    """530 tokens are 34 chunks: three groups of the recurrence."""
    g = torch.Generator().manual_seed(width)
    x = {name: torch.randn(3, width, generator=g).to(DEVICE) for name in ("rewards", "values")}
    mask = (torch.rand(3, width, generator=g) < 0.9).to(DEVICE)
    settings = {"config": ShapingConfig(lam=lam), "backend": "triton"}
    choose()
    alone = attnshape.gae(x["rewards"][1:2], x["values"][1:2], mask[1:2], **settings)
    cu = (torch.arange(4) * width).int().to(DEVICE)
    wider = {name: torch.nn.functional.pad(y, (0, 23), value=float("nan")) for name, y in x.items()}
    wider_mask = torch.nn.functional.pad(mask, (0, 23))
    for in_chunks in (False, True):
        choose(in_chunks=in_chunks)
        padded = attnshape.gae(**wider, response=wider_mask, **settings)
        flat = {name: y.flatten() for name, y in x.items()}
        packed = attnshape.gae(**flat, response=Response(mask.flatten(), cu_seqlens=cu), **settings)
        for i in range(2):
            assert_same_bits(padded[i][1:2, :width], alone[i])
            assert_same_bits(packed[i][width : 2 * width], alone[i][0])


@pytest.mark.usefixtures("crossing_rows")
def test_packed_bounds_that_are_not_sound(choose: Callable[..., None]) -> None:
    g = torch.Generator().manual_seed(0)
    x, values = torch.randn(2, 130, generator=g).to(DEVICE)
    mask = torch.ones(130, device=DEVICE)
    settings = {"config": ShapingConfig(lam=0.9, mask_semantics="zero"), "backend": "triton"}
    results = []
    for in_chunks in (False, True):
        choose(in_chunks=in_chunks)
        bounds = torch.tensor([5, 40, 40, 100, 70, 120], dtype=torch.int32, device=DEVICE)
        results.append(attnshape.gae(x, values, Response(mask, cu_seqlens=bounds), **settings))
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)
    advantages = results[0][0]
    assert (advantages[:5] == 0).all()
    assert (advantages[120:] == 0).all()
    assert advantages[5:40].isfinite().all()
    assert advantages[40:120].isnan().all()


@INTERPRETED
@pytest.mark.parametrize("path", EVERY_PATH)
@pytest.mark.parametrize("packed", [False, True])
def test_programs_may_run_in_any_order(
    path: dict, packed: bool, choose: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = long_problem(5)
    if packed:
        problem = pack(problem)
    choose(**path)
    want = shaped(problem)
    builder = sys.modules["triton.runtime.interpreter"].InterpreterBuilder
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    order: list[int] = []

    def shuffled(self, x: int, *rest: int) -> None:
        order[:] = [*random.Random(x).sample(range(1, x), x - 1), 0]
        set_grid_dim(self, x, *rest)

    monkeypatch.setattr(builder, "set_grid_dim", shuffled)
    monkeypatch.setattr(builder, "set_grid_idx", lambda self, x, *rest: set_grid_idx(self, order[x], *rest))
    assert_same_bits(shaped(problem), want)
    assert order != sorted(order)


def test_short_chunks_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests here cut rows into chunks of 16 tokens, and so do the kernels that they start."""
    sizes = []
    launcher = attention.ATTEND

    def recorded(programs: int, options: dict[str, Any], **arguments: Any) -> None:
        sizes.append(arguments["rules"].CHUNK)
        launcher(programs, options, **arguments)

    monkeypatch.setattr(attention, "ATTEND", recorded)
    shaped(long_problem(8))
    assert sizes == [16]


@INTERPRETED
def test_a_group_is_published_before_another_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk 31 ends the second group of 16; of the first group nothing is there yet."""
    n, flags = 48, torch.zeros(4, 48, dtype=torch.int32)
    right = n - 1
    flags[0, right - 30 : right - 15] = 1  # chunks 16 to 30
    doubles = torch.full((advantages.DOUBLES, n), 0.5, dtype=torch.float64)

    def no_wait(p_counters: Any, wanted: Any, count: Any) -> None:
        there = tl.load(p_counters, mask=wanted, other=0)
        if tl.sum(there).handle.data.item() < count.handle.data.item():
            raise TimeoutError

    monkeypatch.setattr(scan, "wait_for", no_wait)
    with pytest.raises(InterpreterError, match="TimeoutError"):
        carry_kernel[(1,)](doubles, flags, n, 31)
    assert flags[1, right - 31] == 1
    assert doubles[3, right - 31] == 0.5**16
    assert doubles[4, right - 31] == sum(0.5**i for i in range(1, 17))


@triton.jit
def carry_kernel(p_doubles, p_flags, n, k):
    board = advantages.Board(p_doubles, p_doubles, n, p_flags, p_flags, p_flags)
    half = tl.full([], 0.5, tl.float64)
    advantages.carry_into(board, half, half, k, n, 0.0, 0)


@INTERPRETED
def test_a_launch_that_breaks_off_does_not_poison_the_next(
    choose: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = long_problem(6)
    choose(one_launch=False, in_chunks=True)
    want = shaped(problem)
    builder = sys.modules["triton.runtime.interpreter"].InterpreterBuilder
    set_grid_idx = builder.set_grid_idx

    def stop(self, x: int, *rest: int) -> None:
        if x == 9:
            raise RuntimeError
        set_grid_idx(self, x, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", stop)
        with pytest.raises(InterpreterError):
            shaped(problem)
    assert_same_bits(shaped(problem), want)


def test_heads_that_are_not_chosen_are_not_read() -> None:
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 16, generator=g), torch.randn(1, 2, 50, 16, generator=g)
    chosen = torch.tensor([[0, 0, 1, 0]]).expand(2, 4).T[:, 0]  # not contiguous
    inputs = AttentionInputs(query, key, 0.3, head_mask=chosen)
    want = attnshape.attention_row(inputs, backend="torch")
    key[:, 0] = float("nan")
    there = mapped(inputs, lambda x: x.to(DEVICE))
    torch.testing.assert_close(attnshape.attention_row(there, backend="triton").cpu(), want)


def test_moments_are_those_of_the_advantages(choose: Callable[..., None]) -> None:
    problem = long_problem(7)
    want = problem.shaped(attnshape.shape_rewards, backend="torch").moments
    for path in EVERY_PATH[1:]:
        choose(**path)
        got = shaped(problem).moments.cpu()
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_status_bits_are_the_public_ones() -> None:
    for flag in attnshape.Status:
        assert getattr(layout, str(flag.name)).value == flag


@pytest.mark.parametrize(
    ("batch", "longest", "n_chunks", "chunked"),
    [
        (4096, 1, 4096, False),
        (8192, 8, 65536, False),
        (1, 256, 256, True),
        (8, 64, 512, True),
        (64, 64, 4096, True),
    ],
)
def test_rows_are_cut_where_they_are_long_and_few(
    batch: int, longest: int, n_chunks: int, chunked: bool
) -> None:
    assert rewards.in_chunks(batch, longest, n_chunks, 132) == chunked


def test_programs_read_more_keys_the_more_there_are() -> None:
    grids = ((8, 1), (64, 8), (64, 32), (256, 32), (1024, 128))
    splits = [attention.chunks_per_program(*grid, 132, "shape") for grid in grids]
    assert splits == [(n, n) for n in (1, 2, 8, 32, 6)]


def test_programs_read_on_where_they_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "READ_ON", frozenset({"scores"}))
    assert attention.chunks_per_program(1024, 128, 132, "scores") == (497, None)
    assert attention.chunks_per_program(1024, 128, 132, "mean") == (6, 6)
    assert attention.chunks_per_program(256, 32, 132, "scores") == (32, 32)


# PTX


@INTERPRETED
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("path", EVERY_PATH)
def test_bits_are_the_same_with_ptx(path: dict, packed: bool, choose: Callable[..., None]) -> None:
    problem = long_problem(7, holes=True, config=ShapingConfig(lam=0.9, kl_estimator="k3"))
    problem.response = dataclasses.replace(problem.response, mask=problem.response.mask.bool())
    problem = pack(problem) if packed else problem
    choose(**path)
    want = shaped(problem)
    with ptx.executed() as done:
        assert_same_bits(want, shaped(problem))
    expected = {"st.global.f32", "st.global.v2.f32", "lg2.approx.ftz.f32", "prmt.b32"}
    if path["one_launch"]:
        expected.add("prefetch.global.L2")
    assert expected <= done.instructions.keys()


LINE = 128


@INTERPRETED
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_inputs_are_asked_for_line_by_line(packed: bool, dtype: torch.dtype) -> None:
    """Before its keys are read: 128 bytes after 128 bytes, and nothing that is not an input's."""
    problem = long_problem(8, keys=400, width=300)
    problem.given["values"] = problem.given["values"].to(dtype)
    problem = pack(problem) if packed else problem
    kl, mask = problem.given["kl"], problem.response.mask
    inputs = [mask, problem.given["values"], kl.logprobs, kl.ref_logprobs]
    inputs += [x for x in [problem.given.get("token_rewards")] if x is not None]
    with ptx.executed() as done:
        shaped(problem)
    rows = [row for x in inputs for row in (x if x.ndim == 2 else problem.rows(x))]
    assert done.prefetched == {at for x in rows for at in range(x.data_ptr(), x.data_ptr() + x.nbytes, LINE)}
