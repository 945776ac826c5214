import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.memory import far_apart
from torch import Tensor

from attnshape import reference
from attnshape.tolerance import credit_bound, error_fraction
from attnshape.types import MIN_MASS, AttentionInputs, Response, Status
from csrc_triton import attention_row, sweep

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OUT_OF_RANGE = int(Status.OUT_OF_RANGE)


def row(inputs: AttentionInputs) -> Tensor:
    return attention_row([inputs])


def raw(inputs: AttentionInputs, mask: Tensor, start=None, index=None, cu=None) -> tuple[Tensor, Tensor]:
    """The attention at the response tokens, and the status of each row."""
    response = Response(mask, start=start, index=index, cu_seqlens=cu)
    outputs = ("credit", "status")
    shaped = sweep(response, outputs, credit=[inputs], normalization="none", min_mass=MIN_MASS)
    return shaped.credit, shaped.status & OUT_OF_RANGE


def exact(inputs: AttentionInputs) -> AttentionInputs:
    """The same numbers in float64."""
    floats = {n: getattr(inputs, n) for n in ("query", "key", "sinks", "lse", "mask_row")}
    return replace(inputs, **{n: None if x is None else x.double() for n, x in floats.items()})


def max_logit(inputs: AttentionInputs) -> float:
    """No score of any query is larger."""
    if not inputs.query.numel() or not inputs.key.numel():
        return 0.0
    q, k = (torch.nan_to_num(x.double(), 0, 0, 0).norm(dim=-1).max() for x in (inputs.query, inputs.key))
    added = 0.0
    if inputs.mask_row is not None:
        added = torch.nan_to_num(inputs.mask_row.double(), 0, 0, 0).abs().max()
    return float(inputs.scaling * q * k + added)


def assert_close(actual: Tensor, expected: Tensor, inputs: AttentionInputs) -> None:
    worst = error_fraction(actual, expected, credit_bound(expected, max_logit(inputs)))
    assert worst.numel() == 0 or worst.max() <= 1


