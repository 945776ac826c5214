"""What the GRPO adapter does around TRL's trainer; the real one is in ``parity/test_trl_grpo_adapter.py``."""

from __future__ import annotations

from collections import defaultdict, deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from parity.toys import Offline, save_policy, save_reward_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from attnshape import CreditModel
from attnshape.integrations import trl
from attnshape.integrations.trl_grpo import shaped_grpo_trainer

GROUP = 2
PROMPTS = ["Was the film any good? ", "Was the film any good? ", "the plot", "the plot"]
TEXTS = [" It was not bad", "superb actors", "the ending was weak;", "It was not"]
TALKS = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]


class FakeTrainer:
    """TRL's shapes, and its arithmetic on rewards; completions are given."""

    num_generations = num_generations_eval = GROUP
    importance_sampling_level = "token"
    scale_rewards: Any = "group"
    tool_mask: Tensor | None = None
    log_completions = False

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
    ) -> None:
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        self.model = SimpleNamespace(training=True)
        self.processing_class = processing_class
        self.reward_funcs = funcs
        given = reward_processing_classes
        self.reward_processing_classes = given if isinstance(given, list) else [given] * len(funcs)
        self.reward_func_names = [f"reward{i}" for i in range(len(funcs))]
        self.reward_weights = torch.ones(len(funcs))
        self.accelerator = SimpleNamespace(process_index=0, gather=lambda x: x, is_main_process=True)
        self._metrics: Any = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._logs: Any = {"advantages": deque(maxlen=4), "extra": defaultdict(lambda: deque(maxlen=4))}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        pass

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        columns = []
        for function, tokenizer in zip(self.reward_funcs, self.reward_processing_classes, strict=True):
            if not isinstance(function, nn.Module):
                found = [x if x is not None else torch.nan for x in function(completions)]
                columns.append(torch.tensor(found))
                continue
            texts = [
                p + c
                if isinstance(p, str)
                else tokenizer.apply_chat_template(p + c, tools=None, tokenize=False)
                for p, c in zip(prompts, completions, strict=True)
            ]
            encoded = tokenizer(
                text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
            )
            with torch.inference_mode():
                columns.append(function(**encoded).logits[:, 0].clone())
        return torch.stack(columns, 1).clone()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        prompts, completions, ids = zip(*inputs, strict=True)
        self.given = self._calculate_rewards(inputs, list(prompts), list(completions), list(ids))
        lost = self.given.isnan().all(1)
        rewards = (self.given * self.reward_weights).nansum(1).masked_fill(lost, torch.nan)
        grouped = rewards.view(-1, GROUP)
        advantages = rewards - grouped.nanmean(1).repeat_interleave(GROUP)
        if self.scale_rewards in ("group", True):
            advantages = advantages / (grouped.std(1).repeat_interleave(GROUP) + 1e-4)
        advantages = advantages.nan_to_num(nan=0.0)
        self._logs["advantages"].extend(advantages.tolist())
        width = max(map(len, ids)) + 1
        mask = torch.tensor([[1] * len(x) + [0] * (width - len(x)) for x in ids])
        out: dict[str, Any] = {"advantages": advantages, "completion_mask": mask}
        if self.tool_mask is not None:
            out["tool_mask"] = self.tool_mask
        return out


Trainer = shaped_grpo_trainer(FakeTrainer)


