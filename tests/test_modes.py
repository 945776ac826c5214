"""Modes of PyTorch that a caller has on: the numbers are the same under each of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import torch
from support import zoo
from support.reward_models import save
from support.tap_models import batch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import attnshape
from attnshape import KL, AttentionInputs, AttentionTap, CreditModel, GroupConfig, Response, ShapingConfig
from attnshape import credit as sources
from attnshape.text.load import SourceName
from attnshape.types import SignedInputs

B, R, S, D = 3, 6, 10, 8


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


MODES: dict[str, Callable[[], Any]] = {
    "autocast": autocast,
    "default dtype": default_dtype,
    "default device": lambda: torch.device("meta"),  # as another device than that of the tensors
    "deterministic": deterministic,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def layer(query: Tensor, key: Tensor, **norms: Tensor) -> AttentionInputs:
    mask = torch.ones(B, S)
    mask[0, :2] = 0
    return AttentionInputs(query, key, 0.35, attention_mask=mask, **norms)


MASK = torch.tensor([[1] * R, [1] * 4 + [0] * 2, [1, 1, 0, 1, 1, 1]])
RESPONSE = Response(MASK, start=torch.tensor([0, 2, 4]))
SCORE, VALUES, WEIGHTS = drawn(B), drawn(B, R), drawn(B, R).abs()
TWO, SHARES = drawn(B, 2), torch.tensor([1.0, 0.5])
ROW, EVERY = layer(drawn(B, 4, D), drawn(B, 2, S, D)), layer(drawn(B, 4, S, D), drawn(B, 2, S, D))
NORMED = layer(EVERY.query, EVERY.key, value_norm=drawn(B, 4, S).abs(), residual_norm=drawn(B, S).abs() + 0.5)
SIGNED = SignedInputs(EVERY, drawn(B, 2, S, D), drawn(B, 4, S, D) / 10)
IDS, PART = torch.arange(20).view(2, 10), Response(torch.ones(2, 5), start=torch.tensor([3, 4]))
FALL = drawn(2, 5)

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "shape_rewards": lambda backend: attnshape.shape_rewards(
        SCORE, ROW, RESPONSE, values=VALUES, kl=KL(VALUES, WEIGHTS, 0.1), backend=backend
    ),
    "gae": lambda backend: attnshape.gae(
        VALUES, WEIGHTS, MASK, ShapingConfig(gamma=0.9, lam=0.8), backend=backend
    ),
    "whiten": lambda backend: attnshape.whiten(1000 + VALUES, MASK, backend=backend),
    "group_advantages": lambda backend: attnshape.group_advantages(
        TWO, [WEIGHTS, None], MASK, group=3, weights=SHARES, config=GroupConfig.grpo(), backend=backend
    ),
    "attention_row": lambda backend: attnshape.attention_row(ROW, backend=backend),
    "attention_credit": lambda backend: attnshape.attention_credit(ROW, RESPONSE, backend=backend),
    "columns": lambda backend: attnshape.attention_column_credit(EVERY, RESPONSE, backend=backend),
    "rollout": lambda backend: attnshape.attention_rollout([NORMED] * 2, RESPONSE, backend=backend),
    "signed_rollout": lambda _: sources.signed_rollout([SIGNED] * 2, RESPONSE),
    "uniform": lambda _: sources.uniform(MASK),
    "segments": lambda _: sources.segment_rewards(VALUES, WEIGHTS, MASK, cutoff=0.5),
    "centered": lambda _: sources.centered(1000 * VALUES, MASK),
    "leave_one_out": lambda _: sources.leave_one_out(
        lambda ids, mask: (ids * mask).sum(1).float(), IDS, PART
    ),
    "deletion": lambda _: sources.deletion_scores(
        lambda ids, mask: (ids * mask).sum(1).float(), IDS, FALL, PART, fractions=(0.2, 0.5)
    ),
    "align": lambda _: attnshape.align([(0, 4), (4, 9)], [(0, 2), (2, 5), (5, 9)])(SHARES),
}


def tensors(x: Any) -> list[Tensor]:
    """All of a result's, whatever it is made of."""
    if isinstance(x, Tensor):
        return [x]
    return [y for item in x for y in tensors(item)] if isinstance(x, tuple | list) else []


def assert_same(found: Any, wanted: Any) -> None:
    assert len(tensors(found)) == len(tensors(wanted)) > 0
    for x, y in zip(tensors(found), tensors(wanted), strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x.clone(), y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations(operation: str, mode: str) -> None:
    for backend in ("auto", "torch"):
        wanted = OPERATIONS[operation](backend)
        with MODES[mode]():
            found = OPERATIONS[operation](backend)
        assert_same(found, wanted)


@pytest.mark.parametrize("operation", ["columns", "rollout"])
def test_compiled_operations_under_autocast(operation: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(OPERATIONS[operation], backend="aot_eager", fullgraph=True)
    with autocast():
        found = compiled("torch")
    assert_same(found, OPERATIONS[operation]("torch"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = save(tmp_path_factory.mktemp("model"), "llama")
    return AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("source", get_args(SourceName))
def test_a_credit_model(world: tuple[Any, Any], source: SourceName) -> None:
    model, tokenizer = world
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("not bad", "awful plot")]
    wanted = CreditModel(model, tokenizer, source=source)(["a film: ", "more: "], ids, tokenizer)
    assert wanted.errors == [None, None]
    for name, mode in MODES.items():
        if name != "autocast":  # which rounds the model's forward
            judge = CreditModel(copy.deepcopy(model), tokenizer, source=source)  # of it nothing is known yet
            with mode():
                found = judge(["a film: ", "more: "], ids, tokenizer)
            assert_same(found[:3], wanted[:3])


def test_a_head_that_is_tried_and_a_mean_row() -> None:
    ids, mask = batch("right")
    rows = []
    for mode in (contextlib.nullcontext, MODES["default device"]):
        model = zoo.build("DistilBertForSequenceClassification")
        with mode(), torch.no_grad(), AttentionTap(model) as tap:
            model(input_ids=ids, attention_mask=mask)
        rows.append(attnshape.attention_row(tap.take()))
        with torch.no_grad(), AttentionTap(model, query_position="mean") as tap:
            model(input_ids=ids, attention_mask=mask)
        with autocast() if rows[1:] else contextlib.nullcontext():
            rows.append(attnshape.attention_row(tap.take()))
    assert_same(rows[2:], rows[:2])
