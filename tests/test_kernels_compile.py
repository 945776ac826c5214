"""Kernels as the launchers would start them on a GPU, compiled for GPUs that are not here.

Run as a script with an architecture, this prints one JSON line per kernel: the tests run under Triton's
interpreter, which leaves nothing to compile, so each architecture gets a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 99 * 1024, "sm_90": 99 * 1024, "sm_100": 99 * 1024, "gfx942": 64 * 1024}


def captured_launches() -> list[tuple]:
    """``(case, kernel, arguments, options)`` of what the launchers start for the shapes of real models."""
    import torch
    from triton.runtime.jit import JITFunction

    from csrc_triton import attention_credit_raw, attention_row, sweep
    from csrc_triton.sweep import StatusBits

    launches, case = [], ""

    def capture(self, *args, grid, warmup, **options) -> None:
        launches.append((case, self, args, options))

    JITFunction.run = capture
    start = torch.zeros(2, dtype=torch.int32)
    half, full = torch.bfloat16, torch.float32
    for dtype, heads, kv_heads, width, layout in [
        (half, 32, 8, 128, "head-major"),
        (half, 32, 8, 128, "token-major"),
        (half, 32, 8, 128, "packed"),
        (half, 32, 8, 128, "misaligned"),
        (half, 64, 1, 256, "head-major"),
        (half, 14, 2, 24, "head-major"),
        (full, 32, 8, 128, "head-major"),
        (full, 32, 8, 128, "misaligned"),
        (full, 64, 1, 256, "token-major"),
    ]:
        case = f"{str(dtype)[6:]} {heads}/{kv_heads}x{width} {layout}"
        query = torch.empty(2, heads, width, dtype=dtype)
        key = torch.empty(2, kv_heads, 300, width, dtype=dtype)
        options = {}
        if layout == "token-major":
            key = torch.empty(2, 300, kv_heads, width, dtype=dtype).transpose(1, 2)
        elif layout == "packed":
            key = torch.empty(600, kv_heads, width, dtype=dtype)
            options = {"cu_seqlens": torch.zeros(3, dtype=torch.int32)}
        elif layout == "misaligned":
            key = torch.empty(key.numel() + 1, dtype=dtype)[1:].view(key.shape)
        before = len(launches)
        mask = torch.ones(2, 50)
        attention_credit_raw(query, key, 0.1, mask, response_start=start, out_of_range=8, **options)
        if layout != "head-major" or width != 128 or dtype != half:
            launches[before:] = [x for x in launches[before:] if x[1].__name__ == "partials_kernel"]
    case = "every option"
    query, key = torch.empty(2, 32, 300, 128, dtype=half), torch.empty(2, 8, 300, 128, dtype=half)
    lse, masked = torch.empty(2, 32, 300), torch.ones(2, 300, dtype=torch.bool)
    extras = {"softcap": 50.0, "sinks": torch.empty(32), "sliding_window": 128, "attention_mask": masked}
    attention_row(query, key, 0.1, lse=lse, **extras)

    tokens, row = torch.empty(2, 700), torch.empty(2)
    common = {"min_mass": 2.0**-100, "status_bits": StatusBits(1, 2, 4, 8, 16)}
    shaped = {"score": row, "credit": tokens, "logprobs": tokens, "ref_logprobs": tokens, "values": tokens}
    shaped |= {"token_rewards": tokens, "bootstrap": row, "terminal_reward": row, **common}
    mask = torch.ones(2, 700, dtype=torch.bool)
    names = ("rewards", "advantages", "returns", "credit", "kl", "status", "stats")
    case = "shape"
    sweep(mask, names, gl=0.95, kl_estimator="k3", **shaped)
    case = "shape, lam 1"
    sweep(mask, names, gl=1.0, **shaped)
    case = "shape, decoupled lam"
    explicit = torch.zeros(2, dtype=torch.int32)
    sweep(mask, names, gl=0.95, gl_value=row, score_index=explicit, zero_nonfinite=True, **shaped)
    case = "shape, packed"
    flat = {n: x[0] if isinstance(x, torch.Tensor) and x.ndim == 2 else x for n, x in shaped.items()}
    cu = torch.zeros(3, dtype=torch.int32)
    sweep(mask[0], names, gl=0.95, skip_masked=False, response_cu_seqlens=cu, **flat)
    for gl in (1.0, 0.95):
        case = f"gae, gl {gl}"
        sweep(mask, ("advantages", "returns"), token_rewards=tokens, values=tokens, gl=gl, **common)
    return launches


def measurements(architecture: str) -> list[dict]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget(*TARGETS[architecture])
    backend = make_backend(target)
    out = []
    for case, kernel, args, options in captured_launches():
        if target.backend == "hip":
            options.pop("maxnreg", None)
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        fixed = {"debug": False, "instrumentation_mode": ""}
        bound, specialization, _ = binder(*args, **options, **fixed)
        parsed, signature, constants, attributes = kernel._pack_args(
            backend, options, bound, specialization, None
        )
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=parsed.__dict__)
        facts = {"case": case, "kernel": kernel.__name__, "shared": compiled.metadata.shared}
        facts["layouts"] = layouts_of_reductions(compiled.asm["ttgir"])
        facts |= amd_facts(compiled.asm) if target.backend == "hip" else nvidia_facts(compiled.asm)
        out.append(facts)
    return out


def layouts_of_reductions(ttgir: str) -> list[str]:
    """Operands of every reduction and scan: the layout decides in which order elements are added."""
    names = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    operands = re.findall(r"tt\.(?:reduce|scan).*?\n.*?\}\) : \((.*?)\)", ttgir, re.DOTALL)
    return [re.sub(r"#\w+", lambda m: names.get(m[0], m[0]), x) for x in operands]


def amd_facts(asm: dict) -> dict:
    code = asm["amdgcn"]
    return {
        "registers": int(re.search(r"\.vgpr_count: *(\d+)", code)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count: *(\d+)", code)[1]),
        "matrix": len(re.findall("v_mfma", code)),
        "wide_loads": len(re.findall("(?:global|buffer)_load_dwordx4", code)),
    }


def nvidia_facts(asm: dict) -> dict:
    import tempfile

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
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\bSTL|\bLDL", code)),
        "matrix": len(re.findall(r"HMMA|HGMMA|UTC\w*MMA", code)),
        "wide_loads": len(re.findall(r"LDG(?:STS)?\.E\S*\.128", code)),
    }


@pytest.fixture(scope="module", params=TARGETS)
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[dict]]:
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")]
    )
    script = [sys.executable, "-W", "error", __file__, request.param]
    done = subprocess.run(script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


def described(facts: dict) -> str:
    return " ".join(f"{name}={x}" for name, x in facts.items() if name != "layouts")


def test_nothing_spills_and_shared_memory_suffices(compiled: tuple[str, list[dict]]) -> None:
    architecture, kernels = compiled
    assert {facts["kernel"] for facts in kernels} == {
        "prepare_kernel",
        "partials_kernel",
        "fold_kernel",
        "mean_kernel",
        "sweep_kernel",
    }
    for facts in kernels:
        assert facts["spills"] == 0, described(facts)
        assert facts["shared"] <= SHARED_LIMIT[architecture], described(facts)


def row_kernels(kernels: list[dict]) -> list[dict]:
    return [facts for facts in kernels if facts["kernel"] == "partials_kernel"]


def test_keys_are_loaded_128_bits_at_a_time(compiled: tuple[str, list[dict]]) -> None:
    _, kernels = compiled
    for facts in row_kernels(kernels):
        assert facts["wide_loads"] >= 2 or "misaligned" in facts["case"], described(facts)
    count = {facts["case"]: facts["wide_loads"] for facts in row_kernels(kernels)}
    for dtype in ("bfloat16", "float32"):
        # What is left where the keys are not aligned to 16 bytes is the query's.
        assert count[f"{dtype} 32/8x128 head-major"] >= 2 + count[f"{dtype} 32/8x128 misaligned"]


def test_half_precision_rows_use_tensor_cores(compiled: tuple[str, list[dict]]) -> None:
    architecture, kernels = compiled
    for facts in row_kernels(kernels):
        if "float32" not in facts["case"]:
            assert facts["matrix"] > 0, described(facts)
        elif architecture != "gfx942":
            assert facts["matrix"] == 0, described(facts)  # no tf32


def test_alignment_does_not_change_the_order_of_additions(compiled: tuple[str, list[dict]]) -> None:
    _, kernels = compiled
    rows = {facts["case"]: facts["layouts"] for facts in row_kernels(kernels)}
    for dtype in ("bfloat16", "float32"):
        aligned = rows[f"{dtype} 32/8x128 head-major"]
        assert aligned
        assert rows[f"{dtype} 32/8x128 misaligned"] == aligned


if __name__ == "__main__":
    for line in measurements(sys.argv[1]):
        print(json.dumps(line))
