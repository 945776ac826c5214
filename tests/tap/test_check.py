"""The self-check: rows that are not the layer's are not handed out, and sound ones are."""

from __future__ import annotations

import pytest
import torch
from support.tap_models import LENGTH, batch, build, reference_attention, state
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama import modeling_llama

from attnshape.tap import AttentionTap, check
from attnshape.tap.check import misplaced
from attnshape.tolerance import output_bound


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def another_scale(module, query, key, value, mask, **options):
    options["scaling"] = options["scaling"] * 1.3
    return sdpa_attention_forward(module, query, key, value, mask, **options)


def a_bias(module, query, key, value, mask, **options):
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    added = (-0.1 * distance).masked_fill(distance < 0, -torch.inf).expand(1, 1, -1, -1)
    return sdpa_attention_forward(module, query, key, value, added, **options)


def a_window(module, query, key, value, mask, **options):
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    return sdpa_attention_forward(module, query, key, value, (distance >= 0) & (distance < 4), **options)


def a_soft_cap(module, query, key, value, mask, **options):
    return reference_attention(module, query, key, value, None, options["scaling"], softcap=1.0)


def a_sink(module, query, key, value, mask, **options):
    return reference_attention(module, query, key, value, None, options["scaling"], s_aux=torch.ones(4))


def another_index(module, query, key, value, mask, **options):
    return sdpa_attention_forward(module, query, key, value.roll(1, 2), mask, **options)


def heads_in_another_order(module, query, key, value, mask, **options):
    heads, weights = sdpa_attention_forward(module, query, key, value, mask, **options)
    return heads[:, :, [1, 0, 2, 3]], weights


def no_causality(module, query, key, value, mask, **options):
    return sdpa_attention_forward(module, query, key, value, mask, **options | {"is_causal": False})


def attends_to_half(module, query, key, value, mask, **options):
    keep = torch.arange(LENGTH) % 2 == 0
    seen = (keep & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()) | torch.eye(LENGTH, dtype=torch.bool)
    return sdpa_attention_forward(module, query, key, value, seen, **options)


MUTANTS = [
    another_scale,
    a_bias,
    a_window,
    a_soft_cap,
    a_sink,
    another_index,
    heads_in_another_order,
    attends_to_half,
]


@pytest.mark.parametrize("mutant", [*MUTANTS, no_causality])
@pytest.mark.parametrize("position", ["pooled", "all", "mean"])
def test_a_row_that_is_not_the_layers_is_not_handed_out(monkeypatch, mutant, position):
    if mutant is no_causality and position == "pooled":
        return  # the last token sees all keys either way
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", mutant)
    model = build("llama")
    ids, _ = batch("none")
    bare = model(ids).logits
    with AttentionTap(model, query_position=position) as tap:
        assert torch.equal(model(ids).logits, bare)
        message = r"layers\.1\.self_attn: its attention row times.*gradient_embedding.*check='never'"
        with pytest.raises(ValueError, match=message):
            tap.take()
    with AttentionTap(model, query_position=position, check="never") as tap:
        model(ids)
    tap.take()


@pytest.mark.parametrize("source", ["rollout", "signed_rollout"])
@pytest.mark.parametrize("mutant", [another_scale, a_window, no_causality])
def test_rollouts_check_a_sample_of_queries(monkeypatch, mutant, source):
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", mutant)
    model = build("llama")
    with AttentionTap(model, source=source) as tap:
        model(batch("none")[0])
    with pytest.raises(ValueError, match="times its values"):
        tap.take()


def test_packed_rows_are_checked(monkeypatch):
    packed = {"position_ids": torch.tensor([[*range(6), *range(8)]]), "use_cache": False}
    ids = batch("none")[0][:1]
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", another_index)
    model = build("llama", head=False)
    with AttentionTap(model, check="always") as tap:
        model(ids, **packed)
    with pytest.raises(ValueError, match="times its values"):
        tap.take()


@pytest.fixture
def checked(monkeypatch):
    """How many layers were checked."""
    count = []
    monkeypatch.setattr(
        check, "failure", lambda *a, real=check.failure, **k: count.append(a[0]) or real(*a, **k)
    )
    return count


