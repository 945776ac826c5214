"""One test, run by every backend: interpreted kernels on a CPU, compiled ones on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.problems import mapped

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("cpu", "torch", "triton") if DEVICE.type == "cpu" else ("torch", "triton")
COMPILED_EXAMPLES = 12
"""At most, on a GPU: nearly each example needs another specialisation, which takes seconds to compile."""

KEEPS_BITS = tuple(name for name in BACKENDS if name != "torch")
"""Where a row's bits follow from the row alone. PyTorch chooses code by shape, stride and processor."""

INTERPRETED = DEVICE.type == "cpu"
"""Whether kernels run in Triton's interpreter, where a launch takes a tenth of a second."""

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def each_backend_with(
    interpreted: dict[str, Sequence[Any]] | None = None, **options: Sequence[Any]
) -> pytest.MarkDecorator:
    """Each backend with every combination of options.

    The interpreted kernels with those of ``pairs``; ``interpreted`` has fewer choices for them.
    """
    every = list(itertools.product(*options.values()))
    few = pairs(*(options | (interpreted or {})).values()) if INTERPRETED else every
    cases = [(name, *case) for name in BACKENDS for case in (few if name == "triton" else every)]
    ids = ["-".join(map(str, case)) for case in cases]
    return pytest.mark.parametrize(("backend", *options), cases, ids=ids)


def pairs(*options: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Few combinations of options, among which every two choices of two options stand together."""

    def met(case: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, case[i], j, case[j]) for j in range(len(case)) for i in range(j)}

    every = list(itertools.product(*map(range, map(len, options))))
    missing = set().union(*map(met, every))
    chosen = []
    while missing:
        chosen.append(max(every, key=lambda case: len(met(case) & missing)))
        missing -= met(chosen[-1])
    return [tuple(choices[i] for choices, i in zip(options, case, strict=True)) for case in chosen]


def there(x: Any) -> Any:
    """``x`` where the backends run."""
    return mapped(x, lambda t: t.to(DEVICE))


def here(x: Any) -> Any:
    return mapped(x, lambda t: t.cpu())


def drawn(*strategies: st.SearchStrategy[Any], **examples: int) -> Callable[..., Any]:
    """A test ``check(backend, *drawn)`` for each backend named, with as many examples as it says."""

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        @pytest.mark.parametrize("backend", [name for name in examples if name in BACKENDS])
        def test(backend: str) -> None:
            count = min(examples[backend], COMPILED_EXAMPLES if DEVICE.type == "cuda" else 10**6)

            @settings(max_examples=count)
            @given(st.tuples(*strategies))
            def run(x: tuple[Any, ...]) -> None:
                check(backend, *x)

            run()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate
