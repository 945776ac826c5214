"""What the tests of the kernels share."""

from typing import Any

import pytest

from csrc_triton.launch import Launcher


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that a test launches, and how one finishes; counters are zero after each."""
    started = []
    launch = Launcher.__call__

    def recorded(self: Launcher, programs: int, options: dict[str, int], **arguments: Any) -> None:
        launch(self, programs, options, **arguments)
        started.append(" ".join([self.kernel.__name__, *filter(None, [arguments.get("FINISH")])]))
        grid = arguments.get("grid")
        if grid is not None and grid.p_counters is not None:
            assert (grid.p_counters == 0).all()

    monkeypatch.setattr(Launcher, "__call__", recorded)
    return started
