"""What the kernels compile to, for GPUs that need not be here.

``python -m benchmarks.kernel_table`` writes ``results/kernels.json`` and ``kernels.md``. With a target's
name, and an expression that names of cases match, it prints what it found for that target: each has a process
of its own, since Triton's interpreter leaves nothing to compile. With ``count`` it prints the specialisations
that 200 random shapes need; with ``kinds`` and a target, how many stand behind each key of the launcher.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "kernels.json"

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}


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


class Variant(NamedTuple):
    """One specialisation of a kernel, as Triton would look it up."""

    kernel: Any
    source: Any
    options: dict[str, Any]

    @property
    def constants(self) -> dict[str, Any]:
        """Its compile-time constants by name; of its pointers, those that are not there."""
        parameters, values = self.kernel.params, {path[0]: x for path, x in self.source.constants.items()}
        return {p.name: values[i] for i, p in enumerate(parameters) if p.is_constexpr}

    @property
    def key(self) -> str:
        return f"{self.kernel.__name__} {self.source.hash()} {sorted(self.options.items(), key=str)}"


class Launch(NamedTuple):
    case: str
    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # and arguments given by name
    programs: int
    tensors: dict[str, tuple[str, int]]  # by argument: what it is, of KINDS, and its bytes

    def variant(self, target: Any) -> Variant:
        from triton.compiler import ASTSource, make_backend
        from triton.runtime.jit import create_function_from_signature

        backend, options = make_backend(target), dict(self.options)
        if target.backend == "hip":
            options.pop("maxnreg", None)
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = binder(
            *self.arguments, **options, debug=False, instrumentation_mode=""
        )
        options, signature, constants, attributes = self.kernel._pack_args(
            backend, options, bound, specialization, None
        )
        return Variant(self.kernel, ASTSource(self.kernel, signature, constants, attributes), vars(options))


Calls = Iterable[tuple[str, Callable[..., Any], dict[str, Any]]]


def captured_launches(calls: Calls) -> Iterator[Launch]:
    """What the calls, each with a name and its arguments, would launch on a GPU; nothing is computed."""
    import torch
    from triton.runtime.jit import JITFunction

    from attnshape import triton_backend

    started: list[tuple[Any, tuple[Any, ...], Any, dict[str, Any]]] = []

    def capture(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        started.append((kernel, arguments, grid, options))

    JITFunction.run = capture
    triton_backend.unsupported = lambda *_: None  # the tensors are on the CPU
    for name, call, given in calls:
        started.clear()
        result = call(**given)
        inputs, outputs = ({x.untyped_storage()._cdata for x in tensors_in(held)} for held in (given, result))
        for kernel, arguments, grid, options in started:
            named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
            tensors = {}
            for argument, x in named.items():
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()._cdata
                    kind = "written" if storage in outputs else "read" if storage in inputs else "workspace"
                    tensors[argument] = kind, x.numel() * x.element_size()
            yield Launch(name, kernel, arguments, options, math.prod(grid), tensors)


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

    from benchmarks.cases import budget_cases

    for case, _ in budget_cases():
        arguments = case.arguments(torch.device("cpu"))
        yield case.name, functools.partial(call_case, case), arguments
    yield from attention_calls()
    yield from option_calls()
    yield from column_calls()


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
    norms = {"value_norm": torch.empty(2, 32, 300), "residual_norm": torch.empty(2, 300)}
    yield "rollout, norms", rollout, {"layers": [AttentionInputs(query, key, 0.1, **norms)] * 2, **where}
    whiten = functools.partial(attnshape.whiten, backend="triton")
    x = {"x": torch.empty(2, 50), "mask": mask}
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


def measured(target: str, wanted: str = "") -> dict[str, Any]:
    """The variants that the calls whose names match ``wanted`` launch, compiled, and what launches which."""
    import triton
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget(*TARGETS[target])
    variants: dict[str, dict[str, Any]] = {}
    launches = []
    for launch in captured_launches(call for call in calls() if re.search(wanted, call[0])):
        variant = launch.variant(gpu)
        if variant.key not in variants:
            compiled = triton.compile(variant.source, target=gpu, options=variant.options)
            facts = amd_facts(compiled.asm) if gpu.backend == "hip" else nvidia_facts(compiled.asm)
            facts["shared"] = compiled.metadata.shared
            facts["programs"] = programs_per_multiprocessor(
                target, facts["registers"], facts["shared"], compiled.metadata.num_warps
            )
            variants[variant.key] = {
                "kernel": variant.kernel.__name__,
                "case": launch.case,
                "constants": variant.constants,
                "layouts": layouts_of_reductions(compiled.asm["ttgir"]),
                "used": used_arguments(variant, compiled.asm["ttir"]),
                **facts,
            }
        used = variants[variant.key]["used"]
        sizes = dict.fromkeys(KINDS, 0)
        for argument, (kind, size) in launch.tensors.items():
            sizes[kind] += size if argument in used else 0
        place = list(variants).index(variant.key)
        launches.append({"case": launch.case, "variant": place, "programs": launch.programs, **sizes})
    return {"variants": list(variants.values()), "launches": launches}


def used_arguments(variant: Variant, ttir: str) -> list[str]:
    """Names of the arguments that a specialisation has a use for."""
    passed = [name for name, kind in variant.source.signature.items() if kind != "constexpr"]
    head, body = re.search(r"tt\.func public @\w+\((.*?)\) attributes(.*)", ttir, re.DOTALL).groups()
    values = re.findall(r"(%\w+): ", head)
    return [name for name, x in zip(passed, values, strict=True) if re.search(rf"{x}\b", body)]


def layouts_of_reductions(ttgir: str) -> list[str]:
    """Operands of every reduction and scan: the layout decides in which order elements are added."""
    names = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    operands = re.findall(r"tt\.(?:reduce|scan).*?\n.*?\}\) : \((.*?)\)", ttgir, re.DOTALL)
    return [re.sub(r"#\w+", lambda m: names.get(m[0], m[0]), x) for x in operands]


def amd_facts(asm: dict[str, Any]) -> dict[str, Any]:
    code = asm["amdgcn"]

    def count(name: str) -> int:
        found = re.search(rf"\.{name}: *(\d+)", code)
        assert found
        return int(found[1])

    return {
        "registers": count("vgpr_count"),
        "spills": count("vgpr_spill_count"),
        "matrix": len(re.findall("v_mfma", code)),
        "wide_loads": len(re.findall("(?:global|buffer)_load_dwordx4", code)),
    }


def nvidia_facts(asm: dict[str, Any]) -> dict[str, Any]:
    import triton

    from benchmarks.sass import atomic_orders, requested_orders

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(asm["cubin"])

        def tool(*command: str) -> str:
            done = subprocess.run([tools / command[0], *command[1:], cubin], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            return done.stdout

        usage, code = tool("cuobjdump", "-res-usage"), tool("nvdisasm", "-c")
    registers = re.search(r"REG:(\d+)", usage)
    assert registers
    return {
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\bSTL|\bLDL", code)),
        "matrix": len(re.findall(r"HMMA|HGMMA|UTC\w*MMA", code)),
        "wide_loads": len(re.findall(r"LDG(?:STS)?\.E\S*\.128", code)),
        "atomics": dict(sorted(atomic_orders(code).items())),
        "requested": dict(sorted(requested_orders(asm["ptx"]).items())),
    }


def specialisations(target: str = "sm_90") -> list[dict[str, Any]]:
    """Those that ``random_calls`` need."""
    from triton.backends.compiler import GPUTarget

    gpu = GPUTarget(*TARGETS[target])
    found = {}
    for launch in captured_launches(random_calls()):
        variant = launch.variant(gpu)
        found[variant.key] = {"kernel": variant.kernel.__name__, **variant.constants}
    return list(found.values())


def specialisations_per_key(target: str) -> list[int]:
    """For each key that the launcher gives any of the calls: how many Triton would tell apart."""
    from triton.backends.compiler import GPUTarget

    from csrc_triton.host.attention import LAUNCHER

    gpu, found = GPUTarget(*TARGETS[target]), {}
    for launch in captured_launches(itertools.chain(calls(), random_calls())):
        if launch.kernel is LAUNCHER.kernel:
            named = dict(zip(launch.kernel.arg_names, launch.arguments, strict=True))
            found.setdefault(LAUNCHER.key(named, launch.options), set()).add(launch.variant(gpu).key)
    return [len(variants) for variants in found.values()]


def printed_apart(*arguments: str, root: Path = ROOT) -> Any:
    """What ``main`` prints with these arguments, in a process of its own, of the sources under ``root``."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "benchmarks.kernel_table", *arguments]
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout)


