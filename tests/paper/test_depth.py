import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from attnshape.demo.corpus import true_reward, vocabulary
from attnshape.demo.models import ModelConfig, train_language_model, train_reward_model
from benchmarks.paper import __main__ as main
from benchmarks.paper import depth
from benchmarks.paper.contextual import contextual_reward
from benchmarks.paper.depth import (
    BATCH,
    CONFIG,
    GRADIENT,
    MODELS,
    PROMPT_WORDS,
    STUDY,
    DeepModel,
    agreement,
    documents,
    measure,
    rank_correlation,
    relative_entropy,
    study,
    train_deep,
)
from benchmarks.paper.sources import SOURCES
from benchmarks.paper.store import collect

TINY = replace(CONFIG, hidden_size=16, heads=2, reviews=200, lm_steps=2, held_out_pairs=48)
MODEL = DeepModel(3, 1, steps=2)


def test_rank_correlation_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) with ranks 2, 1, 4, 3: d^2 sum to 4, so 1 - 24 / 60
    assert rank_correlation(x, torch.tensor([20.0, 10, 40, 30])) == pytest.approx(0.6)
    # ties at their mean rank: 1.5, 1.5, 3 against 1, 2, 3 gives sqrt(3) / 2
    assert rank_correlation(torch.tensor([5.0, 5, 7]), torch.tensor([1.0, 2, 3])) == pytest.approx(3**0.5 / 2)
    assert rank_correlation(x, torch.ones(4)) == 0.0


def test_agreement_tells_sign_from_size() -> None:
    effects = torch.tensor([[0.0, 2.0, -1.0, 0.0], [0.0, 0, 0, 0]])  # the second row has no truth to find
    good = agreement(torch.tensor([[0.0, 3.0, -1.0, 0.0]]).expand(2, 4), effects)
    assert good == pytest.approx({"precision_at_k": 1, "signed": 1, "absolute": 1})
    sizes = agreement(torch.tensor([[0.0, 3.0, 1.0, 0.0]]).expand(2, 4), effects)
    assert sizes["absolute"] == pytest.approx(1)
    assert sizes["signed"] < 1  # what ABC cannot say: a bad word in a good review


@pytest.mark.parametrize(("reward", "value"), [("lexical", true_reward), ("contextual", contextual_reward)])
def test_documents_carry_leave_one_out_effects(reward: str, value: object) -> None:
    found = documents(12, reward, 5)  # type: ignore[arg-type]
    words = vocabulary()
    for ids, effects in zip(found.ids.tolist(), found.effects.tolist(), strict=True):
        review = [words[i] for i in ids[1:]]
        whole = value(review)  # type: ignore[operator]
        for j, effect in enumerate(effects):
            i = PROMPT_WORDS + j
            assert effect == pytest.approx(whole - value(review[:i] + review[i + 1 :]))  # type: ignore[operator]
    assert found.effects.any()


def test_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "train_deep", lambda model, cache: train_deep(model, cache, TINY))
    monkeypatch.setattr(depth, "LENGTHS", (8,))
    assert MODELS.missing([MODEL], tmp_path) == [MODEL]
    study(MODEL, tmp_path / "cache", tmp_path)
    assert MODELS.missing([MODEL], tmp_path) == []
    collect(tmp_path, [MODELS])
    found = MODELS.read(tmp_path)[MODEL.key]
    assert MODELS.missing([MODEL], tmp_path) == []
    assert found["machine"]["cpus"] == os.cpu_count()
    assert (found["layers"], found["seed"], found["reward"]) == (3, 1, "lexical")
    assert set(found["lengths"]["8"]["sources"]) == set(SOURCES)
    for measures in found["lengths"]["8"]["sources"].values():
        assert 0 <= measures["precision_at_k"] <= 1
        assert measures["cost"] > 0.5
    folder = tmp_path / "cache" / MODEL.name
    trained = (folder / "model.safetensors").read_bytes()
    assert train_deep(MODEL, tmp_path / "cache", TINY) == folder  # found, not trained again
    assert (folder / "model.safetensors").read_bytes() == trained


def test_relative_entropy_by_hand() -> None:
    weights = torch.tensor([[-8.0, 0.0, 0.0, 0.0], [1.0, 1.0, -1.0, 1.0]])
    assert relative_entropy(weights) == pytest.approx(0.5)  # one token, and all alike


def test_gradient_x_value_overlaps_with_itself() -> None:
    torch.manual_seed(0)
    base, _ = train_language_model(replace(TINY, layers=1))
    model, *_ = train_reward_model(replace(TINY, layers=1, rm_steps=2), base)
    found = measure(model, "lexical", 12, BATCH)["sources"]
    assert found[GRADIENT]["overlap"] == 1.0
    assert all(0 <= x["overlap"] <= 1 and 0 < x["entropy"] <= 1 for x in found.values())


def test_the_study_has_every_model_once_and_the_command_chooses_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len({m.key for m in STUDY}) == len({MODELS.new(tmp_path, m.name) for m in STUDY}) == len(STUDY)
    done: list[DeepModel] = []
    monkeypatch.setattr(main, "study", lambda model, cache, out: done.append(model))

    def call(*arguments: str) -> int:
        done.clear()
        return CliRunner().invoke(main.app, ["depth", "--out", str(tmp_path), *arguments]).exit_code

    assert call() == 0
    assert done == STUDY
    assert call("--layers", "4", "--seed", "1", "--steps", "400", "--steps", "100") == 0
    assert done == [DeepModel(4, 1), DeepModel(4, 1, steps=100), DeepModel(4, 1, "contextual")]
    assert call("--layers", "5") == 2
    MODELS.new(tmp_path, STUDY[1].name).parent.mkdir(parents=True)
    MODELS.new(tmp_path, STUDY[1].name).touch()
    assert call() == 0
    assert done == [STUDY[0], *STUDY[2:]]  # what has been measured is not measured again


def test_training_is_the_models_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[int, int, int]] = []

    def train(config: ModelConfig, *_: object, **__: object) -> tuple[Any, float, float]:
        trained.append((config.layers, config.seed, config.rm_steps))
        return train_reward_model(replace(config, rm_steps=1), *_, **__)  # type: ignore[arg-type]

    monkeypatch.setattr(depth, "train_reward_model", train)
    for model in (DeepModel(1, 0), DeepModel(1, 2, steps=7)):
        train_deep(model, tmp_path, TINY)
    assert trained == [(1, 0, 400), (1, 20, 7)]
