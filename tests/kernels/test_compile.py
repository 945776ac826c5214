"""Kernels as the public functions would start them on a GPU, compiled for GPUs that are not here."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import triton
from support.kernels import compiling, kernels, tracing

from benchmarks.cases import budget_cases, launches
from benchmarks.kernel_facts import STORE, TARGETS, read, used, written
from benchmarks.kernel_table import ROOT, TABLE, markdown, table_of
from benchmarks.sass import atomic_orders, waits
from csrc_triton.host.attention import STAGES

TABLE_MODULE = "benchmarks.kernel_table"
SHARED_LIMIT = {target: 64 * 1024 if target == "gfx942" else 99 * 1024 for target in TARGETS}
CUDA = [target for target in TARGETS if target != "gfx942"]
PINNED = re.search(r"^triton==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]


@pytest.fixture(scope="module")
def found() -> dict[str, dict]:
    """Compiled only where ``kernels.jsonl`` does not know them."""
    return json.loads(tracing(TABLE_MODULE, "found"))


@pytest.fixture(params=TARGETS)
def compiled(request: pytest.FixtureRequest, found: dict[str, dict]) -> tuple[str, list[dict]]:
    return request.param, launched(found[request.param])


def launched(found: dict) -> list[dict]:
    """What each launch of each case runs."""
    return [found["variants"][launch["variant"]] | {"case": launch["case"]} for launch in found["launches"]]


def described(facts: dict) -> str:
    return " ".join(f"{name}={x}" for name, x in facts.items())


def test_nothing_spills_and_shared_memory_suffices(compiled: tuple[str, list[dict]]) -> None:
    target, variants = compiled
    for facts in variants:
        # Keys in float32, whose products are not the tensor cores': a few words beside 255 registers.
        few = target in ("sm_100", "sm_120") and facts["kernel"] == "attend_kernel" and not facts["matrix"]
        assert facts["spills"] <= 8 * few, described(facts)
        assert facts["shared"] <= SHARED_LIMIT[target], described(facts)
        assert facts["programs"] >= 1, described(facts)


def test_every_kernel_is_in_the_table(found: dict[str, dict]) -> None:
    assert {facts["kernel"] for facts in found["sm_90"]["variants"]} == kernels()


def key_readers(variants: list[dict]) -> list[dict]:
    """Variants of the kernel that reads one row's keys, in the cases that vary how keys lie."""
    return [x for x in variants if x["case"].startswith("credit") and x["kernel"] == "attend_kernel"]


def whole(variants: list[dict]) -> list[dict]:
    """Those whose keys lie side by side, and whose product with a chunk of them is one."""
    alike = [x for x in key_readers(variants) if "bfloat16 32/8" in x["case"] or "14/2" in x["case"]]
    return [x for x in alike if "misaligned" not in x["case"]]


def test_keys_are_loaded_128_bits_at_a_time(compiled: tuple[str, list[dict]]) -> None:
    target, variants = compiled
    # AMD loads parts of 16 elements narrowly.
    readers = whole(variants) if target == "gfx942" else key_readers(variants)
    assert readers
    for facts in readers:
        assert facts["wide_loads"] >= 2 or "misaligned" in facts["case"], described(facts)


def test_half_precision_rows_use_tensor_cores(compiled: tuple[str, list[dict]]) -> None:
    target, variants = compiled
    for facts in key_readers(variants):
        if "float32" not in facts["case"]:
            assert facts["matrix"] > 0, described(facts)
        elif target != "gfx942":  # which multiplies float32 in full
            assert facts["matrix"] == 0, described(facts)  # no tf32


def test_alignment_does_not_change_the_order_of_additions(compiled: tuple[str, list[dict]]) -> None:
    _, variants = compiled
    order = {facts["case"]: facts["order"] for facts in key_readers(variants)}
    aligned = {
        "bfloat16": "credit, bfloat16 32/8x128 token-major",
        "float32": "credit, float32 32/8x128 head-major",
    }
    for dtype, case in aligned.items():
        assert order[case]
        assert order[f"credit, {dtype} 32/8x128 misaligned"] == order[case]


