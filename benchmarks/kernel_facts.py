"""What a kernel compiles to for a GPU that need not be here, and the file that remembers it.

Compiling every kernel for every target takes a quarter of an hour; of a specialisation, Triton's intermediate
representation, with which its compiler begins, takes a tenth of a second. ``kernels.jsonl`` holds a line for
each target and each representation: what its machine code was found to be. A line is found by a digest of
everything that it follows from: the representation itself (so names, comments and the places of functions do
not matter, and a change in one branch of a kernel concerns no specialisation that does not take it), the
options, the version of Triton and the code that reads facts off machine code. So a line is never stale: what
changed has another digest, and is compiled.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import sass

STORE = Path(__file__).parent / "results" / "kernels.jsonl"

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}


def gpu_of(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(*TARGETS[target])


class Variant(NamedTuple):
    """One specialisation of a kernel, as Triton would look it up."""

    kernel: Any
    source: Any
    options: dict[str, Any]

    @property
    def constants(self) -> dict[str, Any]:
        """Its compile-time constants by name."""
        names, found = self.kernel.arg_names, {}
        for path, x in sorted(self.source.constants.items()):
            if isinstance(x, tuple):
                found |= x._asdict()
            elif len(path) == 1 and x is not None:
                found[names[path[0]]] = x
        return found

    @property
    def passed(self) -> list[str]:
        """Names of what a launch passes to it, those in groups too."""
        kinds = (x for name, kind in self.source.signature.items() for x in leaves(name, kind))
        return [name for name, kind in kinds if kind != "constexpr"]

    @property
    def key(self) -> str:
        return f"{self.kernel.__name__} {self.source.hash()} {sorted(self.options.items(), key=str)}"


def leaves(name: str, x: Any) -> Iterator[tuple[str, Any]]:
    """What a group of arguments holds, or the argument itself, by name."""
    if isinstance(x, tuple):
        for field, held in zip(x._fields, x, strict=True):  # type: ignore[attr-defined]
            yield f"{name}.{field}", held
    else:
        yield name, x


# What facts follow from


_REPRESENTATIONS: dict[str, str] = {}
"""By source: targets and options part after it."""
_MET: set[tuple[str, str]] = set()
"""Of each kernel and kind of target one has been made anew."""


def digest(variant: Variant, target: str) -> str:
    """Of everything that the facts about a variant follow from, but for the target.

    Raises:
        RuntimeError: the first of a kernel and kind of target begins otherwise than its source did before.
    """
    source, met = variant.source.hash(), (variant.kernel.__name__, TARGETS[target][0])
    known = source in _REPRESENTATIONS
    if not known:
        _REPRESENTATIONS[source] = representation(variant, target)
    found = digest_of(variant, target, _REPRESENTATIONS[source])
    if known and met not in _MET and fresh_digest(variant, target) != found:
        raise RuntimeError(f"{variant.kernel.__name__} begins otherwise for {target} than for its kin")
    _MET.add(met)
    return found


def fresh_digest(variant: Variant, target: str) -> str:
    return digest_of(variant, target, representation(variant, target))


def digest_of(variant: Variant, target: str, code: str) -> str:
    import triton

    of = [triton.__version__, readers(), chosen(variant, target), code]
    return hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16]


def chosen(variant: Variant, target: str) -> list[tuple[str, str]]:
    """The compiler's options that are not the target's defaults."""
    from triton.compiler import make_backend

    # Triton 3.9 warns unless fusion is said, which was its default before.
    default = vars(make_backend(gpu_of(target)).parse_options({"enable_fp_fusion": True}))
    return sorted((name, str(x)) for name, x in variant.options.items() if x != default[name])


def representation(variant: Variant, target: str) -> str:
    """Triton's intermediate representation of a variant, before anything is optimised, without names."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    gpu = gpu_of(target)
    backend, context = make_backend(gpu), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    options = backend.parse_options(dict(variant.options))
    functions, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    code = variant.source.make_ir(gpu, options, functions, modules, context).str_nodebug()
    # Only functions still have names, which say in which file they are.
    names: dict[str, str] = {}
    # In quotes where a constant is part of it.
    name = r'@(?:"[^"]*"|[\w.$-]+)'
    return re.sub(name, lambda found: names.setdefault(found[0], f"@{len(names)}"), code)