class World:
    def __init__(self, folder: Path) -> None:
        self.policy = save_policy(folder / "policy")
        save_reward_model(folder / "reward")
        self.reward = str(folder / "reward")
        self.offline = Offline(folder / "reward", self.policy)

    def trainer(self, reward_funcs: Any = None, cls: Any = Trainer, **options: Any) -> Any:
        funcs = [self.reward] if reward_funcs is None else reward_funcs
        return cls("policy", funcs, processing_class=self.policy, **options)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.policy.encode(text, add_special_tokens=False)
        return found

    def inputs(self, form: str = "text") -> list[Any]:
        rows: list[Any] = []
        for prompt, talk, text in zip(PROMPTS, TALKS, TEXTS, strict=True):
            ids = [*self.ids(text), self.policy.eos_token_id]
            message = [{"role": "assistant", "content": text}]
            rows.append((prompt, text, ids) if form == "text" else (talk, message, ids))
        return rows

    def credit(self, inputs: list[Any]) -> list[Tensor]:
        return [self.offline(prompt, ids, [1] * len(ids))[1] for prompt, _, ids in inputs]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def spread(own: Tensor, part: Tensor, credits: list[Tensor], share: float) -> Tensor:
    """``[B, R + 1]``: the rest of each row is padding."""
    width = max(map(len, credits)) + 1
    rows = torch.zeros(len(credits), width, dtype=torch.float64)
    for i, credit in enumerate(credits):
        n = len(credit)
        rows[i, :n] = own[i] + part[i] * share * (n * credit - 1)
    return rows


def group_advantage(rewards: Tensor) -> Tensor:
    grouped = rewards.double().view(-1, GROUP)
    return ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["text", "messages"])
def test_an_advantage_is_spread_by_credit(world: World, form: str) -> None:
    inputs = world.inputs(form)
    model = AutoModelForSequenceClassification.from_pretrained(world.reward).eval()
    plain = world.trainer([model], FakeTrainer)
    plain.reward_processing_classes = [AutoTokenizer.from_pretrained(world.reward)]
    own = plain._generate_and_score_completions(inputs)["advantages"]
    trainer = world.trainer(credit=CreditModel(world.reward), dense_share=0.8)
    out = trainer._generate_and_score_completions(inputs)
    close(out["advantages"], spread(own, own, world.credit(inputs), 0.8))
    metrics = trainer._metrics["train"]
    entropies = [-float((c * c.clamp(min=1e-9).log()).sum()) for c in world.credit(inputs)]
    assert metrics["credit/entropy"] == pytest.approx([sum(entropies) / 4], rel=1e-4)
    assert metrics["credit/fallback"] == [0]
    assert list(trainer._logs["extra"]["credit/entropy"]) == pytest.approx(entropies, rel=1e-4)
    unspread = world.trainer(credit=CreditModel(world.reward), dense_share=0.0)
    assert torch.equal(unspread._generate_and_score_completions(inputs)["advantages"], own)


