"""The kernels that the public functions would start on a GPU, and what they compile to there.

``python -m benchmarks.kernel_table`` brings ``results/kernels.jsonl`` (`benchmarks.kernel_facts`) and
``kernels.md`` up to date, after a change to a kernel: it compiles the specialisations that the first does not
know, some two seconds each, and prints how many there are. With ``all`` it compiles every one of them anew.

The rest is what the tests ask, in a process of its own, since Triton's interpreter leaves nothing to compile:
``found`` prints what is found, ``anew`` the lines for ``kernels.jsonl`` without a look at what it knows, both
for every target and case or as in ``found sm_90,gfx942 "^sweep"``. ``kinds sm_90`` prints which
specialisations 200 random shapes need, and how many stand behind each key of a launcher. ``summed sm_90``
prints how many numbers each reduction adds up where rows are swept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.kernel_facts import (
    STORE,
    TARGETS,
    Facts,
    Variant,
    digest,
    facts,
    gpu_of,
    leaves,
    read,
    representation,
    written,
)

ROOT = Path(__file__).parents[1]
TABLE = STORE.with_suffix(".md")


class Limits(NamedTuple):
    """What a multiprocessor (AMD: a compute unit) has for the programs it holds."""

    registers: int  # 32 bits, of all threads
    registers_step: int  # a warp's registers are given out in these
    warps: int
    programs: int
    shared: int  # bytes
    shared_of_program: int  # at most
    reserved: int  # bytes of it that each program costs besides its own


LIMITS = {
    # CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
    "sm_80": Limits(65536, 256, 64, 32, 164 << 10, 163 << 10, 1024),
    "sm_89": Limits(65536, 256, 48, 24, 100 << 10, 99 << 10, 1024),
    "sm_90": Limits(65536, 256, 64, 32, 228 << 10, 227 << 10, 1024),
    "sm_100": Limits(65536, 256, 64, 32, 228 << 10, 227 << 10, 1024),
    "sm_120": Limits(65536, 256, 48, 24, 100 << 10, 99 << 10, 1024),
    # AMD, "CDNA 3 Instruction Set Architecture": 4 SIMDs of 8 wavefronts, 512 registers a lane; 64 KB of LDS.
    "gfx942": Limits(4 * 512 * 64, 8 * 64, 32, 32, 64 << 10, 64 << 10, 0),
}


def programs_per_multiprocessor(target: str, registers: int, shared: int, warps: int) -> int:
    """How many programs a multiprocessor holds; its four parts share nothing but memory."""
    limits, threads = LIMITS[target], TARGETS[target][2]
    of_warp = math.ceil(registers * threads / limits.registers_step) * limits.registers_step
    by_registers = limits.registers // 4 // max(of_warp, 1) * 4 // warps
    by_shared = limits.shared // (shared + limits.reserved) if shared + limits.reserved else limits.programs
    return min(by_registers, by_shared, limits.warps // warps, limits.programs)


# What is launched


KINDS = ("read", "written", "workspace")
"""A tensor that the caller gave, one that it gets, or one by which programs leave something to each other."""


class Launch(NamedTuple):
    case: str
    launcher: Any
    arguments: dict[str, Any]
    options: dict[str, Any]
    programs: int
    tensors: dict[str, tuple[str, int]]  # by argument: what it is, of KINDS, and its bytes

    def variant(self, target: Any) -> Variant:
        from triton.compiler import make_backend

        from csrc_triton.launch import fitted

        source = self.launcher.source(self.arguments)
        options = make_backend(target).parse_options(fitted(dict(self.options), target))
        return Variant(self.launcher.kernel, source, vars(options))


Calls = Iterable[tuple[str, Callable[..., Any], dict[str, Any]]]


def captured_launches(calls: Calls, backend: str = "cuda") -> Iterator[Launch]:
    """What the calls, each with a name and its arguments, would launch on a GPU; nothing is computed."""
    import torch

    from attnshape import triton_backend
    from csrc_triton.launch import Launcher

    started: list[tuple[Any, int, dict[str, Any], dict[str, Any]]] = []

    def capture(self: Any, programs: int, options: dict[str, Any], **arguments: Any) -> None:
        started.append((self, programs, options, {name: arguments[name] for name in self.constant}))

    Launcher.__call__ = capture  # type: ignore[method-assign]
    torch.version.hip = "compiled offline" if backend == "hip" else None
    triton_backend.unsupported = lambda *_: None  # the tensors are on the CPU
    for name, call, given in calls:
        started.clear()
        result = call(**given)
        inputs, outputs = ({x.untyped_storage()._cdata for x in tensors_in(held)} for held in (given, result))
        for launcher, programs, options, arguments in started:
            tensors = {}
            for argument, x in (x for group, held in arguments.items() for x in leaves(group, held)):
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()._cdata
                    kind = "written" if storage in outputs else "read" if storage in inputs else "workspace"
                    tensors[argument] = kind, x.numel() * x.element_size()
            yield Launch(name, launcher, arguments, options, programs, tensors)


def tensors_in(x: Any) -> Iterator[Any]:
    import torch

    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, dict):
        yield from tensors_in(list(x.values()))
    elif isinstance(x, list | tuple):
        for held in x:
            yield from tensors_in(held)
    elif dataclasses.is_dataclass(x):
        yield from tensors_in(vars(x))


def calls() -> Calls:
    """Every budget's call, and those that need another specialisation of a kernel."""
    import torch

    from attnshape.bench.cases import Case, Shape
    from benchmarks.cases import budget_cases

    for case, _ in budget_cases():
        arguments = case.arguments(torch.device("cpu"))
        yield case.name, functools.partial(call_case, case), arguments
    for what in ("sweep", "gae"):
        case = Case(what, Shape(4096, 511))  # whose rows begin where they may
        yield case.name, functools.partial(call_case, case), case.arguments(torch.device("cpu"))
    yield from attention_calls()
    yield from option_calls()
    yield from column_calls()


