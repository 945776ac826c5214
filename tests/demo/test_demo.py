import io
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.processes import FORK, like_spawned, start
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

import attnshape
from attnshape.demo.config import DemoConfig
from attnshape.demo.corpus import EOS
from attnshape.demo.models import (
    POLICY,
    REWARD_MODEL,
    ModelConfig,
    TrainingMetrics,
    held_out_accuracy,
    trained_models,
)
from attnshape.demo.ppo import Completion, PPOConfig, Record, Rollout, train
from attnshape.demo.run import (
    REVIEWS_TRUTH,
    Setup,
    read_prompts,
    review_prompts,
    run_demo,
)

MODELS = ModelConfig(
    hidden_size=32,
    reviews=1500,
    review_words=(10, 16),
    lm_steps=200,
    pair_words=(4, 16),
    rm_steps=300,
    rm_lr=3e-3,
    held_out_pairs=1000,
)
PPO = PPOConfig(steps=40, new_tokens=12, min_new_tokens=8, lr=2e-3)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def trained(cache_dir: Path) -> tuple[Path, TrainingMetrics]:
    folder, metrics, cached = trained_models(MODELS, cache_dir)
    assert not cached
    return folder, metrics


@pytest.fixture(scope="module")
def setup(trained: tuple[Path, TrainingMetrics]) -> Setup:
    folder, _ = trained
    return Setup(
        str(folder / POLICY), str(folder / REWARD_MODEL), review_prompts(0), "logit", "cpu", REVIEWS_TRUTH
    )


@pytest.fixture
def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_reward_model_learns_but_not_everything(trained: tuple[Path, TrainingMetrics]) -> None:
    folder, metrics = trained
    assert 0.68 < metrics.accuracy < 0.95
    untrained = GPT2ForSequenceClassification(GPT2Config.from_pretrained(folder / REWARD_MODEL)).eval()
    assert held_out_accuracy(untrained, MODELS)[0] < 0.6


def test_cache_is_reused_and_keyed_by_the_configuration(
    trained: tuple[Path, TrainingMetrics], cache_dir: Path
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("trained again")

    assert trained_models(MODELS, cache_dir, fail) == (*trained, True)
    with pytest.raises(AssertionError, match="trained again"):
        trained_models(replace(MODELS, rm_lr=2 * MODELS.rm_lr), cache_dir, fail)


def test_interrupted_training_leaves_no_folder(tmp_path: Path) -> None:
    def interrupt(stage: str, step: int, _: float) -> None:
        if stage == "reward model":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_models(replace(MODELS, lm_steps=1, rm_steps=2, reviews=300), tmp_path / "cache", interrupt)
    assert not list(tmp_path.rglob("*.safetensors"))


def assert_records(records: list[Record], completions: list[Completion]) -> None:
    assert abs(records[0]["kl"]) < 1e-3  # the policy is its own reference at first
    assert records[-1]["kl"] > 0
    assert all(PPO.shortest <= r["length"] <= PPO.new_tokens and 0 <= r["end_mass"] < 1 for r in records)
    for completion in completions:
        assert len(completion.tokens) == len(completion.credit)
        assert sum(completion.credit) == pytest.approx(1, abs=1e-5)
        words = (completion.prompt + "".join(completion.tokens)).replace(EOS, "").split()
        assert completion.true_reward == pytest.approx(REVIEWS_TRUTH.reward(words))


def test_true_reward_rises(setup: Setup) -> None:
    mean, std, initial, _ = setup.reference(PPO)
    actor, judge = replace(setup, mean=mean, std=std).load()
    records, completions = train(actor, judge, setup.prompts, PPO, method="ABC", seed=11, truth=setup.truth)
    assert initial is not None
    assert sum(r["true_reward"] for r in records[-10:]) / 10 > initial + 0.5
    assert sum(r["score"] for r in records[-10:]) / 10 > 0.5
    assert min(r["credit_entropy"] for r in records) > 0.5
    assert_records(records, completions)


def test_a_sparse_score_is_the_last_tokens(setup: Setup) -> None:
    actor, judge = setup.load()
    ppo = replace(PPO, steps=3)
    records, completions = train(
        actor, judge, setup.prompts, ppo, method="sparse", seed=11, truth=setup.truth
    )
    assert [r["credit_entropy"] for r in records] == [0, 0, 0]
    assert all(completion.credit[-1] == 1 for completion in completions)
    assert_records(records, completions)


def test_log_probabilities_are_those_of_the_sampling_distribution(setup: Setup) -> None:
    torch.manual_seed(0)
    actor, _ = setup.load()
    with torch.no_grad():  # an end-of-text so likely that suppressing it matters
        actor.policy.transformer.wte.weight[actor.end_ids] *= 3
    prompts = ["the plot was", "the story is about a family", "everyone"]
    rollout = actor.sample(prompts, 12, 8)
    with torch.no_grad():
        logprobs, values, end_mass = actor(rollout, 8)
    for b in range(len(prompts)):
        mask = rollout.mask[b].bool()
        ids = rollout.ids[b, mask][None]
        n = int(rollout.response_mask[b].sum())
        with torch.no_grad():
            logits = actor.policy(input_ids=ids).logits[0, -n - 1 : -1].double()
        assert end_mass[b, :n] == pytest.approx(logits.softmax(-1)[:, actor.end_ids[0]].float(), rel=1e-4)
        assert end_mass[b, :8].max() > 0.01
        logits[:8, actor.end_ids[0]] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, ids[0, -n:, None]).squeeze(1)
        assert logprobs[b, :n].double() == pytest.approx(expected, abs=1e-4)
    assert logprobs.shape == values.shape == rollout.response_mask.shape


