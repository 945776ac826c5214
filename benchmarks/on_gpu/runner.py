"""Runs parts one after the other, watches each, and writes what they find at once.

A part that is a worker prints events, a line of JSON each, to the file descriptor it is given: ``item``,
what it begins, and how many seconds it may then say nothing; ``launch``, a kernel that it is about to
start; ``line``, what it found. It is told what others have found: what is done, and which kernels are
broken.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks.on_gpu.summary import write_summary

LINES = "results.jsonl"
LOG = "log.txt"
GRACE = 5.0
"""Seconds that a part has to end by itself when its time is over."""
START = 90.0
"""Seconds until a worker says its first word: imports, and a context on the GPU."""
RESTARTS = 6
"""Times that a part may lose its process, and go on."""
BETWEEN = "between items"
TAIL = 3000
"""Characters of an error that are kept."""

Line = dict[str, Any]


class Part(NamedTuple):
    """``command`` begins a worker; without ``watched`` anything, whose output is all that it says."""

    name: str
    seconds: float
    command: Sequence[str]
    watched: bool = True
    found: Callable[[], Iterable[Line]] | None = None
    """What an unwatched command left, to be read when it has ended."""


class Process(Protocol):
    """What is needed of ``subprocess.Popen``."""

    @property
    def pid(self) -> int: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def poll(self) -> int | None: ...


Start = Callable[[Part, dict[str, Any], int, Path], Process]
"""Begins a part's process: with what it is told, the descriptor of its events, and the file of its output."""


def started(part: Part, told: dict[str, Any], events: int, log: Path) -> Process:
    """As a process of the system's, which leads a group of its own."""
    given = {"ON_GPU_TOLD": json.dumps(told), "ON_GPU_EVENTS": str(events)} if part.watched else {}
    with log.open("ab") as out:
        return subprocess.Popen(
            part.command,
            env=os.environ | given,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=(events,) if part.watched else (),
            start_new_session=True,
        )


