"""What each source of credit costs beside the forward that scores: arithmetic and memory, counted, not timed.

``python -m benchmarks.credit_cost [OUT]`` prints a table and, with a folder, writes ``credit_cost.json``. The
counts depend on the shapes, the versions and the backend (PyTorch on the CPU), not on the machine. Memory is
the most that lives at once beyond the weights, in tensors; of the PyTorch rollouts it includes the chunk of
attention scores that they work on, which is of constant size, and which the Triton kernels do not have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import LlamaConfig, LlamaForSequenceClassification

from attnshape import compile as compiling
from attnshape.vectorized import attention as vectorized
from benchmarks.paper.sources import SOURCES, Weights

LENGTHS = (256, 512, 1024)
BATCH, LAYERS, WIDTH = 2, 4, 256
CHUNK = 2**18
"""Elements of a chunk of scores: so few that it does not hide what grows with the length."""


ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (sdpa_flop_count, 3),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (sdpa_backward_flop_count, 4),
}
"""Formulas of PyTorch's own counter, for the kernels of a CPU, and how many shapes each takes."""


class Count(TorchDispatchMode):
    """Multiplications and additions of matrix products, and the most bytes that live at once."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.known = {p.untyped_storage()._cdata for p in [*known.parameters(), *known.buffers()]}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.flops = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        packet = function.overloadpacket
        if packet in ATTENTION:
            formula, shapes = ATTENTION[packet]
            self.flops += formula(*(x.shape for x in args[:shapes]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs or {}, out_val=out)
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


class Cost(NamedTuple):
    flops: int
    peak_bytes: int


def reward_model() -> Any:
    """Llama's shape, small, with random frozen weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=704,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=max(LENGTHS),
        pad_token_id=0,
        num_labels=1,
    )
    return LlamaForSequenceClassification(config).eval().requires_grad_(False)


@torch.no_grad()
def _score_only(model: Any, ids: Tensor, mask: Tensor, response_mask: Tensor, start: Tensor) -> Weights:
    return model(ids, attention_mask=mask).logits[:, 0], response_mask


def costs(name: str | None, model: Any, length: int) -> Cost:
    """Of a source, or of the forward alone; the second half of each sequence is the response."""
    compute = _score_only if name is None else SOURCES[name].compute
    ids = torch.randint(1, 512, (BATCH, length), generator=torch.Generator().manual_seed(length))
    response, start = torch.ones(BATCH, length // 2), torch.full((BATCH,), length - length // 2)
    arguments = (model, ids, torch.ones_like(ids), response, start)
    compute(*arguments)  # what the first call makes for good is not counted
    with Count(model) as count:
        compute(*arguments)
    return Cost(count.flops, count.peak)


def measure() -> dict[str, Any]:
    model = reward_model()
    rows = []
    # Operators would be counted as one call of which nothing is known.
    with (
        mock.patch.object(compiling, "is_traced", return_value=False),
        mock.patch.object(vectorized, "SCORE_ELEMENTS", CHUNK),
    ):
        for length in LENGTHS:
            base = costs(None, model, length)
            for name in [None, *SOURCES]:
                cost = base if name is None else costs(name, model, length)
                row = {"source": name or "forward alone", "length": length, **cost._asdict()}
                rows.append({**row, "flops_of_forward": round(cost.flops / base.flops, 4)})
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "model": f"Llama shape, {LAYERS} layers, width {WIDTH}, float32, batch {BATCH}",
        "versions": versions,
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Markdown: arithmetic of the longest, and memory of all, in MB."""
    lengths = sorted({row["length"] for row in result["rows"]})
    head = ["source", f"arithmetic at {lengths[-1]} (forward = 1)", *(f"MB at {n}" for n in lengths)]
    lines = [head, ["---"] * len(head)]
    for source in dict.fromkeys(row["source"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["source"] == source]
        megabytes = [f"{row['peak_bytes'] / 1e6:.1f}" for row in rows]
        lines.append([source, f"{rows[-1]['flops_of_forward']:.2f}", *megabytes])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: list[str]) -> None:
    result = measure()
    print(table(result))
    for folder in arguments:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / "credit_cost.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
