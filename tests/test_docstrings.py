"""Examples in docstrings: they say what happens, and every public function has one."""

import doctest
import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import attnshape
from attnshape import credit

ROOT = Path(attnshape.__file__).parent
SOURCES = {
    ".".join(["attnshape", *path.relative_to(ROOT).with_suffix("").parts]): path.read_text()
    for path in sorted(ROOT.rglob("*.py"))
}
MODULES = [name for name, source in SOURCES.items() if ">>> " in source]
PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (attnshape, credit)
    for name in module.__all__
    if inspect.isfunction(getattr(module, name))
}


def examples(module: ModuleType) -> Iterator[doctest.DocTest]:
    """Of all that the module defines; doctest's own search passes over what a decorator has wrapped."""
    finder, found = doctest.DocTestFinder(), set()
    for name, x in vars(module).items():
        if getattr(x, "__module__", None) == module.__name__ and (
            inspect.isclass(x) or inspect.isfunction(x)
        ):
            for test in finder.find(x, f"{module.__name__}.{name}", globs=vars(module)):
                if test.examples and test.name not in found:
                    found.add(test.name)
                    yield test


def test_the_modules_that_users_call_have_examples() -> None:
    assert {f"attnshape.{name}" for name in ("ops", "types", "config", "credit", "text.align")} <= {*MODULES}


@pytest.mark.parametrize("name", MODULES)
def test_examples_say_what_happens(name: str) -> None:
    runner, count = doctest.DocTestRunner(), 0
    for test in examples(importlib.import_module(name)):
        report: list[str] = []
        failed, attempted = runner.run(test, out=report.append)
        assert not failed, "".join(report)
        count += attempted
    assert count == SOURCES[name].count(">>> "), "an example is where nobody looks for it"


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_function_has_an_example(name: str) -> None:
    function: Callable[..., object] = PUBLIC[name]
    assert doctest.DocTestParser().get_examples(inspect.getdoc(function) or ""), name