class Runner:
    def __init__(self, out: Path, start: Start = started) -> None:
        self.out, self.start = out, start
        self.began = time.monotonic()
        self.deadline = self.began
        self.lines: list[Line] = []
        self.broken: dict[str, str] = {}
        self.proved: set[str] = set()
        self.running: list[Process] = []
        out.mkdir(parents=True, exist_ok=True)
        for name in (LINES, LOG):
            (out / name).write_text("")

    def begin(self, part: Part, told: dict[str, Any], events: int) -> Process:
        process = self.start(part, told, events, self.out / LOG)
        self.running.append(process)
        return process

    def stop(self) -> None:
        """Everything, at once; what was found stays."""
        for process in self.running:
            end(process)
        write_summary(self.out, self.lines)

    def write(self, part: str, line: Line) -> None:
        line = {"part": part, "at": round(time.monotonic() - self.began, 1), **line}
        self.lines.append(line)
        with (self.out / LINES).open("a") as file:
            file.write(json.dumps(line) + "\n")
        status = line.get("status", "")
        if status and status != "ok":
            print(
                f"{part}: {line.get('item', '')}: {status}: {str(line.get('error', ''))[-300:]}", flush=True
            )

    def run(self, parts: Sequence[Part], beside: Part | None = None) -> None:
        """Parts in turn; what one leaves of its time is the next one's. ``beside`` runs along with them."""
        aside = None
        if beside is not None:
            aside = beside, self.begin(beside, {}, -1), time.monotonic() + beside.seconds
        for part in parts:
            self.deadline += part.seconds
            begun = time.monotonic()
            print(f"== {part.name}: {max(self.deadline - begun, 0):.0f} s at most", flush=True)
            if self.deadline - begun < 1:
                status = "out of time"
                self.write(part.name, {"item": "all", "status": "skipped", "error": "no time left"})
            elif part.watched:
                status = self.run_watched(part)
            else:
                status = self.run_command(part)
            seconds = round(time.monotonic() - begun, 1)
            self.write(part.name, {"ended": status, "seconds": seconds, "limit": part.seconds})
            if aside is not None:
                aside = self.see(*aside)
            write_summary(self.out, self.lines)
        if aside is not None:
            self.see(*aside, last=True)
        write_summary(self.out, self.lines)

    def see(self, part: Part, process: Process, until: float, last: bool = False) -> Any:
        """What has become of the part that runs beside the others; itself while it still runs."""
        status: int | str | None = process.poll()
        if status is None and not last and time.monotonic() < until:
            return part, process, until
        if status is None:
            end(process)
            status = "out of time"
        self.running.remove(process)
        self.write(part.name, {"ended": "ok" if status == 0 else status})
        for line in part.found() if part.found else ():
            self.write(part.name, line)
        return None

    # A command

    def run_command(self, part: Part) -> str:
        log, begun = self.out / LOG, time.monotonic()
        before = log.stat().st_size
        process = self.begin(part, {}, -1)
        status: int | str
        try:
            status = process.wait(max(self.deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            status = "out of time"
            end(process, gently=True)
        self.running.remove(process)
        status = (
            "ok" if status == 0 else status if isinstance(status, str) else f"failed: exit status {status}"
        )
        if part.found is None:
            said = log.read_bytes()[before:].decode(errors="replace")[-TAIL:]
            seconds = round(time.monotonic() - begun, 1)
            line = {"item": part.name, "what": part.name, "status": status.split(":")[0], "seconds": seconds}
            self.write(
                part.name, line | {"said": said, "error": "" if status == "ok" else f"{status}: {said}"}
            )
        for line in part.found() if part.found else ():
            self.write(part.name, line)
        return status

    # A worker

    def run_watched(self, part: Part) -> str:
        for _ in range(1 + RESTARTS):
            done = [x["item"] for x in self.lines if x["part"] == part.name and "item" in x]
            told = {
                "done": done,
                # The first part asks every kernel: where one is wrong, another way to it may be right.
                "broken": {x: y for x, y in self.broken.items() if part.name != "smoke" or "wrong" not in y},
                "seconds": self.deadline - time.monotonic(),
            }
            status, lost = self.watch(part, told)
            if not lost:
                return status
        return f"lost its process {RESTARTS + 1} times"

    def watch(self, part: Part, told: dict[str, Any]) -> tuple[str, bool]:
        """Until the worker ends or is ended; whether it is to be begun again."""
        read, write = os.pipe()
        process = self.begin(part, told, write)
        os.close(write)
        watcher = Watcher(self, part.name)
        with contextlib.closing(selectors.DefaultSelector()) as selector:
            selector.register(read, selectors.EVENT_READ)
            waiting = b""
            while True:
                now = time.monotonic()
                if now > self.deadline + GRACE:
                    end(process)
                    watcher.lost("out of time", "the part's time was over")
                    status = "out of time", False
                    break
                if now > watcher.until:
                    end(process)
                    again = watcher.item is not None or self.silent(part) == 0
                    watcher.lost("hung", f"nothing was heard for {watcher.limit:.0f} s")
                    status = "no answer", again
                    break
                if not selector.select(min(watcher.until, self.deadline + GRACE) - now + 0.01):
                    continue
                more = os.read(read, 1 << 16)
                if not more:
                    status = self.ended(part, process, watcher)
                    break
                *events, waiting = (waiting + more).split(b"\n")
                for event in events:
                    watcher.take(json.loads(event))
        os.close(read)
        self.running.remove(process)
        return status

    def silent(self, part: Part) -> int:
        """How often the part's worker has ended outside of an item: after two times it is given up."""
        return sum(x["part"] == part.name and x.get("item") == BETWEEN for x in self.lines)

    def ended(self, part: Part, process: Process, watcher: Watcher) -> tuple[str, bool]:
        try:
            code = process.wait(GRACE)
        except subprocess.TimeoutExpired:
            end(process)
            code = -signal.SIGKILL
        if watcher.finished and code == 0:
            return "ok", False
        if watcher.again:
            return "begins again", True
        text = (self.out / LOG).read_text(errors="replace")[-TAIL:]
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        again = watcher.item is not None or self.silent(part) == 0
        watcher.lost("died", f"{how}; the log ends: {text}")
        return f"died: {how}", again


class Watcher:
    """What a worker is at."""

    def __init__(self, runner: Runner, part: str) -> None:
        self.runner, self.part = runner, part
        self.item: str | None = None
        self.launches: list[Line] = []  # of the item
        self.limit = START
        self.until = time.monotonic() + START
        self.finished = self.again = False

    def take(self, event: Line) -> None:
        kind = event.pop("event")
        if kind == "item":
            self.item, self.limit, self.launches = event["name"], event["limit"], []
        elif kind == "patience":
            self.limit = event["limit"]
        elif kind == "launch":
            self.launches.append(event)
        elif kind == "line":
            self.judge(event)
            self.runner.write(self.part, event)
            self.item = None if event.get("item") == self.item else self.item
        elif kind == "finished":
            self.finished = True
        elif kind == "again":
            self.again = True
        self.until = time.monotonic() + self.limit

    def judge(self, line: Line) -> None:
        """Which kernels an item's end speaks against: of a wrong number, those that nothing has proved.

        One that is wrong by what may be rounding is not stopped.
        """
        tags = [x["tag"] for x in self.launches]
        if line.get("status") == "ok":
            self.runner.proved |= set(tags)
        if not tags or line.get("status") not in ("wrong", "failed", "hung", "died"):
            return
        line.setdefault("launch", self.launches[-1])
        if line["status"] == "wrong":
            line["launches"] = self.launches
            if line.get("rounding"):
                return
            blamed = [tag for tag in tags if tag not in self.runner.proved] or tags
        elif line["status"] == "hung":
            blamed = [tags[-1].split()[0]]  # whatever it does: to wait for it again costs too much
        elif line["status"] == "failed" and not line.get("on_gpu"):
            return
        else:
            blamed = tags[-1:]
        for tag in blamed:
            self.runner.broken.setdefault(tag, f"{line['status']} in {self.part}, {line['item']}")
        line["broken"] = blamed

    def lost(self, status: str, error: str) -> None:
        """The worker is gone, in the midst of an item or before the first."""
        line = {"item": self.item or BETWEEN, "status": status, "error": error}
        if status != "out of time":
            self.judge(line)
        self.runner.write(self.part, line)


def read_lines(path: Path) -> list[Line]:
    """A file's lines of JSON; none where it is not there."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def end(process: Process, gently: bool = False) -> None:
    """The process and its group; gently, so that it can still report."""
    if gently:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
        else:
            return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that waits for a GPU may be slow to go, and nobody waits for it.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
