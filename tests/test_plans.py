"""Calls that repeat: what makes two calls alike, and what may not be repeated."""

import ctypes
import dataclasses
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import triton.language as tl
from torch import Tensor

from attnshape import KL, AttentionInputs, Response, ShapingConfig, plans
from attnshape.plans import Layouts
from csrc_triton import launch, plan, written
from csrc_triton.launch import COUNTERS, Launcher

X = torch.zeros(2, 64)
CONFIG = ShapingConfig(lam=0.5)
EMPTY, EMPTY_STRIDED = torch.empty, torch.empty_strided
"""As they are: tests fill what they make, which is more than a call that is repeated may do."""


class Repeating(plans.Repeating):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(args, kwargs)


class Outputs(NamedTuple):
    p_twice: Any
    p_between: Any
    p_counters: Any = None


class Settings(NamedTuple):
    p_in: Any
    kl_coef: Any
    n: Any


def adding_kernel(out, settings, BLOCK: tl.constexpr) -> None:
    """``twice = between + kl_coef``, with ``between = 2 * in``."""


def add(out: Any, settings: Any, BLOCK: int, stream: int | None = None) -> None:
    """What it computes, on the host, of tensors or addresses."""
    p_in, coef, n = settings
    twice, between, source = (floats_at(x, n) for x in (*out[:2], p_in))
    for i in range(n):
        between[i] = 2 * source[i]
        twice[i] = between[i] + coef


def floats_at(x: Any, n: int) -> Any:
    return (ctypes.c_float * n).from_address(x.data_ptr() if isinstance(x, Tensor) else x)


@pytest.fixture
def adding(monkeypatch: pytest.MonkeyPatch) -> Launcher:
    """A kernel that is there already, compiled to a function of the host's."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(plans, "is_on_current_gpu", lambda *_: True)
    kernel = SimpleNamespace(fn=adding_kernel, __name__="adding_kernel")
    launcher = Launcher(kernel)
    compiled = {(1, 1, 1): add}
    monkeypatch.setattr(Launcher, "key", lambda *_: "the only one")
    launcher.compiled["the only one"] = compiled
    return launcher


class Result(NamedTuple):
    twice: Tensor
    every_other: Tensor
    nothing: None = None


def twice_of(launcher: Launcher, **changes: Callable[[], Any]) -> Callable[..., Any]:
    """A function that launches it, and what else it may do."""

    def function(x: Tensor, kl: KL | None = None, other: Any = None) -> Result:
        coef = 0.0 if kl is None else float(kl.coef)
        made = changes.get("make", lambda: EMPTY(4))()
        out = Outputs(made, EMPTY(4))
        launcher(1, {}, out=out, settings=Settings(changes.get("given", lambda: x)(), coef, 4), BLOCK=16)
        changes.get("then", lambda: None)()
        return Result(made, made[::2])

    return function


def test_calls_are_repeated_from_the_third_on(adding: Launcher) -> None:
    called = []
    repeating = Repeating(twice_of(adding, then=lambda: called.append(1)))
    results = [repeating(torch.full((4,), float(i)), kl=KL(None, None, i)) for i in range(5)]
    for i, (twice, every_other, nothing) in enumerate(results):
        assert twice.tolist() == [3 * i] * 4
        assert every_other.tolist() == [3 * i] * 2
        assert nothing is None
    assert len(called) == 2
    # A result is the caller's own.
    results[-1].twice.zero_()
    assert results[-1].every_other.tolist() == [0, 0]
    assert results[-2].twice.tolist() == [9] * 4


def test_a_call_of_another_layout_is_made_anew(adding: Launcher) -> None:
    called = []
    repeating = Repeating(twice_of(adding, then=lambda: called.append(1)))
    for _ in range(3):
        repeating(torch.ones(4))
    assert repeating(torch.ones(8)[::2]).twice.tolist() == [2] * 4
    assert len(called) == 3


def test_the_oldest_layout_is_forgotten(adding: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "MOST", 2)
    repeating = Repeating(twice_of(adding))
    for n in (4, 5, 6):
        repeating(torch.ones(n))
    shapes = [key[-1] for key in repeating.known]
    assert shapes == [(5,), (6,)]
    plans.forget()
    assert not repeating.known


def test_calls_are_repeated_once_nobody_looks_at_launches(
    adding: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looked had the first call of the process too."""
    called, watched = [], []
    repeating = Repeating(twice_of(adding, then=lambda: called.append(1)))
    plans._kernels.cache_clear()
    monkeypatch.delitem(sys.modules, "csrc_triton.plan")
    with monkeypatch.context() as patch:
        start = Launcher.__call__
        patch.setattr(Launcher, "__call__", lambda *args, **x: (watched.append(1), start(*args, **x)))
        for _ in range(4):
            repeating(torch.ones(4))
    assert len(called) == len(watched) == 4
    for _ in range(4):
        assert repeating(torch.ones(4)).twice.tolist() == [2] * 4
    assert len(called) == 6
    plans._kernels.cache_clear()


