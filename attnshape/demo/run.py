"""The demo from end to end: train or load the models, run PPO for every method and seed, report."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import random
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from attnshape.demo.bars import bars_on
from attnshape.demo.config import DemoConfig
from attnshape.demo.corpus import leave_one_out, true_reward, write_review
from attnshape.demo.models import (
    POLICY,
    REWARD_MODEL,
    Stage,
    TrainingMetrics,
    default_cache_dir,
    trained_models,
)
from attnshape.demo.ppo import ActorCritic, Judge, Method, PPOConfig, Record, Truth, train
from attnshape.demo.results import Results, Run, write_results
from attnshape.text.load import load_reward_model
from attnshape.text.score_fn import parse_score_fn

REFERENCE_SAMPLES = 256
"""Completions of the initial policy whose scores set the reward's zero and unit."""
PROMPTS, PROMPT_WORDS = 512, (2, 6)
REVIEWS_TRUTH = Truth(true_reward, leave_one_out)


class Reference(NamedTuple):
    """Mean and standard deviation of the initial policy's scores and true rewards, None if unknown."""

    mean: float
    std: float
    true_mean: float | None
    true_std: float | None


@dataclass(frozen=True)
class Setup:
    """What a run needs to load its models; it can be sent to another process."""

    policy: str
    reward_model: str
    prompts: tuple[str, ...]
    score_fn: str
    device: str
    truth: Truth | None
    mean: float = 0.0
    std: float = 1.0

    def load(self) -> tuple[ActorCritic, Judge]:
        """The policy with a new value head, and the reward model that judges it."""
        policy = AutoModelForCausalLM.from_pretrained(self.policy, dtype=torch.float32).to(self.device)
        tokenizer = _padded(AutoTokenizer.from_pretrained(self.policy))
        model, judge_tokenizer = load_reward_model(self.reward_model, self.device)
        judge_tokenizer = _padded(judge_tokenizer)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = judge_tokenizer.pad_token_id
        score_function = parse_score_fn(self.score_fn)
        judge = Judge(model.float(), judge_tokenizer, tokenizer, score_function, mean=self.mean, std=self.std)
        return ActorCritic(policy, tokenizer), judge

    def reference(self, config: PPOConfig) -> Reference:
        """Scores and true rewards of the initial policy."""
        torch.manual_seed(0)
        actor, judge = self.load()
        rng = random.Random(0)
        scores: list[float] = []
        rewards: list[float] = []
        while len(scores) < REFERENCE_SAMPLES:
            batch = [rng.choice(self.prompts) for _ in range(config.batch_size)]
            rollout = actor.sample(batch, config.new_tokens, config.shortest)
            scores += judge(rollout, "sparse").score.tolist()
            if self.truth:
                rewards += self.truth.rewards(actor, rollout)
        spread = torch.tensor(scores)
        true = (sum(rewards) / len(rewards), statistics.stdev(rewards)) if rewards else (None, None)
        return Reference(spread.mean().item(), spread.std().item(), *true)


def _padded(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def review_prompts(seed: int) -> tuple[str, ...]:
    """The first few words of unseen reviews."""
    rng = random.Random(seed)
    return tuple(" ".join(write_review(rng, 8)[: rng.randint(*PROMPT_WORDS)]) for _ in range(PROMPTS))


def read_prompts(path: Path) -> tuple[str, ...]:
    """Prompts from ``.jsonl`` (an object with ``prompt`` per line) or from a text file (one per line).

    Raises:
        ValueError: a line that is no such object, with its number; a file without prompts.
    """
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError):
                prompt = None
            if not isinstance(prompt, str):
                raise ValueError(f'{path}, line {number}: want {{"prompt": text}}, got {line[:60]}')
            prompts.append(prompt)
        else:
            prompts.append(line)
    if not prompts:
        raise ValueError(f"{path} has no prompts")
    return tuple(prompts)


def run_demo(config: DemoConfig, console: Console | None = None) -> Results:
    """Runs everything, prints the table, and writes the results into ``config.out``.

    Each output file appears whole or not at all. Ctrl-C raises ``SystemExit(130)``.
    """
    console = console or Console()
    try:
        with _quiet_transformers(), _one_thread(config.own_models):
            return _run_demo(config, console)
    except KeyboardInterrupt:
        console.print("Interrupted.")
        raise SystemExit(130) from None


def _run_demo(config: DemoConfig, console: Console) -> Results:
    start = time.perf_counter()
    # What would fail at the end is seen at the start.
    parse_score_fn(config.score_fn)
    if any(path.is_file() for path in (config.out, *config.out.parents)):
        raise ValueError(f"out: got {config.out}, a file, want a folder")
    with bars_on(console, TextColumn("{task.fields[status]}")) as progress:
        setup, training = _prepare(config, progress)
        mean, std, initial_reward, _ = setup.reference(config.ppo)
        if config.standardize:
            setup = replace(setup, mean=mean, std=std)
        runs = _run_all(config, setup, progress)
    results = Results(
        config=config,
        training=training,
        initial_score=0.0 if config.standardize else mean,
        initial_true_reward=initial_reward,
        runs=runs,
        seconds=time.perf_counter() - start,
    )
    write_results(results, config.out)
    results.print(console)
    return results


