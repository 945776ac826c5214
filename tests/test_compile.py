"""The public functions under ``torch.compile``, ``make_fx``, fake tensors and ``torch.library.opcheck``."""

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.backends import pairs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import attnshape
from attnshape import KL, AttentionInputs, Response, ShapingConfig, Whitening
from attnshape import compile as compiling
from attnshape.problems import Problem, make_problem, mapped, pack

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # inductor's imports
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPERATORS = [
    "attention_row",
    "attention_credit",
    "attention_column_credit",
    "attention_rollout",
    "shape_rewards",
    "gae",
    "whiten",
]
GAE_CONFIG = ShapingConfig(gamma=0.99, lam=0.9, mask_semantics="zero")


def drawn(batch: int = 3, width: int = 9, packed: bool = False, **options: Any) -> Problem:
    """Arguments of every function, drawn together."""
    config = ShapingConfig(lam=torch.linspace(0.5, 1.0, batch), score_clip=(-2.0, 2.0))
    problem = make_problem(batch, batch=batch, width=width, whole_query=True, config=config, **options)
    problem = pack(problem) if packed else problem
    return mapped(problem, lambda x: x.to(DEVICE))


def call(name: str, drawn: Problem, backend: str) -> Any:
    """The public function on what it takes of ``drawn``."""
    response, inputs, given = drawn.response, drawn.inputs, drawn.given
    if name == "attention_row":
        return attnshape.attention_row([inputs, inputs], backend=backend)
    if name in ("attention_credit", "attention_column_credit"):
        return getattr(attnshape, name)(inputs, response, backend=backend)
    if name == "attention_rollout":
        return attnshape.attention_rollout([inputs, inputs], response, backend=backend)
    if name == "redistribute":
        return attnshape.redistribute(drawn.score, "uniform", response, drawn.config, backend=backend)
    if name == "gae":
        rewards, values = given["token_rewards"], given["values"]
        return attnshape.gae(rewards, values, response, GAE_CONFIG, backend=backend)
    if name == "whiten":
        return attnshape.whiten(given["values"], response, Whitening(eps=1e-6), backend=backend)
    return drawn.shaped(attnshape.shape_rewards, backend=backend)


def leaves(x: Any) -> list[Any]:
    """Tensors, None where there might be one, and whether statistics are of attention."""
    if isinstance(x, tuple):
        return [leaf for item in x for leaf in leaves(item)]
    return [x]


def assert_same(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    for x, y in zip(leaves(got), leaves(want), strict=True):
        assert type(x) is type(y)
        if not isinstance(x, Tensor):
            assert x is y
        else:
            assert x.dtype == y.dtype
            assert not x.requires_grad
            assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0))


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Without graph breaks."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch.compile(function, fullgraph=True, **options)


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


FUNCTIONS = [*OPERATORS, "redistribute"]


@pytest.mark.parametrize(
    ("name", "backend", "compiler"),
    [
        *((name, "torch", "inductor") for name in FUNCTIONS),
        # To a compiler the backend is one constant more.
        *((name, ("cpu", "triton")[i % 2], "aot_eager") for i, name in enumerate(FUNCTIONS)),
    ],
)
def test_compiled_as_eager(name: str, backend: str, compiler: str) -> None:
    arguments = drawn()
    function = compiled(call, backend=compiler)
    assert_same(function(name, arguments, backend), call(name, arguments, backend))


@pytest.mark.parametrize(
    ("packed", "dtype", "backend"),
    pairs([False, True], [torch.float32, torch.bfloat16], ["cpu", "torch", "triton"]),
)
def test_compiled_in_every_layout(packed: bool, dtype: torch.dtype, backend: str) -> None:
    options = {"sinks": True, "softcap": 5.0, "sliding_window": 7, "head_mask": True, "lse": True, "kl": "kl"}
    arguments = drawn(packed=packed, dtype=dtype, **options)
    function = compiled(call, backend="aot_eager")
    assert_same(function("shape_rewards", arguments, backend), call("shape_rewards", arguments, backend))


