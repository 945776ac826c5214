"""The calls that have a budget: their shapes, random arguments for them, and the bytes they must move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attnshape
from attnshape import AttentionInputs, ShapedRewards

GAMMA, LAM = 1.0, 0.95
KL_COEF = 0.05


class Shape(NamedTuple):
    """``batch`` rows of ``response`` tokens at the end of ``keys`` keys; of other lengths in ``lengths``."""

    batch: int
    response: int
    keys: int = 0
    lengths: tuple[int, ...] = ()
    packed: bool = False
    heads: int = 32
    kv_heads: int = 8
    width: int = 128

    @property
    def tokens(self) -> int:
        """Elements of a token tensor."""
        return sum(self.lengths) if self.packed else self.batch * self.response

    @property
    def live_tokens(self) -> int:
        return sum(self.lengths) or self.batch * self.response

    def __str__(self) -> str:
        if self.lengths:
            return (
                f"{self.batch} rows, {max(self.lengths)} the longest, {'packed' if self.packed else 'padded'}"
            )
        return (
            f"B {self.batch} S {self.keys} R {self.response}"
            if self.keys
            else f"{self.batch}x{self.response}"
        )


class Case(NamedTuple):
    """One call, ``what`` of it, at one shape."""

    what: str
    shape: Shape
    dtype: torch.dtype = torch.bfloat16  # of queries and keys

    @property
    def name(self) -> str:
        return f"{self.what}, {self.shape}"

    @property
    def read(self) -> int:
        """Bytes of inputs that the result depends on, each once; what a row has one of is left out."""
        s, floats = self.shape, {"fused": 3, "sweep": 4, "gae": 2, "whiten": 1}.get(self.what, 0)
        count = 4 * floats * s.live_tokens + (self.what != "row") * s.tokens  # the mask has one byte
        if s.keys:
            rows = s.batch * (s.keys if self.what == "column" else 1)
            count += self.dtype.itemsize * s.width * (rows * s.heads + s.batch * s.keys * s.kv_heads)
        return count

    @property
    def written(self) -> int:
        """Bytes of outputs, likewise."""
        s = self.shape
        if self.what == "row":
            return 4 * s.batch * s.keys
        outputs = {"fused": 5, "sweep": 5, "gae": 2}.get(self.what, 1)
        return 4 * outputs * s.tokens

    def arguments(self, device: torch.device, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Random arguments of ``call``; without a generator nobody fills them."""
        s = self.shape

        def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            x = torch.empty(size, device=device, dtype=dtype)
            return x if generator is None else x.normal_(generator=generator)

        tokens = (s.tokens,) if s.packed else (s.batch, s.response)
        mask = torch.ones(tokens, dtype=torch.bool, device=device)
        if s.lengths and not s.packed:
            mask = torch.arange(s.response, device=device) < torch.tensor(s.lengths, device=device)[:, None]
        out: dict[str, Any] = {} if self.what == "row" else {"response_mask": mask}
        if s.packed:
            ends = torch.tensor((0, *s.lengths), device=device).cumsum(0)
            out["response_cu_seqlens"] = ends.to(torch.int32)
        if s.keys:
            queries = (s.keys,) if self.what == "column" else ()
            out["inputs"] = AttentionInputs(
                normal(s.batch, s.heads, *queries, s.width, dtype=self.dtype),
                normal(s.batch, s.kv_heads, s.keys, s.width, dtype=self.dtype),
                s.width**-0.5,
            )
            if self.what != "row":
                start = torch.full((s.batch,), s.keys - s.response, dtype=torch.int32, device=device)
                out["response_start"] = start
        if self.what in ("fused", "sweep"):
            names = ("values", "logprobs", "ref_logprobs")
            out |= {"score": normal(s.batch), **{name: normal(*tokens) for name in names}}
        if self.what == "sweep":
            out["credit"] = normal(*tokens).abs()
        if self.what == "gae":
            out |= {"rewards": normal(*tokens), "values": normal(*tokens)}
        if self.what == "whiten":
            out |= {"x": normal(*tokens), "mask": out.pop("response_mask")}
        return out

    def call(self, arguments: dict[str, Any], backend: attnshape.types.Backend = "auto") -> Any:
        rest = dict(arguments)
        if self.what in ("fused", "sweep"):
            credit = rest.pop("inputs" if self.what == "fused" else "credit")
            return attnshape.shape_rewards(
                rest.pop("score"), credit, **rest, kl_coef=KL_COEF, backend=backend
            )
        if self.what == "gae":
            recurrence = {"gamma": GAMMA, "lam": LAM, "mask_semantics": "skip"}
            return attnshape.gae(**rest, **recurrence, backend=backend)
        function: Callable[..., Any] = {
            "row": attnshape.attention_row,
            "credit": attnshape.attention_credit,
            "column": attnshape.attention_column_credit,
            "whiten": attnshape.whiten,
        }[self.what]
        return function(**rest, backend=backend)


def outputs_of(what: str, result: Any) -> dict[str, Tensor]:
    """The tensors that a call returns, by name."""
    if isinstance(result, ShapedRewards):
        names = ("rewards", "advantages", "returns", "credit", "kl")
        return {name: getattr(result, name) for name in names}
    if what == "gae":
        return dict(zip(("advantages", "returns"), result, strict=False))
    return {what: result}


ATTENTION = (Shape(32, 1024, 2048), Shape(64, 2048, 4096), Shape(128, 4096, 8192))
SWEEPS = (Shape(4096, 512), Shape(2048, 4096), Shape(512, 32768))
LONG = (Shape(1, 131072), Shape(8, 32768))
UNEQUAL = tuple(Shape(64, 32768, lengths=(200,) * 63 + (32768,), packed=packed) for packed in (False, True))
SMALL = Shape(8, 256, 512)
COLUMN = Shape(4, 2048, 4096)


class Budget(NamedTuple):
    """A limit in seconds, from the time that a copy of the same bytes takes."""

    of_copy: float = 0.0  # this share of the copy's bandwidth
    times_copy: float = 0.0  # this many times its time
    seconds: float = 0.0

    def limit(self, copy_seconds: float) -> float | None:
        """None where there is no budget."""
        if self.of_copy:
            return copy_seconds / self.of_copy
        return self.times_copy * copy_seconds or self.seconds or None

    def __str__(self) -> str:
        if self.of_copy:
            return f"{self.of_copy:.0%} of a copy"
        if self.times_copy:
            return f"{self.times_copy} x a copy"
        return f"{self.seconds * 1e6:.0f} us" if self.seconds else "none"


def budget_cases() -> Iterator[tuple[Case, Budget]]:
    """Every call that is timed on a GPU by itself."""
    for what in ("fused", "credit", "row"):
        for shape, share in zip(ATTENTION, (0.8, 0.9, 0.95), strict=True):
            yield Case(what, shape), Budget(of_copy=share)
    for shape in SWEEPS:
        yield Case("sweep", shape), Budget(of_copy=0.85)
    for shape in SWEEPS:
        yield Case("gae", shape), Budget()
    for shape, seconds in zip(LONG, (15e-6, 12e-6), strict=True):
        yield Case("sweep", shape), Budget(seconds=seconds)
    for shape in UNEQUAL:
        yield Case("sweep", shape), Budget(times_copy=1.3)
    yield Case("whiten", SWEEPS[0]), Budget()
    yield Case("fused", SMALL), Budget(seconds=7e-6)
    yield Case("column", COLUMN), Budget()


def random_arguments(case: Case, device: torch.device, seed: int) -> dict[str, Any]:
    return case.arguments(device, torch.Generator(device).manual_seed(seed))