def test_chunks_of_keys_are_on_their_way(compiled: tuple[str, list[dict]]) -> None:
    """Where keys lie side by side and a chunk's product is one: the loop waits for the oldest of two only."""
    target, variants = compiled
    aligned = whole(variants)
    assert aligned
    reading_on = [x for x in variants if x["case"].endswith("reading on") and x["kernel"] == "attend_kernel"]
    assert len(reading_on) == 2
    for facts in aligned + reading_on:
        assert facts["on_their_way"] == STAGES - 1, described(facts)
        if target != "gfx942":
            assert facts["loop_barriers"] <= 2, described(facts)
            assert facts["loop_instructions"] <= 200, described(facts)  # for 64 keys


def test_512_tokens_are_swept_in_few_instructions(compiled: tuple[str, list[dict]]) -> None:
    """128 bits at a time, 16 tokens a lane: weights, values, both log-probabilities; five outputs, or two.

    Of a warp's 1200 instructions the loop before, over mask and weights, has 161, which no fact here counts.
    """
    target, variants = compiled
    by_case = {x["case"]: x for x in variants if x["kernel"] == "rows_kernel"}
    sweep, gae = by_case["sweep, 4096x512"], by_case["gae, 4096x512"]
    assert sweep["warps"] == gae["warps"] == 1
    assert by_case["sweep, 4096x511"]["warps"] == by_case["gae, 4096x511"]["warps"] == 4
    if target == "gfx942":
        return
    assert sweep["longest_wide"] == 4 * (4 + 5)
    assert gae["longest_wide"] == 4 * (2 + 2)
    # sm_120 computes float64 in more. Barriers of one warp keep memory in order; nobody waits.
    assert sweep["longest_loop"] <= (1200 if target == "sm_120" else 920), described(sweep)
    assert gae["longest_loop"] <= (900 if target == "sm_120" else 600), described(gae)
    assert max(sweep["longest_barriers"], gae["longest_barriers"]) <= 2
    assert by_case["sweep, 4096x511"]["wide_loads"] == by_case["gae, 4096x511"]["wide_loads"] == 0
    # Few rows, or narrow ones: four warps, with 128 tokens each.
    assert by_case["sweep, 4096x511"]["longest_loop"] <= (680 if target == "sm_120" else 500)
    # Rows of several chunks: two, with 256 tokens each.
    two = by_case["sweep, 2048x4096"]
    assert two["warps"] == 2
    assert two["longest_loop"] <= (860 if target == "sm_120" else 640), described(two)


def test_rows_of_several_chunks_are_read_ahead(compiled: tuple[str, list[dict]]) -> None:
    """Two chunks' tokens on their way at once, where a token's inputs are wide enough to be copied."""
    target, variants = compiled
    stages = {
        x["case"]: (x["constants"]["STAGES"], x["read_ahead"])
        for x in variants
        if x["kernel"] == "rows_kernel"
    }
    for case in ("sweep, 2048x4096", "sweep, 512x32768", "gae, 2048x4096", "gae, 512x32768"):
        assert stages[case] == (3, 0 if target == "gfx942" else 2), case  # which takes registers
    for case in ("sweep, 4096x512", "gae, 4096x512"):
        assert stages[case] == (1, 0), case


def test_loads_wait_together(compiled: tuple[str, list[dict]]) -> None:
    """Those of a look-back at other programs, and of a mean over heads, wait not each for the one before."""
    target, variants = compiled
    found = [x for x in variants if x["kernel"] in ("means_kernel", "chunks_kernel")]
    assert {x["kernel"] for x in found} == {"means_kernel", "chunks_kernel"}
    for facts in found:
        packed = "response.p_cu" in facts["used"]  # a program looks for its row
        assert target == "gfx942" or facts["waits"] <= (20 if packed else 12), described(facts)  # 16, 35 once


