"""That nothing wrong is timed, and that the baseline computes the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import attnshape
from attnshape.bench import measure as module
from attnshape.bench.cases import Case, Shape, outputs_of, random_arguments
from attnshape.bench.measure import (
    PLAIN,
    WrongResultError,
    check,
    check_plain,
    measure,
    quick_cases,
)
from attnshape.bench.plain import plain_call
from attnshape.bench.timing import Ratio
from attnshape.cli import app
from attnshape.problems import mapped
from benchmarks.cases import made_small

CPU = torch.device("cpu")
SMALL = Shape(3, 40, 64, heads=4, kv_heads=2, width=16)
TOKENS = SMALL._replace(keys=0)
RAGGED = TOKENS._replace(lengths=(5, 40, 17))
HOLES = Shape(3, 300, holes=True)
CASES = [
    *(Case(what, SMALL, torch.float32) for what in ("fused", "apart", "credit", "row", "column")),
    *(Case(what, shape) for what in ("sweep", "gae", "whiten") for shape in (TOKENS, RAGGED, HOLES)),
    *(Case(what, HOLES, lam=0.9, mask_semantics="zero") for what in ("sweep", "gae")),
    Case("gae", TOKENS, gamma=0.9, lam=1.0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_pytorch_is_the_reference(case: Case) -> None:
    """All rows, not only those that a check samples."""
    arguments = random_arguments(case, CPU, 0)
    want = outputs_of(case.what, case.reference(arguments))
    got = plain_call(case, arguments)
    assert got
    for name, x in got.items():
        torch.testing.assert_close(x, want[name], rtol=1e-4, atol=1e-5)


def test_a_measurement() -> None:
    case = Case("gae", TOKENS)
    m = measure(case, CPU, 0.01)
    assert 0 <= m.error <= 1
    assert list(m.baselines) == [PLAIN]
    assert {len(t.samples) for t in (m.ours, m.copy, *m.baselines.values())} == {len(m.ours.samples)}
    assert m.of_copy.value > 0
    assert set(m.ratios) == {"copy", PLAIN}
    facts = m.facts()
    assert facts["bytes_read"] + facts["bytes_written"] == case.bytes
    assert set(facts["seconds_of"]) == {"ours", "copy", PLAIN}


def test_packed_rows_and_those_too_many_have_no_plain_baseline() -> None:
    packed = Case("sweep", RAGGED._replace(packed=True))
    assert measure(packed, CPU, 0.0).baselines == {}
    assert measure(Case("gae", TOKENS), CPU, 0.0, plain=False).baselines == {}


def test_what_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **options: Any) -> Any:
        out = right(*arguments, **options)
        return out._replace(advantages=out.advantages * 1.001)

    right = attnshape.gae
    monkeypatch.setattr(attnshape, "gae", wrong)
    monkeypatch.setattr(module, "time_calls", lambda *_, **__: pytest.fail("a wrong result was timed"))
    with pytest.raises(WrongResultError, match=r"gae, 3x40: the error of advantages is .* times its bound"):
        measure(Case("gae", TOKENS), CPU)


@pytest.mark.parametrize(("row", "seen"), [(0, True), (1, False), (2, True)])
def test_the_first_and_the_last_row_are_checked(
    monkeypatch: pytest.MonkeyPatch, row: int, seen: bool
) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        out = right(*arguments, **options)
        out.advantages[row, 3] = float("nan")
        return out

    right = attnshape.gae
    case = Case("gae", TOKENS)
    monkeypatch.setattr(attnshape, "gae", broken)
    arguments = random_arguments(case, CPU, 0)
    if seen:
        with pytest.raises(WrongResultError):
            check(case, arguments)
    else:
        assert check(case, arguments) <= 1


def test_a_baseline_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(case: Case, arguments: dict[str, Any]) -> Any:
        return {name: 1.2 * x for name, x in plain_call(case, arguments).items()}

    monkeypatch.setattr(module, "plain_call", other)
    case = Case("whiten", TOKENS)
    with pytest.raises(WrongResultError, match="of the baseline is off"):
        check_plain(case, random_arguments(case, CPU, 0))


@pytest.mark.parametrize("device", [CPU, torch.device("cuda")], ids=str)
def test_quick_cases_have_every_operation_but_credit_alone(device: torch.device) -> None:
    cases = [made_small(case) for case in quick_cases(device)]
    assert {case.what for case in cases} == {"fused", "apart", "row", "column", "sweep", "gae", "whiten"}
    for case in dict.fromkeys(cases):
        assert check(case, random_arguments(case, CPU, 0)) <= 1


# attnshape bench


def bench(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], env={"COLUMNS": "200"})


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> list[Case]:
    cases = [Case("gae", TOKENS), Case("fused", SMALL, torch.float32), Case("whiten", TOKENS)]
    monkeypatch.setattr(module, "quick_cases", lambda device: cases)
    return cases


def test_the_command_shows_ours_beside_the_baseline_and_the_copy(
    few_cases: list[Case], tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    result = bench("--device", "cpu", "--seconds", "0", "--json", out)
    assert result.exit_code == 0, result.output
    assert f"torch {torch.__version__}" in result.stdout
    for heading in ("ours", PLAIN, "ratio", "MB", "share of copy"):
        assert heading in result.stdout
    found = json.loads(out.read_text())
    assert found["machine"]["device_type"] == "cpu"
    assert [row["case"] for row in found["measured"]] == [case.name for case in few_cases]
    for case, row in zip(few_cases, found["measured"], strict=True):
        line = next(line for line in result.stdout.splitlines() if case.name in line)
        assert f" {case.bytes / 1e6:.2f} " in line
        assert str(Ratio(**row["ratios"][PLAIN])) in line or "unsteady" in line
    assert len(found["load"]) == 2
    assert f"load before {found['load'][0]:.1f}, after {found['load'][1]:.1f}" in result.stdout


def test_what_was_measured_is_shown_where_it_cannot_be_written(
    few_cases: list[Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("attnshape.cli.measure.whole_file", full)
    result = bench("--device", "cpu", "--seconds", "0", "--json", tmp_path / "bench.json")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "no space left")
    assert all(case.name in result.stdout for case in few_cases)


def test_the_command_fails_where_a_result_is_wrong(
    few_cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attnshape.gae
    monkeypatch.setattr(attnshape, "gae", lambda *a, **k: mapped(right(*a, **k), lambda x: 1.01 * x))
    result = bench("--device", "cpu", "--seconds", "0")
    assert result.exit_code == 1
    assert "gae, 3x40: the error of" in result.stdout
    assert few_cases[1].name in result.stdout  # the others are measured all the same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "nowhere"), "device: got 'nowhere', want "),
        (("--device", "cpu", "--json", "no/folder/x.json"), "there is no folder"),
        (("--device", "cpu", "--json", "/"), "/ is a folder, want a file"),
    ],
)
def test_what_cannot_be_measured_is_one_line(arguments: tuple[str, ...], message: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_one_line() -> None:
    result = bench("--device", "cuda")
    assert result.exit_code == 1
    assert result.stderr.startswith("device: got 'cuda', want ")