@pytest.mark.parametrize("form", ["text", "messages"])
def test_a_page_beside_the_completions_table(
    world: World, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each token is paid of the score, and of the advantage; a new one for what was generated since."""
    monkeypatch.setattr(FakeTrainer, "log_completions", True)
    inputs = world.inputs(form)
    trainer = world.trainer(credit=CreditModel(world.reward), dense_share=0.5)
    trainer.args, trainer.state = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(global_step=10)
    out = trainer._generate_and_score_completions(inputs)
    page = trainer._page
    trainer.log({})
    html = (tmp_path / "completions" / "completions_00010.html").read_text()
    assert html.count("<section id=") == 4
    score = trainer.given[:, 0].double()
    assert page is not None
    items = page.items(world.policy)
    for item, s, a, credit, (_, _, ids) in zip(
        items, score, out["advantages"].double(), world.credit(inputs), inputs, strict=True
    ):
        assert "".join(item.tokens) == world.policy.decode(ids, skip_special_tokens=True)
        assert item.score == pytest.approx(float(s))
        of_score, of_advantage = item.views
        assert sum(of_score.rewards) == pytest.approx(float(s), rel=1e-5)
        assert of_score.rewards[1] == pytest.approx(float(s * credit[0]), rel=1e-3, abs=1e-6)
        assert sum(of_advantage.rewards) == pytest.approx(float(a.sum() / len(ids)), rel=1e-4, abs=1e-6)
        assert of_score.metrics["entropy"] > 0
    trainer.state.global_step = 11
    trainer.log({})
    assert len(list((tmp_path / "completions").iterdir())) == 1


def test_without_credit_it_is_trls(world: World) -> None:
    trainer = world.trainer([lambda completions: [1.0, 0.0, 2.0, 2.0]])
    out = trainer._generate_and_score_completions(world.inputs())
    assert out["advantages"].shape == (4,)
    assert not trainer._metrics["train"]


@pytest.mark.parametrize("scale", ["group", True, "none", False])
def test_rules_stay_uniform(world: World, scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTrainer, "scale_rewards", scale)
    inputs = world.inputs()

    def rule(completions: Any) -> list[float | None]:
        return [1.0, None, 0.5, 2.0]

    trainer = world.trainer([rule, world.reward], credit=CreditModel(world.reward), dense_share=0.5)
    trainer.reward_weights = torch.tensor([1.0, 2.0])
    out = trainer._generate_and_score_completions(inputs)
    weighted = (trainer.given * trainer.reward_weights).nan_to_num().double()
    sums = (weighted.sum(1), weighted[:, 1])
    own, part = (x - x.view(-1, GROUP).mean(1).repeat_interleave(GROUP) for x in sums)
    if scale in ("group", True):
        std = weighted.sum(1).view(-1, GROUP).std(1).repeat_interleave(GROUP) + 1e-4
        own, part = own / std, part / std
    close(out["advantages"], spread(own, part, world.credit(inputs), 0.5))


def test_leave_one_out(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTrainer, "scale_rewards", "none")
    inputs = world.inputs()
    options = {"credit": CreditModel(world.reward), "dense_share": 0.5}
    trainer = world.trainer(baseline="leave_one_out", **options)
    out = trainer._generate_and_score_completions(inputs)
    r = trainer.given[:, 0].double()
    own = torch.stack([r[0] - r[1], r[1] - r[0], r[2] - r[3], r[3] - r[2]])
    close(out["advantages"], spread(own, own, world.credit(inputs), 0.5))
    assert list(trainer._logs["advantages"]) == pytest.approx(own.tolist(), rel=1e-5)
    rule = world.trainer([lambda completions: [3.0, 1.0, 0.0, 0.0]], baseline="leave_one_out")
    assert rule._generate_and_score_completions(inputs)["advantages"].tolist() == [2.0, -2.0, 0.0, 0.0]


def test_the_turns_around_a_tools(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run of the policy's tokens is a turn, found in its place though its words stand elsewhere too."""
    said = ["good film", "the plot", "the plot was good"]
    prompt = [{"role": "user", "content": "the plot"}]
    completion = [
        {"role": "assistant", "content": said[0]},
        {"role": "tool", "content": "the plot was good"},
        {"role": "assistant", "content": said[2]},
    ]
    end = world.policy.eos_token_id
    parts = [[*world.ids(said[0]), end], world.ids("tool the plot was good"), [*world.ids(said[2]), end]]
    ids = [i for part in parts for i in part]
    mask = [own for own, part in zip((1, 0, 1), parts, strict=True) for _ in part]
    inputs = [(prompt, completion, ids), (prompt, completion[:1], parts[0])] * 2
    rows = [mask, [1] * len(parts[0])] * 2
    tool_mask = torch.tensor([row + [0] * (len(ids) + 1 - len(row)) for row in rows])
    monkeypatch.setattr(FakeTrainer, "tool_mask", tool_mask)
    trainer = world.trainer([world.reward], credit=CreditModel(world.reward), dense_share=1.0)
    out = trainer._generate_and_score_completions(inputs)

    tokenizer, model = world.offline.tokenizer, world.offline.model
    text = tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    first, last = text.index(said[0]), text.rindex(said[2])
    owner: dict[int, int] = {}
    for part, low, token in ((parts[0], first, 0), (parts[2], last, len(parts[0]) + len(parts[1]))):
        for i, piece in enumerate(part):
            for _ in world.policy.decode([piece], skip_special_tokens=True):
                owner[low] = token + i
                low += 1
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    with torch.no_grad():
        attended = model(torch.tensor([encoded["input_ids"]]), output_attentions=True).attentions[-1]
    credit = torch.zeros(len(ids), dtype=torch.float64)
    for weight, (low, high) in zip(
        attended[0, :, -1].double().mean(0), encoded["offset_mapping"], strict=True
    ):
        owners = [owner[c] for c in range(low, high) if c in owner]
        for j in owners:
            credit[j] += weight / len(owners)
    credit /= credit.sum()
    own = out["advantages"][0, tool_mask[0] != 0].mean().item()
    close(out["advantages"][0, : len(ids)], own * sum(mask) * credit)
    assert trainer._metrics["train"]["credit/fallback"] == [0]


def test_what_the_reward_model_does_not_read_is_uniform_and_counted(world: World) -> None:
    inputs = world.inputs("messages")
    inputs[0] = (inputs[0][0], [{"role": "assistant", "content": "another text"}], inputs[0][2])
    trainer = world.trainer(credit=CreditModel(world.reward), dense_share=0.8)
    out = trainer._generate_and_score_completions(inputs)
    n = len(inputs[0][2])
    assert out["advantages"][0, :n].unique().numel() == 1
    assert out["advantages"][1].unique().numel() > 2
    assert trainer._metrics["train"]["credit/fallback"] == [0.25]


@pytest.mark.parametrize("source", ["attention", "leave_one_out"])
def test_a_completion_without_a_score_costs_no_other(world: World, source: Any) -> None:
    """As in TRL's own run: it has no advantage, and its group's others have theirs, with their credit."""
    inputs = world.inputs()
    model = AutoModelForSequenceClassification.from_pretrained(world.reward).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.reward)
    with torch.no_grad():  # in the third text alone
        model.get_input_embeddings().weight[tokenizer.encode(";", add_special_tokens=False)[0]] = torch.nan
    judge = CreditModel(model, tokenizer, source=source)
    trainer = world.trainer([model], credit=judge, dense_share=0.8)
    out = trainer._generate_and_score_completions(inputs)
    assert trainer.given[:, 0].isnan().tolist() == [False, False, True, False]
    assert out["advantages"].isfinite().all()
    assert not out["advantages"][2:].any()
    assert out["advantages"][0].unique().numel() > 2
    assert trainer._metrics["train"]["credit/fallback"] == [0.25]


