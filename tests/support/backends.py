"""One test, run by every backend: interpreted kernels on a CPU, compiled ones on a GPU."""

from __future__ import annotations

from collections.abc import Callable
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

each_backend = pytest.mark.parametrize("backend", BACKENDS)


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
