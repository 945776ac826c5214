"""`align` against its plain version, and on the offsets of real tokenizers."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)

from attnshape import AttentionTap, Response, attention_credit, reference, shape_rewards
from attnshape.text.align import align
from attnshape.text.texts import align_texts, decoded_spans

CORPUS = [
    "The film was not bad, and the ending was great!",
    "A truly awful plot; the actors, however, were superb.",
    "It's naïve — a café scene, déjà vu, 100% cliché.",
    "Das war ein schöner Film über Überraschungen.",
    "その映画は素晴らしいです。 终于好看了",
    "I laughed 😀 and cried 😭 with my family 👨‍👩‍👧‍👦 today",
    "  indented\n\n\tcode:   x = 1\n",
    "user assistant system <|x|> Yes no maybe",
] * 4
TEXTS = [
    "The film was great",
    "not bad at all, truly!",
    "naïve café — déjà vu",
    "schöne Überraschung",
    "その映画は素晴らしい",
    "ok 😀😭 and 👨‍👩‍👧‍👦!",
    "🏳️‍🌈é̂ unseen 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "x  =   1\n\n\n\ty",
    "Yes",
]
KINDS = ["byte_bpe", "byte_bpe_untrimmed", "byte_fallback", "unigram", "wordpiece", "wordlevel"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
)
PREFIX, SUFFIX = "<|im_start|>user\nIs it good? Yes or no?<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"


def conversation(response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Is it good? Yes or no?"}, {"role": "assistant", "content": response}]


def _byte_bpe(trim_offsets: bool) -> tuple[Tokenizer, trainers.Trainer]:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tok, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)


def _byte_fallback() -> tuple[Tokenizer, None]:
    """A tokenizer as Llama 2 has it: an unknown character becomes its bytes."""
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=150, limit_alphabet=50, special_tokens=["<unk>"], show_progress=False),
    )
    model = json.loads(tok.to_str())["model"]
    vocab = model["vocab"] | {f"<0x{i:02X}>": len(model["vocab"]) + i for i in range(256)}
    merges = [tuple(pair) for pair in model["merges"]]
    tok.model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tok, None


def _unigram() -> tuple[Tokenizer, trainers.Trainer]:
    tok = Tokenizer(models.Unigram())
    tok.normalizer = normalizers.NFKC()
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    return tok, trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )


def _wordpiece() -> tuple[Tokenizer, trainers.Trainer]:
    tok = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tok.normalizer = normalizers.BertNormalizer(lowercase=True)
    tok.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tok.decoder = decoders.WordPiece(cleanup=False)
    return tok, trainers.WordPieceTrainer(vocab_size=250, special_tokens=["<unk>"], show_progress=False)


def _wordlevel() -> tuple[Tokenizer, trainers.Trainer]:
    tok = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    return tok, trainers.WordLevelTrainer(vocab_size=200, special_tokens=["<unk>"], show_progress=False)


@functools.cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    make = {
        "byte_bpe": lambda: _byte_bpe(True),
        "byte_bpe_untrimmed": lambda: _byte_bpe(False),
        "byte_fallback": _byte_fallback,
        "unigram": _unigram,
        "wordpiece": _wordpiece,
        "wordlevel": _wordlevel,
    }[kind]
    tok, trainer = make()
    if trainer is not None:
        tok.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token=None if kind.startswith("byte_bpe") else "<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=TEMPLATE,
        padding_side="left" if kind == "unigram" else "right",
    )


def offsets(kind: str, text: str) -> list[tuple[int, int]]:
    return tokenizer(kind)(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]


spans = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 4)).map(lambda x: (x[0], sum(x))), max_size=12)


@st.composite
def partitions(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Spans in order, with gaps, tokens of zero width and characters of several tokens."""
    out, here = [], 0
    for gap, width, copies in draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(1, 3)), max_size=10)
    ):
        out += [(here + gap, here + gap + width)] * copies if width else [(0, 0)]
        here += gap + width if width else 0
    return out


