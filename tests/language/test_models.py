from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.language.data import Texts
from benchmarks.language.models import (
    LanguageConfig,
    at_depth,
    build_tokenizer,
    language_model_record,
    make_language_models,
    new_language_model,
    token_stream,
    train_language_model,
)

SMALL = LanguageConfig(
    vocabulary=300,
    hidden_size=16,
    intermediate_size=32,
    heads=2,
    depths=(2, 1),
    positions=64,
    tokens=12,
    batch_size=2,
    steps=4,
    more_steps=2,
    save_every=2,
)


def test_a_text_begins_with_its_mark_and_comes_back(texts: Texts) -> None:
    tokenizer = build_tokenizer(texts, SMALL)
    ids = tokenizer("The Film's good!")["input_ids"]
    assert ids[0] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the film's good!"
    stream = token_stream(tokenizer, ["a film", "good"])
    ends = (stream == tokenizer.eos_token_id).nonzero().flatten().tolist()
    assert (ends[0], ends[-1], len(ends)) == (0, len(stream) - 1, 3)
    assert [tokenizer.decode(stream[a + 1 : b]) for a, b in pairwise(ends)] == ["a film", "good"]


def test_new_layers_change_nothing_yet_and_gone_ones_leave_the_lower() -> None:
    torch.manual_seed(0)
    model = new_language_model(SMALL, 50, 2).eval()
    ids = torch.randint(50, (1, 9))
    with torch.no_grad():
        grown = at_depth(model, 4).eval()
        torch.testing.assert_close(grown(ids).logits, model(ids).logits)
        states = model(ids, output_hidden_states=True).hidden_states
        lower = at_depth(model, 1).eval()
        torch.testing.assert_close(lower(ids).logits, model.lm_head(model.model.norm(states[1])))


def test_training_cut_off_ends_where_it_would_have(tmp_path: Path) -> None:
    stream = torch.randint(50, (200,), generator=torch.Generator().manual_seed(0))

    def trained(checkpoint: Path, stop: int | None = None) -> torch.Tensor:
        torch.manual_seed(0)
        model = new_language_model(SMALL, 50, 1)

        def on_step(step: int, _loss: float) -> None:
            if step == stop:
                raise KeyboardInterrupt

        train_language_model(model, stream, SMALL, steps=5, lr=1e-2, checkpoint=checkpoint, on_step=on_step)
        return model.lm_head.weight.detach()

    whole = trained(tmp_path / "whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut.pt", stop=4)
    assert torch.equal(trained(tmp_path / "cut.pt"), whole)


def test_what_the_folder_has_is_not_made_again(texts: Texts, tmp_path: Path) -> None:
    made: list[int] = []
    for _ in range(2):
        make_language_models(texts, tmp_path, SMALL, lambda step, _loss: made.append(step))
    assert made == [1, 2, 3, 4, 1, 2]  # the first depth, then the other
    record = language_model_record(texts, tmp_path, 1, SMALL)
    assert (record["layers"], record["steps"]) == (1, 2)
    assert 0 < record["held_out_nats"] < 10