@pytest.mark.parametrize("source", ["gradient_value", "relevance", "leave_one_out"])
def test_signed_weights_keep_the_mean_and_punish_what_lowered_the_score(world: World, source: Any) -> None:
    inputs = world.inputs()
    judge = CreditModel(world.reward, source=source)
    trainer = world.trainer(credit=judge, dense_share=0.8)
    out = trainer._generate_and_score_completions(inputs)
    scored = judge(PROMPTS, [ids for *_, ids in inputs], world.policy)
    torch.testing.assert_close(scored.score, trainer.given[:, 0], rtol=1e-4, atol=1e-5)
    for i, (*_, ids) in enumerate(inputs):
        n = len(ids)
        row, w = out["advantages"][i, :n].double(), scored.weights[i, :n].double()
        own = row.mean()
        w = w / w.abs().sum()
        close(row, own + 0.8 * own.abs() * n * (w - w.mean()))


def test_an_off_policy_completion_is_dropped_whole(world: World) -> None:
    """The tokens that signed credit puts above zero in a bad completion do not stay behind."""

    class Masking(FakeTrainer):
        @staticmethod
        def get_off_policy_mask(advantages: Tensor, kl: Tensor, mask: Tensor) -> Tensor:
            """TRL's, on a mean KL ``[B, 1]`` that is given: good, or near to the policy."""
            return ((advantages >= 0) | (kl <= 0.5)).to(mask.dtype)

    judge = CreditModel(world.reward, source="relevance")
    trainer = world.trainer(cls=shaped_grpo_trainer(Masking), credit=judge, dense_share=1.0)
    out = trainer._generate_and_score_completions(world.inputs())
    advantages, mask = out["advantages"], out["completion_mask"]
    own = group_advantage(trainer.given[:, 0])
    bad = own < 0
    assert (advantages[bad] > 0).any()  # so there is something to lose
    far, near = torch.full((4, 1), 1.0), torch.full((4, 1), 0.1)
    kept = trainer.get_off_policy_mask(advantages=advantages, kl=far, mask=mask)
    assert kept.expand_as(mask).bool().tolist() == (~bad)[:, None].expand_as(mask).tolist()
    assert trainer.get_off_policy_mask(advantages, near, mask).bool().all()
    flat = own[:, None].float()  # with nothing spread TRL's own tensor comes through
    assert trainer.get_off_policy_mask(flat, far, mask).bool()[:, 0].tolist() == (~bad).tolist()


