"""That a case's bytes are those of its tensors, and its arguments what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attnshape.bench.cases import TURN, TURNS, Case, Shape, outputs_of, random_arguments
from attnshape.problems import mapped

CPU = torch.device("cpu")
SMALL = Shape(3, 40, 64, heads=4, kv_heads=2, width=16)
TOKENS = SMALL._replace(keys=0)
LENGTHS = {"lengths": (5, 40, 1)}


def bytes_of(x: Any) -> int:
    sizes = []
    mapped(x, lambda tensor: sizes.append(tensor.numel() * tensor.element_size()) or tensor)
    return sum(sizes)


@pytest.mark.parametrize(
    "case",
    [
        *(Case(what, SMALL) for what in ("fused", "apart", "credit", "row", "column")),
        *(Case(what, TOKENS) for what in ("sweep", "gae", "whiten")),
        Case("sweep", TOKENS._replace(**LENGTHS, packed=True)),
        Case("fused", SMALL, torch.float32),
    ],
    ids=lambda case: case.name,
)
def test_bytes_are_those_of_the_tensors(case: Case) -> None:
    arguments = random_arguments(case, CPU, 0)
    arguments.pop("score", None)  # what a row has one of
    if "response" in arguments:
        arguments["response"] = arguments["response"].mask
    assert bytes_of(arguments) == case.read
    result = outputs_of(case.what, case.call(random_arguments(case, CPU, 0)))
    assert bytes_of(result) == case.written
    assert case.bytes == case.read + case.written


def test_padding_is_read_in_the_mask_alone() -> None:
    padded, packed = (Case("gae", TOKENS._replace(**LENGTHS, packed=packed)) for packed in (False, True))
    assert padded.read - packed.read == 3 * 40 - 46
    assert padded.written == 2 * 4 * 3 * 40


@pytest.mark.parametrize("lengths", [(), (70, 600, 255)])
def test_holes_are_turns_inside_the_response(lengths: tuple[int, ...]) -> None:
    shape = Shape(3, 600, lengths=lengths, holes=True)
    mask = random_arguments(Case("gae", shape), CPU, 0)["response"].mask
    assert mask.sum() == shape.live_tokens
    own = TURN * (TURNS - 1)
    assert mask[1, :own].all()
    assert not mask[1, own : own + TURN].any()
    assert mask[1, own + TURN]


def test_settings_reach_the_function() -> None:
    shape = Shape(2, 400, holes=True)
    results = []
    for changed in ({}, {"lam": 1.0}, {"gamma": 0.9}, {"mask_semantics": "zero"}):
        case = Case("gae", shape, **changed)
        results.append(case.call(random_arguments(case, CPU, 0))[0])
    assert all(not torch.equal(results[0], other) for other in results[1:])


def test_names_tell_cases_apart() -> None:
    assert Case("gae", TOKENS).name == "gae, 3x40"
    assert (
        Case("gae", TOKENS, lam=1.0, mask_semantics="zero").name == "gae, 3x40, lam 1.0, mask_semantics zero"
    )
    assert Case("fused", SMALL, torch.float32, model="m").name == "fused, B 3 S 64 R 40, m, float32"