def reading_on(function: Callable[..., Any], **arguments: Any) -> Any:
    """With as many programs as run at a time, which read on where a row's keys end."""
    from benchmarks.on_gpu.tuning import READING_ON, injected

    with injected({"attention.READ_ON": READING_ON}):
        return function(**arguments)


def call_case(case: Any, **arguments: Any) -> Any:
    return case.call(arguments, "triton")


def attention_calls() -> Calls:
    """Head widths, groups, dtypes and layouts of real models, and bases that are not aligned."""
    import torch

    import attnshape

    mask, start = torch.ones(2, 50, dtype=torch.bool), torch.zeros(2, dtype=torch.int32)
    half, full = torch.bfloat16, torch.float32
    for dtype, heads, kv_heads, width, layout in [
        (half, 32, 8, 128, "token-major"),
        (half, 32, 8, 128, "packed"),
        (half, 32, 8, 128, "misaligned"),
        (half, 64, 1, 256, "head-major"),
        (half, 14, 2, 24, "head-major"),
        (full, 32, 8, 128, "head-major"),
        (full, 32, 8, 128, "misaligned"),
        (full, 64, 1, 256, "token-major"),
    ]:
        query, options = torch.empty(2, heads, width, dtype=dtype), {}
        key = torch.empty(2, kv_heads, 300, width, dtype=dtype)
        if layout == "token-major":
            key = torch.empty(2, 300, kv_heads, width, dtype=dtype).transpose(1, 2)
        elif layout == "packed":
            key = torch.empty(600, kv_heads, width, dtype=dtype)
            options = {"cu_seqlens": torch.zeros(3, dtype=torch.int32)}
        elif layout == "misaligned":
            key = torch.empty(key.numel() + 1, dtype=dtype)[1:].view(key.shape)
        inputs = attnshape.AttentionInputs(query, key, 0.1, **options)
        given = {"inputs": inputs, "response": attnshape.Response(mask, start=start)}
        name = f"credit, {str(dtype)[6:]} {heads}/{kv_heads}x{width} {layout}"
        yield name, functools.partial(attnshape.attention_credit, backend="triton"), given


