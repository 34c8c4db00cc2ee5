"""Where the time of a run went, and that a resumed run goes on counting."""

import pytest

from acrlpd.training.clocks import Clocks, breakdown
from acrlpd.training.run import Progress


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def settled(clocks, progress):
    clocks.settle()
    return progress.seconds


def test_inner_time_counts_once():
    clock, progress = Clock(), Progress()
    clocks = Clocks(progress, clock)
    with clocks.span("outer"):
        clock.now += 2
        with clocks.span("inner"):
            clock.now += 3
    assert settled(clocks, progress) == {"inner": 3.0, "outer": 2.0}
    clocks.move("outer", "inner", 0.5)
    assert settled(clocks, progress) == {"inner": 3.5, "outer": 1.5}


@pytest.mark.parametrize(("busy", "name"), [(True, "update"), (False, "data")])
def test_time_behind_a_busy_device_is_the_devices(busy, name):
    clock, progress = Clock(), Progress()
    clocks = Clocks(progress, clock)
    with clocks.span("data", behind="update", busy=lambda: busy):
        clock.now += 2
    assert settled(clocks, progress) == {name: 2.0}


def test_a_resumed_run_goes_on_counting():
    clock, progress = Clock(), Progress(wall_s=10.0, cpu_s=7.0, seconds={"update": 4.0})
    clocks = Clocks(progress, clock)
    with clocks.span("update"):
        clock.now += 3
    assert clocks.wall() == 13.0
    assert clocks.cpu() >= 7.0
    for _ in range(2):  # what was settled is not counted again
        assert settled(clocks, progress) == {"update": 7.0}
        assert (progress.wall_s, clocks.wall()) == (13.0, 13.0)


def test_breakdown_counts_what_no_span_measured():
    result = breakdown({"update": 6.0, "simulator": 2.0, "data": 1.0, "evaluation": 5.0, "compile": 4.0}, 19.0)
    assert result["other_s"] == pytest.approx(1.0)
    assert result["outside_share"] == pytest.approx(0.2)  # data and other, of the 10 s of training
