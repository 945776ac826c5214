"""What an adapter asks of its framework: its version, and the parameters of its functions."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import pytest

from attnshape.integrations import framework
from attnshape.integrations.framework import require_parameters, require_version


def test_the_tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = metadata.version("torch")
    assert require_version("torch", ["0.1", installed.partition("+")[0]]) == installed
    monkeypatch.setattr(framework, "version", lambda name: "0.9.1+cu129")
    assert require_version("verl", ["0.9.1"]) == "0.9.1+cu129"


def test_others_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"torch \S+ is not supported, want torch 0.1 or 0.2"):
        require_version("torch", ["0.1", "0.2"])
    with pytest.raises(RuntimeError, match=r"no-such-thing is not installed, want no-such-thing 1\.0"):
        require_version("no-such-thing", ["1.0"])


class Framework:
    def gae(self, rewards: Any, values: Any) -> None: ...

    def traced(self, rewards: Any, _ray_trace_ctx: Any = None) -> None: ...


def test_parameters() -> None:
    require_parameters(Framework.gae, "self", "rewards", "values")
    require_parameters(Framework.traced, "self", "rewards")
    for other in (("self", "rewards"), ("self", "values", "rewards"), ("self", "rewards", "values", "mask")):
        with pytest.raises(
            RuntimeError, match=r"Framework\.gae takes \(self, rewards, values\), want \(self"
        ):
            require_parameters(Framework.gae, *other)
