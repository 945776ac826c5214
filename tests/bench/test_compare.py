"""`compare` passes where the outputs agree, and sees every kind of fault."""

from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import attnshape
from attnshape import compare as module
from attnshape.cli import app
from attnshape.compare import DTYPES, SETTINGS, SMALL, Case, Worst, compare, grid

CASE = Case(SMALL[1], torch.float32, SETTINGS[0])


def faulty(monkeypatch: pytest.MonkeyPatch, **faults: Any) -> None:
    """``shape_rewards`` with the named outputs changed."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        shaped = attnshape.shape_rewards(*args, **kwargs)
        return shaped._replace(**{name: f(getattr(shaped, name)) for name, f in faults.items()})

    monkeypatch.setattr(module, "shape_rewards", changed)


def test_the_torch_backend_agrees() -> None:
    for case in grid(quick=True):
        assert all(worst.ok for worst in compare(case, "torch", "cpu").values()), case


def test_the_grid_holds_what_can_go_wrong() -> None:
    cases = list(grid(quick=False))
    assert {case.dtype for case in cases} == set(DTYPES)
    assert {case.setting.mask_semantics for case in cases} == {"skip", "zero"}
    assert {case.setting.left_padding for case in cases} == {True, False}
    assert any(case.setting.gamma == case.setting.lam == 1 and case.setting.holes for case in cases)
    assert any(case.shape.Hq > case.shape.Hkv > 1 for case in cases)
    assert any(case.shape.R >= 4096 for case in cases)
    for setting in SETTINGS:
        drawn = Case(SMALL[2], torch.float32, setting).problem()
        holes = (drawn.response.mask.int().diff(dim=1) > 0).any()
        assert bool(holes) == setting.holes
        left = drawn.inputs.attention_mask[:, 0] == 0
        assert bool(left.any()) == setting.left_padding
        assert drawn.inputs.key.isnan().any()


@pytest.mark.parametrize("name", ["credit", "rewards", "advantages", "returns", "kl"])
def test_an_error_beyond_the_bound_is_seen(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    fine = compare(CASE, "torch", "cpu")[name]
    assert fine.ok
    at = (1, 3)

    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[at] += 1e-3
        return x

    faulty(monkeypatch, **{name: change})
    found = compare(CASE, "torch", "cpu")
    assert found[name].error == pytest.approx(1e-3, rel=1e-2)
    assert found[name].fraction == pytest.approx(found[name].error / found[name].bound)
    assert not found[name].ok
    assert [other for other, worst in found.items() if not worst.ok] == (
        ["credit", "credit sum"] if name == "credit" else [name]
    )


def test_a_wrong_sum_and_a_wrong_status_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, credit=lambda x: x * (1 + 5e-6), status=lambda x: x + 1)
    found = compare(CASE, "torch", "cpu")
    assert [name for name, worst in found.items() if not worst.ok] == ["credit sum", "status"]


def test_a_value_that_should_be_finite_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch, returns=lambda x: torch.where(x == x.max(), torch.nan, x))
    found = compare(CASE, "torch", "cpu")["returns"]
    assert not found.ok
    assert found.fraction == float("inf")


def test_command_prints_errors_beside_bounds() -> None:
    result = CliRunner().invoke(app, ["compare", "--quick", "--device", "cpu", "--backend", "torch"])
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if "│" in line]
    assert len(lines) == len(SMALL) * len(DTYPES) * (7 + 5)  # outputs, the sum of credit, statistics of rows
    assert "36 cases, 0 outputs beyond their bounds" in result.stdout


def test_command_exits_with_1_and_names_the_case(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(case: Case, backend: str, device: str) -> dict[str, Worst]:
        wrong = case.shape == SMALL[1] and case.setting == SETTINGS[2] and case.dtype == torch.float16
        return {"kl": Worst(0.5, 0.125, 4.0) if wrong else Worst(0.0, 0.125, 0.0)}

    monkeypatch.setattr(module, "compare", broken)
    result = CliRunner().invoke(app, ["compare", "--quick"])
    assert result.exit_code == 1
    text = " ".join(result.stdout.split())
    assert "kl: error 0.5, bound 0.125 in B 3, S 40, R 17, Hq 4, Hkv 4, D 24, dtype torch.float16" in text
    assert "mask_semantics zero" in text
    assert "36 cases, 1 outputs beyond their bounds" in text


def test_a_backend_that_cannot_run_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["compare", "--quick", "--device", "nowhere"])
    assert result.exit_code == 1
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.output


def test_interpret_is_set_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import os
    import sys

    seen = []
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(
        module,
        "compare",
        lambda *args: seen.append((args[1], os.environ["TRITON_INTERPRET"])) or {"kl": Worst(0.0, 1.0, 0.0)},
    )
    monkeypatch.setattr(os, "execv", lambda path, args: seen.append(args))
    monkeypatch.setattr(sys, "argv", ["attnshape", "compare", "--quick", "--interpret"])
    monkeypatch.setitem(sys.modules, "triton", object())
    CliRunner().invoke(app, ["compare", "--quick", "--interpret"])
    assert seen[0] == [sys.executable, "-m", "attnshape", "compare", "--quick", "--interpret"]
    seen.clear()
    monkeypatch.delenv("TRITON_INTERPRET")
    monkeypatch.delitem(sys.modules, "triton")
    CliRunner().invoke(app, ["compare", "--quick", "--interpret"])
    assert set(seen) == {("triton", "1")}
    monkeypatch.delenv("TRITON_INTERPRET")