def option_calls() -> Calls:
    import torch

    import attnshape
    from attnshape import KL, AttentionInputs, Response, ShapingConfig
    from attnshape.problems import mapped

    def layer(**options: Any) -> AttentionInputs:
        query, key = torch.empty(2, 32, 300, 128, dtype=half), torch.empty(2, 8, 300, 128, dtype=half)
        return AttentionInputs(query, key, 0.1, **options)

    half = torch.bfloat16
    tokens, row = torch.empty(6, 2, 700).unbind(), torch.empty(2)
    mask, index = torch.ones(2, 700, dtype=torch.bool), torch.zeros(2, 700, dtype=torch.int32)
    attended = torch.ones(2, 300, dtype=torch.bool)
    masked = {"softcap": 50.0, "sinks": torch.empty(32), "sliding_window": 128, "attention_mask": attended}
    position = torch.zeros(2, dtype=torch.int32)
    yield (
        "row, every option",
        attnshape.attention_row,
        {
            "inputs": layer(**masked, lse=torch.empty(2, 32, 300), head_mask=torch.ones(32)),
            "backend": "triton",
        },
    )
    fused = functools.partial(attnshape.shape_rewards, torch.empty(2), backend="triton")
    given = {"values": tokens[0], "kl": KL(tokens[1], tokens[2], 0.1), "token_rewards": tokens[3]}
    given |= {"bootstrap": row, "terminal_reward": row.clone()}
    k3 = ShapingConfig(lam=0.95, kl_estimator="k3", kl_input_clip=5.0, kl_output_clip=5.0)
    both_ways = layer(
        mask_row=torch.empty(2, 32, 300, dtype=half),
        causal=False,
        sliding_window=128,
        query_position=position,
    )
    yield "row, mask_row, both ways", attnshape.attention_row, {"inputs": both_ways, "backend": "triton"}
    long = AttentionInputs(
        torch.empty(1, 32, 128, dtype=half).expand(256, -1, -1),
        torch.empty(1, 8, 4300, 128, dtype=half).expand(256, -1, -1, -1),
        0.1,
    )
    one_key_head = AttentionInputs(torch.empty(2, 32, 128, dtype=half), long.key[:2, :1], 0.1)
    yield "row, long, one key head", attnshape.attention_row, {"inputs": one_key_head, "backend": "triton"}
    where = Response(torch.empty(1, 4200).expand(256, -1), start=torch.zeros(256, dtype=torch.int32))
    many = {"inputs": long, "response": where, "backend": "triton"}
    yield "credit, many long rows", attnshape.attention_credit, many
    yield "credit, reading on", functools.partial(reading_on, attnshape.attention_credit), many
    yield (
        "fused, last_response, index",
        fused,
        {
            "credit": layer(query_position="last_response", attention_mask=attended),
            "response": Response(mask, index=index),
            "config": ShapingConfig(lam=0.95),
            **given,
        },
    )
    yield (
        "fused, lse, two layers, k3",
        fused,
        {
            "credit": [layer(key_start=position, query_position=position, lse=torch.empty(2, 32, 300))] * 2,
            "response": Response(mask, start=position),
            "config": k3,
            **given,
        },
    )
    decoupled = ShapingConfig(
        lam=row, lam_value=0.9, score_index=position, on_nan="zero_row", kl_estimator="k2"
    )
    short = Response(mask[:1].expand(256, -1), start=where.start)
    yield (
        "fused, reading on",
        functools.partial(reading_on, attnshape.shape_rewards),
        {
            "score": torch.empty(256),
            "credit": long,
            "response": short,
            "values": tokens[0][:1].expand(256, -1),
            "kl": KL(tokens[1][:1].expand(256, -1), tokens[2][:1].expand(256, -1), 0.1),
            "backend": "triton",
        },
    )
    yield "sweep, decoupled lam", fused, {"credit": tokens[4], "response": mask, "config": decoupled, **given}
    yield "sweep, lam 1", fused, {"credit": "uniform", "response": mask, **given}
    packed = mapped(given, lambda x: x[0] if x.ndim == 2 else x)
    yield (
        "sweep, packed, zero",
        fused,
        {
            "credit": tokens[4][0],
            "response": Response(mask[0], cu_seqlens=torch.zeros(3, dtype=torch.int32)),
            "config": ShapingConfig(lam=0.95, mask_semantics="zero", normalization="sum_to_length"),
            **packed,
        },
    )
    group = functools.partial(attnshape.group_advantages, torch.empty(2), group=2, backend="triton")
    yield "groups", group, {"credit": layer(), "response": Response(mask, start=position)}
    yield "groups, given credit", group, {"credit": tokens[4], "response": mask}
    gae = functools.partial(attnshape.gae, backend="triton")
    yield "gae, lam 1", gae, {"rewards": tokens[0], "values": tokens[1], "response": mask}


