"""``attnshape doctor``: what it finds is so, and what is wrong makes it fail."""

import json
from importlib import metadata

import pytest
import torch
from typer.testing import CliRunner

from attnshape import doctor
from attnshape.cli import app


@pytest.fixture(autouse=True)
def one_kind_of_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DTYPES", (torch.float32,))


def test_a_healthy_installation() -> None:
    ended = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(ended.stdout)
    assert ended.exit_code == 0
    assert found["healthy"]
    assert found["versions"]["numpy"] == metadata.version("numpy")
    assert [x["device"] for x in found["checked"]] == list(found["devices"])
    cpu = found["checked"][0]
    assert (cpu["backend"], cpu["why_not_triton"]) == ("cpu", "tensors are on cpu")
    assert 0 <= cpu["error"] <= 1
    assert (found["no_gpu"] is None) == torch.cuda.is_available()


def test_a_wrong_result_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such loop")

    monkeypatch.setattr(doctor, "compare", broken)
    ended = CliRunner().invoke(app, ["doctor"])
    assert ended.exit_code == 1
    assert "RuntimeError: no such loop" in " ".join(ended.stdout.split())


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: None if name in ("numba", "uvicorn") else "1.0")
    report = doctor.examine()
    assert not report.healthy
    assert report.missing == {"demo": [], "serve": ["uvicorn"]}
    ended = CliRunner().invoke(app, ["doctor"])
    assert "numba missing" in ended.stdout
    assert "for attnshape serve: pip install uvicorn" in ended.stdout