def test_the_first_of_each_kind_is_checked(checked):
    model = build("llama")
    ids, mask = batch("left")

    def run(**options):
        before = len(checked)
        with AttentionTap(model, **options) as tap:
            model(ids, attention_mask=mask)
            tap.take()
        return len(checked) - before

    assert [run(), run(), run(layer=-2), run(layer=[-1, -2])] == [1, 0, 1, 0]
    assert [run(check="never", query_position="all"), run(query_position="all")] == [0, 1]
    assert [run(check="always"), run(check="always")] == [1, 1]
    mask = torch.ones_like(mask)  # no mask reaches the layer
    assert [run(), run()] == [1, 0]
    ids, mask = ids.repeat(1, 2), mask.repeat(1, 2)  # longer
    assert [run(), run()] == [1, 0]
    model.to(torch.bfloat16)
    assert [run(), run()] == [1, 0]
    model.set_attn_implementation("eager")
    assert [run(), run()] == [1, 0]


def test_a_method_is_the_same_from_forward_to_forward(checked):
    model = build("gptj")
    ids, mask = batch("left")
    with AttentionTap(model) as tap:
        for _ in range(3):
            model(ids, attention_mask=mask)
            tap.take()
    assert len(checked) == 1


def test_a_failure_is_no_first(monkeypatch, checked):
    model = build("llama")
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", another_scale)
    with AttentionTap(model) as tap:
        for _ in range(2):
            model(batch("left")[0])
            with pytest.raises(ValueError, match="times its values"):
                tap.take()
    assert len(checked) == 2


@pytest.mark.parametrize(
    ("name", "implementation", "dropout"),
    [
        ("llama", "sdpa", "attention_dropout"),
        ("llama", "eager", "attention_dropout"),
        ("gpt2", "eager", "attn_pdrop"),
        ("gptj", "eager", "attn_pdrop"),
    ],
)
def test_dropout_is_not_held_against_a_row(checked, name, implementation, dropout):
    model = build(name, implementation=implementation, **{dropout: 0.5}).train()
    ids, mask = batch("left")
    with AttentionTap(model, check="always") as tap:
        model(ids, attention_mask=mask)
        tap.take()
        assert checked == []
        model.eval()
        model(ids, attention_mask=mask)
        tap.take()
    assert len(checked) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "gpt2"])
def test_rounding_is_no_failure(name, implementation, dtype):
    if name == "gpt_oss":
        implementation = "eager"
    model = build(name, implementation=implementation).to(dtype)
    if name == "gpt_oss":
        model.set_experts_implementation("eager")  # others know no float64
    ids, mask = batch("left")
    for source in ("attention", "rollout"):
        with AttentionTap(model, source=source, check="always") as tap:
            model(ids, attention_mask=mask)
        tap.take()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_rounded_scores_are_no_failure_but_a_window_is(monkeypatch, implementation, dtype, size):
    model = build("llama", implementation=implementation).to(dtype)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= size  # scores of up to 25, 50 and 100
    ids = torch.randint(3, 60, (16, LENGTH), generator=torch.Generator().manual_seed(1))
    for position in ("pooled", "all"):
        with AttentionTap(model, [0, 1], query_position=position, check="always") as tap:
            model(ids)
        tap.take()
    if implementation == "sdpa":
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", a_window)
    else:
        eager = modeling_llama.eager_attention_forward
        close = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH) < 4

        def eager_attention_forward(module, query, key, value, mask, **options):
            return eager(
                module, query, key, value, mask.masked_fill(~close, torch.finfo(dtype).min), **options
            )

        monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager_attention_forward)
    with AttentionTap(model, check="always") as tap:
        model(ids)
    with pytest.raises(ValueError, match="times its values"):
        tap.take()


def test_autocast_is_no_failure():
    model = build("llama")
    ids, mask = batch("left")
    with AttentionTap(model, check="always") as tap, torch.autocast("cpu", torch.bfloat16):
        model(ids, attention_mask=mask)
        tap.take()


