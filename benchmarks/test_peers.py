"""Ours and each peer on the same tensors in the same run; a peer that is not there is listed as missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnshape.bench.cases import Case
from attnshape.bench.timing import Timing, ratio_of
from benchmarks.peers.measure import PEERS
from benchmarks.record import Promise, Recorder

ROOT = Path(__file__).parents[1]
LIMIT = 150
"""Seconds that all cases of one peer may take."""


class PeerMissingError(Exception):
    """There is nothing to be measured, and why."""


class PeerRuns:
    """What each peer's process measured; it runs once, when the first case asks."""

    def __init__(self, environments: Path, device: torch.device, small: bool, folder: Path) -> None:
        self.environments, self.device, self.small, self.folder = environments, device, small, folder
        self._results: dict[str, dict[str, Any] | PeerMissingError] = {}

    def __getitem__(self, name: str) -> dict[str, Any]:
        if name not in self._results:
            try:
                self._results[name] = self._run(name)
            except PeerMissingError as error:
                self._results[name] = error
        result = self._results[name]
        if isinstance(result, PeerMissingError):
            raise result
        return result

    def _python(self, name: str) -> str:
        module = PEERS[name].module
        if not module or importlib.util.find_spec(module) is not None:
            return sys.executable
        python = self.environments / name / "bin" / "python"
        if not python.exists():
            raise PeerMissingError(f"not installed: python -m benchmarks.peers.install {name}")
        return str(python.absolute())

    def _run(self, name: str) -> dict[str, Any]:
        if PEERS[name].only_cuda and self.device.type != "cuda":
            raise PeerMissingError("needs a GPU")
        out = self.folder / f"{name}.json"
        command = [self._python(name), "-m", "benchmarks.peers.measure", name, str(out)]
        command += ["--device", str(self.device), *(["--small"] if self.small else [])]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path}
        reason = ""
        try:
            ended = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
            )
            if ended.returncode:
                reason = f"does not run: {ended.stderr.strip().splitlines()[-1]}"
        except subprocess.TimeoutExpired:
            reason = f"took longer than {LIMIT} s"
        if not out.exists():
            raise PeerMissingError(reason)
        result: dict[str, Any] = json.loads(out.read_text())
        return result | {"ended": reason}


@pytest.fixture(scope="session")
def peer_runs(
    pytestconfig: pytest.Config, device: torch.device, small: bool, tmp_path_factory: pytest.TempPathFactory
) -> PeerRuns:
    return PeerRuns(pytestconfig.getoption("--peers"), device, small, tmp_path_factory.mktemp("peers"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kind = torch.device(metafunc.config.getoption("--device")).type
    small = metafunc.config.getoption("--small")
    cases = [(name, case) for name, peer in PEERS.items() for case in peer.cases(kind, small)]
    metafunc.parametrize(("peer", "case"), cases, ids=[f"{name}, {case.name}" for name, case in cases])


def test_peer(
    peer: str,
    case: Case,
    device: torch.device,
    peer_runs: PeerRuns,
    missing: dict[str, str],
    record: Recorder,
) -> None:
    if record.untimed():
        pytest.skip("peers are only timed")
    try:
        result = peer_runs[peer]
    except PeerMissingError as error:
        missing[peer] = str(error)
        pytest.skip(f"{peer}: {error}")
    row = next((row for row in result["rows"] if row["case"] == case.name), None)
    if row is None:
        missing[f"{peer}, {case.name}"] = result["ended"]
        pytest.skip(f"{peer}: {result['ended']}")
    if "failed" in row:
        missing[f"{peer}, {case.name}"] = row["failed"]
        pytest.fail(row["failed"])
    ours, theirs = (Timing(**row.pop(name)) for name in ("ours", "theirs"))
    gain, least = ratio_of(theirs, ours), PEERS[peer].least_gain
    promise = None
    # The loops' budget names one size.
    if device.type == "cpu" and least and (least == 1 or case.shape[:2] == (256, 1024)):
        promise = Promise(f"{least:g} x {peer}", gain.value, least, at_most=False, unit="x")
    record(
        "peers",
        ours,
        ratios={peer: gain},
        promise=promise,
        peer=peer,
        peer_version=result["version"],
        tokens=case.shape.batch * case.shape.response,
        seconds_of={"ours": ours.seconds, peer: theirs.seconds},
        **row,
    )
