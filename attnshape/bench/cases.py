"""The calls that are measured: random arguments for them, and the bytes they must move."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

import attnshape
from attnshape import KL, AttentionInputs, Response, ShapedRewards, ShapingConfig, reference
from attnshape.config import MaskSemantics
from attnshape.types import Advantages, Backend

KL_COEF = 0.05
TURN, TURNS = 64, 4
"""Where a mask has holes, every fourth turn of 64 tokens is not the policy's own."""

What: TypeAlias = Literal["fused", "apart", "credit", "row", "column", "sweep", "gae", "whiten"]
"""``fused``: ``shape_rewards`` on queries and keys; ``apart``: ``attention_credit``, then ``shape_rewards``;
``sweep``: ``shape_rewards`` on given credit; the rest: the function of that name."""


class Shape(NamedTuple):
    """``batch`` rows of ``response`` tokens at the end of ``keys`` keys; of other lengths in ``lengths``.

    ``holes``: the mask leaves out turns inside the response.
    """

    batch: int
    response: int
    keys: int = 0
    lengths: tuple[int, ...] = ()
    packed: bool = False
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    holes: bool = False

    @property
    def tokens(self) -> int:
        """Elements of a token tensor."""
        return sum(self.lengths) if self.packed else self.batch * self.response

    @property
    def live_tokens(self) -> int:
        lengths = self.lengths or (self.response,) * self.batch
        return sum(lengths) if not self.holes else sum(map(_own_tokens, lengths))

    def __str__(self) -> str:
        holes = ", holes" if self.holes else ""
        if self.lengths:
            layout = "packed" if self.packed else "padded"
            return f"{self.batch} rows, {max(self.lengths)} the longest, {layout}{holes}"
        if self.keys:
            return f"B {self.batch} S {self.keys} R {self.response}{holes}"
        return f"{self.batch}x{self.response}{holes}"


def _own_tokens(length: int) -> int:
    turns, rest = divmod(length, TURN * TURNS)
    return turns * TURN * (TURNS - 1) + min(rest, TURN * (TURNS - 1))


class Case(NamedTuple):
    """One call, ``what`` of it, at one shape."""

    what: What
    shape: Shape
    dtype: torch.dtype = torch.bfloat16  # of queries and keys
    gamma: float = 1.0
    lam: float = 0.95
    mask_semantics: MaskSemantics = "skip"
    model: str = ""  # whose heads the shape has

    @property
    def name(self) -> str:
        settings = [
            self.model,
            str(self.dtype).removeprefix("torch.") if self.dtype != torch.bfloat16 else "",
        ]
        for name in ("gamma", "lam", "mask_semantics"):
            value = getattr(self, name)
            if value != self._field_defaults[name]:
                settings.append(f"{name} {value}")
        return ", ".join([self.what, str(self.shape), *filter(None, settings)])

    @property
    def config(self) -> ShapingConfig:
        return _config(self.gamma, self.lam, self.mask_semantics)

    @property
    def read(self) -> int:
        """Bytes of inputs that the result depends on, each once; what a row has one of is left out."""
        s, floats = self.shape, {"fused": 3, "apart": 3, "sweep": 4, "gae": 2, "whiten": 1}.get(self.what, 0)
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
        outputs = {"fused": 5, "apart": 5, "sweep": 5, "gae": 2}.get(self.what, 1)
        return 4 * outputs * s.tokens

    @property
    def bytes(self) -> int:
        return self.read + self.written

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
        if s.holes:
            own = torch.arange(s.response, device=device) // TURN % TURNS != TURNS - 1
            mask = mask & own
        out: dict[str, Any] = {}
        ends = torch.tensor((0, *s.lengths), device=device).cumsum(0).to(torch.int32) if s.packed else None
        start = None
        if s.keys:
            queries = (s.keys,) if self.what == "column" else ()
            out["inputs"] = AttentionInputs(
                normal(s.batch, s.heads, *queries, s.width, dtype=self.dtype),
                normal(s.batch, s.kv_heads, s.keys, s.width, dtype=self.dtype),
                s.width**-0.5,
            )
            start = torch.full((s.batch,), s.keys - s.response, dtype=torch.int32, device=device)
        if self.what != "row":
            out["response"] = Response(mask, start=start, cu_seqlens=ends)
        if self.what in ("fused", "apart", "sweep"):
            out |= {"score": normal(s.batch), "values": normal(*tokens)}
            out["kl"] = KL(normal(*tokens), normal(*tokens), KL_COEF)
        if self.what == "sweep":
            out["credit"] = normal(*tokens).abs()
        if self.what == "gae":
            out |= {"rewards": normal(*tokens), "values": normal(*tokens)}
        if self.what == "whiten":
            out["x"] = normal(*tokens)
        return out

    def call(self, arguments: dict[str, Any], backend: Backend = "auto") -> Any:
        return self._call(attnshape, arguments, {"backend": backend})

    def reference(self, arguments: dict[str, Any]) -> Any:
        """The same by ``attnshape.reference``."""
        return self._call(reference, arguments, {})

    def _call(self, functions: Any, arguments: dict[str, Any], options: dict[str, Any]) -> Any:
        rest = arguments | options
        if self.what in ("fused", "apart", "sweep"):
            score = rest.pop("score")
            credit = rest.pop("credit" if self.what == "sweep" else "inputs")
            if self.what == "apart":
                credit = functions.attention_credit(credit, rest["response"], **options)
            return functions.shape_rewards(score, credit, **rest, config=self.config)
        if self.what == "gae":
            return functions.gae(**rest, config=self.config)
        name = {
            "row": "attention_row",
            "credit": "attention_credit",
            "column": "attention_column_credit",
            "whiten": "whiten",
        }[self.what]
        return getattr(functions, name)(**rest)


@functools.cache
def _config(gamma: float, lam: float, mask_semantics: MaskSemantics) -> ShapingConfig:
    return ShapingConfig(gamma=gamma, lam=lam, mask_semantics=mask_semantics)


def outputs_of(what: str, result: Any) -> dict[str, Tensor]:
    """The tensors that a call returns, by name."""
    if isinstance(result, ShapedRewards):
        names = ("rewards", "advantages", "returns", "credit", "kl")
        return {name: getattr(result, name) for name in names}
    if isinstance(result, Advantages):
        return {"advantages": result.advantages, "returns": result.returns}
    return {what: result}


def random_arguments(case: Case, device: torch.device, seed: int) -> dict[str, Any]:
    return case.arguments(device, torch.Generator(device).manual_seed(seed))