def test_where_rows_are_swept_two_floats_are_added_at_a_time() -> None:
    """So no layout says in which order: neither how many warps a program has nor where its rows begin."""
    found = json.loads(tracing(TABLE_MODULE, "summed", "sm_90"))
    assert {x["kernel"] for x in found} == {"rows_kernel", "chunks_kernel"}
    assert {x["warps"] for x in found} == {1, 2, 4}
    for x in found:
        wider = [size for size in x["sizes"] if size[0] == "scan" or size[1] > 2]
        assert wider == [], x


def test_what_is_stored_is_read_again_behind_a_barrier(compiled: tuple[str, list[dict]]) -> None:
    """By statistics, and where rows become NaN or 0."""
    _, variants = compiled
    alone = [x for x in variants if x["kernel"] == "rows_kernel"]
    assert alone
    for x in alone:
        reading = "out.p_stats" in x["used"] and x["constants"].get("CREDIT") is not None
        constants = x["constants"]
        filling = constants["ZERO_NONFINITE"] or constants["SCORE_INDEX"] == "explicit"
        filling |= bool({"response.p_cu", "inputs.p_row_status"} & set(x["used"]))
        assert x["barriers"] == reading + filling, described(x)


# Hand-offs between programs of one launch


def missing_orders(facts: dict) -> set[str]:
    """Those that a hand-off in this variant needs and its machine code lacks."""
    kernel = facts["kernel"]
    needed = {"attend_kernel": {"acq_rel"}, "chunks_kernel": {"acq_rel", "acquire"}}.get(kernel, set())
    if kernel == "chunks_kernel" and "out.p_advantages" in facts["used"]:  # the look-back
        needed.add("release")
    return needed - facts["atomics"].keys()


@pytest.mark.parametrize("target", CUDA)
def test_hand_offs_are_ordered_in_the_machine_code(target: str, found: dict[str, dict]) -> None:
    variants = launched(found[target])
    for facts in variants:
        assert facts["atomics"] == facts["requested"], described(facts)
        assert not missing_orders(facts), described(facts)
    assert {"attend_kernel", "chunks_kernel"} <= {facts["kernel"] for facts in variants}


def test_hand_offs_without_order_are_seen(tmp_path: Path) -> None:
    for room in ("attnshape", "benchmarks", "csrc_triton"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("results", "__pycache__"))
    (tmp_path / "benchmarks" / "results").mkdir()
    shutil.copy(STORE, tmp_path / "benchmarks" / "results")  # in which the change must not be found
    relaxed = set()
    for path in (tmp_path / "csrc_triton").rglob("*.py"):
        text, found = path.read_text(), set()
        for order in ("acq_rel", "acquire", "release"):
            if f'sem="{order}"' in text:
                found.add(order)
                text = text.replace(f'sem="{order}"', 'sem="relaxed"')
        path.write_text(text)
        relaxed |= found
    found = json.loads(compiling(TABLE_MODULE, "found", "sm_90", "^sweep, 8x32768", root=tmp_path))
    [facts, *_] = launched(found["sm_90"])
    assert facts["kernel"] == "chunks_kernel"
    assert missing_orders(facts) == relaxed == {"acq_rel", "acquire", "release"}


LAST_ARRIVAL = """
        /*0100*/                   STG.E desc[UR4][R2.64], R0 ;
        /*0110*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0120*/               @P0 BRA `(.L_x_0) ;
        /*0130*/                   MEMBAR.ALL.GPU ;
        /*0140*/                   ATOMG.E.ADD.STRONG.GPU PT, R4, desc[UR4][R6.64], R5 ;
        /*0150*/                   CCTL.IVALL ;
.L_x_0:
        /*0160*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0170*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*0180*/                   EXIT ;
"""


@pytest.mark.parametrize(
    ("removed", "order"),
    [
        (None, "acq_rel"),
        ("0110", "acquire"),  # other threads may still store
        ("0130", "acquire"),
        ("0150", "release"),
        ("0160", "release"),  # other threads may already load
    ],
)
def test_orders_are_read_off_machine_code(removed: str | None, order: str) -> None:
    code = "\n".join(
        line for line in LAST_ARRIVAL.splitlines() if removed is None or f"/*{removed}*/" not in line
    )
    assert atomic_orders(code) == Counter({order: 1})