def test_sampling_ignores_the_models_own_settings(setup: Setup, tmp_path: Path) -> None:
    actor, _ = setup.load()
    actor.policy.generation_config.update(do_sample=True, temperature=0.01, top_p=0.1, repetition_penalty=1.5)
    actor.policy.save_pretrained(tmp_path)
    actor.tokenizer.save_pretrained(tmp_path)
    greedy, _ = replace(setup, policy=str(tmp_path)).load()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.temperature == 0.01
    plain, _ = setup.load()
    torch.manual_seed(0)
    expected = plain.sample(["the plot was"] * 8, 12, 8)
    torch.manual_seed(0)
    assert torch.equal(greedy.sample(["the plot was"] * 8, 12, 8).ids, expected.ids)


def test_responses_end_at_end_of_text(setup: Setup) -> None:
    torch.manual_seed(0)
    actor, _ = setup.load()
    rollout = actor.sample(review_prompts(1)[:64], 16, 4)
    end = actor.end_ids[0]
    lengths = rollout.response_mask.sum(1)
    assert 4 < lengths.min() < lengths.max()
    for response, n in zip(rollout.responses.tolist(), lengths.tolist(), strict=True):
        assert end not in response[: n - 1]
        assert n == len(response) or response[n - 1] == end


def eager_credit(model: torch.nn.Module, ids: torch.Tensor, responses: int) -> torch.Tensor:
    """Head mean of the last layer's last row over the last tokens, which end an unpadded sequence."""
    with torch.no_grad():
        attention = model(input_ids=ids, output_attentions=True).attentions[-1]
    row = attention[0].double().mean(0)[-1, -responses:]
    return row / row.sum()


def test_judge_credits_what_eager_attention_shows(setup: Setup) -> None:
    torch.manual_seed(1)
    actor, judge = setup.load()
    rollout = actor.sample(["the plot was", "the story is about a family", "everyone"], 14, 6)
    judged = judge(rollout, "ABC")
    response = attnshape.Response(rollout.response_mask, start=judged.response_start)
    out = attnshape.shape_rewards(judged.score, judged.credit, response)
    eager = AutoModelForSequenceClassification.from_pretrained(
        setup.reward_model, attn_implementation="eager"
    )
    eager.eval()
    for b in range(3):
        ids = rollout.ids[b, rollout.mask[b].bool()][None]
        n = int(rollout.response_mask[b].sum())
        with torch.no_grad():
            score = eager(input_ids=ids).logits[0, 0]
        assert judged.score[b].item() == pytest.approx(score.item(), abs=1e-4)
        assert out.credit[b, :n].double() == pytest.approx(eager_credit(eager, ids, n), abs=1e-5)
        assert not out.credit[b, n:].any()


