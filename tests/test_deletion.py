"""What a score does when tokens are deleted: against closed forms, and against a loop over a real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from attnshape import Response
from attnshape.credit import deletion_scores, leave_one_out

VALUE = torch.tensor([0.0, 2.0, -1.0, 0.5, 7.0])
"""Of each word: a score adds them up."""
IDS = torch.tensor([[4, 1, 2, 3, 1, 0], [0, 0, 4, 2, 2, 1]])
OWN = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]])
RESPONSE = Response(MASK, start=torch.tensor([1, 3]))
# The one masked token of each row has a weight that must reach nothing.
WEIGHTS = torch.tensor([[2.0, -1.0, 9.0, 2.0], [-1.0, -1.0, 2.0, 9.0]])


class Words:
    """A reward model that adds up words, and what it was asked."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.padded = 0

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        assert ids.dtype == mask.dtype == torch.int64
        assert not torch.is_grad_enabled()
        self.sizes.append((ids.shape[0], ids.shape[1]))
        self.padded += int((mask == 0).sum())
        return (VALUE[ids] * mask).sum(1)


def test_a_word_s_weight_is_what_it_adds() -> None:
    expected = VALUE[torch.tensor([[1, 2, 3, 1], [2, 2, 1, 0]])] * MASK
    scores = torch.tensor([10.5, 7.0])
    for given in (None, scores):
        words = Words()
        found = leave_one_out(words, IDS, RESPONSE, score=given, attention_mask=OWN)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)
        # All texts of one length in one forward; two words of a row that are the same are two texts.
        assert words.sizes == ([(1, 5), (4, 4), (3, 3)] if given is None else [(3, 4), (3, 3)])
    packed = Response(
        MASK.flatten(),
        index=torch.tensor([1, 2, 3, 4, 3, 4, 5, -1]),
        cu_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32),
    )
    assert torch.equal(leave_one_out(Words(), IDS, packed, attention_mask=OWN), expected.flatten())


def test_texts_are_padded_only_where_a_token_for_it_is_named() -> None:
    words = Words()
    found = leave_one_out(words, IDS, RESPONSE, attention_mask=OWN, pad_token_id=4, batch_tokens=12)
    assert torch.equal(found, leave_one_out(Words(), IDS, RESPONSE, attention_mask=OWN))
    assert all(rows * length <= 12 or rows == 1 for rows, length in words.sizes)
    assert words.padded > 0
    words = Words()
    leave_one_out(words, IDS, RESPONSE, attention_mask=OWN, batch_tokens=1)
    assert {rows for rows, _ in words.sizes} == {1}
    assert words.padded == 0


def test_a_span_shares_what_it_does() -> None:
    words = Words()
    spans = torch.tensor([[7, 7, 7, 3], [0, 1, 0, 1]])
    found = leave_one_out(
        words, IDS, RESPONSE, score=torch.tensor([10.5, 7.0]), attention_mask=OWN, spans=spans
    )
    assert torch.equal(found, torch.tensor([[0.5, 0.5, 0.0, 2.0], [0.5, -1.0, 0.5, 0.0]]))
    assert sum(rows for rows, _ in words.sizes) == 4


def test_nothing_is_left() -> None:
    """A text that is all response, of one token: it has no weight, so all its credit is on that token."""
    words = Words()
    one = Response(torch.ones(2, 1), start=torch.tensor([0, 0]))
    assert not leave_one_out(words, torch.tensor([[1], [2]]), one).any()
    assert words.sizes == []
    empty = Response(torch.zeros(2, 1), start=torch.tensor([0, 0]))
    assert not leave_one_out(words, torch.tensor([[1], [2]]), empty).any()
    assert leave_one_out(
        words, torch.zeros(0, 3).long(), Response(torch.zeros(0, 2), start=torch.zeros(0).long())
    ).shape == (0, 2)
    nowhere = Response(torch.ones(1, 3), index=torch.tensor([[1, -1, 2]]))
    assert leave_one_out(words, IDS[:1], nowhere).tolist() == [[2.0, 0.0, -1.0]]


def test_a_deletion_curve_by_hand() -> None:
    # Row 0 deletes 2, 2, .5; row 1 deletes 2, -1, -1.
    weights = torch.tensor([[2.0, 0.5, 9.0, 1.9], [-1.0, -1.0, 2.0, 9.0]])
    words = Words()
    found = deletion_scores(words, IDS, weights, RESPONSE, fractions=(0.1, 0.5, 1.0), attention_mask=OWN)
    assert torch.equal(found, torch.tensor([[8.5, 6.5, 7.5], [5.0, 6.0, 7.0]]))
    by_size = deletion_scores(words, IDS, WEIGHTS.abs(), RESPONSE, fractions=(2 / 3,), attention_mask=OWN)
    assert by_size[0, 0] == 6.5
    packed = Response(
        MASK.flatten(),
        index=torch.tensor([1, 2, 3, 4, 3, 4, 5, -1]),
        cu_seqlens=torch.tensor([0, 4, 8], dtype=torch.int32),
    )
    again = deletion_scores(
        words, IDS, weights.flatten(), packed, fractions=(0.1, 0.5, 1.0), attention_mask=OWN, pad_token_id=0
    )
    assert torch.equal(again, found)


