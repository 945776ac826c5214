"""OpenRLHF's own trainer and reward workers in Ray: token rewards are the credit of eager attention."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from parity.openrlhf_loop import COMPARED
from parity.openrlhf_on_gpu import arguments
from parity.toys import CORPUS, save_policy, small_llama
from torch import Tensor
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

pytestmark = pytest.mark.filterwarnings("ignore")

HERE = Path(__file__).parent
DENSE_SHARE = 0.7
ON, OFF = str(DENSE_SHARE), "off"
CLIP = (-4.2, 10.0)
SETTINGS = [(packing, estimator) for packing in (False, True) for estimator in ("gae", "reinforce")]


def rollout(
    tokenizer: Any, user: str, turns: list[tuple[str, int]], left_padding: int = 0
) -> dict[str, Tensor]:
    """A conversation in the policy's chat template; 1 marks the policy's turns, 0 a tool's."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    messages = [{"role": "user", "content": user}]
    prompt = encode(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    ids, mask = [tokenizer.pad_token_id] * left_padding + prompt, [0] * (left_padding + len(prompt))
    for text, policy in turns:
        ids += encode(text)
        mask += [policy] * (len(ids) - len(mask))
    attention = [0] * left_padding + [1] * (len(ids) - left_padding)
    return {
        "sequences": torch.tensor(ids),
        "attention_mask": torch.tensor(attention),
        "action_mask": torch.tensor(mask[1:]),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("openrlhf")
    tokenizer = save_policy(folder / "policy")
    torch.manual_seed(0)
    config = small_llama(tokenizer, max_position_embeddings=256, initializer_range=0.5)
    LlamaForSequenceClassification(config).save_pretrained(folder / "reward")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"input": line}) + "\n" for line in CORPUS[:2]))
    rollouts = [
        rollout(tokenizer, "Was the film any good?", [("It was not bad, but the ending was weak.", 1)]),
        rollout(
            tokenizer,
            CORPUS[0],
            [
                ("Let me look that up.<|im_end|>", 1),
                ("\n<|im_start|>tool\nThe search found three reviews<|im_end|>\n<|im_start|>assistant\n", 0),
                ("All of them good.<|im_end|>", 1),
            ],
        ),
        rollout(tokenizer, "Good?", [("Yes", 1)]),
        rollout(tokenizer, "And the actors?", [("Superb, all of them!<|im_end|>", 1)], left_padding=5),
        rollout(tokenizer, "The end?", [("Weak, I was told.", 1), (" and a tool has the last word", 0)]),
    ]
    torch.save(rollouts, folder / "rollouts.pt")
    return folder


def environment() -> dict[str, str]:
    paths = [HERE / "openrlhf_stubs", *HERE.parents[:2]]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def made(folder: Path) -> dict[str, Any]:
    """What OpenRLHF made of the rollouts without the adapter, and with it."""
    for share in (OFF, ON):
        command = [sys.executable, HERE / "openrlhf_loop.py", folder, share]
        ran = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-8000:]
        (folder / f"said-{share}.txt").write_text(ran.stdout)
    return {share: torch.load(folder / f"made-{share}.pt") for share in (OFF, ON)}