def test_fewer_bits_in_products_of_float32_loosen_the_bound():
    device, dtypes = torch.device("cpu"), (torch.float32, torch.float32)
    assert output_bound(device, *dtypes) == 1e-4
    assert output_bound(device, torch.float32, torch.bfloat16) == 3e-2
    before = torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert output_bound(device, *dtypes) == 3e-2
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def test_what_is_not_finite_is_left_out_and_the_rest_checked(monkeypatch):
    model = build("llama")
    ids, _ = batch("none")
    spoilt = model.get_input_embeddings().register_forward_hook(
        lambda m, args, out: out.index_fill(0, torch.tensor([1]), torch.nan)
    )
    with AttentionTap(model, check="always") as tap:
        model(ids)
        tap.take()
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", another_scale)
    with AttentionTap(model, check="always") as tap:
        model(ids)
        with pytest.raises(ValueError, match="times its values"):
            tap.take()
    spoilt.remove()


def test_what_the_check_cannot_read_is_said_by_take(monkeypatch):
    def flat(*args, **options):
        heads, weights = sdpa_attention_forward(*args, **options)
        return heads.flatten(2), weights

    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", flat)
    model = build("llama")
    before = state(model)
    with AttentionTap(model) as tap:
        model(batch("none")[0])
        with pytest.raises(ValueError, match=r"attention: gave \[3, 14, 32\].*want \[B, S, Hq, Dv\]"):
            tap.take()
    assert state(model) == before


@pytest.mark.parametrize("kind", ["hook", "function"])
def test_nothing_the_tap_does_raises_inside_the_model(monkeypatch, kind):
    model = build("llama")
    ids, mask = batch("left")
    bare = model(ids, attention_mask=mask).logits
    broken = "attnshape.tap.tap.attended_by" if kind == "function" else "attnshape.tap.flow._same"
    monkeypatch.setattr(broken, lambda *args, **options: 1 / 0)
    with AttentionTap(model, source="rollout") as tap:
        assert torch.equal(model(ids, attention_mask=mask).logits, bare)
    with pytest.raises(ValueError, match=r"could not be read \(ZeroDivisionError.*gradient_embedding"):
        tap.take()


# The function itself


def test_the_share_that_is_elsewhere():
    weights = torch.tensor([[[0.5, 0.3, 0.2]]], dtype=torch.float64)
    values = torch.tensor([[[1.0, -2.0], [4.0, 0.0], [0.0, 6.0]]], dtype=torch.float64)
    sound = weights @ values
    moved = sound + 0.1 * (values[:, 1:2] - values[:, :1])  # a tenth of the attention from key 0 to key 1
    size = 0.5 * 2 + 0.2 * 6
    assert misplaced(weights, values, sound).abs().max() < 1e-12
    torch.testing.assert_close(misplaced(weights, values, moved).item(), 0.1 * 3 / size)
    small = misplaced(weights, 1e-6 * values, 1e-6 * moved)
    torch.testing.assert_close(small.item(), 0.1 * 3 / size)  # however small the values are


def test_heads_share_values_and_rows_are_left_out():
    weights = torch.rand(2, 4, 3, 5).softmax(-1)
    values = torch.randn(2, 2, 5, 6)
    output = weights @ values.repeat_interleave(2, 1)
    weights[0, 1, 2] = 0
    output[1, 3, 0, 2] = torch.nan
    error = misplaced(weights, values, output)
    left_out = torch.zeros(2, 4, 3, dtype=torch.bool)
    left_out[0, 1, 2] = left_out[1, 3, 0] = True
    assert torch.equal(error.isnan(), left_out)
    assert error[~left_out].max() < 1e-5
    values[1, 1, 4] = torch.nan
    assert misplaced(weights, values, output)[1, 2:][~left_out[1, 2:]].isinf().all()


def test_values_that_no_query_sees_may_hold_anything():
    weights = torch.tensor([[[0.5, 0.5, 0.0]]])
    values = torch.tensor([[[1.0], [2.0], [torch.nan]]])
    assert misplaced(weights, values, torch.tensor([[[1.5]]])).item() == 0


def test_bad_check():
    with pytest.raises(ValueError, match="check: got 'sometimes', want one of"):
        AttentionTap(nn.Linear(2, 2), check="sometimes")