TEXTS = [" ".join(review_prompts(7)), "Whatever the film was, it was long; nobody laughed, héros included."]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy without a pad token and a two-label reward model of another family, tokenizers different."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    for name, size in (("policy", 400), ("reward_model", 300)):
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(TEXTS, vocab_size=size, special_tokens=["<end>"], show_progress=False)
        pad = {"pad_token": "<end>"} if name == "reward_model" else {}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>", **pad)
        tokenizer.save_pretrained(folder / name)
        if name == "policy":
            GPT2LMHeadModel(
                GPT2Config(
                    vocab_size=size,
                    n_positions=96,
                    n_embd=32,
                    n_layer=1,
                    n_head=2,
                    bos_token_id=0,
                    eos_token_id=0,
                )
            ).save_pretrained(folder / name)
        else:
            LlamaForSequenceClassification(
                LlamaConfig(
                    vocab_size=size,
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    num_labels=2,
                    pad_token_id=None,
                )
            ).save_pretrained(folder / name)
    lines = [json.dumps({"prompt": text}) for text in ("The film was", "Nobody laughed", "héros")]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_any_saved_models_run(foreign: Path, tmp_path: Path, quiet: Console) -> None:
    config = DemoConfig(
        policy=str(foreign / "policy"),
        reward_model=str(foreign / "reward_model"),
        prompts=foreign / "prompts.jsonl",
        score_fn="logit[1] - logit[0]",
        seeds=(5,),
        ppo=PPOConfig(steps=2, batch_size=4, new_tokens=10, min_new_tokens=3),
        standardize=False,
        out=tmp_path / "out",
    )
    results = run_demo(config, quiet)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["initial_true_reward"] is None
    assert [(run["method"], run["seed"]) for run in saved["runs"]] == [("sparse", 5), ("ABC", 5)]
    for run in saved["runs"]:
        assert {"score", "kl", "end_mass"} <= run["curves"].keys()
        assert not {"true_reward", "precision_at_k", "auc"} & run["curves"].keys()
        assert all(len(curve) == 2 for curve in run["curves"].values())
    assert "true" not in quiet.file.getvalue()  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "credit.html").is_file()
    assert (tmp_path / "out" / "learning_curves.png").is_file()
    assert len(results.runs) == 2


def test_a_model_without_a_trained_head_is_refused(foreign: Path, tmp_path: Path, quiet: Console) -> None:
    config = DemoConfig(
        policy=str(foreign / "policy"),
        reward_model=str(foreign / "policy"),
        prompts=foreign / "prompts.jsonl",
        seeds=(5,),
        out=tmp_path / "out",
    )
    with pytest.raises(ValueError, match="is no reward model: it lacks score"):
        run_demo(config, quiet)
    assert not (tmp_path / "out").exists()


def test_credit_crosses_tokenizers(foreign: Path) -> None:
    torch.manual_seed(2)
    setup = Setup(
        str(foreign / "policy"), str(foreign / "reward_model"), ("x",), "logit[1] - logit[0]", "cpu", None
    )
    actor, judge = setup.load()
    policy_tokenizer, tokenizer = actor.tokenizer, judge.tokenizer
    assert policy_tokenizer.get_vocab() != tokenizer.get_vocab()
    texts = [("The film was", ", it was long"), ("Nobody", " laughed, the film included.")]
    prompts = [policy_tokenizer(a)["input_ids"] for a, _ in texts]
    responses = [policy_tokenizer(b)["input_ids"] for _, b in texts]
    p, r = max(map(len, prompts)), max(map(len, responses))
    ids = torch.tensor(
        [[0] * (p - len(a)) + a + b + [0] * (r - len(b)) for a, b in zip(prompts, responses, strict=True)]
    )
    response_mask = torch.tensor([[True] * len(b) + [False] * (r - len(b)) for b in responses])
    prompt_mask = torch.tensor([[False] * (p - len(a)) + [True] * len(a) for a in prompts])
    rollout = Rollout(ids, torch.cat([prompt_mask, response_mask], 1).long(), response_mask)
    judged = judge(rollout, "ABC")

    model = AutoModelForSequenceClassification.from_pretrained(
        foreign / "reward_model", attn_implementation="eager"
    ).eval()
    model.config.pad_token_id = 0
    for b, (prompt, response) in enumerate(texts):
        text = prompt + response
        encoded = tokenizer(text, return_offsets_mapping=True, return_tensors="pt")
        source = encoded.pop("offset_mapping")[0].tolist()
        with torch.no_grad():
            logits = model(**encoded).logits[0]
        assert judged.score[b].item() == pytest.approx((logits[1] - logits[0]).item(), abs=1e-5)
        in_response = [j for j, (_, end) in enumerate(source) if end > len(prompt)]
        per_token = eager_credit(model, encoded["input_ids"], len(in_response)).tolist()
        per_character = [0.0] * len(text)
        for j, weight in zip(in_response, per_token, strict=True):
            start, end = max(source[j][0], len(prompt)), source[j][1]
            for c in range(start, end):
                per_character[c] += weight / (end - start)
        spans = policy_tokenizer(response, return_offsets_mapping=True)["offset_mapping"]
        expected = [sum(per_character[len(prompt) + i : len(prompt) + j]) for i, j in spans]
        assert judged.credit[b, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)
        assert not judged.credit[b, len(expected) :].any()


