"""The tap's mechanism: what it changes, what it holds, when it refuses. The families are elsewhere."""

from __future__ import annotations

import copy
import threading
import weakref

import pytest
import torch
import transformers
from support.tap_models import (
    LENGTH,
    assert_row,
    assert_same,
    batch,
    build,
    eager_rows,
    positions_of,
    state,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.llama import modeling_llama

from attnshape.tap import AttentionTap


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


# Entering and leaving


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_an_exception_leaves_the_model_as_it_was(implementation):
    model = build("llama", implementation=implementation)
    before = state(model)
    ids, mask = batch("left")

    def interrupt(*_):
        raise KeyboardInterrupt

    with AttentionTap(model, [-1, 0]):
        assert state(model) != before
    handle = model.model.norm.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), AttentionTap(model, [-1, 0]):
        model(ids, attention_mask=mask)
    handle.remove()
    assert state(model) == before


def test_take_after_a_forward_that_failed():
    model = build("llama")
    ids, mask = batch("left")

    def fail(*_):
        raise ZeroDivisionError

    with AttentionTap(model) as tap:
        handle = model.model.layers[0].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(ids, attention_mask=mask)
        handle.remove()
        with pytest.raises(RuntimeError, match="ran 0"):
            tap.take()
        model(ids, attention_mask=mask)
        assert tap.take().query.shape == (3, 4, 8)


def test_a_tap_can_be_entered_again_but_not_twice():
    model = build("llama")
    ids, mask = batch("left")
    tap = AttentionTap(model)
    for _ in range(2):
        with tap:
            model(ids, attention_mask=mask)
            with pytest.raises(RuntimeError, match="open already"):
                tap.__enter__()
        tap.take()


def other_attention(*args, **kwargs):
    return sdpa_attention_forward(*args, **kwargs)


def test_a_function_that_somebody_else_registers_meanwhile_stays():
    try:
        with AttentionTap(build("llama")):
            ALL_ATTENTION_FUNCTIONS["sdpa"] = other_attention
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other_attention
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_a_local_override_is_wrapped_and_put_back():
    model = build("llama")
    ids, mask = batch("left")
    try:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = other_attention
        with AttentionTap(model) as tap:
            model(ids, attention_mask=mask)
        tap.take()
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is other_attention
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_taps_nest_and_close_in_any_order():
    model, other = build("llama"), build("qwen2")
    ids, mask = batch("right")
    before = state(model)
    last, first = AttentionTap(model), AttentionTap(model, 0)
    elsewhere = AttentionTap(other)
    alone = []
    for tap in (last, first):
        with tap:
            model(ids, attention_mask=mask)
        alone.append(tap.take())
    last.__enter__()
    elsewhere.__enter__()
    first.__enter__()
    model(ids, attention_mask=mask)
    assert_same(last.take(), alone[0])
    last.__exit__(None, None, None)
    model(ids, attention_mask=mask)
    with pytest.raises(RuntimeError, match="ran 2"):
        first.take()
    model(ids, attention_mask=mask)
    other(ids, attention_mask=mask)
    first.__exit__(None, None, None)
    assert_same(first.take(), alone[1])
    elsewhere.take()
    other(ids, attention_mask=mask)
    elsewhere.__exit__(None, None, None)
    elsewhere.take()
    with pytest.raises(RuntimeError, match="ran 0"):
        last.take()
    assert state(model) == before


def test_threads_see_their_own_forwards():
    model = build("llama")
    expected, results, barrier = {}, {}, threading.Barrier(4, timeout=300)
    inputs = {
        n: torch.randint(3, 60, (2, 8 + n), generator=torch.Generator().manual_seed(n)) for n in range(4)
    }
    for n, ids in inputs.items():
        with AttentionTap(model) as tap:
            model(ids)
        expected[n] = tap.take()

    def work(n):
        with torch.no_grad():
            for _ in range(3):
                with AttentionTap(model) as tap:
                    barrier.wait()
                    model(inputs[n])
                    barrier.wait()
                    results[n] = tap.take()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(4):
        assert_same(results[n], expected[n])