def test_a_tensor_is_found_in_any_argument() -> None:
    """By which it is known where a call computes, whatever comes first."""
    key = torch.ones(2, 1, 5, 4)
    inputs, mask = AttentionInputs(key[:, :, 0], key, 0.5), torch.ones(2, 3)
    for x, want in ((X, X), ([inputs, inputs], key), (Response(mask), mask), (mask, mask)):
        assert plans.tensor_of(x) is want
    for x in (None, 0.5, [], CONFIG, "uniform"):
        assert plans.tensor_of(x) is None
    assert not plans.is_on_current_gpu((None, Response(mask)), {})


class Both(NamedTuple):
    twice: Tensor
    between: Tensor


def both_of(launcher: Launcher) -> Callable[[Tensor], Both]:
    def function(x: Tensor) -> Both:
        n = len(x)
        out = Outputs(EMPTY(n), EMPTY(n))
        launcher(1, {}, out=out, settings=Settings(x, 0.0, n), BLOCK=16)
        return Both(out.p_twice, out.p_between)

    return function


def test_outputs_of_one_shape_are_one_allocation(adding: Launcher) -> None:
    repeating = Repeating(both_of(adding))
    results = [repeating(torch.full((8,), float(i))) for i in range(4)]
    for i, (twice, between) in enumerate(results):
        assert twice.tolist() == between.tolist() == [2 * i] * 8
        assert twice.is_contiguous()
    storages = [{x.untyped_storage().data_ptr() for x in result} for result in results]
    assert [len(x) for x in storages] == [2, 2, 1, 1]
    assert not storages[2] & storages[3]
    # To autograd they have nothing to do with each other.
    twice, between = results[3]
    weight = torch.ones(8, requires_grad=True)
    loss = (weight * twice).sum()
    between.zero_()
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [6] * 8


@pytest.mark.parametrize(("n", "together"), [(7, 1 << 20), (8, 63)], ids=["not aligned", "much"])
def test_outputs_are_allocations_of_their_own(
    adding: Launcher, monkeypatch: pytest.MonkeyPatch, n: int, together: int
) -> None:
    monkeypatch.setattr(plan, "TOGETHER", together)
    repeating = Repeating(both_of(adding))
    for _ in range(3):
        twice, between = repeating(torch.ones(n))
    assert twice.untyped_storage().data_ptr() != between.untyped_storage().data_ptr()
    assert twice.tolist() == between.tolist() == [2] * n


def test_an_output_with_gaps_is_made_anew(adding: Launcher) -> None:
    repeating = Repeating(twice_of(adding, make=lambda: EMPTY_STRIDED((2,), (2,))))
    for _ in range(4):
        assert repeating(torch.ones(4)).twice.tolist() == [2] * 2
    assert list(repeating.known.values()) == [plans.NEVER]


class Half(NamedTuple):
    both: Both
    half: Tensor


def test_an_output_of_which_a_part_is_returned_too_is_an_allocation(adding: Launcher) -> None:
    """They are the same to autograd as in a call made anew."""
    function = both_of(adding)

    def halved(x: Tensor) -> Half:
        both = function(x)
        return Half(both, both.between[4:])

    repeating = Repeating(halved)
    for i in range(4):
        (twice, between), half = repeating(torch.arange(8.0) + i)
        assert twice.tolist() == between.tolist() == [2 * (i + j) for j in range(8)]
        assert half.tolist() == between.tolist()[4:]
        versions = twice._version, between._version + 1
        half.zero_()
        assert (twice._version, between._version) == versions
        assert between.tolist() == twice.tolist()[:4] + [0] * 4
    assert all(map(callable, repeating.known.values()))


@pytest.mark.parametrize(
    "returned",
    [lambda both: Both(both.twice.view(torch.int32), both.between), tuple, lambda both: Both(both.twice, 1)],
    ids=["as another dtype", "a plain tuple", "a number"],
)
def test_a_call_that_returns_something_else_is_made_anew(
    adding: Launcher, returned: Callable[[Both], Any]
) -> None:
    function = both_of(adding)
    repeating = Repeating(lambda x: returned(function(x)))
    for i in range(4):
        assert repeating(torch.full((4,), float(i)))[0].view(torch.float32).tolist() == [2 * i] * 4
    assert list(repeating.known.values()) == [plans.NEVER]


