"""What an adapter asks of its framework before it hooks in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any


def require_version(package: str, tested: Sequence[str]) -> str:
    """The installed version of ``package``.

    Raises:
        RuntimeError: it is not installed, or not one of the ``tested``.
    """
    wanted = " or ".join(tested)
    try:
        found = version(package)
    except PackageNotFoundError:
        raise RuntimeError(f"{package} is not installed, want {package} {wanted}") from None
    if found.partition("+")[0] not in tested:
        raise RuntimeError(f"{package} {found} is not supported, want {package} {wanted}")
    return found


def require_least(package: str, least: tuple[int, int]) -> None:
    """Raises RuntimeError if ``package`` is not installed, or older than version ``least``."""
    wanted = f"want {package} {least[0]}.{least[1]} or later"
    try:
        found = version(package)
    except PackageNotFoundError:
        raise RuntimeError(f"{package} is not installed, {wanted}") from None
    numbers = found.split(".")
    if tuple(int("".join(filter(str.isdigit, x)) or 0) for x in numbers[:2]) < least:
        raise RuntimeError(f"{package} {found} is not supported, {wanted}")


def require_parameters(function: Callable[..., Any], *names: str) -> None:
    """Raises RuntimeError if ``function`` takes other parameters than ``names``, in this order."""
    # Ray adds its own to the methods of an actor.
    found = tuple(name for name in inspect.signature(function).parameters if name != "_ray_trace_ctx")
    if found != names:
        raise RuntimeError(
            f"{function.__module__}.{function.__qualname__} takes ({', '.join(found)}), "
            f"want ({', '.join(names)}): another version of the framework?"
        )