def test_functions_are_restored_after_an_error(world: World) -> None:
    def fails(completions: Any) -> list[float]:
        raise OSError("no sandbox")

    funcs = [world.reward, fails]
    trainer = world.trainer(funcs, credit=CreditModel(world.reward))
    before = list(trainer.reward_funcs), list(trainer.reward_processing_classes)
    with pytest.raises(OSError, match="no sandbox"):
        trainer._generate_and_score_completions(world.inputs())
    assert (trainer.reward_funcs, trainer.reward_processing_classes) == before
    assert funcs == [world.reward, fails]


def test_advantages_made_otherwise_are_refused(world: World) -> None:
    class Changed(FakeTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            out = super()._generate_and_score_completions(inputs)
            return out | {"advantages": out["advantages"] + 0.1}

    trainer = world.trainer(cls=shaped_grpo_trainer(Changed), credit=CreditModel(world.reward))
    with pytest.raises(RuntimeError, match=r"TRL's advantage of completion \d is .*another version of TRL"):
        trainer._generate_and_score_completions(world.inputs())


@pytest.fixture
def sequence_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTrainer, "importance_sampling_level", "sequence")


@pytest.mark.usefixtures("sequence_level")
def test_gspo_is_refused_with_credit_only(world: World) -> None:
    with pytest.raises(ValueError, match=r"importance_sampling_level: got 'sequence' \(GSPO\)"):
        world.trainer(credit=CreditModel(world.reward))
    world.trainer()


def test_what_does_not_fit_is_refused(world: World) -> None:
    judge = CreditModel(world.reward)
    with pytest.raises(ValueError, match=r"must be one of reward_funcs, once, got \['<lambda>'\]"):
        world.trainer([lambda completions: []], credit=judge)
    with pytest.raises(ValueError, match="must be one of reward_funcs, once"):
        world.trainer([world.reward, world.reward], credit=judge)
    with pytest.raises(ValueError, match="TRL's score is the first logit"):
        world.trainer(credit=CreditModel(world.reward, score_fn="2 * logit"))
    with pytest.raises(ValueError, match="got signed and unsigned sources"):
        world.trainer(credit=[judge, CreditModel(world.reward, source="gradient_value")])
    with pytest.raises(ValueError, match="baseline: got 'median', want 'mean' or 'leave_one_out'"):
        world.trainer(baseline="median")
    with pytest.raises(ValueError, match=r"dense_share: got 2"):
        world.trainer(credit=judge, dense_share=2)

    class Changed(FakeTrainer):
        def _calculate_rewards(self, inputs: Any) -> Tensor:  # type: ignore[override]
            return torch.zeros(0)

    with pytest.raises(RuntimeError, match=r"_calculate_rewards takes \(self, inputs\), want"):
        shaped_grpo_trainer(Changed)


@pytest.mark.parametrize("found", ["0.11.4", "0.29.1"])
def test_older_versions_are_refused(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnshape.integrations.framework.version", lambda name: found)
    with pytest.raises(RuntimeError, match=rf"trl {found} is not supported, want trl 1.0 or later"):
        _ = trl.GRPOTrainer


def test_a_missing_trl_is_said() -> None:
    with pytest.raises(RuntimeError, match=r"trl is not installed, want trl 1.0 or later"):
        _ = trl.GRPOTrainer
