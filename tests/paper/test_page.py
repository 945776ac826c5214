import json

import pytest

from benchmarks.paper.__main__ import HERE, ROOT
from benchmarks.paper.cells import RTO_BEST, SPARSE_BEST, chosen
from benchmarks.paper.depth import MODELS
from benchmarks.paper.options import RESULTS
from benchmarks.paper.page import claims, fill, groups, in_short, tables
from benchmarks.paper.runs import Results, best_of
from benchmarks.paper.summary import summarise, to_json
from benchmarks.paper.sweep import RUNS


@pytest.fixture(scope="module")
def results() -> Results:
    return Results(RESULTS)


def test_the_committed_summary_is_that_of_the_committed_runs(results: Results) -> None:
    assert (RESULTS / "summary.json").read_text() == to_json(summarise(results))


def test_the_tables_of_the_pages_are_the_committed_summarys() -> None:
    paper = json.loads((HERE / "paper_figures.json").read_text())
    summary = json.loads((RESULTS / "summary.json").read_text())
    made = tables(summary, paper)
    page = (HERE / "README.md").read_text()
    assert fill(page, {"claims": made.pop("claims")}) == page
    assert len(page.splitlines()) <= 250
    page = (HERE / "TABLES.md").read_text()
    assert fill(page, made) == page
    page = (ROOT / "docs" / "evidence.md").read_text()
    assert f"{len(chosen())} runs of" in page
    assert fill(page, in_short(summary["claims"])) == page


def test_what_the_recipe_says_of_overlap_and_precision(results: Results) -> None:
    """The bounds and the two exceptions in docs/sources.md, over every reward model of the study."""
    last = [m["lengths"]["50"]["sources"]["last row"] for m in results.models]
    low = [x["precision_at_k"] for x in last if x["overlap"] < 0.12]
    high = [x["precision_at_k"] for x in last if x["overlap"] > 0.4]
    deep = [m["lengths"]["50"]["sources"]["last row"] for m in results.models if m["layers"] > 1]
    assert (sum(x["precision_at_k"] > 0.25 for x in deep), len(deep)) == (2, 36)
    assert len(low) > 10
    assert len(high) > 5
    assert max(low) < 0.17
    assert min(high) >= 0.33


def test_chosen_settings_are_those_that_the_runs_chose(results: Results) -> None:
    assert best_of(results.selection("sparse", "lam", "lr")) == (SPARSE_BEST["lam"], SPARSE_BEST["lr"])
    assert best_of(results.selection("RTO", "beta")) == (RTO_BEST,)


def test_every_line_names_machine_versions_and_commit_and_stands_in_its_place() -> None:
    for table in (RUNS, MODELS):
        records = table.read(RESULTS)
        assert records
        assert list(records) == sorted(records)
        for record in records.values():
            assert record["machine"]["processor"]
            assert record["versions"]["torch"]
            assert record["commit"]
    assert sum(path.stat().st_size for path in RESULTS.rglob("*") if path.is_file()) < 8e6


def test_rows_by_hand() -> None:
    row = {
        "n": 5,
        "mean": [1.234, 0.1, 0.2, 5],
        "end": [2.0, 0.3, 0.456, 5],
        "steps": {"1": 31.0, "2": None},
        "kl_end": [7.25, 1.0, 1.0, 5],
        "penalised": [-0.123, 0.1, 0.1, 5],
        "precision_at_k": [0.615, 0.1, 0.1, 5],
        "collapsed": 1,
        "ran_away": 2,
        "lead": [0.5, 0.25, 4, 5],
    }
    table = groups({"ABC": row, "never run": {"n": 0}})
    *_, last = table.splitlines()
    assert last == (
        "| ABC | 5 | 1.23 ± 0.10 | 2.00 ± 0.30 | 0.46 | 31 | never | 7.2 | -0.12 | 0.61 | 1, 2 "
        "| +0.50 ± 0.25 (4 of 5) |"
    )
    assert "never run" not in table
    assert groups({"ABC": {"n": 0}}) == "Not run yet."
    one = {"claim": "it flies", "lead": [-1.0, None, 0, 1], "verdict": "1 seed only"}
    assert claims({"flight": [one]}).splitlines()[-2] == "| **flight** |  |  |  |"
    assert claims({"flight": [one]}).splitlines()[-1] == "| it flies | **1 seed only** | -1.00 | 0 of 1 |"


def test_markers_and_tables_must_agree() -> None:
    page = "a\n<!-- begin: x -->\nold\n<!-- end: x -->\nb\n"
    assert fill(page, {"x": "| \\1 |"}) == "a\n<!-- begin: x -->\n| \\1 |\n<!-- end: x -->\nb\n"
    with pytest.raises(ValueError, match="page: got the markers"):
        fill(page, {"y": "new"})