def test_layouts_of_a_structure_are_compiled_once(adding: Launcher) -> None:
    repeating, compiled = Repeating(both_of(adding)), list[int]()
    for n in (8, 12, 16):
        for _ in range(3):
            assert repeating(torch.ones(n)).twice.tolist() == [2] * n
        compiled.append(written._compiled.cache_info().misses)
    assert all(map(callable, repeating.known.values()))
    assert compiled[0] == compiled[2]


def test_calls_of_several_structures_are_repeated_by_turns(adding: Launcher) -> None:
    called = []
    repeating = Repeating(twice_of(adding, then=lambda: called.append(1)))
    ways = [
        {},
        {"kl": KL(None, None, 1)},
        {"kl": KL(ONE, None, 1.0)},
        {"other": [ONE]},
        {"other": [ONE, ONE]},
    ]
    for _ in range(4):
        for way in ways:
            assert repeating(torch.ones(4), **way).twice.tolist() == [2 + ("kl" in way)] * 4
    assert len(called) == 2 * len(ways)


ONE = torch.ones(4)


@pytest.mark.parametrize(
    "changes",
    [
        {"then": lambda: ONE + 1},
        {"then": lambda: ONE[0].item()},
        {"make": lambda: torch.zeros(4)},
        {"given": lambda: ONE},
        {"make": lambda: EMPTY(2 * plan.MOST + 1)[:4]},
    ],
    ids=["computes", "reads", "zeros", "unknown", "much"],
)
def test_a_call_that_does_more_is_made_anew(adding: Launcher, changes: dict[str, Callable[[], Any]]) -> None:
    repeating = Repeating(twice_of(adding, **changes))
    for _ in range(4):
        assert repeating(torch.ones(4)).twice.tolist() == [2] * 4
    assert list(repeating.known.values()) == [plans.NEVER]


def test_a_part_of_an_input_may_be_another_input(adding: Launcher) -> None:
    """Where one begins within another, an address does not say whose it is."""
    x = torch.arange(8.0)

    def function(whole: Tensor, part: Tensor) -> Tensor:
        out = Outputs(EMPTY(4), EMPTY(4))
        adding(1, {}, out=out, settings=Settings(whole[4:], 0.0, 4), BLOCK=16)
        return out.p_twice

    repeating = Repeating(function)
    for _ in range(3):
        assert repeating(x, x[4:]).tolist() == [8, 10, 12, 14]
    assert list(repeating.known.values()) == [plans.NEVER]


def test_a_call_that_looks_at_values_is_made_anew(adding: Launcher) -> None:
    """What it finds is another thing each time; on a CPU it could not be seen to look."""
    repeating = Repeating(lambda x, validate: twice_of(adding)(x))
    repeating(ONE, validate=True)
    assert not repeating.known
    repeating(ONE, validate=False)
    assert repeating.known


class Subclass(Tensor):
    """Whose operators may do anything."""


@pytest.mark.parametrize(
    "other",
    [object(), X.as_subclass(Subclass), X.to_sparse(), dataclasses.replace(CONFIG, lam=X[:, 0])],
    ids=["object", "subclass", "sparse", "setting"],
)
def test_a_call_with_what_no_plan_reads_is_made_anew(adding: Launcher, other: Any) -> None:
    """Nor is it kept."""
    repeating = Repeating(twice_of(adding))
    for _ in range(3):
        repeating(ONE, other=other)
    assert not repeating.known


def test_a_call_that_raises_is_not_known(adding: Launcher) -> None:
    def refuse() -> Tensor:
        raise ValueError("got this, want that")

    repeating = Repeating(twice_of(adding, given=refuse))
    for _ in range(3):
        with pytest.raises(ValueError, match="got this"):
            repeating(torch.ones(4))
    assert not repeating.known


