"""``compare``, ``doctor`` and ``bench``: whether it is right here, with what, and how fast."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from attnshape.cli.base import DEFAULT_DEVICE, Device, app, check_output, fail, progress_bar
from attnshape.files import whole_file
from attnshape.types import Backend

if TYPE_CHECKING:
    from attnshape.bench.measure import Measurement
    from attnshape.compare import Case, Worst
    from attnshape.doctor import Report


@app.command()
def compare(
    *,
    backend: Annotated[Backend, typer.Option(help="The implementation under test.")] = "auto",
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Triton kernels in its interpreter.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small shapes only.")] = False,
    device: Device = DEFAULT_DEVICE,
) -> None:
    """Compare the fast implementation with the float64 reference; exit status 1 if they differ.

    Printed is the error of each output's worst element beside its bound, over masks, padding sides, mask
    semantics, discounts and kinds of attention layer.
    """
    if interpret and os.environ.get("TRITON_INTERPRET") != "1":
        os.environ["TRITON_INTERPRET"] = "1"
        if "triton" in sys.modules:  # it reads the variable when it is imported
            os.execv(sys.executable, [sys.executable, "-m", "attnshape", *sys.argv[1:]])
    if interpret and backend == "auto":
        backend = "triton"
    from attnshape.compare import compare as compare_case
    from attnshape.compare import grid

    cases = list(grid(quick))
    worst: dict[tuple[str, str], dict[str, Worst]] = {}
    failures: list[tuple[Case, str, Worst]] = []
    with progress_bar() as progress:
        for case in progress.track(cases, description="comparing"):
            try:
                outputs = compare_case(case, backend, device)
            except (ValueError, RuntimeError) as error:
                raise fail(f"{error} (in {_name(case)})") from error
            row = worst.setdefault(
                (" ".join(map(str, case.shape)), str(case.dtype).removeprefix("torch.")), {}
            )
            for name, found in outputs.items():
                row[name] = max(row.get(name, found), found, key=lambda w: w.fraction)
                if not found.ok:
                    failures.append((case, name, found))

    console = Console(highlight=False)
    console.print(_table(worst, f"backend {backend} on {device}"))
    for case, name, found in failures:
        console.print(
            f"{name}: error {found.error:.3g}, bound {found.bound:.3g} in {_name(case)}", style="red"
        )
    console.print(f"{len(cases)} cases, {len(failures)} outputs beyond their bounds")
    if failures:
        raise typer.Exit(1)


def _table(worst: dict[tuple[str, str], dict[str, Worst]], title: str) -> Table:
    table = Table("B S R Hq Hkv D", "dtype", "output", title=title)
    for heading in ("error", "bound", "of bound"):
        table.add_column(heading, justify="right")
    for group, row in worst.items():
        for name, w in row.items():
            figures = (f"{w.error:.1e}", f"{w.bound:.1e}", f"{w.fraction:.0%}")
            table.add_row(*group, name, *figures, style=None if w.ok else "red")
            group = ("", "")
        table.add_section()
    return table


def _name(case: Case) -> str:
    settings = {**case.shape._asdict(), "dtype": case.dtype, **case.setting._asdict()}
    return ", ".join(f"{name} {value}" for name, value in settings.items())


@app.command()
def doctor(
    *, as_json: Annotated[bool, typer.Option("--json", help="For a bug report or a machine.")] = False
) -> None:
    """Say what this installation can do: versions, devices, and which backend each kind of input takes.

    Each kind of input is tried on each device and held against the float64 reference. Exit status 1 if one is
    wrong, or a package that is needed is missing.
    """
    from attnshape.doctor import examine

    report = examine()
    console = Console(highlight=False, soft_wrap=True)
    if as_json:
        console.print_json(json.dumps(dataclasses.asdict(report) | {"healthy": report.healthy}, default=str))
    else:
        _print_report(console, report)
    if not report.healthy:
        raise typer.Exit(1)


def _print_report(console: Console, report: Report) -> None:
    console.print(", ".join(f"{name} {version or 'missing'}" for name, version in report.versions.items()))
    for device, name in report.devices.items():
        console.print(f"{device}: {name}")
    if report.no_gpu:
        console.print(f"no GPU: {report.no_gpu}")
    table = Table("device", "attention in", "backend", "why not Triton", "against the reference")
    for x in report.checked:
        verdict = "an error, below" if isinstance(x.error, str) else f"{x.error:.0%} of its bound"
        row = (x.device, x.dtype, x.backend or "none", x.why_not_triton or "", verdict)
        table.add_row(*row, style=None if x.right else "red")
    console.print(table)
    for x in report.checked:
        if isinstance(x.error, str):
            console.print(f"{x.device}, {x.dtype}: {x.error}", style="red", markup=False)
    kept = report.kept_in or "nowhere: each process compiles them; set NUMBA_CACHE_DIR"
    console.print(f"compiled loops are kept in: {kept}")
    for extra, packages in report.missing.items():
        if packages:
            console.print(f"for attnshape {extra}: pip install {' '.join(packages)}")
    if report.used_with:
        installed = ", ".join(f"{name} {version}" for name, version in report.used_with.items())
        console.print(f"installed beside it: {installed}")


@app.command()
def bench(
    *,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long each call is timed, about.")] = 0.5,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File to write every figure to, with its spread.")
    ] = None,
    device: Device = DEFAULT_DEVICE,
) -> None:
    """Time every operation on this machine, beside plain PyTorch and a copy of as many bytes.

    Plain PyTorch is what a PPO code writes without this library: eager attention over repeated keys, a loop
    over tokens. The copy is the limit of what moves bytes only. A result is first compared with the float64
    reference: one that is wrong is not timed, and the exit status is 1. On a CPU or a GPU, in about a minute.
    """
    from attnshape.bench.machine import in_words, machine_facts
    from attnshape.bench.measure import WrongResultError, measure, quick_cases

    if json_file is not None:
        check_output(json_file)
    where = torch.device(device)
    loads = [os.getloadavg()[0]]
    cases = list(quick_cases(where))
    measured: list[Measurement] = []
    wrong: list[str] = []
    with progress_bar() as progress:
        for case in progress.track(cases, description="measuring"):
            try:
                measured.append(measure(case, where, seconds))
            except WrongResultError as error:
                wrong.append(str(error))
    loads.append(os.getloadavg()[0])
    machine = machine_facts(where)
    try:  # what was measured is in one of the two, if the disk is full or nobody reads on
        if json_file is not None:
            rows = [m.facts() | {"ratios": {n: r._asdict() for n, r in m.ratios.items()}} for m in measured]
            with whole_file(json_file) as out:
                out.write(json.dumps({"machine": machine, "load": loads, "measured": rows}, indent=1) + "\n")
    except OSError as error:
        raise fail(error) from error
    finally:
        console = Console(highlight=False)
        console.print(in_words(machine))
        console.print(f"load before {loads[0]:.1f}, after {loads[1]:.1f}, of {os.cpu_count()} processors")
        console.print(_bench_table(measured))
        for message in wrong:
            console.print(message, style="red")
    if wrong:
        raise typer.Exit(1)


def _bench_table(measured: list[Measurement]) -> Table:
    caption = (
        "fused: shape_rewards on queries and keys; apart: attention_credit, then shape_rewards; sweep: "
        "shape_rewards on given credit. ratio: how many times as long as ours, the median over repeats and "
        "their 10th and 90th percentile; unsteady: it moved by more than that meanwhile, so there is none."
    )
    table = Table("call", caption=caption, caption_justify="left")
    baselines = list(dict.fromkeys(name for m in measured for name in m.baselines))
    on_gpu = any(m.ours.how != "clock" for m in measured)  # where a call takes longer than its kernels
    for heading in ("ours", *(["full call"] if on_gpu else [])):
        table.add_column(heading, justify="right")
    for name in baselines:
        table.add_column(name, justify="right")
        table.add_column("ratio", justify="right")
    for heading in ("MB", "share of copy"):
        table.add_column(heading, justify="right")
    for m in measured:
        cells = [m.case.name, _time(m.ours.seconds), *([_time(m.ours.wall)] if on_gpu else [])]
        for name in baselines:
            timing = m.baselines.get(name)
            gain = "" if timing is None else str(m.steady_gain(name) or "unsteady")
            cells += ["" if timing is None else _time(timing.seconds), gain]
        share = m.of_copy.value
        table.add_row(*cells, f"{m.case.bytes / 1e6:.2f}", f"{share:.0%}" if share >= 0.1 else f"{share:.1%}")
    return table


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"