def measured_all() -> dict[str, dict[str, Any]]:
    """Every target, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(TARGETS, pool.map(printed_apart, TARGETS), strict=True))


# The table

COLUMNS = ("registers", "shared", "spills", "programs", "wide_loads", "matrix", "atomics")


def table_of(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What ``measured`` found for each target, as it is written to the file."""
    import triton

    first = next(iter(found.values()))
    # Targets specialise on different things, so that the same launch's variant has another place in each.
    launches = zip(*(of_target["launches"] for of_target in found.values()), strict=True)
    places: dict[int, list[int]] = {}
    for launch in launches:
        places.setdefault(launch[0]["variant"], [x["variant"] for x in launch])
    variants = []
    for i, variant in enumerate(first["variants"]):
        row = {name: variant[name] for name in ("kernel", "case", "constants")}
        for (target, of_target), place in zip(found.items(), places[i], strict=True):
            facts = of_target["variants"][place]
            row[target] = {name: facts[name] for name in COLUMNS if name in facts}
        variants.append(row)
    limits = {target: limits._asdict() for target, limits in LIMITS.items()}
    return {
        "triton": triton.__version__,
        "limits": limits,
        "variants": variants,
        "launches": first["launches"],
    }


def markdown(table: dict[str, Any]) -> str:
    """The table to be read."""
    lines = [
        "# Kernels, compiled offline",
        "",
        f"By `python -m benchmarks.kernel_table` with triton {table['triton']}; nothing here was timed.",
        "",
        "A row per specialisation and target. *Programs*: how many a multiprocessor holds, by registers,",
        "shared memory and warps (CUDA C++ Programming Guide, technical specifications per compute",
        "capability; CDNA 3 ISA guide). *Atomics*: by the order around them in the machine code.",
        "",
        "| # | kernel | first case | target | registers | shared memory | spills | programs | 128-bit loads "
        "| tensor-core instructions | atomics |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for i, variant in enumerate(table["variants"]):
        for target in TARGETS:
            facts = variant[target]
            atomics = ", ".join(f"{n} {name}" for name, n in facts.get("atomics", {}).items())
            cells = [
                i,
                variant["kernel"],
                variant["case"],
                target,
                *(facts[name] for name in COLUMNS[:-1]),
                atomics,
            ]
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
        kernel = f"{table['variants'][launch['variant']]['kernel']} #{launch['variant']}"
        sizes = [f"{launch[name]:,}" for name in ("programs", "read", "written", "workspace")]
        lines.append(f"| {' | '.join([launch['case'], kernel, *sizes])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if len(sys.argv) > 1:
        what, *arguments = sys.argv[1:]
        apart = {"count": specialisations, "kinds": specialisations_per_key}
        print(json.dumps(apart[what](*arguments) if what in apart else measured(what, *arguments)))
        return
    table = table_of(measured_all())
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    TABLE.with_suffix(".md").write_text(markdown(table))


if __name__ == "__main__":
    main()
