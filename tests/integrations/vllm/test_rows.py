"""Rows out of a paged cache that is made here, in every layout, against the reference on the same keys."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attnshape import reference
from attnshape.integrations.vllm import rows as rows_module
from attnshape.integrations.vllm.pages import Tokens, keys_and_values
from attnshape.integrations.vllm.rows import Layer, Step, rows_of
from attnshape.reference.attention import attend, keys_of_row
from attnshape.tolerance import credit_bound, error_fraction
from attnshape.types import AttentionInputs

HEADS, KEY_HEADS, WIDTH, SIZE, BLOCKS = 4, 2, 16, 8, 24
LENGTHS = [1, 8, 9, 30, 17]
ORDERS = {  # of vLLM's v1/kv_cache_layout.py: the logical dimensions [L, B, H, N, C] in memory's order
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}
SCORES = {
    "plain": {},
    "window": {"window": 12},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
}


class Made(NamedTuple):
    layer: Layer
    step: Step
    keys: list[Tensor]
    """Of each request, ``[S, Hkv, D]``."""
    rows: list[Tensor]
    """The reference's, float64."""


def made(
    order: str = "LBHNC",
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    **score: Any,
) -> Made:
    """A step of some requests, its cache full of NaN where no key of theirs lies; ``order``: or ``"CPU"``."""
    torch.manual_seed(1)
    kept = cache_dtype or dtype
    shape = (2, BLOCKS, KEY_HEADS, SIZE, 2 * WIDTH)
    permutation = ORDERS.get(order, ORDERS["LBHNC"])
    empty = torch.full([shape[i] for i in permutation], torch.nan).to(kept)
    cache = empty.permute([permutation.index(i) for i in range(5)])[1]
    assert cache.shape == shape[1:]
    scale = {"key_scale": 0.5, "value_scale": 0.25} if cache_dtype else {}
    layer = Layer("last", 0.3, transposed=order == "CPU", quantised=cache_dtype, **scale, **score)
    views = keys_and_values(cache, transposed=layer.transposed)
    free = torch.randperm(BLOCKS).tolist()
    table = torch.full((len(LENGTHS), 5), 10**6, dtype=torch.int32)
    query = torch.randn(len(LENGTHS), HEADS, WIDTH).to(dtype)
    keys, seen, outputs = [], [], []
    for b, length in enumerate(LENGTHS):
        gone = 0 if layer.window is None else max(0, length - layer.window)
        pair = [(2 * torch.randn(length, KEY_HEADS, WIDTH)).to(kept) for _ in views]
        for view, x in zip(views, pair, strict=True):
            for low in range(gone // SIZE * SIZE, length, SIZE):
                part = x[low : low + SIZE]
                if view is views[0]:
                    table[b, low // SIZE] = free.pop()
                view[table[b, low // SIZE], :, : len(part)] = part.transpose(0, 1)
        key, value = (x.double() * f for x, f in zip(pair, (layer.key_scale, layer.value_scale), strict=True))
        keys.append(key)
        inputs = AttentionInputs(
            query[b : b + 1].double(),
            key.transpose(0, 1)[None],
            layer.scaling,
            softcap=layer.softcap,
            sliding_window=layer.window,
            sinks=None if layer.sinks is None else layer.sinks.double(),
        )
        seen.append(reference.attention_row(inputs)[0])
        of_heads = keys_of_row(inputs, 0)
        assert of_heads is not None
        weights = attend(inputs, of_heads, length - 1)
        outputs.append(torch.einsum("ht,thd->hd", weights, value.repeat_interleave(HEADS // KEY_HEADS, 1)))
    return Made(layer, Step(query, torch.stack(outputs).to(dtype), cache, table), keys, seen)


def hold(found: Tensor, case: Made, requests: list[int]) -> None:
    for i, row in zip(requests, found.split([LENGTHS[i] for i in requests]), strict=True):
        logits = case.step.query[i].double().norm(dim=-1).max() * case.keys[i].norm(dim=-1).max()
        bound = credit_bound(case.rows[i], case.layer.scaling * float(logits))
        assert error_fraction(row, case.rows[i], bound).max() <= 1


@pytest.mark.parametrize("order", [*ORDERS, "CPU"])
def test_rows_are_those_of_the_reference_in_every_layout(order: str) -> None:
    case, requests = made(order), [3, 0, 4, 2]
    found, wrong = rows_of(case.layer, case.step, requests, [LENGTHS[i] for i in requests], range(4))
    assert wrong is None
    hold(found, case, requests)


@pytest.mark.parametrize("order", ["LBNHC", "CPU"])
@pytest.mark.parametrize("score", SCORES)
def test_rows_have_the_windows_softcap_and_sinks_of_their_layer(score: str, order: str) -> None:
    case = made(order, **SCORES[score])
    found, wrong = rows_of(case.layer, case.step, range(5), LENGTHS, range(5))
    assert wrong is None
    hold(found, case, [*range(5)])


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_keys_are_read_with_their_scales(dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    case = made("LBNHC", dtype, cache_dtype)
    found, wrong = rows_of(case.layer, case.step, range(5), LENGTHS, range(5))
    assert wrong is None
    hold(found, case, [*range(5)])


def test_a_quantised_cache_may_come_as_bytes() -> None:
    case = made("LBNHC", torch.float32, torch.float8_e4m3fn)
    step = dataclasses.replace(case.step, cache=case.step.cache.view(torch.uint8))
    found, wrong = rows_of(case.layer, step, range(5), LENGTHS, range(5))
    assert wrong is None
    hold(found, case, [*range(5)])


def test_a_step_is_one_gather_and_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests it has; those that are checked are read again, with their values."""
    case, calls = made(**SCORES["window"]), []
    of, row = Tokens.of, rows_module.attention_row
    monkeypatch.setattr(Tokens, "of", lambda *args: calls.append("gather") or of(*args))
    monkeypatch.setattr(rows_module, "attention_row", lambda inputs: calls.append("row") or row(inputs))
    rows_of(case.layer, case.step, range(5), LENGTHS, ())
    assert calls == ["gather", "row"]


def test_rows_have_the_same_bits_however_many_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = made()
    together, _ = rows_of(case.layer, case.step, range(5), LENGTHS, ())
    monkeypatch.setattr(rows_module, "MOST_TOKENS", 10)
    apart, wrong = rows_of(case.layer, case.step, range(5), LENGTHS, range(5))
    assert wrong is None
    assert torch.equal(together, apart)


def permuted(case: Made) -> Made:
    table = case.step.table.clone()
    table[3, :4] = table[3, :4].roll(1)
    return case._replace(step=dataclasses.replace(case.step, table=table))


def of_another(case: Made) -> Made:
    return case._replace(step=dataclasses.replace(case.step, query=case.step.query.roll(1, 0)))


def layout_of_another_backend(case: Made) -> Made:
    return case._replace(layer=case.layer._replace(transposed=not case.layer.transposed))


def without(name: str, value: Any = None) -> Any:
    return lambda case: case._replace(layer=case.layer._replace(**{name: value}))


MUTATIONS = {
    "blocks permuted": (made, permuted),
    "another request's query": (made, of_another),
    "keys of a CPU read as pairs": (lambda: made("CPU"), layout_of_another_backend),
    "pairs read as a CPU's": (made, layout_of_another_backend),
    "window ignored": (lambda: made(**SCORES["window"]), without("window")),
    "window one short": (lambda: made(**SCORES["window"]), without("window", 11)),
    "softcap ignored": (lambda: made(**SCORES["softcap"]), without("softcap")),
    "sinks ignored": (lambda: made(**SCORES["sinks"]), without("sinks")),
    "scale 10% off": (made, without("scaling", 0.33)),
    "key scale ignored": (lambda: made(cache_dtype=torch.float8_e4m3fn), without("key_scale", 1.0)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_check_finds_what_is_read_wrongly(name: str) -> None:
    make, mutate = MUTATIONS[name]
    case = make()
    if name.startswith("window"):
        case.step.cache.nan_to_num_(0.0)  # what has left the window is there, and finite
    case.step.table[case.step.table == 10**6] = 0
    _, wrong = rows_of(case.layer, case.step, [3], [LENGTHS[3]], [0])
    assert wrong is None
    _, wrong = rows_of(mutate(case).layer, mutate(case).step, [3], [LENGTHS[3]], [0])
    assert wrong is not None
    assert wrong.startswith("last: its attention row times its values is not what it gave")


def test_the_check_finds_a_row_that_is_not_the_mean_of_its_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = made()
    row = rows_module.attention_row
    monkeypatch.setattr(rows_module, "attention_row", lambda inputs: row(inputs).roll(1))
    _, wrong = rows_of(case.layer, case.step, [3], [LENGTHS[3]], [0])
    assert wrong is not None
    assert "off the mean of its heads" in wrong