def test_whole_run_from_the_cache(
    cache_dir: Path, trained: object, tmp_path: Path, quiet: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: FORK)
    config = DemoConfig(
        seeds=(3, 4),
        ppo=replace(PPO, steps=3),
        models=MODELS,
        cache_dir=cache_dir,
        out=tmp_path / "out",
        workers=2,
    )
    results = run_demo(config, quiet)
    text = quiet.file.getvalue()  # type: ignore[attr-defined]
    assert "(cached)" in text
    for words in ("initial", "sparse", "ABC", "held-out accuracy", "Wall time", "P@k"):
        assert words in text
    assert text.count(" 3/3 ") == 4  # no bar is left short
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(run["method"], run["seed"]) for run in saved["runs"]] == [
        ("sparse", 3),
        ("ABC", 3),
        ("sparse", 4),
        ("ABC", 4),
    ]
    assert saved["initial_true_reward"] == results.initial_true_reward
    assert saved["versions"]["torch"] == torch.__version__
    # a seed's first batch does not depend on the method, nor on the process that ran it
    first = [run["curves"]["true_reward"][0] for run in saved["runs"]]
    assert first[0] == first[1] != first[2] == first[3]


def group_runs(pgid: int) -> bool:
    """Whether a process of the group still runs; one that nobody has reaped does not."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == pgid and state != "Z":
            return True
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def run_on_terminal(config: DemoConfig, output: Path, errors: Path) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is born without it
    with output.open("w", buffering=1) as terminal, errors.open("w", buffering=1) as sys.stderr:
        run_demo(config, Console(file=terminal, force_terminal=True, width=150))


@pytest.mark.parametrize(
    ("workers", "how", "kind"),
    [(1, "ctrl-c", "fork"), (2, "ctrl-c", "like spawn"), (2, "parent killed", "fork")],
)
def test_interrupted_run(
    cache_dir: Path,
    trained: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    how: str,
    kind: str,
) -> None:
    context = FORK if kind == "fork" else like_spawned("attnshape.demo.run")
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    out, output, errors = tmp_path / "out", tmp_path / "output", tmp_path / "errors"
    config = DemoConfig(
        seeds=(0, 1),
        workers=workers,
        models=MODELS,
        cache_dir=cache_dir,
        out=out,
        ppo=replace(PPO, steps=100000),
    )
    cached = sorted(cache_dir.rglob("*"))
    process = start(run_on_terminal, config, output, errors)
    assert process.pid is not None
    try:
        while not (output.is_file() and "KL" in output.read_text()):
            assert process.is_alive(), errors.read_text()
            time.sleep(0.05)
        if how == "ctrl-c":
            os.killpg(process.pid, signal.SIGINT)
            process.join(300)
            assert process.exitcode == 130
            assert "Interrupted" in output.read_text()
            assert "Traceback" not in errors.read_text()
        else:
            process.kill()  # joining it would wait for its workers too
        deadline = time.monotonic() + 120
        while group_runs(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not group_runs(process.pid)  # no worker is left, nor what multiprocessing runs beside them
    finally:
        if group_runs(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
    assert not list(out.rglob("*"))
    assert sorted(cache_dir.rglob("*")) == cached


def test_prompts_file(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("one\n\ntwo words\n")
    assert read_prompts(text) == ("one", "two words")
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "one"}\n\n{"prompt": "two", "id": 3}\n')
    assert read_prompts(lines) == ("one", "two")
    for bad in ('{"text": "x"}', "[1]", "no json", '{"prompt": 3}'):
        lines.write_text('{"prompt": "one"}\n' + bad)
        with pytest.raises(ValueError, match="line 2"):
            read_prompts(lines)
    text.write_text("\n")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"new_tokens": 8, "min_new_tokens": 9}, "min_new_tokens"),
        ({"new_tokens": 8, "min_new_tokens": -1}, "min_new_tokens"),
    ],
)
def test_ppo_errors_name_the_argument(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)  # type: ignore[arg-type]


def test_shortest_completion_follows_the_longest() -> None:
    assert PPOConfig(new_tokens=60).shortest == 40
    assert PPOConfig(new_tokens=60, min_new_tokens=0).shortest == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "x"}, "reward_model, prompts"),
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"methods": ("dense",)}, "methods"),
        ({"workers": 0}, "workers"),
    ],
)
def test_configuration_errors_name_the_argument(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DemoConfig(**options)  # type: ignore[arg-type]