def token_major(x: Tensor) -> Tensor:
    """``[B, H, S, D]`` as ``use_cache=False`` leaves it: heads of a token side by side."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@st.composite
def layers(draw: st.DrawFn) -> AttentionInputs:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    batch = draw(st.integers(1, 3))
    kv_heads = draw(st.integers(1, 2))
    heads = kv_heads * draw(st.sampled_from([1, 3, 4, 17]))
    length = draw(st.sampled_from([1, 5, 127, 129, 300]))
    width = draw(st.sampled_from([8, 24, 80, 192]))
    dtype = draw(st.sampled_from(DTYPES))
    packed = draw(st.booleans())
    whole = draw(st.booleans())
    shape = (batch, heads, length, width)
    query = randn(*shape) * draw(st.sampled_from([0.1, 1.0]))
    key = randn(batch, kv_heads, length, width)
    lengths = torch.full((batch,), length)
    cu = None
    if packed:
        lengths = torch.randint(0, length + 1, (batch,), generator=generator)
        cu = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
        total = int(cu[-1])
        key = randn(total, kv_heads, width)
        query = randn(total if whole else batch, heads, width)
    elif not whole:
        query = query[:, :, 0]
    if not packed and draw(st.booleans()):
        key = token_major(key)
    kind = draw(st.sampled_from(["none", "start", "mask"]))
    key_start = mask = position = None
    if kind == "start":
        key_start = (torch.rand(batch, generator=generator) * (lengths + 1)).to(torch.int32)
    elif kind == "mask":
        mask = torch.rand(key.shape[0] if packed else (batch, length), generator=generator) < 0.8
        mask = mask.to(draw(st.sampled_from([torch.bool, torch.int64, torch.float32])))
    if draw(st.booleans()):
        position = (torch.rand(batch, generator=generator) * lengths).to(torch.int64)
    mask_row = None
    if draw(st.booleans()):
        per_head = (heads,) if draw(st.booleans()) else ()
        mask_row = randn(key.shape[0], *per_head) if packed else randn(batch, *per_head, length)
        hidden = torch.rand(mask_row.shape, generator=generator) < draw(st.sampled_from([0.2, 1.0]))
        mask_row = (mask_row * 2).masked_fill(hidden, -math.inf)
        mask_row = mask_row.to(draw(st.sampled_from(DTYPES)))
    inputs = AttentionInputs(
        query.to(dtype),
        key.to(dtype),
        draw(st.sampled_from([0.3, width**-0.5])),
        key_start=key_start,
        query_position=position,
        attention_mask=mask,
        mask_row=mask_row,
        causal=draw(st.booleans()),
        cu_seqlens=cu,
        softcap=draw(st.sampled_from([None, 2.0])),
        sliding_window=draw(st.sampled_from([None, 3, 140])),
        sinks=randn(heads) if draw(st.booleans()) else None,
    )
    if mask is not None:
        hidden = mask == 0 if packed else (mask == 0)[:, None].expand(-1, kv_heads, -1)
        inputs.key[hidden] = float("nan")
    tensors = {n: x.to(DEVICE) for n, x in vars(inputs).items() if isinstance(x, Tensor)}
    return replace(inputs, **tensors)


@settings(max_examples=40)
@given(layers())
def test_attention_row_is_the_reference(inputs: AttentionInputs) -> None:
    assert_close(row(inputs), reference.attention_row(exact(inputs)), inputs)


@settings(max_examples=40)
@given(layers(), st.data())
def test_credit_at_response_tokens_is_the_reference(inputs: AttentionInputs, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    batch = inputs.batch_size
    lengths = torch.full((batch,), inputs.key.shape[-2])
    if inputs.cu_seqlens is not None:
        lengths = inputs.cu_seqlens.cpu().diff()
    start = (torch.rand(batch, generator=generator) * (lengths + 1)).long()
    width = int((lengths - start).max())
    mask = torch.rand(batch, width, generator=generator) < 0.7
    mask &= torch.arange(width) < (lengths - start)[:, None]
    index = cu = None
    if data.draw(st.booleans()):
        index = (torch.rand(batch, width, generator=generator) * (lengths[:, None] + 1)).long() - 1
    if data.draw(st.booleans()):
        inside = torch.arange(width) < (lengths - start)[:, None]
        cu = torch.cat([torch.zeros(1), inside.sum(1).cumsum(0)]).to(torch.int32)
        mask = mask[inside]
        index = None if index is None else index[inside]
    if index is not None:
        start = None
    where = [None if x is None else x.to(DEVICE) for x in (mask, start, index, cu)]
    place = Response(where[0], start=where[1], index=where[2], cu_seqlens=where[3])
    actual, status = raw(inputs, *where)
    expected, invalid = reference.attention.raw_credit(exact(inputs), place)
    assert_close(actual, expected, inputs)
    assert ((status == OUT_OF_RANGE) == invalid).all()


def layer(
    length: int = 300, batch: int = 2, dtype: torch.dtype = torch.float32, **changes
) -> AttentionInputs:
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(batch, 6, 40, generator=generator).to(DEVICE, dtype)
    key = torch.randn(batch, 2, length, 40, generator=generator).to(DEVICE, dtype)
    return AttentionInputs(query, key, 0.2, **changes)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_do_not_depend_on_padding_neighbours_or_memory(dtype: torch.dtype) -> None:
    alone = layer(300, 1, dtype)
    expected = row(alone)[0]
    for left in (1, 16, 133):
        key = torch.full((3, 2, 300 + left + 7, 40), float("nan"), dtype=dtype, device=DEVICE)
        key[1, :, left : left + 300] = alone.key[0]
        query = alone.query.expand(3, -1, -1)
        start, end = ints(0, left, 5), ints(3, left + 299, 9)
        by_start = AttentionInputs(query, key, 0.2, key_start=start, query_position=end)
        mask = torch.zeros(key.shape[0], key.shape[2], device=DEVICE)
        mask[1, left : left + 300] = 1
        by_mask = AttentionInputs(query, token_major(key), 0.2, attention_mask=mask)
        for inputs in (by_start, by_mask):
            assert row(inputs)[1, left : left + 300].equal(expected)
    shifted = torch.empty(alone.key.numel() + 1, dtype=dtype, device=DEVICE)[1:].view(alone.key.shape)
    shifted.copy_(alone.key)
    assert row(replace(alone, key=shifted))[0].equal(expected)
    cu = ints(0, 11, 311)
    other = torch.ones(11, 2, 40, dtype=dtype, device=DEVICE)
    packed = torch.cat([other, alone.key[0].transpose(0, 1)])
    query = alone.query.expand(2, -1, -1)
    assert row(AttentionInputs(query, packed, 0.2, cu_seqlens=cu))[11:].equal(expected)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 257])
def test_credit_has_the_bits_of_the_row(length: int) -> None:
    inputs = layer(300)
    whole = row(inputs)
    start = ints(300 - length, (300 - length) // 2)
    mask = torch.ones(2, length, device=DEVICE)
    index = start[:, None] + torch.arange(length, device=DEVICE)
    expected = whole.gather(1, index.long())
    assert raw(inputs, mask, start)[0].equal(expected)
    assert raw(inputs, mask, index=index)[0].equal(expected)
    cu = ints(0, length, 2 * length)
    assert raw(inputs, mask.flatten(), start, cu=cu)[0].equal(expected.flatten())


def test_last_response_is_the_last_unmasked_tokens_query() -> None:
    query = torch.randn(2, 6, 300, 40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    inputs = replace(layer(), query=query, query_position="last_response")
    mask = torch.ones(2, 20, device=DEVICE)
    mask[1, 15:] = 0
    start = ints(200, 30)
    expected, _ = reference.attention.raw_credit(exact(inputs), Response(mask, start=start))
    index = start[:, None] + torch.arange(20, device=DEVICE)
    assert_close(raw(inputs, mask, start)[0], expected, inputs)
    assert_close(raw(inputs, mask, index=index)[0], expected, inputs)


@pytest.mark.parametrize("sinks", [False, True])
def test_given_lse_only_response_keys_are_read(sinks: bool) -> None:
    inputs = layer(600)
    scores = 0.2 * torch.einsum("bgd,bsd->bgs", inputs.query[:, :3].double(), inputs.key[:, 0].double())
    second = 0.2 * torch.einsum("bgd,bsd->bgs", inputs.query[:, 3:].double(), inputs.key[:, 1].double())
    lse = torch.cat([scores, second], 1).logsumexp(-1)
    inputs = replace(inputs, lse=lse.float(), sinks=torch.ones(6, device=DEVICE) if sinks else None)
    mask, start = torch.ones(2, 100, device=DEVICE), ints(500, 490)
    expected, _ = reference.attention.raw_credit(exact(inputs), Response(mask, start=start))
    inputs.key[:, :, :256] = float("nan")
    assert_close(raw(inputs, mask, start)[0], expected, replace(inputs, key=inputs.key[:, :, 256:]))


def test_keys_outside_the_window_are_not_read() -> None:
    inputs = layer(300, sliding_window=100)
    expected = reference.attention_row(exact(inputs))
    inputs.key[:, :, :200] = float("nan")
    actual = row(inputs)
    assert_close(actual, expected, replace(inputs, key=inputs.key[:, :, 200:]))
    assert (actual[:, :200] == 0).all()


def test_a_window_that_looks_both_ways() -> None:
    inputs = layer(300, sliding_window=30, causal=False, query_position=ints(150, 290))
    expected = reference.attention_row(exact(inputs))
    assert (expected[0].nonzero().flatten() == torch.arange(121, 180, device=DEVICE)).all()
    inputs.key[0, :, :121] = inputs.key[0, :, 180:] = float("nan")
    actual = row(inputs)
    assert_close(actual, expected, replace(inputs, key=torch.nan_to_num(inputs.key)))
    assert (actual[0, :121] == 0).all()


def test_a_chunk_without_a_key_that_is_seen_adds_nothing_to_low_scores() -> None:
    """Relative to scores of -1000, the 0 that stands for no score at all would be infinite."""
    key = torch.full((1, 1, 300, 16), -1000.0, device=DEVICE)
    mask = torch.ones(1, 300, device=DEVICE)
    mask[:, :140] = 0
    mask[:, 0] = 1
    mask[:, 150:290] = 0
    inputs = AttentionInputs(torch.ones(1, 1, 16, device=DEVICE), key, 0.1, attention_mask=mask)
    for added in (None, torch.where(mask == 1, 0.0, -math.inf)):
        masked = replace(inputs, mask_row=added, attention_mask=mask if added is None else None)
        assert_close(row(masked), mask.double() / mask.sum(), inputs)


@pytest.mark.parametrize("hidden", [0, 1])
def test_a_hidden_key_is_hidden_whatever_it_holds(hidden: int) -> None:
    added = torch.zeros(2, 6, 300, device=DEVICE)
    added[:, hidden, 17] = -math.inf
    inputs = layer(300, mask_row=added, head_mask=(torch.arange(6, device=DEVICE) == hidden))
    inputs.key[:, 0, 17] = float("nan")
    inputs.query[:] = inputs.query[:, :1]
    actual = row(inputs)
    assert (actual[:, 17] == 0).all()
    assert_close(actual, reference.attention_row(exact(inputs)), inputs)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_strides_beyond_32_bits(axis: int) -> None:
    """Products of the kernel's own arithmetic, of strides that pass through 32 bits themselves."""
    strides = [300 * 40, 2 * 300 * 40, 40, 1]
    strides[axis] = 2**31 + 64 if axis < 2 else 2**24
    small = layer(300, dtype=torch.float16, query_position=ints(299, 200))
    key = far_apart(small.key, *strides)
    assert row(replace(small, key=key)).equal(row(small))
    query = torch.zeros(2, 6, 300, 40, dtype=torch.float16, device=DEVICE)
    query[0, :, 299], query[1, :, 200] = small.query[0], small.query[1]
    strides = [300 * 40, 2 * 300 * 40, 40, 1]
    strides[axis] = 2**31 + 64 if axis < 2 else 2**24
    assert row(replace(small, query=far_apart(query, *strides))).equal(row(small))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_visible_key_poisons_its_row_only(bad: float) -> None:
    inputs = layer(300, attention_mask=torch.ones(2, 300, device=DEVICE))
    inputs.attention_mask[:, 17] = 0
    expected = row(inputs)
    inputs.key[0, 0, 200] = bad
    actual = row(inputs)
    assert actual[1].equal(expected[1])
    assert actual[0].isnan().equal(reference.attention_row(exact(inputs))[0].isnan())
    assert actual[0, 17] == 0


