"""Golden vectors: what the frameworks' real functions gave for a few drawn cases. Data only."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parity.cases import Case
from parity.check import Errors
from parity.formulas import Outputs

FILE = Path(__file__).with_name("golden.npz")
"""Of every framework; the names of its arrays begin with the framework's."""
CASES = 10
"""Of each framework, of one shape."""


@dataclass
class Golden:
    about: dict[str, Any]
    """``ran``: the framework's version or commit; ``cases`` and ``errors`` of the whole run."""
    cases: list[Case]
    outputs: list[Outputs]


def save(
    framework: str, ran: str, errors: Errors, n_cases: int, cases: list[Case], outputs: list[Outputs]
) -> None:
    arrays = {
        f"{kind}.{name}": torch.stack([each[name].cpu() for each in dicts]).numpy()
        for kind, dicts in (("in", [case.inputs for case in cases]), ("out", outputs))
        for name in dicts[0]
    }
    about = {
        "ran": ran,
        "torch": torch.__version__.partition("+")[0],
        "cases": n_cases,
        "errors": errors,
        "settings": [case.settings for case in cases],
    }
    with np.load(FILE) as file:
        others = {name: file[name] for name in file.files if name.partition("/")[0] != framework}
    ours = {f"{framework}/{name}": x for name, x in (arrays | {"about": np.array(json.dumps(about))}).items()}
    np.savez_compressed(FILE, allow_pickle=False, **others, **ours)


def load(framework: str) -> Golden:
    with np.load(FILE) as file:
        about = json.loads(str(file[f"{framework}/about"]))
        names = [name.partition("/")[2] for name in file.files if name.partition("/")[0] == framework]
        arrays = {name: torch.from_numpy(file[f"{framework}/{name}"]) for name in names if name != "about"}

    def rows(kind: str, i: int) -> dict[str, torch.Tensor]:
        return {name.removeprefix(kind): x[i] for name, x in arrays.items() if name.startswith(kind)}

    settings = about.pop("settings")
    cases = [Case(s, rows("in.", i)) for i, s in enumerate(settings)]
    return Golden(about, cases, [rows("out.", i) for i in range(len(settings))])


def names() -> list[str]:
    with np.load(FILE) as file:
        return sorted({name.partition("/")[0] for name in file.files})


def table() -> str:
    """The errors of the last run of each framework, as Markdown."""
    lines = [
        "# Presets against the frameworks' real functions",
        "",
        "Written by `make parity`. Largest error against the framework's formula in float64, over all cases,",
        "as a part of the case's largest output: the framework's own / ours. float32 rounds by 6.0e-08.",
        "",
        "| framework | cases | rewards | advantages | returns | whitened |",
        "|---|---|---|---|---|---|",
    ]
    for name in names():
        about = load(name).about
        cells = [
            " / ".join(f"{x:.1e}" for x in about["errors"].get(output, []))
            for output in ("rewards", "advantages", "returns", "whitened")
        ]
        ran = about["ran"] + (", without a critic" if name.endswith("-groups") else "")
        lines.append(f"| {ran} | {about['cases']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write_table() -> None:
    FILE.with_name("results.md").write_text(table())
