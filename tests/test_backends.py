"""Which backend computes."""

import pytest
import torch
from support.backends import DEVICE, there
from support.problems import make_problem

import attnshape
import csrc_triton
from attnshape import AttentionInputs, triton_backend


def test_what_the_kernels_cannot_do_goes_elsewhere() -> None:
    def reason(heads: int, width: int, dtype: torch.dtype = torch.float32) -> str | None:
        query, key = (torch.zeros(1, h, 2, width, dtype=dtype, device=DEVICE) for h in (heads, 1))
        return triton_backend.unsupported([AttentionInputs(query, key, 1.0)])

    assert reason(64, 256) is None
    assert reason(1, 264) == "the head width is 264, the kernels' limit 256"
    assert reason(65, 8) == "65 query heads share a key head, the kernels' limit is 64"
    assert "float64" in str(reason(1, 8, torch.float64))


def test_auto_is_triton_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    original = triton_backend.gae
    monkeypatch.setattr(triton_backend, "gae", lambda *args: (called.append(1), original(*args))[1])
    ones = torch.ones(1, 3, device=DEVICE)
    attnshape.gae(ones, ones, ones)
    assert bool(called) == (DEVICE.type == "cuda")
    attnshape.gae(ones, ones, ones, backend="triton")
    assert called


def test_columns_and_rollout_run_in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name in ("column_credit_raw", "rollout_raw"):
        function = getattr(csrc_triton, name)
        monkeypatch.setattr(
            csrc_triton, name, lambda *a, f=function, **k: (called.append(f.__name__), f(*a, **k))[1]
        )
    problem = there(make_problem(0, batch=1, whole_query=True))
    attnshape.attention_column_credit(problem.inputs, problem.response, backend="triton")
    attnshape.attention_rollout([problem.inputs], problem.response, backend="triton")
    assert called == ["column_credit_raw", "rollout_raw"]