@pytest.fixture(scope="module")
def offline(folder: Path) -> list[tuple[float, Tensor]]:
    """Score, and credit ``[T - 1]`` float64 of the actions, of each rollout alone, by eager attention."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "reward", attn_implementation="eager", dtype=torch.bfloat16
    )
    model = model.float().eval()
    found = []
    for rollout in torch.load(folder / "rollouts.pt"):
        real = rollout["attention_mask"] != 0
        with torch.no_grad():
            out = model(rollout["sequences"][real][None], output_attentions=True)
        row = torch.zeros(len(real), dtype=torch.float64)
        row[real] = out.attentions[-1][0].double().mean(0)[-1]
        credit = row[1:] * rollout["action_mask"]
        found.append((out.logits[0, 0].item(), credit / credit.sum()))
    return found


def rows(made: dict[str, Any], name: str) -> list[Tensor]:
    """The tensor of every rollout, in their order; micro-batches keep it."""
    return [row for experience in made["experiences"] for row in experience[name]]


@pytest.mark.parametrize("setting", SETTINGS)
def test_token_rewards_are_the_offline_credit(
    made: dict[str, Any], offline: list[tuple[float, Tensor]], setting: tuple[bool, str]
) -> None:
    on, off = made[ON][setting], made[OFF][setting]
    assert on["process"] != made[ON]["driver"]
    assert [len(e["sequences"]) for e in on["experiences"]] == [3, 2]
    masks = rows(on, "action_mask")
    token_rewards = [row for batch in on["token_rewards"] for row in batch]
    theirs = [row for batch in off["token_rewards"] for row in batch]
    clipped = 0
    for mask, found, sparse, (score, credit) in zip(masks, token_rewards, theirs, offline, strict=True):
        n = len(credit)
        clipped += score < CLIP[0]
        spread = min(max(score, CLIP[0]), CLIP[1])
        last = int(mask.nonzero()[-1])
        expected = sparse.double()  # OpenRLHF's own KL penalty, and the score in one place
        expected[last] -= spread * DENSE_SHARE
        expected[:n] += DENSE_SHARE * spread * credit
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)
    assert 0 < clipped < len(offline)


@pytest.mark.parametrize("setting", SETTINGS)
def test_advantages_are_openrlhfs_recurrence(made: dict[str, Any], setting: tuple[bool, str]) -> None:
    on = made[ON][setting]
    masks, advantages, returns = (rows(on, name) for name in ("action_mask", "advantages", "returns"))
    token_rewards = [row for batch in on["token_rewards"] for row in batch]
    raw = []
    for i, (mask, reward) in enumerate(zip(masks, token_rewards, strict=True)):
        live = (mask != 0).double()
        reward = reward.double() * live
        value = rows(on, "values")[i].double() * live if setting[1] == "gae" else torch.zeros_like(reward)
        decay = 0.95 if setting[1] == "gae" else 1.0
        ahead, next_value, found = 0.0, 0.0, []
        for r, v in zip(reward.flip(0).tolist(), value.flip(0).tolist(), strict=True):
            ahead, next_value = r + next_value - v + decay * ahead, v
            found.append(ahead)
        raw.append(torch.tensor(found).double().flip(0))
        torch.testing.assert_close(returns[i].double() * live, (raw[i] + value) * live, rtol=1e-5, atol=1e-5)
    every = torch.cat([x[mask != 0] for x, mask in zip(raw, masks, strict=True)])
    mean, deviation = every.mean(), every.var(correction=0).sqrt()
    for x, mask, found in zip(raw, masks, advantages, strict=True):
        torch.testing.assert_close(
            found[mask != 0].double(), ((x - mean) / deviation)[mask != 0], rtol=1e-4, atol=1e-4
        )


def compared(estimator: str, scores: Tensor) -> Tensor:
    """Advantages of one group of completions, clipped."""
    n = len(scores)
    if estimator == "rloo":
        found = scores - (scores.sum() - scores) / (n - 1)
    elif estimator == "group_norm":
        found = (scores - scores.mean()) / (scores.std() + 1e-9)
    else:
        found = scores - scores.mean()
    return found.clamp(*CLIP)


def check_advantages(made: dict[str, Any], want: list[Tensor], whitened: bool) -> None:
    """``want``: before whitening, of each rollout's actions."""
    masks = rows(made, "action_mask")
    if whitened:
        every = torch.cat([x[mask != 0] for x, mask in zip(want, masks, strict=True)])
        deviation = every.var(correction=0).sqrt()
        want = [(x - every.mean()) / deviation for x in want]
    for mask, x, found in zip(masks, want, rows(made, "advantages"), strict=True):
        torch.testing.assert_close(found[mask != 0].double(), x[mask != 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", COMPARED)
def test_compared_completions(
    made: dict[str, Any], offline: list[tuple[float, Tensor]], estimator: str
) -> None:
    """Nothing spread is OpenRLHF's own to the bit; spread, the mean stays; as rewards, it is paid in turn."""
    off, whitened = made[OFF][estimator, None], estimator == "reinforce_baseline"
    none = made[ON][estimator, (0.0, "advantages")]
    spread, default, rewards = (
        made[ON][estimator, key] for key in ((DENSE_SHARE, "advantages"), None, (DENSE_SHARE, "rewards"))
    )
    for name in ("advantages", "returns", "rewards"):
        for ours, theirs, given, said in zip(
            *[rows(x, name) for x in (none, off, default, spread)], strict=True
        ):
            assert torch.equal(ours, theirs)
            assert torch.equal(given, said)
    own = compared(estimator, torch.tensor([score for score, _ in offline]).double())
    theirs = [row.double() for row in rows(off, "returns")]  # with KL to go
    masks = [mask.double() for mask in rows(off, "action_mask")]
    want, paid = [], []
    for a, row, mask, (_, credit) in zip(own, theirs, masks, offline, strict=True):
        credit = torch.cat([credit, torch.zeros(len(mask) - len(credit)).double()])
        want.append(row + a * DENSE_SHARE * (mask.sum() * credit - 1) * mask)
        paid.append(row + a * DENSE_SHARE * (credit.flip(0).cumsum(0).flip(0) - 1))
    check_advantages(spread, want, whitened)
    check_advantages(rewards, paid, whitened)
    means = [
        [(x * mask).sum() / mask.sum() for x, mask in zip(each, masks, strict=True)]
        for each in (theirs, want)
    ]
    torch.testing.assert_close(*map(torch.stack, means))


def test_scores_are_openrlhfs(made: dict[str, Any], offline: list[tuple[float, Tensor]]) -> None:
    for setting in SETTINGS:
        on, off = (made[share][setting] for share in (ON, OFF))
        scores = [torch.cat([e["rewards"] for e in x["experiences"]]) for x in (on, off)]
        logged = torch.cat([e["info"]["reward"] for e in on["experiences"]])
        assert torch.equal(*scores)
        assert torch.equal(logged, scores[0])
        torch.testing.assert_close(
            scores[0].double(), torch.tensor([s for s, _ in offline]).double(), atol=1e-5, rtol=1e-4
        )


def test_what_is_logged(made: dict[str, Any], offline: list[tuple[float, Tensor]]) -> None:
    experiences = made[ON][False, "gae"]["experiences"]
    assert not any("attention_row" in e for e in experiences)
    entropy = torch.cat([e["info"]["credit_entropy"] for e in experiences])
    expected = torch.stack([torch.special.entr(credit).sum() for _, credit in offline])
    torch.testing.assert_close(entropy.double(), expected, rtol=1e-5, atol=1e-6)
    for name in ("credit_last_share", "credit_fallback", "response_attention"):
        assert all(e["info"][name].shape == e["rewards"].shape for e in experiences)
    assert not any(bool(e["info"]["credit_fallback"].any()) for e in experiences)


def test_off_is_openrlhfs_own(made: dict[str, Any]) -> None:
    for setting in SETTINGS:
        assert made[OFF][setting]["maker"] == "RemoteExperienceMaker"
        assert made[ON][setting]["maker"] == "ShapedExperienceMaker"
        keys = [set(e["info"]) for e in made[OFF][setting]["experiences"]]
        assert all("credit_entropy" not in found for found in keys)
    assert made[OFF]["asynchronous"] == [False, False]


def test_what_reaches_the_asynchronous_trainer(made: dict[str, Any]) -> None:
    assert made[ON]["asynchronous"] == [False, True]


def test_one_line_says_what_changed(made: dict[str, Any], folder: Path) -> None:
    said = [line for line in (folder / f"said-{ON}.txt").read_text().splitlines() if "attnshape" in line]
    assert len(said) == 1
    assert "OpenRLHF 0.11.2's RewardModelActor, PPOTrainer, TrainingActor spread 0.7" in said[0]
    assert "attnshape" not in (folder / f"said-{OFF}.txt").read_text()


@pytest.mark.parametrize(
    "name", ["ring_attn_size", "tensor_parallel_size", "remote_url", "agent_func_path", "late"]
)
def test_refused_before_training(made: dict[str, Any], name: str) -> None:
    assert (name if name != "late" else "install() before that") in made[ON][name]


def test_the_command_reaches_openrlhf_with_its_arguments(folder: Path) -> None:
    """Up to the first line of OpenRLHF's ``train``, which wants a GPU, with the arguments given there."""
    code = """
import sys
import ray
from attnshape.integrations import openrlhf
from parity.openrlhf_loop import is_ours

def started():
    from openrlhf.trainer.ray.launcher import RewardModelActor
    frame = sys._getframe(1)
    forward = RewardModelActor.__ray_metadata__.modified_class.forward
    size = frame.f_locals["args"].rollout.micro_batch_size
    print(frame.f_code.co_name, size, is_ours(forward))
    sys.exit(7)

ray.is_initialized = started
openrlhf.main()
"""
    command = [sys.executable, "-c", code, "--abc.dense_share", "0.6", *arguments(folder)]
    ran = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert ran.returncode == 7, ran.stderr[-4000:]
    assert "spread 0.6 of each score" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "train 3 True"
