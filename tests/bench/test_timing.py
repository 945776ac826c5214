"""The one clock: samples of known length, every call in its turn."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attnshape.bench import timing as module
from attnshape.bench.timing import (
    Ratio,
    Timing,
    copy_calls,
    host_timing,
    ratio_of,
    sets_for,
    steady_ratio,
    time_calls,
)

CPU = torch.device("cpu")


class FakeTime:
    """A clock that only calls move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.order.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: fake.now))
    return fake


def test_times_are_those_of_the_calls(clock: FakeTime) -> None:
    calls = {"short": [lambda: clock.sleep(1e-6)] * 2, "long": [lambda: clock.sleep(4e-3)]}
    timings = time_calls(calls, CPU, 0.1)
    assert timings["short"].seconds == pytest.approx(1e-6)
    assert timings["long"].seconds == timings["long"].wall == pytest.approx(4e-3)
    assert timings["long"].how == "clock"
    # A repeat is one long call and half a millisecond of short ones.
    assert len(timings["short"].samples) == len(timings["long"].samples) == round(0.1 / 4.5e-3)
    assert ratio_of(timings["long"], timings["short"]).value == pytest.approx(4000)


def test_every_call_takes_its_turn_in_every_repeat(clock: FakeTime) -> None:
    lengths = (1.0, 2.0, 3.0)
    calls = {str(x): [lambda x=x: clock.sleep(x)] for x in lengths}
    timings = time_calls(calls, CPU, 0, least=6)
    assert {len(t.samples) for t in timings.values()} == {6}
    repeats = [clock.order[i : i + 3] for i in range(len(clock.order) - 18, len(clock.order), 3)]
    assert all(sorted(repeat) == list(lengths) for repeat in repeats)
    assert {repeat[0] for repeat in repeats} == set(lengths)  # none always follows the same one


def test_a_sample_does_not_pay_for_what_ran_before_it(clock: FakeTime) -> None:
    """The first call after another entry's takes six times as long, as one of 50 us does on a CPU."""
    last = []

    def call(name: str, seconds: float) -> None:
        clock.sleep(seconds if last[-1:] == [name] else 6 * seconds)
        last.append(name)

    calls = {"short": [lambda: call("short", 5e-5)], "long": [lambda: call("long", 8e-3)]}
    timings = time_calls(calls, CPU, 0.1)
    assert timings["short"].samples == pytest.approx([5e-5] * len(timings["short"].samples))


def test_ratios_are_of_one_repeat() -> None:
    """The machine slows down by ten on the way: the ratio of neighbours does not see it."""
    slow = Timing((2.0, 2.0, 20.0, 20.0, 24.0), "clock", 2.0)
    fast = Timing((1.0, 1.0, 10.0, 10.0, 10.0), "clock", 1.0)
    assert ratio_of(slow, fast) == Ratio(2.0, 2.0, 2.4)


def test_tails_are_cut_at_the_tenth() -> None:
    samples = Timing(tuple(float(x) for x in range(1, 21)), "clock", 1.0)
    assert ratio_of(samples, Timing((1.0,) * 20, "clock", 1.0)) == Ratio(10.5, 3.0, 18.0)


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        ((1.234, 1.2, 1.3), "1.23 (1.20 to 1.30)"),
        ((12.34, 12, 13), "12.3 (12.0 to 13.0)"),
        ((123.4, 99.6, 130), "123 (100 to 130)"),
    ],
)
def test_a_ratio_in_three_digits_with_its_spread(ratio: tuple[float, float, float], text: str) -> None:
    assert str(Ratio(*ratio)) == text


def test_a_ratio_that_moved_by_more_than_it_spreads_is_none() -> None:
    ones = Timing((1.0,) * 20, "clock", 1.0)
    early, late = [2.0, 2.1] * 5, [3.0, 3.1] * 5
    assert steady_ratio(Timing(tuple(early + late), "clock", 1.0), ones) is None
    mixed = Timing(tuple(early[:5] + late[:5] + early[5:] + late[5:]), "clock", 1.0)
    assert steady_ratio(mixed, ones) == ratio_of(mixed, ones)
    assert steady_ratio(ones, ones) == Ratio(1.0, 1.0, 1.0)


def test_host_timing(clock: FakeTime) -> None:
    timing = host_timing(lambda: clock.sleep(0.001), CPU, calls=3, repeats=4)
    assert timing.samples == pytest.approx([0.001] * 4)


def test_a_copy_reads_half_of_its_bytes_and_writes_half() -> None:
    calls = copy_calls(4096, 2, CPU)
    target = calls[0]()
    assert len(calls) == 2
    assert 2 * target.numel() * target.element_size() == 4096
    assert sets_for(4096, CPU) == 2