def test_the_query_of_a_row_that_is_lost_is_not_read() -> None:
    """Its place would be 16 GB before its tensor."""
    small = layer(3, dtype=torch.float16, query_position=ints(-1, 2))
    query = small.query[:, :, None].expand(-1, -1, 3, -1)
    lost = replace(small, query=far_apart(query, 40, 80, 2**33, 1))
    assert row(lost)[0].isnan().all()
    assert row(lost)[1].equal(row(replace(small, query_position=ints(2, 2)))[1])


def test_a_row_without_visible_keys_is_zero() -> None:
    mask = torch.zeros(2, 300, device=DEVICE)
    mask[1, 3] = 1
    inputs = layer(300, attention_mask=mask)
    actual = row(inputs)
    assert (actual[0] == 0).all()
    assert actual[1, 3] == 1
    assert row(layer(300, key_start=ints(300, 299))).sum(1).tolist() == [0, 1]


@pytest.mark.parametrize(("batch", "length", "width"), [(0, 5, 3), (2, 0, 3), (2, 5, 0)])
def test_empty_shapes(batch: int, length: int, width: int) -> None:
    inputs = layer(length, batch)
    assert row(inputs).shape == (batch, length)
    actual, status = raw(inputs, torch.zeros(batch, width, device=DEVICE), ints(*[0] * batch))
    assert (actual == 0).all()
    assert status.tolist() == [0] * batch


