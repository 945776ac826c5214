"""``python -m benchmarks.paper``: run cells, run them all, summarise."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from attnshape.demo.models import Stage, default_cache_dir
from attnshape.demo.ppo import Record
from attnshape.demo.run import Setup, read_prompts
from attnshape.files import whole_file
from attnshape.text.score_fn import parse_score_fn
from benchmarks.paper import figures
from benchmarks.paper.cells import (
    BETA,
    BETAS,
    EXPERIMENTS,
    LAM,
    LR,
    STEPS,
    Cell,
    Critic,
    Length,
    Method,
    chosen,
)
from benchmarks.paper.depth import STUDY, RewardName, study
from benchmarks.paper.page import fill, in_short, tables
from benchmarks.paper.runs import Results
from benchmarks.paper.summary import summarise, to_json
from benchmarks.paper.sweep import RUNS, start_worker, sweep, todo, write_training
from benchmarks.paper.testbed import DEPTH, Models, own_models

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE.parent / "results" / "paper-cpu"

app = typer.Typer(
    help="The paper's experiments at a size that runs on a CPU, or on models of your own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=True)

Policy = Annotated[str | None, typer.Option(help="Folder or hub name of a causal model.")]
RewardModel = Annotated[str | None, typer.Option(help="Folder or hub name of a sequence classifier.")]
Prompts = Annotated[
    Path | None, typer.Option(help="Prompts: .jsonl with a prompt per line, or one per line.")
]
ScoreFn = Annotated[str, typer.Option(help="The score, such as 'logit[1] - logit[0]'.")]
Dpo = Annotated[str | None, typer.Option(help="Folder or hub name of a DPO-trained policy, for RTO.")]
Device = Annotated[str | None, typer.Option(help="Of your own models; a GPU if there is one.")]
Cache = Annotated[Path | None, typer.Option(help="Where the testbed's own models are kept.")]
Out = Annotated[Path, typer.Option(help="Folder of results.")]


def _testbed(
    policy: str | None,
    reward_model: str | None,
    prompts: Path | None,
    score_fn: str,
    dpo_policy: str | None,
    device: str | None,
    cache_dir: Path | None,
    out: Path,
    needed: Collection[str],
) -> Models:
    given = {"--policy": policy, "--reward-model": reward_model, "--prompts": prompts}
    if not any(given.values()):
        start_worker()  # what models learn depends on the number of threads
        with _bars() as bars:
            tasks: dict[Stage, int] = {}

            def on_step(stage: Stage, done: int, loss: float) -> None:
                if stage not in tasks:
                    tasks[stage] = int(bars.add_task(f"training the {stage}", total=None))
                bars.update(tasks[stage], completed=done)  # type: ignore[arg-type]

            return own_models(needed, cache_dir, on_step)
    if policy is None or reward_model is None or prompts is None:
        missing = ", ".join(name for name, value in given.items() if not value)
        raise typer.BadParameter(f"--policy, --reward-model and --prompts go together, got no {missing}")
    if out == RESULTS:
        raise typer.BadParameter("models of your own need a folder of their own: --out")
    parse_score_fn(score_fn)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    setup = Setup(policy, reward_model, read_prompts(prompts), score_fn, device, None)
    return Models({"testbed": setup}, None if dpo_policy is None else partial(str, dpo_policy))


@contextmanager
def _bars() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield bars


def _run(cells: list[Cell], testbed: Models, out: Path, workers: int) -> None:
    left = todo(cells, out)
    if left:
        write_training(testbed, out)
    with _bars() as bars:
        total = bars.add_task("cells", total=len(cells), completed=len(cells) - len(left))
        current = bars.add_task("steps", total=left[0].steps if left else 1, visible=workers == 1)

        def on_step(_record: Record) -> None:
            bars.advance(current)

        def on_done(cell: Cell) -> None:
            bars.advance(total)
            bars.reset(current)
            bars.update(total, description=f"cells (last {cell.name.removesuffix('.json')})")

        sweep(cells, testbed, out, workers=workers, on_step=on_step, on_done=on_done)


@app.command()
def cell(
    method: Annotated[Method, typer.Argument(help="Where the credit comes from.")],
    *,
    length: Annotated[Length, typer.Option(help="New tokens, fewest and most.")] = "40-60",
    seed: Annotated[int, typer.Option(help="Of the prompts, the value head and the sampling.")] = 0,
    beta: Annotated[float, typer.Option(help="Share of the score that the credit redistributes.")] = BETA,
    lam: Annotated[float, typer.Option(help="GAE's lambda.")] = LAM,
    lr: Annotated[float, typer.Option(help="Learning rate.")] = LR,
    shift: Annotated[float, typer.Option(help="Added to every standardised score.")] = 0.0,
    models: Annotated[
        str, typer.Option(help="Which of the testbed's models: testbed, long, or a deep one.")
    ] = "testbed",
    critic: Annotated[Critic, typer.Option(help="Where values come from.")] = "shared",
    steps: Annotated[int, typer.Option(min=1, help="PPO steps.")] = STEPS,
    policy: Policy = None,
    reward_model: RewardModel = None,
    prompts: Prompts = None,
    score_fn: ScoreFn = "logit",
    dpo_policy: Dpo = None,
    device: Device = None,
    cache_dir: Cache = None,
    out: Out = RESULTS,
) -> None:
    """Run one cell, unless its file is there."""
    one = Cell(
        method=method,
        length=length,
        seed=seed,
        beta=beta,
        lam=lam,
        lr=lr,
        shift=shift,
        models=models,
        critic=critic,
        steps=steps,
    )
    testbed = _testbed(
        policy, reward_model, prompts, score_fn, dpo_policy, device, cache_dir, out, [one.models]
    )
    _run([one], testbed, out, 1)
    console.print(out / RUNS / one.name)


@app.command("all")
def run_all(
    *,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Experiments: {', '.join(EXPERIMENTS)}; all by default.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the cells.")] = 1,
    policy: Policy = None,
    reward_model: RewardModel = None,
    prompts: Prompts = None,
    score_fn: ScoreFn = "logit",
    dpo_policy: Dpo = None,
    device: Device = None,
    cache_dir: Cache = None,
    out: Out = RESULTS,
) -> None:
    """Run every cell that has no file yet; stopped at any time, it goes on where it was."""
    try:
        cells = chosen(only)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    left = todo(cells, out)
    if not left:
        console.print(f"all {len(cells)} cells have their files in {out / RUNS}")
        return
    needed = {c.models for c in left}
    testbed = _testbed(policy, reward_model, prompts, score_fn, dpo_policy, device, cache_dir, out, needed)
    waiting = {c for c in left if c.models not in testbed.setups}
    _run([c for c in cells if c not in waiting], testbed, out, workers)
    if waiting:
        console.print(f"{len(waiting)} cells wait for the reward models of `depth`")


@app.command()
def depth(
    *,
    layers: Annotated[list[int] | None, typer.Option(help="Only those of these depths.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only these training seeds.")] = None,
    reward: Annotated[
        RewardName | None, typer.Option(help="Only those whose preferences are about this.")
    ] = None,
    steps: Annotated[list[int] | None, typer.Option(help="Only those trained for so many steps.")] = None,
    cache_dir: Cache = None,
    out: Out = RESULTS,
) -> None:
    """Train reward models of several depths and qualities; measure which credit finds what matters."""
    models = [
        m
        for m in STUDY
        if all(
            not wanted or value in wanted
            for wanted, value in (
                (layers, m.layers),
                (seed, m.seed),
                ([reward] if reward else None, m.reward),
                (steps, m.steps),
            )
        )
    ]
    if not models:
        raise typer.BadParameter("the study has no such reward model")
    start_worker()
    with _bars() as bars:
        for model in bars.track(models, description="reward models"):
            study(model, (cache_dir or default_cache_dir()) / DEPTH, out)


@app.command()
def summary(*, out: Out = RESULTS) -> None:
    """Summarise the runs: summary.json, the figures, and the tables of the READMEs."""
    paper = json.loads((HERE / "paper_figures.json").read_text())
    results = Results(out)
    if not results.runs:
        raise typer.BadParameter(f"{out} has no runs")
    found = summarise(results)
    with whole_file(out / "summary.json") as file:
        file.write(to_json(found))
    figures.learning(results, out / "learning_curves.png")
    figures.lengths(results, found, paper, out / "lengths.png")
    figures.beta(results, BETAS, paper, out / "beta_and_kl.png")
    figures.credit(results, found, out / "credit.png")
    figures.speed(results, out / "credit_and_speed.png")
    made = tables(json.loads(to_json(found)), paper)
    if out == RESULTS:
        for page, own in ((HERE / "README.md", made), (ROOT / "README.md", in_short(found["claims"]))):
            filled = fill(page.read_text(encoding="utf-8"), own)
            with whole_file(page) as file:
                file.write(filled)
    console.print(Markdown(made["claims"]))
    console.print(f"summary.json and figures in {out}")


if __name__ == "__main__":
    app()
