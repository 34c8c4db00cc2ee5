import json
import os

import jax.numpy as jnp

from acrlpd.files import temporary_path
from acrlpd.training.metrics import MetricAverage, write_json


def test_average_is_over_the_steps_since_the_last_fetch():
    average = MetricAverage()
    for value in (1.0, 2.0, 6.0):
        average.add({"loss": jnp.float32(value)})
    assert average.fetch() == {"loss": 3.0}
    average.add({"loss": jnp.float32(5.0)})
    assert average.fetch() == {"loss": 5.0}


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