def test_ties_are_broken_at_random() -> None:
    equal = torch.ones(2, 4)
    drawn = torch.stack(
        [
            deletion_scores(Words(), IDS, equal, RESPONSE, fractions=(0.1,), attention_mask=OWN, seed=i)[0, 0]
            for i in range(30)
        ]
    )
    assert set(drawn.tolist()) == {8.5, 11.5}  # without a 2, without the -1
    same = [deletion_scores(Words(), IDS, equal, RESPONSE, attention_mask=OWN, seed=1) for _ in range(2)]
    assert torch.equal(*same)


def test_rows_without_a_curve() -> None:
    weights = torch.tensor([[1.0, torch.nan], [1.0, 2.0], [1.0, torch.nan]])
    mask = torch.tensor([[1, 1], [0, 0], [1, 0]])
    found = deletion_scores(
        Words(),
        torch.tensor([[4, 1, 2]] * 3),
        weights,
        Response(mask, start=torch.ones(3).long()),
        fractions=(0.1,),
    )
    assert found.isnan().tolist() == [[True], [True], [False]]
    whole = Response(torch.ones(1, 2), start=torch.tensor([0]))
    found = deletion_scores(
        Words(), torch.tensor([[1, 2]]), torch.tensor([[1.0, 0.0]]), whole, fractions=(0.5, 1.0)
    )
    assert found.isnan().tolist() == [[False, True]]


def causal() -> Any:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForSequenceClassification(config)


def encoder() -> Any:
    config = BertConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_labels=1, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("make", [causal, encoder])
def test_a_real_model_asked_one_text_at_a_time(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    ids, own = torch.randint(1, 20, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ids[1, 7:], own[1, 7:] = 0, 0
    response = Response(torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]]), start=torch.tensor([4, 3]))

    def score_of(ids: Tensor, mask: Tensor) -> Tensor:
        return model(ids, attention_mask=mask).logits[:, 0]

    found = leave_one_out(score_of, ids, response, attention_mask=own, pad_token_id=0)
    for b, start in enumerate((4, 3)):
        text = ids[b, : own[b].sum()].tolist()
        with torch.no_grad():
            whole = model(torch.tensor([text])).logits[0, 0]
            for j in range(4):
                left = text[: start + j] + text[start + j + 1 :]
                move = whole - model(torch.tensor([left])).logits[0, 0]
                expected = move if response.mask[b, j] else torch.tensor(0.0)
                torch.testing.assert_close(found[b, j], expected, rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_of": 3}, "score_of: got int, want a function"),
        ({"score_of": lambda ids, mask: VALUE[ids]}, r"score_of: got \[1, 5\] for 1 texts"),
        ({"score_of": lambda ids, mask: ids.sum(1)}, "score_of: .*want floating"),
        ({"input_ids": IDS.float()}, "input_ids: got torch.float32"),
        ({"input_ids": [[1, 2]]}, "input_ids: got .*want int"),
        ({"response": MASK}, "response: got Tensor, want Response with start or index"),
        ({"response": Response(MASK)}, "response.start, response.index: got neither"),
        ({"response": Response(MASK, start=torch.tensor([1, 4]))}, "response.start: row 1 starts at 4"),
        ({"response": Response(MASK, start=torch.tensor([2, 3]))}, "hides token 3 of response 0, at 5"),
        ({"attention_mask": OWN[:, :3]}, r"attention_mask: got \[2, 3\], want \[2, 6\]"),
        ({"batch_tokens": 0}, "batch_tokens: got 0"),
        ({"spans": torch.ones(2, 4)}, "spans: got torch.float32"),
        ({"score": torch.ones(3)}, "score: got shape"),
    ],
)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "score_of": Words(), "input_ids": IDS, "response": RESPONSE, "attention_mask": OWN, **changes
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        leave_one_out(**given)


def test_bad_fractions_and_weights() -> None:
    for fractions in ((0.0,), (1.5,), (float("nan"),)):
        with pytest.raises(ValueError, match="fractions: got"):
            deletion_scores(Words(), IDS, WEIGHTS, RESPONSE, fractions=fractions, attention_mask=OWN)
    with pytest.raises(ValueError, match="weights: got shape"):
        deletion_scores(Words(), IDS, WEIGHTS[:, :2], RESPONSE, attention_mask=OWN)
