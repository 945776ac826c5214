"""``python -m benchmarks.language``: make the models, measure credit, run cells, summarise."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markdown import Markdown

from attnshape.files import json_rows, whole_file
from benchmarks.language import figures
from benchmarks.language.agreement import Lexicon, agreement, measured_on
from benchmarks.language.cells import CELLS, STEPS, cells_on
from benchmarks.language.data import read_texts
from benchmarks.language.models import (
    LanguageConfig,
    default_cache,
    language_model_name,
    language_model_record,
    make_language_models,
)
from benchmarks.language.page import tables
from benchmarks.language.rewards import Scorer, gold_models, make_gold, make_reward_model, study_models
from benchmarks.language.rl import prompts_of, run_cell, setup_of
from benchmarks.language.summary import summarise
from benchmarks.paper.page import fill
from benchmarks.paper.store import Table, collect
from benchmarks.paper.sweep import start_worker
from benchmarks.paper.testbed import provenance

RESULTS = Path(__file__).parents[1] / "results" / "language"
PAGE = Path(__file__).parent / "README.md"
MODELS = Table("models", lambda record: record["name"])
CREDIT = Table("credit", lambda record: record["name"])
RUNS = Table("runs", lambda record: record["name"])

Reviews = Annotated[Path, typer.Option(help="Film reviews, .jsonl or .jsonl.gz.", exists=True)]
Treebank = Annotated[Path, typer.Option(help="Labelled sentences, .jsonl or .jsonl.gz.", exists=True)]
Cache = Annotated[Path | None, typer.Option(help="Where the study's models are kept.")]
Out = Annotated[Path, typer.Option(help="Folder of results.")]
Only = Annotated[str, typer.Option(help="Only what has such a name, as a file pattern: 'lm-4*'.")]

RewardModelName = Annotated[
    str | None, typer.Option(help="Folder or hub name of a sequence classifier, in place of the study's.")
]

app = typer.Typer(
    help="Credit, PPO and group advantages on real language.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(highlight=False, soft_wrap=True)
T = TypeVar("T")


def _named(items: Sequence[T], only: str) -> list[T]:
    found = [item for item in items if fnmatch.fnmatch(str(item.name), only)]
    if not found:
        raise typer.BadParameter(f"--only: nothing is called {only!r}")
    return found


def _keep(table: Table, record: dict[str, Any], out: Path) -> None:
    table.add(record | provenance(), out, record["name"])
    print(record["name"], {k: v for k, v in record.items() if not isinstance(v, dict | list)}, flush=True)


@app.command()
def models(
    *, reviews: Reviews, treebank: Treebank, cache: Cache = None, out: Out = RESULTS, only: Only = "*"
) -> None:
    """Train what is not in the cache: language models, reward models, the gold judge."""
    start_worker()
    texts, cache = read_texts(reviews, treebank), cache or default_cache()
    if fnmatch.filter(["lm"], only):
        make_language_models(texts, cache)
        known = MODELS.read(out)
        for layers in LanguageConfig().depths:
            name = language_model_name(layers)
            if name not in known and not MODELS.new(out, name).is_file():
                _keep(MODELS, language_model_record(texts, cache, layers), out)
    wanted = _named(study_models(), only) if only != "lm" else []
    for model in wanted:
        if not (cache / model.name).is_dir():
            _keep(MODELS, make_reward_model(model, texts, cache), out)
        judges = [cache / m.name for m in gold_models()]
        if all(j.is_dir() for j in judges) and not (cache / "gold.json").is_file():
            _keep(MODELS, make_gold(texts, cache), out)


@app.command()
def credit(
    *,
    reviews: Reviews,
    treebank: Treebank,
    reward_model: RewardModelName = None,
    cache: Cache = None,
    out: Out = RESULTS,
    only: Only = "*",
) -> None:
    """Every source of every reward model in the cache against people's word labels and against deletions."""
    start_worker()
    texts, cache = read_texts(reviews, treebank), cache or default_cache()
    sentences, lexicon = measured_on(texts.test), Lexicon(texts.reviews["a"])
    folders = {m.name: str(cache / m.name) for m in study_models() if (cache / m.name).is_dir()}
    if reward_model is not None:
        _own_folder(out)
        folders = {Path(reward_model).name: reward_model}
    known = CREDIT.read(out)
    for name, folder in folders.items():
        if fnmatch.fnmatch(name, only) and name not in known and not CREDIT.new(out, name).is_file():
            _keep(CREDIT, {"name": name, **agreement(Scorer.load(folder), sentences, lexicon)}, out)


@app.command()
def runs(
    *,
    reviews: Reviews,
    treebank: Treebank,
    policy: Annotated[str | None, typer.Option(help="Folder or hub name of a causal model.")] = None,
    reward_model: RewardModelName = None,
    cache: Cache = None,
    out: Out = RESULTS,
    only: Only = "*",
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many new ones.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of cells on models of your own.")] = STEPS,
) -> None:
    """Run the cells that have not been run and whose models are there, the most telling first.

    With --policy and --reward-model on those models; the gold judge is there if the cache has it.
    """
    start_worker()
    if (policy is None) != (reward_model is None):
        raise typer.BadParameter("--policy and --reward-model go together")
    texts, cache = read_texts(reviews, treebank), cache or default_cache()
    prompts = prompts_of(texts.held_out)
    cells = CELLS
    if reward_model is not None:
        _own_folder(out)
        cells = cells_on(Path(reward_model).name, steps)
    done = 0
    for cell in RUNS.missing(_named(cells, only), out):
        setup = setup_of(cell, cache, prompts, policy, reward_model)
        if setup is not None and done != count:
            _keep(RUNS, run_cell(cell, setup), out)
            done += 1


def _own_folder(out: Path) -> None:
    if out == RESULTS:
        raise typer.BadParameter("models of your own need a folder of their own: --out")


@app.command()
def summary(*, out: Out = RESULTS) -> None:
    """Fold new records into the tables; write summary.json, the figures and the tables of the page."""
    collect(out, (MODELS, CREDIT, RUNS))
    made, credited, run = (list(table.read(out).values()) for table in (MODELS, CREDIT, RUNS))
    if not (made or credited or run):
        raise typer.BadParameter(f"{out} has no records")
    found = summarise(made, credited, run)
    with whole_file(out / "summary.json") as file:
        file.write(json_rows(found, 2))
    if credited:
        figures.credit(credited, out / "credit.png")
    judged = [r for r in run if "gold" in r["initial"]]
    if judged:
        figures.leads(judged, out / "leads.png")
        figures.frontier(judged, out / "gold_and_kl.png")
    filled = tables(found)
    if out == RESULTS:
        text = fill(PAGE.read_text(encoding="utf-8"), filled)
        with whole_file(PAGE) as file:
            file.write(text)
    for table in filled.values():
        console.print(Markdown(table))


if __name__ == "__main__":
    app()
