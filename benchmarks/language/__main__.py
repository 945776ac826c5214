"""``python -m benchmarks.language``: make the models, measure credit, run cells, summarise."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from benchmarks.language.agreement import Lexicon, agreement, measured_on
from benchmarks.language.cells import CELLS
from benchmarks.language.data import read_texts
from benchmarks.language.models import default_cache, make_language_models
from benchmarks.language.rewards import Scorer, gold_models, make_gold, make_reward_model, study_models
from benchmarks.language.rl import prompts_of, run_cell, setup_of
from benchmarks.paper.store import Table
from benchmarks.paper.sweep import start_worker
from benchmarks.paper.testbed import provenance

RESULTS = Path(__file__).parents[1] / "results" / "language"
MODELS = Table("models", lambda record: record["name"])
CREDIT = Table("credit", lambda record: record["name"])
RUNS = Table("runs", lambda record: record["name"])

Reviews = Annotated[Path, typer.Option(help="Film reviews, .jsonl or .jsonl.gz.", exists=True)]
Treebank = Annotated[Path, typer.Option(help="Labelled sentences, .jsonl or .jsonl.gz.", exists=True)]
Cache = Annotated[Path | None, typer.Option(help="Where the study's models are kept.")]
Out = Annotated[Path, typer.Option(help="Folder of results.")]
Only = Annotated[str, typer.Option(help="Only what has such a name, as a file pattern: 'lm-4*'.")]

app = typer.Typer(
    help="Credit, PPO and group advantages on real language.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
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
        for record in make_language_models(texts, cache):
            _keep(MODELS, record, out)
    wanted = _named(study_models(), only) if only != "lm" else []
    for model in wanted:
        if not (cache / model.name).is_dir():
            _keep(MODELS, make_reward_model(model, texts, cache), out)
        judges = [cache / m.name for m in gold_models()]
        if all(j.is_dir() for j in judges) and not (cache / "gold.json").is_file():
            _keep(MODELS, make_gold(texts, cache), out)


@app.command()
def credit(
    *, reviews: Reviews, treebank: Treebank, cache: Cache = None, out: Out = RESULTS, only: Only = "*"
) -> None:
    """Every source of every reward model in the cache against people's word labels and against deletions."""
    start_worker()
    texts, cache = read_texts(reviews, treebank), cache or default_cache()
    sentences, lexicon = measured_on(texts.test), Lexicon(texts.reviews["a"])
    for model in CREDIT.missing(_named(study_models(), only), out):
        if (cache / model.name).is_dir():
            found = agreement(Scorer.load(cache / model.name), sentences, lexicon)
            _keep(CREDIT, {"name": model.name, **found}, out)


@app.command()
def runs(
    *,
    reviews: Reviews,
    treebank: Treebank,
    cache: Cache = None,
    out: Out = RESULTS,
    only: Only = "*",
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many new ones.")] = None,
) -> None:
    """Run the cells that have not been run and whose models are there, the most telling first."""
    start_worker()
    texts, cache = read_texts(reviews, treebank), cache or default_cache()
    prompts = prompts_of(texts.held_out)
    done = 0
    for cell in RUNS.missing(_named(CELLS, only), out):
        setup = setup_of(cell, cache, prompts)
        if setup is None or done == count:
            continue
        _keep(RUNS, run_cell(cell, setup), out)
        done += 1


if __name__ == "__main__":
    app()
