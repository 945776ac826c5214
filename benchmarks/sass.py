"""In which order a kernel accesses memory around its atomics: its machine code as nvdisasm prints it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"^(\.L_\w+):")
STORE = re.compile(r"(STG|ST|RED|REDG|ATOMG|ATOM)\b")
LOAD = re.compile(r"(LDG|LDGSTS|LD)\b")
ATOMIC = re.compile(r"(RED|REDG|ATOMG|ATOM)\b")
FENCE = re.compile(r"MEMBAR\.\w+\.(GPU|SYS)$")
INVALIDATE = re.compile(r"CCTL\.IVALL$")
BARRIER = re.compile(r"BAR\.SYNC")


class Instruction(NamedTuple):
    predicate: str | None
    opcode: str
    operands: str


def parsed(code: str) -> tuple[list[Instruction], list[list[int]]]:
    """The instructions of one kernel, and which may follow each."""
    instructions, targets, labels = [], [], {}
    for line in code.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := LINE.search(line):
            predicate, opcode, operands = found.groups()
            jump = re.search(r"\((\.L_\w+)\)", operands) if opcode.startswith("BRA") else None
            if opcode.startswith("BRA") and "," in operands:  # on a condition, as in `BRA.U !UP0, (.L_x_2)`
                predicate = predicate or operands.split(",")[0].strip()
            instructions.append(Instruction(predicate, opcode, operands))
            targets.append(jump[1] if jump else None)
    following: list[list[int]] = []
    for i, (instruction, target) in enumerate(zip(instructions, targets, strict=True)):
        leaves = instruction.opcode.startswith(("BRA", "EXIT", "RET"))
        after = [i + 1] if (instruction.predicate or not leaves) and i + 1 < len(instructions) else []
        following.append(after + ([labels[target]] if target else []))
    return instructions, following


def reversed_edges(following: list[list[int]]) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in following]
    for i, after in enumerate(following):
        for j in after:
            before[j].append(i)
    return before


def always_meets(
    start: int, steps: list[list[int]], wanted: Callable[[int], bool], barred: Callable[[int], bool]
) -> bool:
    """Whether every path from ``start`` meets a wanted instruction before a barred one and before its end."""
    todo, seen = list(steps[start]), set()
    if not todo:
        return False
    while todo:
        i = todo.pop()
        if i in seen or wanted(i):
            continue
        if barred(i) or not steps[i]:
            return False
        seen.add(i)
        todo += steps[i]
    return True


def atomic_orders(code: str) -> Counter[str]:
    """How many atomics release (``"release"``), acquire (``"acquire"``), do both (``"acq_rel"``) or neither.

    One releases if before it, on every path, stand a fence on the GPU and before that a barrier, and no store
    after the barrier: the fence then covers what all threads wrote. It acquires if after it, on every path,
    the first-level cache is invalidated and then a barrier passed before anything is loaded.
    """
    instructions, following = parsed(code)
    before = reversed_edges(following)

    def opcode(pattern: re.Pattern[str]) -> Callable[[int], bool]:
        return lambda i: pattern.match(instructions[i].opcode) is not None

    store, load, barrier = opcode(STORE), opcode(LOAD), opcode(BARRIER)
    fence, invalidate = opcode(FENCE), opcode(INVALIDATE)

    def under(i: int, j: int) -> bool:
        return instructions[j].predicate in (None, instructions[i].predicate)

    orders: Counter[str] = Counter()
    for i in filter(opcode(ATOMIC), range(len(instructions))):

        def released(j: int, i: int = i) -> bool:
            return fence(j) and under(i, j) and always_meets(j, before, barrier, store)

        def acquired(j: int, i: int = i) -> bool:
            return invalidate(j) and under(i, j) and always_meets(j, following, barrier, load)

        releases = always_meets(i, before, released, store)
        acquires = always_meets(i, following, acquired, load)
        names = {(True, True): "acq_rel", (True, False): "release", (False, True): "acquire"}
        orders[names.get((releases, acquires), "relaxed")] += 1
    return orders


def loops(instructions: list[Instruction], following: list[list[int]]) -> list[tuple[int, int]]:
    """The first and last instruction of each loop."""
    return [
        (start, i)
        for i, after in enumerate(following)
        for start in after
        if start <= i and instructions[i].opcode.startswith("BRA")
    ]


def matching(pattern: str, instructions: list[Instruction]) -> int:
    """How many instructions' opcodes begin as a pattern says."""
    return sum(re.match(pattern, x.opcode) is not None for x in instructions)


def product_loop(code: str) -> dict[str, int]:
    """Instructions and barriers of the innermost loop around the kernel's first tensor-core product."""
    instructions, following = parsed(code)
    products = [i for i, x in enumerate(instructions) if re.match(r"HG?MMA\b", x.opcode)]
    around = [x for x in loops(instructions, following) if products and x[0] <= products[0] <= x[1]]
    if not around:
        return {}
    start, end = min(around, key=lambda x: x[1] - x[0])
    inside = instructions[start : end + 1]
    return {"loop_instructions": len(inside), "loop_barriers": matching(BARRIER.pattern, inside)}


def longest_loop(code: str) -> dict[str, int]:
    """The longest loop without tensor-core products: a chunk of tokens where a row is swept."""
    instructions, following = parsed(code)
    bodies = [instructions[start : end + 1] for start, end in loops(instructions, following)]
    body = max((x for x in bodies if not matching(r"HG?MMA\b", x)), key=len, default=[])
    return {
        "longest_loop": len(body),
        "longest_barriers": matching(BARRIER.pattern, body),
        "longest_wide": matching(r"(LDG|STG)\.E\S*\.128", body),
    }


def waits(code: str) -> int:
    """How often a thread waits for loads that are not to shared memory, if no branch is taken.

    All that are on their way at a time are one wait. ptxas may have each of many wait for the one before.
    """
    count, coming = 0, set[str]()
    for _, opcode, operands in parsed(code)[0]:
        registers = re.findall(r"\bR\d+\b", operands)
        loading = re.match(r"LDG\.", opcode) and registers
        if coming & set(registers[1:] if loading else registers):
            count, coming = count + 1, set()
        if loading:
            first = int(registers[0][1:])
            width = next((n for bits, n in ((".128", 4), (".64.", 2)) if bits in opcode + "."), 1)
            coming |= {f"R{first + i}" for i in range(width)}
    return count


def requested_orders(ptx: str) -> Counter[str]:
    """The orders that a kernel's PTX asks for."""
    return Counter(re.findall(r"\b(?:atom|red)\.global\.gpu\.(acq_rel|release|acquire|relaxed)\b", ptx))
