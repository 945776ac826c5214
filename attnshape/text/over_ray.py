"""``attnshape credit --ray``: a JSONL file, block by block, over an actor pool of Ray Data."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from attnshape.text.file import BLOCK_BATCHES, Credited, block_of, credited
from attnshape.text.load import RewardModelConfig
from attnshape.text.model import CreditModel
from attnshape.text.source import CreditSource


@dataclass(frozen=True)
class Block:
    """Lines of the file that an actor reads at once."""

    first: int
    """The number of its first line."""
    offset: int
    """In bytes, from the file's beginning."""
    size: int
    done: list[int]
    """Numbers of the lines that are passed over."""


class Creditor:
    """An actor: a reward model, and the credit of one block after another."""

    def __init__(
        self,
        path: Path,
        size: int,
        config: RewardModelConfig,
        device: str,
        beside: Sequence[CreditSource],
        with_page: bool,
        batch_size: int,
    ) -> None:
        # Before the model is loaded: a node may not see the file, or see another one.
        if path.stat().st_size != size:
            raise ValueError(f"{path}: got {path.stat().st_size} bytes on a node of Ray's, want {size}")
        self._path = path
        self._model = CreditModel.load(config, device)
        for source in (None, *beside):
            self._model.probe(source)
        self._options: dict[str, Any] = {
            "with_page": with_page,
            "beside": beside,
            "batch_size": batch_size,
        }

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Of a row with a block, a row with what is written of it; both as JSON."""
        block = Block(**json.loads(row["item"]))
        with self._path.open("rb") as file:
            file.seek(block.offset)
            lines = io.BytesIO(file.read(block.size))
        batches = [*credited(self._model, lines, first=block.first, done=block.done, **self._options)]
        return {"credited": json.dumps(Credited.joined(batches))}


def blocks(lines: Iterable[bytes], done: Iterator[int], batch_size: int) -> Iterator[Block]:
    """The file in blocks; those of which all is done are left out.

    Args:
        done: the numbers of lines that are written, in order.
    """
    ahead, offset = iter(lines), 0
    of_block = itertools.groupby(done, lambda line: block_of(line, batch_size))
    number, written = next(of_block, (None, None))
    for i in itertools.count():
        first = 1 + i * BLOCK_BATCHES * batch_size
        block = [*itertools.islice(ahead, BLOCK_BATCHES * batch_size)]
        if not block:
            return
        before: list[int] = []
        if number == i and written is not None:
            before = [*written]
            number, written = next(of_block, (None, None))
        size = sum(map(len, block))
        if len(before) < sum(bool(line.strip()) for line in block):
            yield Block(first, offset, size, before)
        offset += size


def credited_over_ray(
    path: Path,
    config: RewardModelConfig,
    device: str,
    *,
    actors: int,
    with_page: bool = False,
    beside: Sequence[CreditSource] = (),
    batch_size: int = 16,
    done: Iterable[int] = (),
) -> Iterator[Credited]:
    """What ``credited`` gives, a block at once, from so many actors with the model on a device each.

    Ray starts an actor again that dies, and its block anew. The cluster is the one that ``RAY_ADDRESS``
    names, or this machine. File and model are read on each node where they are named.

    Args:
        device: ``"cpu"``, or ``"cuda"``: which GPU, says Ray.
        done: the numbers of lines that are passed over, in order.

    Raises:
        ValueError: Ray is not there; the device is one that Ray does not give; an actor's own error.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device: got {device!r}, but Ray says which GPU an actor has: want 'cpu' or 'cuda'")
    try:
        import ray
        from ray.data import ActorPoolStrategy
    except ModuleNotFoundError as error:
        raise ValueError(f"--ray: {error}; want pip install 'ray[data]'") from error
    if Path(config.model).exists():  # an actor is in another folder
        config = replace(config, model=str(Path(config.model).resolve()))
    with path.open("rb") as lines:
        rows = [json.dumps(asdict(block)) for block in blocks(lines, iter(done), batch_size)]
    if not rows:
        return
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level="warning")
    try:
        data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            Creditor,
            fn_constructor_args=(
                path.resolve(),
                path.stat().st_size,
                config,
                device,
                tuple(beside),
                with_page,
                batch_size,
            ),
            compute=ActorPoolStrategy(size=min(actors, len(rows))),
            **({"num_gpus": 1} if device == "cuda" else {"num_cpus": 1}),
        )
        data.context.execution_options.preserve_order = True
        data.context.enable_progress_bars = False
        for row in data.iter_rows():
            yield Credited(*json.loads(row["credited"]))
    except ray.exceptions.RayError as error:
        *_, said = str(error).strip().splitlines()  # below an actor's traceback
        raise ValueError(f"--ray: {said}") from error
