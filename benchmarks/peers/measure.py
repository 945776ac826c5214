"""Ours and a peer on the same tensors in the same process, in the peer's own environment.

``python -m benchmarks.peers.measure PEER OUT [--device cpu] [--small]``, which ``benchmarks/test_peers.py``
starts with the interpreter of that environment. Needs nothing but torch, the peer and this repository; each
peer is called through its own published function, and is not timed where it does not compute the same.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.abc
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import torch
from torch import Tensor

import attnshape
from attnshape.bench.cases import Case, Shape, random_arguments
from attnshape.bench.measure import WrongResultError, check
from attnshape.bench.timing import sets_for, time_calls

Arguments = dict[str, Any]
Result = tuple[Tensor, ...]
Prepared = Callable[[], Result]
"""A call whose inputs are in the form that its function takes: no conversion is timed."""

PEER_ERROR = 1e-3
"""Of the largest element: float32 loops drift by as much over long rows at gamma = lam = 1."""
LARGE = 1 << 24
"""Tokens of a batch that is measured once, at lam = 1."""


class Peer(NamedTuple):
    """How a peer is called, and ours beside it."""

    module: str
    """Its package; empty for code of this repository."""
    theirs: Callable[[Case, Any], Prepared]
    ours: Callable[[Case, Any], Prepared]
    ragged: bool = False
    """Whether it takes a mask; others are given whole rows."""
    most: tuple[int, int] | None = None
    """Rows and tokens of a row beyond which it is not asked, because it only takes longer."""
    least_gain: float = 0.0
    """The budget on a CPU."""
    what: str = "gae"
    only_cuda: bool = False

    def cases(self, device_type: str, small: bool) -> Iterator[Case]:
        if self.what == "row":
            shapes = (Shape(2, 32, 64),) if small else (Shape(32, 1024, 2048), Shape(64, 2048, 4096))
            yield from (Case("row", shape, torch.float16) for shape in shapes)
            return
        shapes = [(64, 128), (256, 1024), (64, 8192), (64, 32768), (8192, 4096), (1, 131072)]
        if device_type == "cuda":
            shapes = [
                (64, 128),
                (256, 1024),
                (4096, 512),
                (2048, 4096),
                (8192, 4096),
                (64, 32768),
                (1, 131072),
            ]
        if self.most is not None:
            shapes = [
                (rows, width) for rows, width in shapes if rows <= self.most[0] and width <= self.most[1]
            ]
        for rows, width in [(3, 40)] if small else shapes:
            for lam in (0.95, 1.0) if rows * width <= LARGE else (1.0,):
                # Lengths fall evenly from the width to half of it.
                lengths = tuple(width - i * (width // 2) // rows for i in range(rows)) if self.ragged else ()
                yield Case("gae", Shape(rows, width, lengths=lengths), lam=lam)


# Ours


def ours_gae(case: Case, arguments: Arguments) -> Prepared:
    return functools.partial(case.call, arguments)


def ours_whitened(case: Case, arguments: Arguments) -> Prepared:
    """Advantages whitened over the batch, as the loops of verl and TRL leave them."""

    def call() -> Result:
        advantages, returns, moments = attnshape.gae(**arguments, config=case.config)
        return attnshape.whiten(advantages, arguments["response"], moments=moments), returns

    return call


def ours_row(case: Case, arguments: Arguments) -> Prepared:
    return lambda: (case.call(arguments),)


# Theirs


def verl(case: Case, arguments: Arguments) -> Prepared:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    mask = arguments["response"].mask.float()
    tensors = (arguments["rewards"], arguments["values"], mask)
    return lambda: compute_gae_advantage_return(*tensors, case.gamma, case.lam)


def trl(case: Case, arguments: Arguments) -> Prepared:
    from trl.trainer.ppo_trainer import PPOTrainer

    trainer = SimpleNamespace(
        config=SimpleNamespace(gamma=case.gamma, lam=case.lam, whiten_rewards=False, use_score_norm=False)
    )
    mask = arguments["response"].mask.long()
    tensors = (arguments["values"], arguments["rewards"], mask)
    return lambda: PPOTrainer.compute_advantages(trainer, *tensors)[1:]


def openrlhf(case: Case, arguments: Arguments) -> Prepared:
    _stub("flash_attn", "vllm")
    from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

    mask = arguments["response"].mask
    tensors = (arguments["values"], arguments["rewards"], mask)
    compute = RemoteExperienceMaker.get_advantages_and_returns
    return lambda: compute(None, *tensors, case.gamma, case.lam)


def torchrl(case: Case, arguments: Arguments) -> Prepared:
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    rewards, values = arguments["rewards"][..., None], arguments["values"][..., None]
    after = torch.nn.functional.pad(values[:, 1:], (0, 0, 0, 1))
    done = torch.zeros_like(rewards, dtype=torch.bool)
    done[:, -1] = True

    def call() -> Result:
        advantages, returns = vec_generalized_advantage_estimate(
            case.gamma, case.lam, values, after, rewards, done, done, time_dim=-2
        )
        return advantages[..., 0], returns[..., 0]

    return call


def slime(case: Case, arguments: Arguments) -> Prepared:
    from slime.utils.ppo_utils import chunked_gae

    return lambda: chunked_gae(arguments["rewards"], arguments["values"], case.gamma, case.lam)


def rl_triton(case: Case, arguments: Arguments) -> Prepared:
    from rl_triton import compute_gae

    rewards, values = arguments["rewards"], arguments["values"]
    done = torch.zeros_like(values)
    return lambda: (compute_gae(rewards, values, done, gamma=case.gamma, lambda_=case.lam),)


def _doubled(rewards: Tensor, values: Tensor, gamma: Tensor, gl: Tensor) -> Result:
    """Sums over 1, 2, 4, ... tokens, each of two of the ones before."""
    advantages = rewards + gamma * torch.nn.functional.pad(values[:, 1:], (0, 1)) - values
    step = 1
    while step < rewards.shape[1]:
        later = torch.nn.functional.pad(advantages[:, step:], (0, step))
        advantages = advantages + gl**step * later
        step *= 2
    return advantages, advantages + values


def doubling(case: Case, arguments: Arguments) -> Prepared:
    compiled = torch.compile(_doubled, fullgraph=True, dynamic=False)
    rewards, values = arguments["rewards"], arguments["values"]
    # Numbers would be compiled in, one after another.
    gamma, gl = (torch.tensor(x, device=rewards.device) for x in (case.gamma, case.gamma * case.lam))
    return lambda: compiled(rewards, values, gamma, gl)


def flashinfer(case: Case, arguments: Any) -> Prepared:
    """Split-KV decode, the nearest thing to a row kernel: one query per sequence over all its keys, and the
    values too, which a row of attention does without."""
    from flashinfer.decode import BatchDecodeWithPagedKVCacheWrapper

    inputs, s, page = arguments["inputs"], case.shape, 16
    key = inputs.key.transpose(1, 2).reshape(-1, page, s.kv_heads, s.width).contiguous()
    value = torch.randn_like(key)
    pages = s.keys // page
    options = {"dtype": torch.int32, "device": key.device}
    decode = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(1 << 27, dtype=torch.uint8, device=key.device), "NHD"
    )
    decode.plan(
        torch.arange(s.batch + 1, **options) * pages,
        torch.arange(s.batch * pages, **options),
        torch.full((s.batch,), page, **options),
        s.heads,
        s.kv_heads,
        s.width,
        page,
        q_data_type=key.dtype,
        kv_data_type=key.dtype,
        sm_scale=inputs.scaling,
    )
    got = decode.run(inputs.query, (key, value))
    want = torch.nn.functional.scaled_dot_product_attention(
        inputs.query[:, :, None].float(),
        inputs.key.float(),
        value.reshape(s.batch, s.keys, s.kv_heads, s.width).transpose(1, 2).float(),
        scale=inputs.scaling,
        enable_gqa=True,
    )[:, :, 0]
    error = (got - want).abs().max() / want.abs().max()
    if not error <= 0.01:
        raise WrongResultError(f"decode attention is off by {error:.2g} of the largest")
    return lambda: decode.run(inputs.query, (key, value))


PEERS = {
    "verl": Peer("verl", verl, ours_whitened, ragged=True, most=(512, 8192), least_gain=50),
    "trl": Peer("trl", trl, ours_whitened, ragged=True, most=(512, 8192), least_gain=50),
    "openrlhf": Peer("openrlhf", openrlhf, ours_gae, ragged=True, most=(512, 8192)),
    "torchrl": Peer("torchrl", torchrl, ours_gae, most=(512, 1024)),
    "slime": Peer("slime", slime, ours_gae, least_gain=1),
    "doubling": Peer("", doubling, ours_gae, least_gain=1),
    "rl-triton": Peer("rl_triton", rl_triton, ours_gae, only_cuda=True),
    "flashinfer": Peer("flashinfer", flashinfer, ours_row, only_cuda=True, what="row"),
}


class _Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that a peer imports and the measured function never calls."""

    def __init__(self, roots: Sequence[str]) -> None:
        self.roots = roots

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.split(".")[0] in self.roots else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def _stub(*roots: str) -> None:
    absent = [root for root in roots if root not in sys.modules and importlib.util.find_spec(root) is None]
    if absent:
        sys.meta_path.append(_Stubs(absent))