WAITING = """
        /*0100*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0110*/              @!P0 LDG.E R8, desc[UR4][R2.64+0x10] ;
        /*0120*/                   FADD R9, R8, R7 ;
        /*0130*/                   FADD R9, R9, R8 ;
        /*0140*/                   LDG.E.64.STRONG.GPU R10, desc[UR4][R8.64] ;
        /*0150*/                   STG.E desc[UR4][R2.64], R11 ;
        /*0160*/                   EXIT ;
"""


def test_waits_are_read_off_machine_code() -> None:
    assert waits(WAITING) == 2
    assert waits(WAITING.replace("R9, R8, R7", "R9, R12, R13").replace("R9, R9, R8", "R9, R9, R9")) == 2
    one_by_one = "".join(
        f"/*0{i}00*/ LDG.E R4, desc[UR4][R2.64] ;\n/*0{i}10*/ FADD R5, R4, R5 ;\n" for i in range(4)
    )
    assert waits(one_by_one) == 4


@pytest.mark.parametrize("names", [("%axis", "%axis_0"), ("%axis.p", "%axis.p_cu")], ids=["3.8", "3.9"])
def test_uses_are_read_off_a_representation(names: tuple[str, str]) -> None:
    """Of a group's fields, as both versions of Triton write them."""
    passed = ", ".join(f'{name}: i32 loc("axis"(#loc))' for name in names)
    body = "{ %0 = tt.load %NAME, %cst : !tt.ptr<i32> }".replace("%NAME", names[1])
    assert used(f"tt.func public @k({passed}) attributes {{noinline = false}} {body}") == "01"


# The table in the repository


@pytest.mark.skipif(triton.__version__ != PINNED, reason=f"the table is of triton {PINNED}")
def test_the_table_is_true(found: dict[str, dict]) -> None:
    table = json.loads(json.dumps(table_of(found)))
    assert TABLE.read_text() == markdown(table), "write it anew: python -m benchmarks.kernel_table"


@pytest.mark.skipif(triton.__version__ != PINNED, reason=f"what is known is of triton {PINNED}")
def test_what_is_known_is_what_compiling_gives() -> None:
    known = STORE.read_text().splitlines()
    assert STORE.read_text() == written(read())
    lines = json.loads(compiling(TABLE_MODULE, "anew", "sm_90,gfx942", "^whiten, moments$")).splitlines()
    assert lines
    assert set(lines) <= set(known)


def test_launches_are_as_many_as_promised(found: dict[str, dict]) -> None:
    started = Counter(launch["case"] for launch in found["sm_90"]["launches"])
    for case, _ in budget_cases():
        if case.what != "whiten":
            assert started[case.name] == launches(case), case.name


# Specialisations


@pytest.fixture(scope="module")
def kinds() -> dict:
    return json.loads(tracing(TABLE_MODULE, "kinds", "sm_90"))


def test_shapes_do_not_recompile(kinds: dict) -> None:
    # Those that sweep twice: with rows that begin at multiples of 4 tokens, and without.
    assert 4 <= len(kinds["needed"]) <= 26, kinds["needed"]


def test_what_a_launcher_takes_for_alike_compiles_alike(kinds: dict) -> None:
    assert len(kinds["behind"]) > 50
    assert set(kinds["behind"]) == {1}


def test_a_row_of_the_table_is_the_worst_of_a_kernel() -> None:
    def of_target(*registers: int) -> dict:
        facts = {"shared": 0, "spills": 0, "programs": 8, "wide_loads": 1, "matrix": 0}
        variants = [{"kernel": "x", **facts, "registers": n, "programs": 64 // n} for n in registers]
        return {"variants": variants, "launches": []}

    rows = table_of({"a": of_target(10, 16), "b": of_target(32)})["kernels"]
    assert [(x["kernel"], x["target"], x["variants"], x["registers"], x["programs"]) for x in rows] == [
        ("x", "a", 2, 16, 4),
        ("x", "b", 1, 32, 2),
    ]