@settings(max_examples=300, deadline=None)
@given(partitions() | spans, partitions() | spans, st.integers(0, 2**32 - 1))
def test_equals_the_plain_version(source: list, target: list, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(3, len(source), dtype=torch.float64, generator=generator)
    got = align(source, target)(weights)
    want = torch.stack([reference.align(source, target)(w) for w in weights])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
    assert (got >= 0).all()
    if target:
        torch.testing.assert_close(got.sum(1), weights.sum(1), rtol=1e-12, atol=1e-14)


@settings(max_examples=200, deadline=None)
@given(partitions(), partitions())
def test_no_weight_leaves_the_tokens_it_overlaps(source: list, target: list) -> None:
    alignment = align(source, target)
    carried = alignment(torch.eye(len(source), dtype=torch.float64))
    for s, (start, end) in enumerate(source):
        overlapped = torch.tensor([max(start, a) < min(end, b) for a, b in target], dtype=torch.bool)
        assert alignment.source_mask[s] == overlapped.any()
        if overlapped.any():
            assert ((carried[s] > 0) == overlapped).all()
        elif target:
            assert (carried[s] == 1).sum() == 1


@settings(max_examples=100, deadline=None)
@given(partitions())
def test_is_the_identity_between_equal_disjoint_spans(tokens: list) -> None:
    tokens = [span for i, span in enumerate(tokens) if span[0] < span[1] and span not in tokens[:i]]
    eye = torch.eye(len(tokens), dtype=torch.float64)
    assert align(tokens, tokens)(eye).equal(eye)


def test_hand_computed_cases() -> None:
    # "a not-bad" + a suffix: |a| |not|-|bad| against |a n|ot-b|ad|.
    target = [(0, 3), (3, 7), (7, 9)]
    carried = align([(0, 1), (1, 5), (5, 6), (6, 9), (12, 15), (0, 0)], target)(torch.eye(6).double())
    want = [[1, 0, 0], [0.5, 0.5, 0], [0, 1, 0], [0, 1 / 3, 2 / 3], [0, 0, 1], [0, 0, 1]]
    torch.testing.assert_close(carried, torch.tensor(want, dtype=torch.float64))


def test_a_token_without_overlap_goes_to_the_nearest_target() -> None:
    target = [(0, 0), (10, 12), (20, 22), (0, 0)]
    # BOS, template, tie, nearer to the left, nearer to the right, suffix, EOS
    source = [(0, 0), (0, 9), (15, 17), (13, 15), (18, 19), (30, 31), (0, 0)]
    carried = align(source, target)(torch.eye(7).double())
    assert carried.argmax(1).tolist() == [1, 1, 2, 1, 2, 2, 2]
    assert carried.sum(0).tolist() == [0, 3, 4, 0]


def test_bytes_of_one_character_share_it() -> None:
    carried = align([(0, 2)], [(0, 1), (0, 1), (0, 1), (0, 1), (1, 2)])(torch.ones(1))
    assert carried.tolist() == [0.125, 0.125, 0.125, 0.125, 0.5]


def test_targets_without_width() -> None:
    weights = torch.tensor([0.25, 0.75])
    assert align([(0, 2), (2, 3)], [(0, 0), (5, 5)])(weights).tolist() == [1.0, 0.0]
    assert align([(0, 2), (2, 3)], [])(weights).shape == (0,)
    assert align([], [(0, 2)])(torch.zeros(0)).tolist() == [0.0]
    assert align([], [])(torch.zeros(4, 0)).shape == (4, 0)


def test_batch_is_its_rows_padded() -> None:
    rows = [(offsets("byte_bpe", text), offsets("wordpiece", text)) for text in TEXTS]
    source, target = [row[0] for row in rows], [row[1] for row in rows]
    alignment = align(source, target)
    weights = torch.rand(2, *alignment.source_shape, dtype=torch.float64)
    for b, (s, _) in enumerate(rows):
        weights[:, b, len(s) :] = 0
    got = alignment(weights)
    assert got.shape == (2, len(TEXTS), max(map(len, target)))
    for b, (s, t) in enumerate(rows):
        assert got[:, b, : len(t)].equal(align(s, t)(weights[:, b, : len(s)]))
        assert not got[:, b, len(t) :].any()
        assert alignment.source_mask[b, : len(s)].equal(align(s, t).source_mask)
        assert not alignment.source_mask[b, len(s) :].any()
    padded = tokenizer("byte_bpe")(
        TEXTS, padding=True, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt"
    )["offset_mapping"]
    assert align(padded, target)(weights).equal(got)


def test_a_batch_may_be_empty_or_hold_empty_sequences() -> None:
    assert align(torch.zeros(0, 5, 2).long(), torch.zeros(0, 3, 2).long())(torch.zeros(0, 5)).shape == (0, 3)
    assert align([[], [(0, 1)]], [[(0, 1)], []])(torch.ones(2, 1)).tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_dtype_and_detachment(given_dtype: torch.dtype, dtype: torch.dtype) -> None:
    got = align([(0, 1)], [(0, 1)])(torch.ones(1, dtype=given_dtype, requires_grad=True))
    assert got.dtype == dtype
    assert not got.requires_grad


def test_long_sums_are_preserved_in_float32() -> None:
    n = 131072
    source = torch.arange(n)[:, None] * 3 + torch.tensor([0, 3])
    target = torch.arange(n * 3 // 2)[:, None] * 2 + torch.tensor([0, 2])
    weights = torch.rand(n, generator=torch.Generator().manual_seed(0))
    got = align(source, target)(weights / weights.sum())
    assert abs(got.double().sum() - 1) < 1e-6


def test_nan_stays_with_its_tokens() -> None:
    got = align([(0, 2), (2, 4)], [(0, 1), (1, 2), (2, 4)])(torch.tensor([1.0, torch.nan]))
    assert got.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ([(3, 2)], [(0, 1)], r"source_offsets: token 0 of sequence 0 is \(3, 2\)"),
        ([(0, 1)], [(0, 1), (-1, 2)], r"target_offsets: token 1 of sequence 0 is \(-1, 2\)"),
        ([[(0, 1)]], [(0, 1)], "1 sequences and one"),
        ([[(0, 1)]], [[(0, 1)]] * 2, "1 sequences and 2 sequences"),
        (torch.zeros(4, 3), [(0, 1)], r"source_offsets must be pairs .* \(4, 3\)"),
        ([(0, 1, 2), (1, 2, 3)], [(0, 1)], r"source_offsets must be pairs .* \(2, 3\)"),
        ([(0, 1)], [(0.0, 1.5)], r"target_offsets must be pairs .* torch\.float32"),
        ([(0, 1)], [(0, 1), (1,)], r"target_offsets must be pairs .* got \[\(0, 1\), \(1,\)\]"),
        ("ab", [(0, 1)], "source_offsets must be pairs .* got 'a'"),
    ],
)
def test_bad_offsets(source: list, target: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        align(source, target)


def test_bad_weights() -> None:
    with pytest.raises(ValueError, match=r"weights must have shape \[\.\.\., 2\].*\(3,\)"):
        align([(0, 1), (1, 2)], [(0, 2)])(torch.ones(3))


# ---- real tokenizers ----


@pytest.mark.parametrize("target_kind", KINDS)
@pytest.mark.parametrize("source_kind", KINDS)
def test_between_tokenizers(source_kind: str, target_kind: str) -> None:
    for text in TEXTS:
        source, target = offsets(source_kind, text), offsets(target_kind, text)
        weights = torch.rand(len(source), dtype=torch.float64)
        got = align(source, target)(weights)
        torch.testing.assert_close(got, reference.align(source, target)(weights), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got.sum(), weights.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("policy", KINDS)
@pytest.mark.parametrize("reward", KINDS)
def test_response_in_a_chat_template(reward: str, policy: str) -> None:
    """Credit on the reward model's token that holds a character arrives at the policy token that holds it."""
    reward_tokenizer = tokenizer(reward)
    for text in TEXTS:
        templated = reward_tokenizer.apply_chat_template(conversation(text), tokenize=False)
        assert templated == PREFIX + text + SUFFIX
        alignment = align_texts(reward_tokenizer, conversation(text), tokenizer(policy), text)
        source, target = offsets(reward, templated), offsets(policy, text)
        assert alignment.source_shape == (len(source),)
        assert alignment.target_shape == (len(target),)
        carried = alignment(torch.eye(len(source), dtype=torch.float64))
        torch.testing.assert_close(carried.sum(1), torch.ones(len(source), dtype=torch.float64))
        for s, (start, end) in enumerate(source):
            overlapped = [max(start - len(PREFIX), a) < min(end - len(PREFIX), b) for a, b in target]
            assert alignment.source_mask[s] == any(overlapped)
            if any(overlapped):
                assert (carried[s] > 0).tolist() == overlapped


def test_unfamiliar_characters_become_bytes() -> None:
    """The tokenizers under test do split characters."""
    for kind in ("byte_bpe", "byte_fallback"):
        assert max(offsets(kind, "𝔘").count(span) for span in [(0, 1)]) >= 3


@pytest.mark.parametrize("kind", ["byte_bpe", "byte_bpe_untrimmed", "byte_fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_spans_of_sampled_ids(kind: str, text: str) -> None:
    """Decoding finds the spans that the tokenizer gives; a leading space may be the token's."""
    fast = tokenizer(kind)
    encoded = fast(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = [fast.bos_token_id, *encoded["input_ids"], fast.eos_token_id, fast.pad_token_id]
    decoded, (first, *found, eos, pad) = decoded_spans(fast, ids)
    assert decoded == text
    assert first == (0, 0)
    assert eos == pad == (len(text), len(text))
    for token, (start, end), (want_start, want_end) in zip(
        encoded.tokens(), found, encoded["offset_mapping"], strict=True
    ):
        if token == "▁" and start == 0:  # a space that only the tokenizer put in front
            assert (start, end) == (0, 0)
            continue
        assert start == want_start or text[start:want_start].isspace()
        assert end == want_end or text[end:want_end].isspace()


@pytest.mark.parametrize("kind", KINDS)
def test_spans_of_sampled_ids_tile_the_text(kind: str) -> None:
    fast = tokenizer(kind)
    for text in TEXTS:
        decoded, found = decoded_spans(fast, fast(text, add_special_tokens=False)["input_ids"])
        assert decoded == fast.decode(
            fast(text)["input_ids"], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        covered = {c for start, end in found for c in range(start, end)}
        assert covered == set(range(len(decoded)))
        assert found == sorted(found)


def test_sampled_ids_that_the_tokenizer_would_not_give() -> None:
    fast = tokenizer("byte_bpe_untrimmed")
    text = "Yes 😀"
    ids = [id for c in ["Y", "e", "s", "Ġ", *fast.tokenize("😀")] for id in fast.convert_tokens_to_ids([c])]
    alignment = align_texts(tokenizer("wordlevel"), "Is it? " + text, fast, ids)
    # WordLevel: "Is" "it" "?" "Yes" "😀"; its emoji is shared by the bytes.
    parts = len(ids) - 4
    want = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0, *[1 / parts] * parts], dtype=torch.float64)
    assert parts > 1
    torch.testing.assert_close(alignment(alignment.source_mask.double()), want)


def test_a_batch_of_texts_is_padded_as_its_tokenizers_pad() -> None:
    reward, policy = tokenizer("unigram"), tokenizer("byte_bpe")  # pad on the left; on the right
    texts = [PREFIX + text + SUFFIX for text in TEXTS]
    conversations = [conversation(text) for text in TEXTS]
    ids = policy(TEXTS, padding=True, add_special_tokens=False, return_tensors="pt")["input_ids"]
    alignment = align_texts(reward, conversations, policy, ids)
    keys = reward(texts, padding=True, add_special_tokens=False, return_tensors="pt")
    assert torch.equal(alignment.input_ids, keys["input_ids"])
    assert torch.equal(alignment.attention_mask, keys["attention_mask"])
    assert alignment.source_shape == tuple(keys["input_ids"].shape)
    assert alignment.target_shape == tuple(ids.shape)
    weights = torch.rand(alignment.source_shape, dtype=torch.float64) * keys["attention_mask"]
    got = alignment(weights)
    for b, messages in enumerate(conversations):
        one = align_texts(reward, messages, policy, [i for i in ids[b] if i != policy.pad_token_id])
        n = one.target_shape[0]
        real = keys["attention_mask"][b].bool()
        assert alignment.source_mask[b][real].equal(one.source_mask)
        in_response = weights[b] * alignment.source_mask[b]
        carried = alignment(weights * alignment.source_mask)[b]
        torch.testing.assert_close(carried.sum(), in_response.sum())
        assert not carried[n:].any()
        torch.testing.assert_close(got[b].sum(), weights[b].sum())


def test_from_a_reward_models_attention_to_the_policys_rewards() -> None:
    """The example of `align_texts`, against eager attention and the plain version."""
    torch.manual_seed(0)
    reward, policy = tokenizer("byte_bpe_untrimmed"), tokenizer("byte_fallback")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(reward),
        num_labels=1,
        pad_token_id=reward.pad_token_id,
        attn_implementation="eager",
        **shape,
    )
    model = LlamaForSequenceClassification(config).eval()
    responses = ["naïve café", "not bad at all, truly!"]
    texts = [PREFIX + response + SUFFIX for response in responses]
    policy_ids = policy(responses, padding=True, add_special_tokens=False, return_tensors="pt")
    keys = reward(texts, padding=True, add_special_tokens=False, return_tensors="pt")

    alignment = align_texts(reward, texts, policy, policy_ids["input_ids"])
    with AttentionTap(model) as tap, torch.no_grad():
        out = model(**keys, output_attentions=True)
    score = out.logits[:, 0]
    start = torch.zeros(2, dtype=torch.int32)
    credit = attention_credit(tap.take(), Response(alignment.source_mask, start=start))
    shaped = shape_rewards(score, alignment(credit), policy_ids["attention_mask"])

    torch.testing.assert_close(shaped.rewards.sum(1), score)
    for b, text in enumerate(texts):
        inside = alignment.source_mask[b]
        row = out.attentions[-1][b, :, int(keys["attention_mask"][b].sum()) - 1].mean(0)
        raw = torch.where(inside, row, 0.0).double()
        own = align_texts(reward, text, policy, policy_ids["input_ids"][b])
        want = reference.align(offsets("byte_bpe_untrimmed", text), _target_spans(policy, responses[b]))
        carried = want((raw / raw.sum())[: own.source_shape[0]])
        torch.testing.assert_close(shaped.credit[b, : len(carried)].double(), carried, rtol=1e-4, atol=1e-6)
        assert not shaped.credit[b, len(carried) :].any()


def _target_spans(policy: PreTrainedTokenizerFast, response: str) -> list[tuple[int, int]]:
    spans = policy(response, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [(start + len(PREFIX), end + len(PREFIX)) for start, end in spans]


@pytest.mark.parametrize(
    ("response", "start"),
    [
        ("Yes", len(PREFIX)),  # also in the prompt
        ("m", None),  # also inside "<|im_end|>"
        ("  Yes\n", len(PREFIX)),  # the template strips it
    ],
)
def test_the_response_is_found_where_it_is(response: str, start: int | None) -> None:
    text = PREFIX + response.strip() + SUFFIX
    source = tokenizer("byte_bpe_untrimmed")
    alignment = align_texts(source, conversation(response), source, response)
    offset = [
        span
        for span, kept in zip(offsets("byte_bpe_untrimmed", text), alignment.source_mask, strict=True)
        if kept
    ]
    start = len(PREFIX) if start is None else start
    assert offset[0][0] == start
    assert offset[-1][1] == start + len(response.strip())


def test_whitespace_that_the_template_strips_gets_nothing() -> None:
    fast = tokenizer("byte_bpe_untrimmed")
    ids = fast.convert_tokens_to_ids([*"ĠĠYesĊ"])
    alignment = align_texts(tokenizer("wordlevel"), PREFIX + "Yes" + SUFFIX, fast, ids, start=len(PREFIX))
    third = 1 / 3
    want = torch.tensor([0, 0, third, third, third, 0], dtype=torch.float64)
    torch.testing.assert_close(alignment(alignment.source_mask.double()), want)


def test_an_unknown_word_is_no_special_token() -> None:
    fast = tokenizer("wordlevel")
    assert fast.tokenize("filmxyz") == ["<unk>"]
    alignment = align_texts(fast, "The filmxyz", tokenizer("byte_bpe"), "xyz")
    assert alignment.source_mask.tolist() == [False, True]


def test_a_response_that_holds_special_tokens_is_found() -> None:
    policy = tokenizer("byte_bpe")
    response = "Yes<|im_end|>\n<|im_start|>user\nno"
    alignment = align_texts(policy, PREFIX + response + SUFFIX, policy, response)
    assert int(alignment.source_mask.sum()) == alignment.target_shape[0]


def test_empty_response() -> None:
    policy = tokenizer("byte_bpe")
    alignment = align_texts(policy, PREFIX + SUFFIX, policy, [policy.eos_token_id])
    assert alignment(torch.ones(alignment.source_shape)).tolist() == [alignment.source_shape[0]]


def test_a_text_without_its_response_is_an_error() -> None:
    policy = tokenizer("byte_bpe")
    with pytest.raises(ValueError, match=r"source 1 .*'good' is not in 'A bad film'"):
        align_texts(policy, ["A good film", "A bad film"], policy, ["good", "good"])
    with pytest.raises(ValueError, match="as many, got 2 and 1"):
        align_texts(policy, ["A good film", "A bad film"], policy, ["good"])


def test_a_slow_tokenizer_is_an_error() -> None:
    class Slow(PreTrainedTokenizer):
        def __init__(self) -> None:
            self.vocab = {"good": 0}
            super().__init__()

        vocab_size = 1

        def get_vocab(self) -> dict[str, int]:
            return self.vocab

        def _tokenize(self, text: str) -> list[str]:
            return text.split()

        def _convert_token_to_id(self, token: str) -> int:
            return 0

        def _convert_id_to_token(self, index: int) -> str:
            return "good"

    with pytest.raises(ValueError, match=r"source_tokenizer must be a fast tokenizer.* got Slow"):
        align_texts(Slow(), "good", tokenizer("byte_bpe"), "good")
    with pytest.raises(ValueError, match=r"target_tokenizer must be a fast tokenizer.* got Slow"):
        align_texts(tokenizer("byte_bpe"), "good", Slow(), "good")
    assert align_texts(tokenizer("byte_bpe"), "good", Slow(), [0]).target_shape == (1,)
