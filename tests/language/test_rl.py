from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from attnshape.demo.ppo import ActorCritic, Rollout
from benchmarks.language import rl
from benchmarks.language.cells import CELLS, SCRATCH, SEEDS, Cell, cells_on
from benchmarks.language.data import Texts
from benchmarks.language.rewards import Scorer


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NEW_TOKENS", 6), ("MIN_NEW_TOKENS", 4), ("REFERENCE", 32), ("GROUP", 2)):
        monkeypatch.setattr(rl, name, value)


@pytest.fixture
def setup(saved: tuple[Path, Path], texts: Texts) -> rl.Setup:
    rl.initial.cache_clear()
    return rl.Setup(str(saved[0]), str(saved[1]), rl.prompts_of(texts.held_out)[:8])


def rollout_of(actor: ActorCritic) -> Rollout:
    """Completions of which one ends early, behind prompts of unequal lengths."""
    torch.manual_seed(0)
    rollout = actor.sample(["the film", "a good plot it", "it"], 6, 4)
    ids, response = rollout.ids.clone(), rollout.response_mask.clone()
    first = rollout.prompt_length
    ids[0, first + 3] = actor.tokenizer.eos_token_id
    response[0] = torch.arange(response.shape[1]) <= 3
    mask = torch.cat([rollout.mask[:, :first], response.long()], 1)
    return Rollout(ids, mask, response)


def test_the_judge_reads_the_policys_tokens_without_padding_and_end(setup: rl.Setup) -> None:
    actor, judge, _ = setup.load()
    rollout = rollout_of(actor)
    ids, mask, inside, carry = judge.read(rollout)
    first = rollout.prompt_length
    for b in range(3):
        prompt = rollout.ids[b, :first][rollout.mask[b, :first].bool()].tolist()
        spoken = rollout.responses[b][rollout.response_mask[b]].tolist()
        spoken = [x for x in spoken if x != actor.tokenizer.eos_token_id]
        assert ids[b][mask[b].bool()].tolist() == prompt + spoken
        assert ids[b][inside[b]].tolist() == spoken
    carried = carry(ids.float())
    live = rollout.response_mask & (rollout.responses != actor.tokenizer.eos_token_id)
    assert torch.equal(carried[live].long(), rollout.responses[live])
    assert (carried[~live] == 0).all()


def test_another_tokenizers_weights_come_back_to_the_policys_tokens(setup: rl.Setup, tmp_path: Path) -> None:
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocabulary = {t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters])}
    tokenizer = BertTokenizerFast(vocab=vocabulary)
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            num_labels=1,
        )
    ).eval()
    actor, own, _ = setup.load()
    judge = replace(own, scorer=Scorer(model, tokenizer))
    assert not judge.same_tokens
    rollout = rollout_of(actor)
    _, _, inside, carry = judge.read(rollout)
    carried = carry(inside.float())
    torch.testing.assert_close(carried.sum(1), inside.sum(1).float())
    assert carried.shape == rollout.response_mask.shape
    for source in ("last row", "gradient x value", "leave-one-out"):
        score, weights = judge.weigh(rollout, source)
        assert score.shape == (3,)
        assert weights is not None
        assert weights.shape == carried.shape


@pytest.mark.parametrize(
    ("loop", "source"),
    [("ppo", "leave-one-out, signed"), ("grpo", "gradient x value, signed"), ("rloo", "ABC")],
)
def test_a_run_on_saved_folders(setup: rl.Setup, loop: str, source: str) -> None:
    cell = Cell(loop=loop, source=source, reward_model="judge", seed=0, steps=2)  # type: ignore[arg-type]
    record = rl.run_cell(cell, setup)
    assert all(len(record["curves"][name]) == 2 for name in rl.CURVES)
    assert [at for at, *_ in record["gold"]] == [0, 1]
    assert record["gold"][0][1] is None
    assert record["curves"]["kl"][0] == pytest.approx(0.0, abs=1e-4) != record["curves"]["kl"][1]
    assert Cell(**record["cell"]) == cell


def test_the_same_seed_samples_the_same_whatever_the_source(setup: rl.Setup) -> None:
    first = [
        rl.run_cell(Cell(loop="grpo", source=source, reward_model="judge", seed=3, steps=1), setup)
        for source in ("plain", "ABC shuffled")
    ]
    assert first[0]["curves"]["score"] == first[1]["curves"]["score"]
    assert first[0]["samples"] == first[1]["samples"]


def test_repetition_counts_pairs_seen_before() -> None:
    ids = torch.tensor([[9, 1, 2, 1, 2, 1]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    rollout = Rollout(ids, torch.ones_like(ids), mask)
    assert rl.repetition(rollout) == pytest.approx(0.5)  # 12 21 12 21


def test_scores_are_in_the_initial_policys_unit(setup: rl.Setup) -> None:
    found = rl.initial(setup)
    actor, raw, _ = setup.load()
    judge = rl.Judge(raw.scorer, raw.tokenizer, found["mean"], found["std"])
    rollout = rollout_of(actor)
    plain, _ = raw.weigh(rollout, None)
    standard, weights = judge.weigh(rollout, "leave-one-out")
    torch.testing.assert_close(standard * found["std"] + found["mean"], plain)
    _, unscaled = raw.weigh(rollout, "leave-one-out")
    assert weights is not None
    assert unscaled is not None
    torch.testing.assert_close(weights * found["std"], unscaled)


def test_cells_are_named_once_and_come_in_pairs() -> None:
    assert len({c.name for c in CELLS}) == len(CELLS)
    plain = {(c.loop, c.lam, c.reward_model, c.seed) for c in CELLS if c.source == "plain"}
    for cell in CELLS:
        assert (cell.loop, cell.lam, cell.reward_model, cell.seed) in plain, cell.name
    assert {c.reward_model for c in CELLS if c.loop == "grpo" and c.seed == SEEDS[0]} >= set(SCRATCH)
    assert {c.reward_model for c in cells_on("mine", 7)} == {"mine"}
    with pytest.raises(ValueError, match="source: got 'attention'"):
        Cell(loop="ppo", source="attention", reward_model="x", seed=0)  # type: ignore[arg-type]


def test_cells_wait_for_their_models(tmp_path: Path, saved: tuple[Path, Path]) -> None:
    assert rl.setup_of(CELLS[0], tmp_path, ("a",)) is None
    own = rl.setup_of(CELLS[0], tmp_path, ("a",), str(saved[0]), str(saved[1]))
    assert own is not None
    assert own.gold == ()
    assert own.policy == str(saved[0])