@functools.cache
def readers() -> str:
    """The code that reads facts off what was compiled."""
    return "".join(
        map(inspect.getsource, (sass, facts, nvidia_facts, amd_facts, order_of_additions, on_their_way, used))
    )


# Facts


def facts(variant: Variant, target: str) -> dict[str, Any]:
    """What a variant compiles to."""
    import triton

    if fresh_digest(variant, target) != digest(variant, target):
        raise RuntimeError(f"{variant.kernel.__name__} begins otherwise for {target} than for its kin")
    gpu = gpu_of(target)
    compiled = triton.compile(variant.source, target=gpu, options=variant.options)
    asm = compiled.asm
    return {
        "kernel": variant.kernel.__name__,
        **(amd_facts(asm) if gpu.backend == "hip" else nvidia_facts(asm)),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "order": order_of_additions(asm["ttgir"]),
        "used": used(asm["ttir"]),
        "on_their_way": on_their_way(asm["ttgir"]),
        "read_ahead": on_their_way(asm["ttgir"], dimensions=1),
        "barriers": asm["ttir"].count("ttg.barrier"),
    }


def on_their_way(ttgir: str, dimensions: int = 2) -> int:
    """Tiles of a loop's loads that are on their way at once: those of the buffers that hold several."""
    tile = r"\d+x" * dimensions
    buffers = re.findall(rf"ttg\.local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{tile}\D", ttgir)
    return min(map(int, buffers), default=0)


def used(ttir: str) -> str:
    """Of each argument that is passed, whether a specialisation has a use for it (1 or 0)."""
    found = re.search(r"tt\.func public @\w+\((.*?)\) attributes(.*)", ttir, re.DOTALL)
    assert found
    # Triton 3.9 writes a field of a group as `%axis.p_cu`, those before as `%axis_4`.
    names = re.findall(r"(%[\w.]+): ", found[1])
    return "".join(str(int(re.search(rf"{re.escape(x)}(?![\w.])", found[2]) is not None)) for x in names)


def order_of_additions(ttgir: str) -> str:
    """The layouts of what is reduced and scanned, which decide the order in which elements are added.

    A digest of them, or nothing if nothing is reduced. A loop whose first or last step is taken out of it has
    the same reductions twice: each is taken once where it follows itself.
    """
    names = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    operands = re.findall(r"tt\.(?:reduce|scan).*?\n.*?\}\) : \((.*?)\)", ttgir, re.DOTALL)
    layouts = [x for x, _ in groupby(re.sub(r"#\w+", lambda m: names.get(m[0], m[0]), x) for x in operands)]
    return hashlib.sha256("\n".join(layouts).encode()).hexdigest()[:12] if layouts else ""


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
        "atomics": dict(sorted(sass.atomic_orders(code).items())),
        "requested": dict(sorted(sass.requested_orders(asm["ptx"]).items())),
        **sass.product_loop(code),
        **sass.longest_loop(code),
        "waits": sass.waits(code),
    }


# The file

Facts = dict[tuple[str, str], dict[str, Any]]
"""By target and digest."""


def read(path: Path = STORE) -> Facts:
    found = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return {(line.pop("target"), line.pop("digest")): line for line in found}


def written(facts: Facts) -> str:
    """The file's text: a line each, those of a kernel together."""
    lines = [{"target": target, "digest": of, **found} for (target, of), found in facts.items()]
    lines.sort(key=lambda line: (line["kernel"], line["digest"], list(TARGETS).index(line["target"])))
    return "".join(f"{json.dumps(line)}\n" for line in lines)