def test_a_forward_in_another_thread_is_not_seen():
    model = build("llama")
    with AttentionTap(model) as tap:
        thread = threading.Thread(target=lambda: model(torch.full((1, 4), 5)))
        thread.start()
        thread.join()
        with pytest.raises(RuntimeError, match=r"thread that entered it.* ran 0"):
            tap.take()


# What take() gives


def test_take_wants_exactly_one_forward():
    model = build("llama")
    ids, mask = batch("left")
    with AttentionTap(model) as tap:
        with pytest.raises(RuntimeError, match=r"layer 'model\.layers\.1\.self_attn' ran 0"):
            tap.take()
        model(ids, attention_mask=mask)
        model(ids, attention_mask=mask)
        with pytest.raises(RuntimeError, match="ran 2"):
            tap.take()
        model(ids, attention_mask=mask)
        tap.take()
        with pytest.raises(RuntimeError, match="ran 0"):
            tap.take()


def test_int_layer_gives_one_and_a_sequence_gives_a_tuple():
    model = build("llama")
    ids, mask = batch("left")
    with (
        AttentionTap(model, -2) as one,
        AttentionTap(model, (0,)) as several,
        AttentionTap(model, [1, 0]) as both,
    ):
        model(ids, attention_mask=mask)
    first = one.take()
    assert_same(several.take()[0], first)
    second, again = both.take()
    assert_same(again, first)
    assert not torch.equal(second.key, first.key)


@pytest.fixture
def spied(monkeypatch):
    """A model whose attention function notes the tensors it is given, last layer last."""
    seen = []

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append((weakref.ref(query.untyped_storage()), query.data_ptr(), key.data_ptr(), key.stride()))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "spy", spy)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "spy", sdpa_mask)
    return build("llama", implementation="spy"), seen


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("position", ["pooled", "last_visible", torch.tensor([3, 2, 1])])
def test_rows_are_copied_and_keys_are_not(spied, use_cache, position):
    model, seen = spied
    ids, mask = batch("right")
    with AttentionTap(model, query_position=position) as tap:
        model(ids, attention_mask=mask, use_cache=use_cache)
        queries, _, key, stride = seen[-1]
        assert queries() is None
        inputs = tap.take()
    assert inputs.key.data_ptr() == key
    assert inputs.key.stride() == stride
    assert inputs.key.shape == (3, 2, LENGTH, 8)
    assert inputs.query.untyped_storage().nbytes() == 3 * 4 * 8 * 4


@pytest.mark.parametrize("position", ["all", "last_response"])
def test_all_queries_are_kept_by_reference(spied, position):
    model, seen = spied
    ids, mask = batch("right")
    with AttentionTap(model, query_position=position) as tap:
        model(ids, attention_mask=mask)
    inputs = tap.take()
    assert inputs.query.data_ptr() == seen[-1][1]
    assert inputs.query.shape == (3, 4, LENGTH, 8)
    assert inputs.query_position == (None if position == "all" else position)
    assert inputs.attention_mask is mask
    assert_row(
        inputs if position == "all" else replaced(inputs),
        eager_rows(
            build("llama", implementation="eager"), -1, positions_of(mask), input_ids=ids, attention_mask=mask
        ),
    )


def replaced(inputs):
    inputs = copy.copy(inputs)
    object.__setattr__(inputs, "query_position", None)
    return inputs


def test_packed_keys_are_not_copied(spied):
    model, seen = spied
    with AttentionTap(model) as tap:
        model(
            torch.full((1, 9), 5), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), use_cache=False
        )
        assert seen[-1][0]() is None
        inputs = tap.take()
    assert inputs.key.shape == (9, 2, 8)
    assert inputs.key.data_ptr() == seen[-1][2]