HUGE = 2**31 - 1


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Puts canaries around everything that is allocated; the function returned checks them."""
    margin, buffers = 4096, []

    def guard(make):
        def made(*size, dtype=torch.float32, device=None):
            shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
            buffer = torch.full((shape.numel() + 2 * margin,), 55, dtype=dtype, device=device)
            buffers.append(buffer)
            inner = buffer[margin : margin + shape.numel()].view(shape)
            return inner.copy_(make(shape, dtype=dtype, device=device))

        return made

    monkeypatch.setattr(torch, "empty", guard(torch.empty))
    monkeypatch.setattr(torch, "zeros", guard(torch.zeros))

    def check() -> None:
        assert buffers
        for buffer in buffers:
            assert (buffer[:margin] == 55).all()
            assert (buffer[-margin:] == 55).all()

    return check


@pytest.mark.parametrize(
    "changes",
    [
        {"query_position": ints(300, 5)},
        {"query_position": ints(-1, 5)},
        {"query_position": ints(HUGE, 5)},
        {"query_position": ints(-HUGE, 5)},
        {"key_start": ints(-1, 0)},
        {"key_start": ints(301, 0)},
        {"key_start": ints(HUGE, 0), "sliding_window": 3},
    ],
)
def test_indices_of_a_row_out_of_range(changes: dict, guarded: Callable[[], None]) -> None:
    inputs = layer(300, **changes)
    fine = layer(300, **{n: x.clamp(0, 5) if isinstance(x, Tensor) else x for n, x in changes.items()})
    actual = row(inputs)
    assert actual[0].isnan().all()
    assert actual[1].equal(row(fine)[1])
    mask = torch.ones(2, 10, device=DEVICE)
    mask[:, 4] = 0
    credit, status = raw(inputs, mask, ints(3, 3))
    assert status.tolist() == [OUT_OF_RANGE, 0]
    assert credit[0].isnan().equal(mask[0] != 0)
    assert credit[1].equal(raw(fine, mask, ints(3, 3))[0][1])
    guarded()


@pytest.mark.parametrize("start", [-1, 291, 300, HUGE, -HUGE])
@pytest.mark.parametrize("packed", [False, True])
def test_responses_out_of_range(start: int, packed: bool, guarded: Callable[[], None]) -> None:
    inputs = layer(300)
    mask = torch.ones(2, 10, device=DEVICE)
    mask[:, 4] = 0
    cu = ints(0, 10, 20) if packed else None
    fine, _ = raw(inputs, mask, ints(0, 7))
    shape = (20,) if packed else (2, 10)
    actual, status = raw(inputs, mask.view(shape), ints(start, 7), cu=cu)
    assert status.tolist() == [OUT_OF_RANGE, 0]
    assert actual.view(2, 10)[0].isnan().equal(mask[0] != 0)
    assert actual.view(2, 10)[1].equal(fine[1])
    guarded()


@pytest.mark.parametrize("outside", [-2, 300])
@pytest.mark.parametrize("packed", [False, True])
def test_tokens_out_of_range(outside: int, packed: bool, guarded: Callable[[], None]) -> None:
    """Where it is masked, no place counts."""
    inputs = layer(300)
    mask = torch.ones(2, 10, device=DEVICE)
    mask[:, 4] = 0
    cu = ints(0, 10, 20) if packed else None
    shape = (20,) if packed else (2, 10)
    fine, _ = raw(inputs, mask, ints(0, 7))
    index = torch.arange(10, device=DEVICE).repeat(2, 1) + 7
    index[:, 4] = HUGE
    index[0, 7] = outside
    actual, status = raw(inputs, mask.view(shape), index=index.view(shape), cu=cu)
    assert status.tolist() == [OUT_OF_RANGE, 0]
    assert actual.view(2, 10)[0].isnan().equal(mask[0] != 0)
    assert actual.view(2, 10)[1].equal(fine[1])
    guarded()


@pytest.mark.usefixtures("crossing_rows")
@pytest.mark.parametrize(
    ("bounds", "sound"),
    [
        ([0, 100, 50, 300, 310], [3]),
        ([-5, 100, 200, 300, 310], [1, 2, 3]),
        ([0, 100, 200, HUGE, 310], [0, 1]),
        ([0, -HUGE, 200, 300, 310], [2, 3]),
        ([HUGE, HUGE, -HUGE, -HUGE, 310], []),
        ([0, 100, 200, 300, 311], [0, 1, 2]),
    ],
)
def test_cu_seqlens_out_of_range(bounds: list[int], sound: list[int], guarded: Callable[[], None]) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(4, 6, 40, generator=generator).to(DEVICE)
    key = torch.randn(310, 2, 40, generator=generator).to(DEVICE)
    inputs = AttentionInputs(query, key, 0.2, cu_seqlens=ints(*bounds))
    actual = row(inputs)
    mask, start = torch.ones(4, 5, device=DEVICE), ints(0, 0, 0, 0)
    credit, status = raw(inputs, mask, start)
    assert [b for b in range(4) if status[b] == 0] == sound
    for b in range(4):
        lo, hi = bounds[b], bounds[b + 1]
        if b in sound:
            one = AttentionInputs(query[b : b + 1], key[lo:hi], 0.2, cu_seqlens=ints(0, hi - lo))
            assert actual[lo:hi].equal(row(one))
            assert credit[b].equal(actual[lo : lo + 5])
        else:
            assert credit[b].isnan().all()
            assert actual[max(lo, 0) : max(hi, 0)].isnan().all()
    packed_mask = torch.ones(310, device=DEVICE)
    plain = AttentionInputs(query, key.expand(4, -1, -1, -1).transpose(1, 2), 0.2)
    credit, status = raw(plain, packed_mask, start, cu=ints(*bounds))
    assert [b for b in range(4) if status[b] == 0] == sound
    rows = row(plain) if sound else None
    for b in sound:
        lo, hi = bounds[b], bounds[b + 1]
        assert credit[lo:hi].equal(rows[b, : hi - lo])
    guarded()