@pytest.mark.parametrize("name", OPERATORS)
def test_one_compilation_for_every_shape(name: str) -> None:
    function = compiled(call, dynamic=True, backend="aot_eager")
    for batch, width in ((3, 9), (2, 7), (5, 11), (4, 2)):
        arguments = drawn(batch, width)
        assert_same(function(name, arguments, "torch"), call(name, arguments, "torch"))
    assert compilations() == 1


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_changing_kl_coef_compiles_twice_at_most(compiler: str) -> None:
    arguments = drawn()
    function = compiled(call, backend=compiler)
    kl = arguments.given["kl"]
    for step in range(8):
        arguments.given["kl"] = KL(kl.logprobs, kl.ref_logprobs, 0.1 + step / 100)
        got, want = (f("shape_rewards", arguments, "torch") for f in (function, call))
        torch.testing.assert_close(got.rewards, want.rewards, equal_nan=True)
    assert compilations() <= 2


def test_a_new_dense_share_compiles_anew() -> None:
    arguments = drawn()
    function = compiled(call, backend="eager")
    for dense_share in (0.5, 0.75, 1.0, 0.5):
        arguments.config = ShapingConfig(dense_share=dense_share, lam=0.95)
        assert_same(function("shape_rewards", arguments, "torch"), call("shape_rewards", arguments, "torch"))
    assert compilations() == 3


def test_arguments_are_made_where_a_compiler_looks_on() -> None:
    def advantages(x: Tensor, mask: Tensor) -> Tensor:
        config = ShapingConfig(dense_share=0.5, lam=0.9, whitening=Whitening(eps=1e-6))
        kl = KL(x, x + 1, 0.125)  # the same number as a tensor in float32
        shaped = attnshape.shape_rewards(x[:, 0], "uniform", Response(mask), values=x, kl=kl, config=config)
        steps = attnshape.gae(shaped.rewards, x, mask, ShapingConfig(gamma=0.9))
        return attnshape.whiten(steps.advantages, mask, config.whitening, moments=steps.moments)

    given = torch.rand(2, 5, device=DEVICE), torch.ones(2, 5, device=DEVICE)
    assert_same(compiled(advantages, backend="eager")(*given), advantages(*given))


def test_inside_a_larger_graph_with_gradients() -> None:
    arguments = drawn()
    arguments.given["values"] = torch.nn.Parameter(arguments.given["values"])
    arguments.inputs.key.requires_grad_()

    def step(arguments: Problem, scale: Tensor) -> tuple[Tensor, Tensor]:
        shaped = call("shape_rewards", arguments, "torch")
        whitened = attnshape.whiten(
            shaped.advantages, arguments.response, moments=shaped.moments, backend="torch"
        )
        return (scale * whitened).sum(), shaped.metrics["credit_entropy"]

    scale = torch.tensor(2.0, device=DEVICE, requires_grad=True)
    want = step(arguments, scale)
    function = compiled(step, backend="aot_eager")
    got = function(arguments, scale)
    torch.testing.assert_close(got, want)
    assert not got[1].requires_grad
    got[0].backward()
    assert scale.grad is not None
    assert arguments.given["values"].grad is None


class Recorder(TorchDispatchMode):
    """Remembers the arguments of an operator."""

    def __init__(self, seen: list[tuple], operator: Any) -> None:
        super().__init__()
        self.seen, self.operator = seen, operator

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is self.operator:
            self.seen.append(args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "packed", "backend"),
    [
        *((name, packed, "torch") for name in OPERATORS for packed in (False, True)),
        *((name, i % 2 == 0, "cpu") for i, name in enumerate(OPERATORS)),
        *((name, i % 2 == 1, "triton") for i, name in enumerate(OPERATORS)),
    ],
)
def test_opcheck(name: str, packed: bool, backend: str) -> None:
    operator, seen = getattr(torch.ops.attnshape, name).default, []
    with Recorder(seen, operator):
        call(name, drawn(2, 5, packed), backend)
    # To a compiler the operator is the same whatever computes; only what it returns may differ.
    checks = ["test_schema", "test_faketensor"]
    if backend == "torch":
        checks += ["test_autograd_registration", "test_aot_dispatch_dynamic"]
    torch.library.opcheck(operator, seen[0], test_utils=checks)