def test_a_second_forward_frees_the_first(spied):
    model, seen = spied
    ids, mask = batch("left")
    with AttentionTap(model, query_position="all") as tap:
        model(ids, attention_mask=mask)
        assert seen[-1][0]() is not None
        model(ids, attention_mask=mask)
        assert [queries() for queries, *_ in seen] == [None] * 4
        with pytest.raises(RuntimeError, match="ran 2"):
            tap.take()


@torch.enable_grad()
def test_what_is_taken_is_detached():
    model = build("llama")
    ids, mask = batch("left")
    for position in ("pooled", "all"):
        with AttentionTap(model, query_position=position) as tap:
            model(ids, attention_mask=mask)
        inputs = tap.take()
        assert not inputs.query.requires_grad
        assert not inputs.key.requires_grad


def test_positions_of_micro_batches():
    model, eager = build("llama"), build("llama", implementation="eager")
    ids, mask = batch("right")
    explicit = torch.tensor([11, 3, 4])
    with AttentionTap(model) as tap:
        for i in range(3):
            tap.query_position = explicit[i : i + 1]
            model(ids[i : i + 1], attention_mask=mask[i : i + 1])
            inputs = tap.take()
            assert inputs.query_position.tolist() == explicit[i : i + 1].tolist()
            expected = eager_rows(
                eager, -1, [int(explicit[i])], input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1]
            )
            assert_row(inputs, expected)


def test_positions_outside_are_left_to_the_shaping():
    model = build("llama")
    ids, mask = batch("left")
    with AttentionTap(model, query_position=torch.tensor([LENGTH, -1, 5])) as tap:
        model(ids, attention_mask=mask)
    assert tap.take().query_position.tolist() == [LENGTH, -1, 5]


def test_positions_in_packed_input_count_from_each_sequence():
    model = build("llama")
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]), "use_cache": False}
    with AttentionTap(model, query_position="all") as tap:
        model(ids, **packed)
        queries = tap.take().query
        assert queries.shape == (9, 4, 8)
        tap.query_position = torch.tensor([2, 1])
        model(ids, **packed)
        inputs = tap.take()
        assert torch.equal(inputs.query, queries[[2, 5]])
        assert inputs.query_position.tolist() == [2, 1]
        tap.query_position = torch.tensor([2, 1, 0])
        model(ids, **packed)
        with pytest.raises(ValueError, match="query_position: got 3 positions for 2 sequences"):
            tap.take()


# Refusals


def test_generation_inside_a_tap_goes_on_and_take_refuses():
    model = build("llama", head=False)
    ids, mask = batch("left")
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False}
    bare = model.generate(ids, **options)
    with AttentionTap(model) as tap:
        assert torch.equal(model.generate(ids, **options), bare)
        with pytest.raises(RuntimeError, match="ran 3"):
            tap.take()


@pytest.mark.parametrize("source", ["attention", "gradient_value"])
def test_earlier_keys_are_refused(source):
    model = build("llama", head=False)
    ids, mask = batch("left")
    past = model(ids[:, :-2], attention_mask=mask[:, :-2], use_cache=True).past_key_values
    with torch.enable_grad(), AttentionTap(model, source=source) as tap:
        model(ids[:, -2:], attention_mask=mask, past_key_values=past)
    with pytest.raises(ValueError, match=r"2 queries for 14 keys.*past_key_values"):
        tap.take()


def test_packed_sequences_in_a_batch_are_refused():
    model = build("llama")
    ids, _ = batch("none")
    positions = torch.tensor([[*range(6), *range(8)]]).expand(3, -1)
    with AttentionTap(model) as tap:
        model(ids, position_ids=positions, use_cache=False)
    with pytest.raises(ValueError, match="position_ids: packed sequences in a batch of 3"):
        tap.take()


def test_position_ids_that_do_not_restart_are_no_packing():
    model = build("llama")
    ids, _ = batch("none")
    with AttentionTap(model) as tap:
        model(ids, position_ids=torch.arange(3, LENGTH + 3)[None])
    assert tap.take().cu_seqlens is None