def column_calls() -> Calls:
    """Columns and rollout, which read every query, and ``whiten`` with moments."""
    import torch

    import attnshape
    from attnshape import AttentionInputs, Response

    mask, start = torch.ones(2, 50, dtype=torch.bool), torch.zeros(2, dtype=torch.int32)
    half, full = torch.bfloat16, torch.float32
    column = functools.partial(attnshape.attention_column_credit, backend="triton")
    where = {"response": Response(mask, start=start)}
    for dtype, heads, kv_heads, width in [(half, 64, 1, 256), (full, 32, 8, 128), (half, 14, 2, 24)]:
        query, key = (torch.empty(2, n, 300, width, dtype=dtype) for n in (heads, kv_heads))
        given = {"inputs": AttentionInputs(query, key, 0.1), **where}
        yield f"column, {str(dtype)[6:]} {heads}/{kv_heads}x{width}", column, given
    query, key = (torch.empty(600, n, 128, dtype=half) for n in (32, 8))
    packed = AttentionInputs(query, key, 0.1, cu_seqlens=torch.zeros(3, dtype=torch.int32))
    yield "column, packed", column, {"inputs": packed, **where}
    query, key = (torch.empty(2, n, 300, 128, dtype=half) for n in (32, 8))
    options = {"softcap": 50.0, "sinks": torch.empty(32), "sliding_window": 128, "head_mask": torch.ones(32)}
    every = AttentionInputs(query, key, 0.1, attention_mask=torch.ones(2, 300), **options)
    yield "column, every option", column, {"inputs": every, **where}
    known = AttentionInputs(query, key, 0.1, lse=torch.empty(2, 32, 300))
    yield "column, lse", column, {"inputs": known, **where}
    rollout = functools.partial(attnshape.attention_rollout, backend="triton")
    layers = [AttentionInputs(query, key, 0.1)] * 2
    yield "rollout", rollout, {"layers": layers, **where}
    both_ways = AttentionInputs(query, key, 0.1, causal=False, sliding_window=128)
    yield "column, both ways", column, {"inputs": both_ways, **where}
    yield "rollout, both ways", rollout, {"layers": [both_ways] * 2, **where}
    norms = {"value_norm": torch.empty(2, 32, 300), "residual_norm": torch.empty(2, 300)}
    yield "rollout, norms", rollout, {"layers": [AttentionInputs(query, key, 0.1, **norms)] * 2, **where}
    whiten = functools.partial(attnshape.whiten, backend="triton")
    x = {"x": torch.empty(2, 50), "response": mask}
    yield "whiten, moments", whiten, {**x, "moments": torch.empty(2, 3)}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield "whiten, process group", functools.partial(whiten, process_group=torch.distributed.group.WORLD), x
    torch.distributed.destroy_process_group()


def random_calls(count: int = 200) -> Calls:
    """Calls that differ in nothing but their shapes."""
    import torch

    from attnshape.bench.cases import Case, Shape

    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        batch, response, prompt = (int(torch.randint(1, n, (), generator=generator)) for n in (40, 5000, 500))
        for what, keys in (
            ("fused", response + prompt),
            ("credit", response + prompt),
            ("sweep", 0),
            ("gae", 0),
        ):
            case = Case(what, Shape(batch, response, keys))
            yield case.name, functools.partial(call_case, case), case.arguments(torch.device("cpu"))


# What it compiles to

Found = dict[str, dict[str, Any]]
"""By target: ``variants``, each with what it compiles to, and ``launches``, each with its variant's place."""


