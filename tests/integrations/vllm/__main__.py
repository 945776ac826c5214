"""``make vllm``: the plugin inside vLLM's own engine on a CPU, cell by cell; a table of what was found.

Makes an environment of vLLM from its pins (``tests/parity/requirements.toml``), with attnshape in it. A cell
is an engine in a process of its own: ``python -m integrations.vllm "gemma2" server`` runs two of them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from parity.__main__ import environment
from parity.adapters import ALONE, PYTEST

from attnshape.files import json_rows

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
RESULTS = HERE / "results.md"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")
"""vLLM's builds of these are for GPUs, and are not to be imported beside a torch for CPUs."""
MODULES = {"server": "server", "cost": "cost"}
"""Cells that are not of ``inside.py``."""


class Elsewhere(NamedTuple):
    """A test in a framework's own environment, and what it found where it passes."""

    environment: str
    test: str
    chosen: str
    found: dict[str, str]


OFFLINE = "those of eager transformers offline"
ELSEWHERE = {
    "verl": Elsewhere(
        "verl",
        "tests/parity/test_verl_adapter.py",
        "v0_trainers_token_rewards",
        {"token rewards": OFFLINE, "advantages": "verl's own of them"},
    ),
    "slime": Elsewhere(
        "slime",
        "tests/parity/test_slime_adapter.py",
        "token_rewards_reach_the_advantages",
        {"token rewards": OFFLINE, "advantages": "slime's own of them"},
    ),
    "Ray Data": Elsewhere(
        "verl",
        "tests/text/test_over_ray.py",
        "actor or killed",
        {
            "two actors": "the bytes of one process",
            "an actor killed": "the same",
            "the run killed, resumed over Ray, and in one process": "the same",
        },
    ),
}
"""verl's and slime's reward paths, with vLLM's server as their reward model; ``attnshape credit --ray``."""
COST = ROOT / "benchmarks" / "results" / "vllm_cost.json"
"""What ``cost`` measured; it runs where it is named only."""
VARIABLES = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    "VLLM_PLUGINS": "attnshape",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # tests reach into the engine
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
PATIENCE = 1800


def interpreter(folder: Path) -> Path:
    """Of vLLM's environment, with this attnshape in it."""
    python = environment("vllm", folder)
    pip = [python, "-m", "pip"]
    subprocess.run([*pip, "uninstall", "--quiet", "--yes", *UNWANTED], check=True, stderr=subprocess.DEVNULL)
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--editable", ROOT], check=True)
    return python


def cells(python: Path) -> dict[str, dict[str, str]]:
    """Names, and the variables that their processes start with."""
    code = "import json\nfrom integrations.vllm.inside import CELLS\n"
    code += "print(json.dumps({name: cell.environment for name, cell in CELLS.items()}))"
    command, settings = [python, "-c", code], os.environ | VARIABLES
    found = subprocess.run(command, cwd=ROOT, env=settings, check=True, capture_output=True, text=True)
    return {**json.loads(found.stdout.splitlines()[-1]), **{name: {} for name in (*MODULES, *ELSEWHERE)}}


def run(python: Path, name: str, variables: dict[str, str], models: Path) -> dict[str, Any] | None:
    """What the cell found, or None where it failed."""
    out = models / "found.json"
    out.unlink(missing_ok=True)
    settings = os.environ | VARIABLES | variables
    command = [python, "-m", f"integrations.vllm.{MODULES.get(name, 'inside')}", name, models, out]
    status = subprocess.run(command, cwd=ROOT, env=settings, timeout=PATIENCE).returncode
    return json.loads(out.read_text()) if status == 0 and out.exists() else None


def elsewhere(cell: Elsewhere, python: Path, options: argparse.Namespace) -> dict[str, Any] | None:
    """What is found in a framework's environment; its test starts vLLM's server where it wants one."""
    started = time.monotonic()
    theirs = environment(cell.environment, options.environments.absolute())
    pip = [theirs, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, PYTEST], check=True)
    if cell.environment == "slime":
        subprocess.run([*pip, "--no-deps", options.slime.absolute()], check=True)
    settings = os.environ | VARIABLES | {"ATTNSHAPE_SERVER": f"{python} -m integrations.vllm.server serve"}
    command = [theirs, "-m", "pytest", *ALONE, ROOT / cell.test, "-k", cell.chosen]
    ran = subprocess.run(command, cwd=ROOT, env=settings, timeout=PATIENCE, stdout=subprocess.PIPE, text=True)
    print(ran.stdout, flush=True)
    passed = ran.returncode == 0 and "skipped" not in ran.stdout
    return {"loading": time.monotonic() - started, **cell.found} if passed else None


def shown(found: dict[str, Any]) -> str:
    """One cell of the table."""
    said = found.pop("said", None)
    parts = [
        f"{k} {v:.1e}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items() if k != "loading"
    ]
    named = said.items() if isinstance(said, dict) else ((f"rank {i}", x) for i, x in enumerate(said or ()))
    for name, why in named:
        share = re.search(r"is not what it gave: (\S+) of", why or "")
        parts.append(f"{name}: {share[1] + ' elsewhere' if share else why or 'nothing said'}")
    return "; ".join(parts)


def write(found: dict[str, dict[str, Any]]) -> None:
    """The table, with what earlier runs found of the cells that were not run now."""
    known = {}
    if RESULTS.exists():
        rows = (line.split(" | ") for line in RESULTS.read_text().splitlines() if line.startswith("| "))
        known = {row[0].removeprefix("| "): row[1].removesuffix(" |") for row in rows}
        known.pop("cell", None)
    known |= {name: shown(dict(x)) for name, x in found.items()}
    lines = ["# The plugin inside vLLM", "", __doc__.partition("\n\n")[0].replace("``", "`"), ""]
    lines += [
        "vLLM 0.32.0 (CPU wheel), torch 2.13.0, float32. `score` and `row` are the largest errors against",
        "eager transformers on the same weights, a fifth of the requests not asking for a row.",
        "",
        "| cell | found |",
        "|---|---|",
    ]
    lines += [f"| {name} | {what} |" for name, what in known.items()]
    RESULTS.write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cells", nargs="*", metavar="CELL", help="all, if none is named")
    parser.add_argument("--environments", type=Path, default=Path(".parity"), metavar="FOLDER")
    parser.add_argument("--python", type=Path, help="of an environment that is there already")
    parser.add_argument("--slime", type=Path, help="a checkout; without it slime is left out")
    options = parser.parse_args()
    python = options.python or interpreter(options.environments.absolute())
    models = options.environments.absolute() / "vllm-models"
    models.mkdir(parents=True, exist_ok=True)
    known = cells(python)
    if unknown := {*options.cells} - {*known}:
        parser.error(f"no such cell: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    found, failed = {}, []
    left_out = {"cost"} if options.slime else {"cost", "slime"}
    for name in options.cells or [name for name in known if name not in left_out]:
        print(f"{name} …", flush=True)
        if name in ELSEWHERE:
            result = elsewhere(ELSEWHERE[name], python, options)
        else:
            result = run(python, name, known[name], models)
        if result is None:
            failed.append(name)
            continue
        if name == "cost":
            COST.write_text(json_rows(result))
            print(f"{name}: {100 * result['rows_share']['cpu']:.2f}% of a batch, {COST}", flush=True)
            continue
        found[name] = result
        print(f"{name}: {shown(dict(result))} (loaded in {result['loading']:.0f} s)", flush=True)
        write(found)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