def test_a_head_that_pools_in_a_way_that_is_not_known_needs_a_position():
    class LargestForSequenceClassification(transformers.LlamaForSequenceClassification):
        def forward(self, input_ids, attention_mask):
            return self.score(self.model(input_ids, attention_mask=attention_mask)[0]).amax(1)

    model = LargestForSequenceClassification(build("llama").config)
    with AttentionTap(model) as tap:
        model(*batch("left"))
        with pytest.raises(ValueError, match=r"'pooled'.*LargestForSequenceClassification.*last_visible"):
            tap.take()
        tap.query_position = "last_visible"
        model(*batch("left"))
    assert tap.take().query_position.tolist() == [LENGTH - 1] * 3


def test_a_subclass_that_defers_to_the_head_of_transformers_pools_as_it():
    class Mine(transformers.LlamaForSequenceClassification):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    model = Mine(build("llama").config)
    ids, mask = batch("right")
    mask[:, -1] = 1
    with AttentionTap(model) as tap:
        model(ids, attention_mask=mask)
    assert tap.take().query_position.tolist() == [LENGTH - 1, 8, 4]


def test_a_layer_that_runs_twice_is_refused():
    model = build("llama")
    model.model.layers[1].self_attn = model.model.layers[0].self_attn
    ids, mask = batch("left")
    with AttentionTap(model) as tap:
        model(ids, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match="attends more than once"):
        tap.take()


def test_ring_attention_is_refused(monkeypatch):
    def ring(*args, **kwargs):
        return sdpa_attention_forward(*args, **kwargs)

    ring.__module__ = "ring_flash_attn.adapters.hf_adapter"
    monkeypatch.setitem(AttentionInterface._global_mapping, "ring", ring)
    with pytest.raises(ValueError, match=r"ring_flash_attn.*shards the keys"):
        AttentionTap(build("llama", implementation="ring"))


@pytest.fixture
def mesh():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_keys_are_refused(monkeypatch, mesh):
    rotate = modeling_llama.apply_rotary_pos_emb

    def sharded(*args, **kwargs):
        query, key = rotate(*args, **kwargs)
        return query, DTensor.from_local(key, mesh, [Shard(2)])

    def gathering(module, query, key, *args, **kwargs):
        return sdpa_attention_forward(module, query, key.to_local(), *args, **kwargs)

    model = build("llama")
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", sharded)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", gathering)
    ids, mask = batch("none")
    with AttentionTap(model) as tap:
        model(ids, attention_mask=mask, use_cache=False)
    with pytest.raises(ValueError, match="key: sharded over devices"):
        tap.take()
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, {"model": "a name"}),
        (ValueError, {"model": nn.Linear(2, 2)}),
        (ValueError, {"layer": 2}),
        (ValueError, {"layer": -3}),
        (ValueError, {"layer": []}),
        (TypeError, {"layer": "last"}),
        (TypeError, {"layer": 1.0}),
        (ValueError, {"query_position": "first"}),
        (ValueError, {"query_position": torch.tensor([1.0])}),
        (ValueError, {"query_position": torch.tensor([[1]])}),
        (ValueError, {"query_position": torch.tensor([True])}),
    ],
)
def test_bad_arguments(error, arguments):
    with pytest.raises(error, match=next(iter(arguments))):
        AttentionTap(**{"model": build("llama")} | arguments)


def test_bad_forwards_are_reported_by_take():
    model = build("llama")
    ids, _ = batch("none")
    bare = model(ids).logits
    with AttentionTap(model, query_position=torch.tensor([1, 2])) as tap:
        assert torch.equal(model(ids).logits, bare)
        with pytest.raises(ValueError, match="query_position: got 2 positions for 3 sequences"):
            tap.take()
        tap.query_position = "pooled"
        model(ids)
        assert tap.take().query.shape == (3, 4, 8)