def measured(peer: Peer, case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Samples of ours and theirs; both are checked first."""
    sets = sets_for(case.bytes, device)
    arguments = [random_arguments(case, device, seed) for seed in range(sets)]
    error = check(case, arguments[0])
    ours, theirs = ([make(case, x) for x in arguments] for make in (peer.ours, peer.theirs))
    disagreement = 0.0
    if peer.what == "gae":
        mask = arguments[0]["response"].mask
        for mine, other in zip(ours[0](), theirs[0](), strict=False):
            size = torch.where(mask, mine, 0.0).abs().max().item()
            off = torch.where(mask, mine - other, 0.0).abs().max().item() / size
            disagreement = max(disagreement, off) if math.isfinite(off) else math.inf
    row = {
        "case": case.name,
        "bytes_read": case.read,
        "bytes_written": case.written,
        "error_of_bound": error,
        "disagreement": disagreement,
    }
    if disagreement > PEER_ERROR:
        return row | {"failed": f"does not compute the same: off by {disagreement:.2g} of the largest"}
    timings = time_calls({"ours": ours, "theirs": theirs}, device, seconds)
    return row | {name: timing._asdict() for name, timing in timings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    peer, device = PEERS[options.peer], torch.device(options.device)
    rows: list[dict[str, Any]] = []
    result = {"version": version_of(peer), "torch": torch.__version__, "rows": rows}
    for case in peer.cases(device.type, options.small):
        try:
            rows.append(measured(peer, case, device, 0.005 if options.small else 0.3))
        except (RuntimeError, ValueError) as error:
            rows.append({"case": case.name, "failed": f"{type(error).__name__}: {error}".splitlines()[0]})
        options.out.write_text(json.dumps(result))  # what was measured stays, whatever happens to the rest


def version_of(peer: Peer) -> str:
    if not peer.module:
        return ""
    from importlib import metadata

    names = metadata.packages_distributions().get(peer.module, [])
    return f"{names[0]} {metadata.version(names[0])}" if names else f"{peer.module} from a path"


if __name__ == "__main__":
    main()
