"""Which module imports which, wherever in its text the import stands."""

import ast
import graphlib
from pathlib import Path

import attnshape

ROOT = Path(__file__).parents[1]


def modules() -> dict[str, Path]:
    out = {}
    for package in ("attnshape", "csrc_triton", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            out[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return out


def imported(path: Path, known: set[str]) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= found & known or {str(node.module)}
    return names & known


def test_imports_go_one_way() -> None:
    found = modules()
    assert {"attnshape", "attnshape.demo.results", "benchmarks.paper.store"} <= set(found)
    graph = {name: imported(path, set(found)) for name, path in found.items()}
    assert "attnshape.demo.plots" in graph["attnshape.demo.results"]
    graphlib.TopologicalSorter(graph).prepare()


def test_credit_and_the_reference_come_with_the_package() -> None:
    """``import attnshape`` is enough for ``attnshape.credit.…`` and ``attnshape.reference.…``."""
    tree = ast.parse((ROOT / "attnshape" / "__init__.py").read_text())
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "attnshape"]
    assert {"credit", "reference"} <= {alias.name for node in found for alias in node.names}
    assert {"credit", "reference"} <= set(attnshape.__all__)
