import json
import os

import jax.numpy as jnp
import pytest

from acrlpd.files import temporary_path
from acrlpd.training.metrics import MetricAverage, Stopwatch, breakdown, write_json


def test_average_is_over_the_steps_since_the_last_fetch():
    average = MetricAverage()
    for value in (1.0, 2.0, 6.0):
        average.add({"loss": jnp.float32(value)})
    assert average.fetch() == {"loss": 3.0}
    average.add({"loss": jnp.float32(5.0)})
    assert average.fetch() == {"loss": 5.0}


class Clock:
    """A clock that a test moves by hand."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_inner_time_counts_once():
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.span("outer"):
        clock.now += 2
        with watch.span("inner"):
            clock.now += 3
    assert watch.seconds == {"inner": 3.0, "outer": 2.0}
    watch.move("outer", "inner", 0.5)
    assert watch.seconds == {"inner": 3.5, "outer": 1.5}


@pytest.mark.parametrize(("busy", "name"), [(True, "update"), (False, "data")])
def test_time_behind_a_busy_device_is_the_devices(busy, name):
    clock = Clock()
    watch = Stopwatch(clock)
    with watch.span("data", behind="update", busy=lambda: busy):
        clock.now += 2
    assert watch.seconds == {name: 2.0}


def test_breakdown_counts_what_no_span_measured():
    result = breakdown({"update": 6.0, "simulator": 2.0, "data": 1.0, "evaluation": 5.0, "compile": 4.0}, 19.0)
    assert result["other_s"] == pytest.approx(1.0)
    assert result["outside_share"] == pytest.approx(0.2)  # data and other, of the 10 s of training


def test_json_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """First the file, then its name in the folder: what a loss of power leaves is the old file or the new one."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda number: done.append(os.readlink(f"/proc/self/fd/{number}")) or fsync(number)
    )
    monkeypatch.setattr(os, "replace", lambda old, new: done.append("replace") or replace(old, new))
    write_json(tmp_path / "a.json", {"a": 1})
    assert done == [str(temporary_path(tmp_path / "a.json") / "content.json"), "replace", str(tmp_path)]
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