def tensors_of(arguments: Problem) -> list[Tensor]:
    tensors: list[Tensor] = []
    mapped(arguments, lambda x: (tensors.append(x), x)[1])
    return tensors


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_one_operator(name: str, mode: str) -> None:
    arguments = drawn()

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        replacement = iter(tensors)
        return tuple(leaves(call(name, mapped(arguments, lambda _: next(replacement)), "torch")))

    tensors = tensors_of(arguments)
    graph = make_fx(function, tracing_mode=mode)(*tensors)
    operators = [node.target for node in graph.graph.nodes if "attnshape" in str(node.target)]
    assert operators == [getattr(torch.ops.attnshape, name).default]
    assert_same(graph(*tensors), function(*tensors))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_fake_tensors(name: str) -> None:
    arguments = drawn(packed=True)
    with FakeTensorMode() as mode:
        fake = call(name, mapped(arguments, mode.from_tensor), "torch")
    for got, want in zip(leaves(fake), leaves(call(name, arguments, "torch")), strict=True):
        if not isinstance(want, Tensor):
            assert got is want
        else:
            assert (got.shape, got.dtype, got.stride()) == (
                want.shape,
                want.dtype,
                want.contiguous().stride(),
            )


def test_eager_mode_goes_past_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(compiling, "flatten", refuse)
    for name in OPERATORS:
        call(name, drawn(), "torch")


def test_structures_come_back_as_they_went() -> None:
    inputs = AttentionInputs(
        torch.ones(1), torch.ones(2), 0.5, sliding_window=3, query_position="last_response"
    )
    config = ShapingConfig(score_clip=(-1.0, 2.0), lam=torch.ones(3), whitening=Whitening(bessel=False))
    response = Response(torch.ones(2, 3), start=torch.ones(2), cu_seqlens=torch.ones(3))
    kl = KL(torch.ones(2), None, 0.5, torch.ones(4))
    given = [[inputs, inputs], response, kl, config, None, True, 7, 1.5, "uniform", (torch.ones(4),)]
    held = compiling.Leaves([], [], [])
    structure = compiling.flatten(given, held)
    layers, *others = compiling.unflatten(structure, held)
    for back, went in zip([*layers, *others[:3]], [inputs, inputs, response, kl, config], strict=True):
        assert type(back) is type(went)
        assert vars(back) == vars(went)
    rest = others[3:]
    assert rest == given[4:]
    with pytest.raises(TypeError, match="got object, which cannot be compiled"):
        compiling.flatten(object(), held)


def test_an_operator_keeps_no_argument() -> None:
    """A CUDA graph's inputs would stay in its pool until garbage is collected."""
    x = torch.ones(3)
    held = compiling.Leaves([], [], [])
    structure = compiling.flatten([[x], 0.5], held)
    kept = weakref.ref(x)
    gc.disable()
    try:
        compiling.unflatten(structure, held)
        del x, held
        assert kept() is None
    finally:
        gc.enable()


def test_bad_arguments_are_named_where_the_operator_runs() -> None:
    arguments = drawn()
    arguments.score = torch.ones(1, device=DEVICE)
    function = compiled(call, backend="eager")
    with pytest.raises(ValueError, match="score: got shape"):
        function("shape_rewards", arguments, "torch")
    assert torch.is_grad_enabled()


def test_a_process_group_is_compiled_too(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    arguments = drawn()

    def whiten(x: Tensor, mask: Tensor) -> Tensor:
        return attnshape.whiten(x.cpu(), mask.cpu(), process_group=dist.group.WORLD, backend="torch")

    given = arguments.given["values"], arguments.response.mask
    assert_same(compiled(whiten, backend="eager")(*given), whiten(*given))
    dist.destroy_process_group()