def _prepare(config: DemoConfig, progress: Progress) -> tuple[Setup, TrainingMetrics | None]:
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if config.policy and config.reward_model and config.prompts:
        prompts = read_prompts(config.prompts)
        return Setup(config.policy, config.reward_model, prompts, config.score_fn, device, None), None
    models = config.models
    steps: dict[Stage, int] = {"language model": models.lm_steps, "reward model": models.rm_steps}
    bars = {stage: progress.add_task(stage, total=total, status="") for stage, total in steps.items()}

    def on_step(stage: Stage, done: int, loss: float) -> None:
        progress.update(bars[stage], completed=done, status=f"loss {loss:.3f}")

    cache_dir = config.cache_dir or default_cache_dir()
    folder, metrics, cached = trained_models(models, cache_dir, on_step)
    notes = {
        "language model": f"loss {metrics.lm_loss:.3f}",
        "reward model": f"held-out accuracy {metrics.accuracy:.3f}",
    }
    for stage, total in steps.items():
        progress.update(bars[stage], completed=total, status=notes[stage] + (" (cached)" if cached else ""))
    prompts = review_prompts(models.seed)
    folders = (str(folder / POLICY), str(folder / REWARD_MODEL))
    return Setup(*folders, prompts, config.score_fn, device, REVIEWS_TRUTH), metrics


def _run_one(
    setup: Setup, config: PPOConfig, method: Method, seed: int, on_step: Callable[[Record], None]
) -> Run:
    start = time.perf_counter()
    actor, judge = setup.load()
    records, completions = train(
        actor, judge, setup.prompts, config, method=method, seed=seed, truth=setup.truth, on_step=on_step
    )
    return Run(method, seed, records, completions, time.perf_counter() - start)


def _run_all(config: DemoConfig, setup: Setup, progress: Progress) -> list[Run]:
    """Every method on every seed, in this process if there is one worker."""
    jobs = [(method, seed) for seed in config.seeds for method in config.methods]
    bars = _RunBars(progress, [f"{method}, seed {seed}" for method, seed in jobs], config.ppo.steps)
    default = min(2, os.cpu_count() or 1) if config.own_models and setup.device == "cpu" else 1
    workers = min(config.workers or default, len(jobs))
    if workers == 1:
        return [
            _run_one(setup, config.ppo, method, seed, partial(bars.advance, i))
            for i, (method, seed) in enumerate(jobs)
        ]

    context = multiprocessing.get_context("spawn")
    steps: Any = context.Queue()
    stop = context.Event()
    with ProcessPoolExecutor(workers, context, _start_worker, (steps, stop)) as pool:
        try:
            with _ignoring_interrupts():
                futures = [
                    pool.submit(_work, setup, config.ppo, method, seed, i)
                    for i, (method, seed) in enumerate(jobs)
                ]
            _follow(futures, steps, bars)
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


class _RunBars:
    """A progress bar for each run, and one for all of them."""

    def __init__(self, progress: Progress, names: list[str], steps: int) -> None:
        self.progress, self.steps = progress, steps
        self.total = progress.add_task("all runs", total=len(names) * steps, status="")
        self.runs = [progress.add_task(name, total=steps, start=False, status="") for name in names]

    def advance(self, run: int, record: Record) -> None:
        self.progress.start_task(self.runs[run])
        status = f"reward {record['score']:+.2f}  KL {record['kl']:.1f}"
        self.progress.update(self.runs[run], advance=1, status=status)
        self.progress.advance(self.total)


def _follow(futures: list[Future[Run]], steps: Any, bars: _RunBars) -> None:
    """Shows the workers' steps until all runs are done or one has failed."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=0.1, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        # A finished run's last steps are still on their way when its result is there.
        patience = 0.0 if pending else 1.0
        while not bars.progress.finished:
            try:
                bars.advance(*steps.get(timeout=patience))
            except queue.Empty:
                break


_steps: Any = None
_stop: Any = None


class _StoppedError(Exception):
    """The parent process asked this worker to stop."""


def _start_worker(steps: Any, stop: Any) -> None:
    global _steps, _stop
    _steps, _stop = steps, stop
    steps.cancel_join_thread()
    end_with_parent()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()


def end_with_parent() -> None:
    """In a child process: end when the parent does, which a worker whose parent was killed waits for."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(setup: Setup, config: PPOConfig, method: Method, seed: int, index: int) -> Run:
    def on_step(record: Record) -> None:
        _steps.put((index, record))
        if _stop.is_set():
            raise _StoppedError

    return _run_one(setup, config, method, seed, on_step)


@contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    """Child processes started inside inherit that they ignore Ctrl-C, which the parent handles for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _one_thread(wanted: bool) -> Iterator[None]:
    """The demo's models gain little from more threads, lose much on a busy machine, and keep their bits."""
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()
