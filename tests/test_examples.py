"""Every example runs as it stands, and fits a page."""

import importlib.util
import io
import json
import os
import runpy
import sys
import urllib.request
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.processes import FORK, run
from support.reward_models import save

from attnshape.serve.protocol import Completion
from attnshape.text.load import RewardModelConfig
from attnshape.text.model import CreditModel
from attnshape.text.score_fn import parse_score_fn

ROOT = Path(__file__).parents[1]
EXAMPLES = {path.stem: path for path in sorted((ROOT / "examples").glob("*.py"))}
OF_ITS_OWN = {"ask_a_server"}
NEEDS = {"grpo_with_trl": "trl"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_fits_a_page(name: str) -> None:
    """And does nothing where it is only imported, as by a process that it starts."""
    text = EXAMPLES[name].read_text()
    assert len(text.splitlines()) <= 60
    if "multiprocessing" in text:
        *_, guard, call = text.splitlines()
        assert (guard, call) == ('if __name__ == "__main__":', "    main()")


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - OF_ITS_OWN))
def test_it_runs(name: str) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    ended = run(example, EXAMPLES[name], "default" if name in NEEDS else "error")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.strip()


def example(path: Path, warned: Any) -> None:
    """As `python path` does; a process that it starts has imported what it needs."""
    os.chdir(ROOT)
    torch.multiprocessing.get_context = lambda _: FORK
    sys.argv = [str(path)]
    warnings.simplefilter(warned)
    runpy.run_path(str(path), run_name="__main__")


def test_a_server_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server's own reading of a request, and the model behind it, without the wire between."""
    folder = save(tmp_path / "model", "llama")
    model = CreditModel.load(RewardModelConfig(model=str(folder), score_fn=parse_score_fn("logit")), "cpu")
    asked: list[Any] = []

    def urlopen(request: urllib.request.Request, timeout: float) -> io.BytesIO:
        asked.append(request)
        bodies = [Completion.model_validate_json(json.dumps(x)) for x in json.loads(request.data)]
        found = model.score([body.read(model.reader()) for body in bodies])
        return io.BytesIO(json.dumps([{"score": x.score, "credit": x.credit} for x in found]).encode())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setenv("ATTNSHAPE_API_KEY", "secret")
    _module("ask_a_server").main("http://here", str(folder))
    [request] = asked
    assert request.full_url == "http://here/score"
    assert request.get_header("Authorization") == "Bearer secret"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("score ") for line in lines)


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES[name])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