def test_counters_of_a_launch_that_breaks_off_are_discarded(adding: Launcher) -> None:
    """In a repeated call as in one that is made anew."""
    device, broken = torch.device("cpu"), []

    def start(*arguments: Any, stream: int | None = None) -> None:
        if broken:
            raise RuntimeError("out of memory")
        add(*arguments)

    adding.compiled["the only one"][1, 1, 1] = start

    def function(x: Tensor) -> Tensor:
        out = Outputs(EMPTY(4), EMPTY(4), COUNTERS.take(device, 3))
        adding(1, {}, out=out, settings=Settings(x, 0.0, 4), BLOCK=16)
        return out.p_twice

    repeating = Repeating(function)
    for _ in range(3):
        repeating(ONE)
    assert all(map(callable, repeating.known.values()))
    counters = COUNTERS.take(device, 3)
    broken.append(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        repeating(ONE)
    assert COUNTERS.take(device, 3) is not counters


def test_launches_have_counters_of_their_own_where_they_are_given_such(
    adding: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a graph that is captured. They are of the stream that a repeated call launches on."""
    given, used = list[Tensor](), list[int]()
    asked, launched = list[int](), list[int | None]()

    def of(device: torch.device, stream: int, count: int) -> Tensor:
        asked.append(stream)
        given.append(torch.zeros(count))
        return given[-1]

    def start(out: Any, settings: Any, BLOCK: int, stream: int | None = None) -> None:
        p_counters = out[2]
        launched.append(stream)
        used.append(p_counters if isinstance(p_counters, int) else p_counters.data_ptr())

    monkeypatch.setattr(COUNTERS, "of", of)
    adding.compiled["the only one"][1, 1, 1] = start

    def function(x: Tensor) -> Tensor:
        made = EMPTY(4)
        for count in (3, 5):
            out = Outputs(made, None, COUNTERS.take(x.device, count))
            adding(1, {}, out=out, settings=Settings(x, 0.0, 4), BLOCK=16)
        return made

    repeating = Repeating(function)
    for _ in range(3):
        repeating(ONE)
    assert all(map(callable, repeating.known.values()))
    assert used == [x.data_ptr() for x in given]
    assert [len(x) for x in given] == [3, 5] * 3
    assert launched == [None] * 4 + asked[4:]


def test_a_launch_that_is_looked_at_is_not_repeated(
    adding: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeating, seen = Repeating(twice_of(adding)), []
    for _ in range(3):
        repeating(ONE)
    launched = Launcher.__call__

    def looked_at(*args: Any, **kwargs: Any) -> None:
        seen.append(1)
        launched(*args, **kwargs)

    monkeypatch.setattr(Launcher, "__call__", looked_at)
    assert repeating(ONE).twice.tolist() == [2] * 4
    assert len(seen) == 1


LAYOUT_OF = Layouts()
ROW = torch.zeros(4)


def key(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return LAYOUT_OF(args, kwargs)[0]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (X, torch.zeros(2, 65)),
        (X, X.half()),
        (X, torch.zeros(64, 2).T),
        (X, X.to("meta")),
        (torch.zeros(129)[1:], torch.zeros(129)[:-1]),
        (1, 1.0),
        (1, True),
        (None, 0),
        ([X, X], [X, torch.zeros(2, 64)]),
        ([torch.zeros(5)[1:], *torch.zeros(2, 4)], [torch.zeros(4), ROW, ROW]),
        ([X], [X, X]),
        (Response(X), X),
        (Response(X, start=X[0]), Response(X, index=X[0])),
        (AttentionInputs(X, X, 0.5), AttentionInputs(X, X, 0.25)),
        (AttentionInputs(X, X, 0.5, softcap=50), AttentionInputs(X, X, 0.5, softcap=50.0)),
        (KL(X, X, 0.5), KL(X, X, math.nan)),
        (KL(X, X, 0.5), KL(X, X, True)),
        (KL(X, X, 0.5), KL(X, X, X[0, 0])),
        (KL.given(X, 0.5), KL(X, None, 0.5)),
        (CONFIG, ShapingConfig(lam=0.25)),
    ],
)
def test_calls_that_differ_are_not_alike(one: Any, other: Any) -> None:
    assert key(one) == key(one)
    assert key(one) != key(other)


def test_calls_are_alike_whose_numbers_a_launch_takes_as_they_come() -> None:
    assert key(KL(X, X, 0.5)) == key(KL(X, X, 1))
    assert LAYOUT_OF((KL(X, X, 1),), {})[1][-1] == 1.0
    assert key(CONFIG) == key(ShapingConfig(lam=0.5))  # adapters make it anew for each call
    assert key(ShapingConfig(score_clip=(-1.0, 2.0))) == key(ShapingConfig(score_clip=(-1.0, 2.0)))
    assert key(X, X[1:]) == key(torch.ones(2, 64), torch.ones(1, 64))
    assert key(X, config=CONFIG) != key(X, CONFIG)