def measured(known: Facts, targets: Iterable[str] = TARGETS, wanted: str = "") -> tuple[Found, Facts]:
    """The variants that the calls whose names match ``wanted`` launch; and of the facts those that they need.

    What is not ``known`` is compiled.
    """
    targets = list(targets)
    by_backend = {
        backend: list(captured_launches((x for x in calls() if re.search(wanted, x[0])), backend))
        for backend in dict.fromkeys(TARGETS[target][0] for target in targets)
    }
    launches = {target: by_backend[TARGETS[target][0]] for target in targets}
    launched = {target: [x.variant(gpu_of(target)) for x in launches[target]] for target in targets}
    needed = {
        (target, digest(variant, target)): variant
        for target, variants in launched.items()
        for variant in {variant.key: variant for variant in variants}.values()
    }
    facts_of = {place: known[place] for place in needed if place in known}
    facts_of |= compiled({place: variant for place, variant in needed.items() if place not in known})
    by_key = {(place[0], variant.key): facts_of[place] for place, variant in needed.items()}
    return {x: found_of(x, launches[x], launched[x], by_key) for x in targets}, facts_of


def compiled(missing: dict[tuple[str, str], Variant]) -> Facts:
    """By target and digest, as ``missing``; what it takes is said on stderr."""
    if not missing:
        return {}
    start, by_kernel = time.monotonic(), Counter(variant.kernel.__name__ for variant in missing.values())
    counts = ", ".join(f"{n} of {name}" for name, n in sorted(by_kernel.items()))
    print(f"to be compiled: {counts}", file=sys.stderr, flush=True)
    facts_of: Facts = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # One after the other: what LLVM makes for one may depend on what it makes for the other meanwhile.
        for backend in ("cuda", "hip"):
            places = [place for place in missing if TARGETS[place[0]][0] == backend]
            found = pool.map(lambda place: facts(missing[place], place[0]), places)
            facts_of |= zip(places, found, strict=True)
    print(f"compiled in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return facts_of


def found_of(
    target: str, launches: Sequence[Launch], launched: Sequence[Variant], facts_of: Facts
) -> dict[str, Any]:
    """What tests and the table read; ``launched`` is by launch, ``facts_of`` by target and variant's key."""
    variants: dict[str, dict[str, Any]] = {}
    in_order = []
    for launch, variant in zip(launches, launched, strict=True):
        known = facts_of[target, variant.key]
        used = {name for name, use in zip(variant.passed, known["used"], strict=True) if use == "1"}
        programs = programs_per_multiprocessor(target, *(known[x] for x in ("registers", "shared", "warps")))
        variants.setdefault(
            variant.key,
            {
                **known,
                "case": launch.case,
                "constants": variant.constants,
                "used": sorted(used),
                "programs": programs,
            },
        )
        sizes = dict.fromkeys(KINDS, 0)
        for argument, (kind, size) in launch.tensors.items():
            sizes[kind] += size if argument in used else 0
        place = list(variants).index(variant.key)
        in_order.append({"case": launch.case, "variant": place, "programs": launch.programs, **sizes})
    return {"variants": list(variants.values()), "launches": in_order}


def specialisations(target: str) -> dict[str, Any]:
    """What random shapes need; and how many stand behind each key of a launcher."""
    needed: dict[str, dict[str, Any]] = {}
    behind: dict[Any, set[str]] = {}
    for some in (calls(), random_calls()):
        needed.clear()  # of the last
        for launch in captured_launches(some):
            variant = launch.variant(gpu_of(target))
            needed[variant.key] = {"kernel": variant.kernel.__name__, **variant.constants}
            key = launch.launcher.key(launch.arguments, launch.options)
            behind.setdefault((variant.kernel.__name__, key), set()).add(variant.key)
    return {"needed": list(needed.values()), "behind": [len(keys) for keys in behind.values()]}


def summed(target: str) -> list[dict[str, Any]]:
    """Of each sweep of tokens, how many floats its reductions and scans put together, before any layout."""
    reduction = re.compile(r'"tt\.(reduce|scan)".*?axis = (\d+) : i32.*?\}\) : \((.*?)\)', re.DOTALL)
    found = {}
    for launch in captured_launches(calls()):
        variant = launch.variant(gpu_of(target))
        if variant.kernel.__name__ not in ("rows_kernel", "chunks_kernel") or variant.key in found:
            continue
        sizes = set()
        for kind, axis, operands in reduction.findall(representation(variant, target)):
            for shape, dtype in re.findall(r"tensor<((?:\d+x)+)(\w+)", operands):
                if dtype.startswith("f"):
                    sizes.add((kind, int(shape.split("x")[int(axis)])))
        case = {"case": launch.case, "kernel": variant.kernel.__name__, "warps": launch.options["num_warps"]}
        found[variant.key] = case | {"source": variant.constants.get("SOURCE"), "sizes": sorted(sizes)}
    return list(found.values())


# The table

WORST: dict[str, Callable[[Iterable[Any]], Any]] = {
    "registers": max,
    "shared": max,
    "spills": max,
    "programs": min,
    "loop_instructions": max,
    "loop_barriers": max,
}
"""Columns, each with which of the variants' values is the worst."""


def table_of(found: Found) -> dict[str, Any]:
    """What ``measured`` found: a row for each kernel and target, and every launch."""
    rows = []
    names = sorted({variant["kernel"] for of_target in found.values() for variant in of_target["variants"]})
    for name in names:
        for target, of_target in found.items():
            variants = [variant for variant in of_target["variants"] if variant["kernel"] == name]
            row: dict[str, Any] = {"kernel": name, "target": target, "variants": len(variants)}
            for column, worst in WORST.items():
                row[column] = (
                    worst(x[column] for x in variants if column in x)
                    if any(column in x for x in variants)
                    else None
                )
            rows.append(row)
    first = next(iter(found.values()))
    launches = [
        launch | {"kernel": first["variants"][launch["variant"]]["kernel"]} for launch in first["launches"]
    ]
    return {"kernels": rows, "launches": launches}


def markdown(table: dict[str, Any]) -> str:
    """The table to be read."""
    import triton

    lines = [
        "# Kernels, compiled offline",
        "",
        f"By `python -m benchmarks.kernel_table` with triton {triton.__version__}; nothing here was timed.",
        "",
        "A row per kernel and target, in each column the worst of its specialisations. *Programs*: how",
        "many a multiprocessor holds, by registers, shared memory and warps (CUDA C++ Programming Guide,",
        "technical specifications per compute capability; CDNA 3 ISA guide). *Instructions*, *barriers*: of",
        "the innermost loop around the first tensor-core product. A line for each specialisation is in",
        "`kernels.jsonl`.",
        "",
        "| kernel | target | specialisations | registers | shared memory | spills | programs | instructions "
        "| barriers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table["kernels"]:
        cells = ["" if x is None else x for x in row.values()]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [
        "",
        "Bytes by launch: tensors that the caller gave, read once; that it gets, written once; and others,",
        "which programs leave to each other. All of a tensor counts if the launch has a use for it.",
        "",
        "| case | launch | programs | bytes read | bytes written | workspace |",
        "|---|---|---|---|---|---|",
    ]
    for launch in table["launches"]:
        sizes = [f"{launch[name]:,}" for name in ("programs", "read", "written", "workspace")]
        lines.append(f"| {' | '.join([launch['case'], launch['kernel'], *sizes])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    every = ",".join(TARGETS)
    apart = {
        "found": lambda of=every, *wanted: measured(read(), of.split(","), *wanted)[0],
        "anew": lambda of=every, *wanted: written(measured({}, of.split(","), *wanted)[1]),
        "kinds": specialisations,
        "summed": summed,
    }
    match sys.argv[1:]:
        case [what, *arguments] if what in apart:
            print(json.dumps(apart[what](*arguments)))
        case [] | ["all"]:
            with tempfile.TemporaryDirectory() as cache:
                os.environ["TRITON_CACHE_DIR"] = cache
                found, facts_of = measured({} if sys.argv[1:] else read())
            STORE.write_text(written(facts_of))
            TABLE.write_text(markdown(table_of(found)))
        case other:
            sys.exit(f"got {' '.join(other)}; want nothing, all, {', '.join(apart)}: see the docstring")


if __name__ == "__main__":
    main()
