"""``python -m benchmarks.paper``: run cells, run them all, summarise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown

from attnshape.demo.bars import bars_on
from attnshape.demo.models import default_cache_dir
from attnshape.demo.ppo import Record
from attnshape.files import whole_file
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
from benchmarks.paper.depth import MODELS, STUDY, RewardName, study
from benchmarks.paper.options import RESULTS, Cache, Options, Out, console, with_options
from benchmarks.paper.page import fill, in_short, tables
from benchmarks.paper.runs import Results
from benchmarks.paper.store import collect
from benchmarks.paper.summary import summarise, to_json
from benchmarks.paper.sweep import RUNS, start_worker, sweep, write_training
from benchmarks.paper.testbed import DEPTH, Models

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

app = typer.Typer(
    help="The paper's experiments at a size that runs on a CPU, or on models of your own.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@contextmanager
def _refusing() -> Iterator[None]:
    """What is wrong with the options or with stored results, as a sentence."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _run(cells: list[Cell], testbed: Models, out: Path, workers: int) -> None:
    with _refusing():
        left = RUNS.missing(cells, out)
    if left:
        write_training(testbed, out)
    with bars_on(console) as bars:
        total = bars.add_task("cells", total=len(cells), completed=len(cells) - len(left))
        current = bars.add_task("steps", total=left[0].steps if left else 1, visible=workers == 1)

        def on_step(_record: Record) -> None:
            bars.advance(current)

        def on_done(cell: Cell) -> None:
            bars.advance(total)
            bars.reset(current)
            bars.update(total, description=f"cells (last {cell.name})")

        sweep(cells, testbed, out, workers=workers, on_step=on_step, on_done=on_done)


@app.command()
@with_options
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
    options: Options,
) -> None:
    """Run one cell, unless it has been run."""
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
    _run([one], options.testbed([one.models]), options.out, 1)
    new = RUNS.new(options.out, one.name)
    console.print(new if new.is_file() else f"{one.name} is in {RUNS.path(options.out)}")


@app.command("all")
@with_options
def run_all(
    *,
    only: Annotated[
        list[str] | None, typer.Option(help=f"Experiments: {', '.join(EXPERIMENTS)}; all by default.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the cells.")] = 1,
    options: Options,
) -> None:
    """Run every cell that has not been run; stopped at any time, it goes on where it was."""
    with _refusing():
        cells = chosen(only)
        left = RUNS.missing(cells, options.out)
    if not left:
        console.print(f"all {len(cells)} cells have been run: `summary` shows them")
        return
    testbed = options.testbed({c.models for c in left})
    waiting = {c for c in left if c.models not in testbed.setups}
    _run([c for c in cells if c not in waiting], testbed, options.out, workers)
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
    with _refusing():
        left = MODELS.missing(models, out)
    start_worker()
    with bars_on(console) as bars:
        for model in bars.track(left, description="reward models"):
            study(model, (cache_dir or default_cache_dir()) / DEPTH, out)


@app.command()
def summary(*, out: Out = RESULTS) -> None:
    """Fold new runs into the tables; write summary.json, the figures, and the tables of the pages."""
    paper = json.loads((HERE / "paper_figures.json").read_text())
    with _refusing():
        collect(out, (RUNS, MODELS))
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
        for page, own in (
            (HERE / "README.md", {"claims": made["claims"]}),
            (HERE / "TABLES.md", {name: table for name, table in made.items() if name != "claims"}),
            (ROOT / "docs" / "evidence.md", in_short(found["claims"])),
        ):
            filled = fill(page.read_text(encoding="utf-8"), own)
            with whole_file(page) as file:
                file.write(filled)
    console.print(Markdown(made["claims"]))
    console.print(f"summary.json and figures in {out}")


if __name__ == "__main__":
    app()
