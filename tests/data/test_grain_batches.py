"""The same batches through Grain: in order, from a saved position, from worker processes."""

import builtins
import sys

import numpy as np
import pytest

from acrlpd.data.formats.layouts.own import write_episode
from acrlpd.data.grain_batches import grain_batches
from acrlpd.founding.loaders import ACRLPDDataLoader
from acrlpd.types import Episode

BATCH, HORIZON, STEPS = 4, 3, 9


def episode(seed):
    rng = np.random.default_rng(seed)
    length = 5 + seed
    return Episode(
        state=rng.normal(size=(length, 4)).astype(np.float32),
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        rewards=np.zeros(length, np.float32),
        terminals=np.arange(length) == length - 1,
        task="slide",
        images={"front": rng.integers(0, 255, (length, 6, 8, 3), np.uint8)},
        success=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("grain")
    for seed in range(3):
        write_episode(path / f"episode_{seed:06d}.hdf5", episode(seed))
    return path


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_grain_gives_the_loaders_batches_and_goes_on_from_a_saved_state(folder, num_workers):
    expected = ACRLPDDataLoader(folder, BATCH, HORIZON, seed=5, device_placement="none")
    data = grain_batches(folder, BATCH, HORIZON, seed=5, num_steps=STEPS, num_workers=num_workers)
    iterator = iter(data)
    first = [copied(next(iterator)) for _ in range(4)]
    state = iterator.get_state()
    rest = [copied(batch) for batch in iterator]
    again = iter(data)
    again.set_state(state)
    resumed = [copied(batch) for batch in again]
    assert len(first) + len(rest) == STEPS
    for step, batch in enumerate(first + rest):
        same(batch, copied(expected.batch(step)))
    for once, twice in zip(rest, resumed, strict=True):
        same(once, twice)


def copied(batch):
    """Out of the memory that Grain shares with its processes."""
    return {
        "actions": np.array(batch.actions),
        "valid": np.array(batch.valid),
        "picture": np.array(batch.observations.images["front"]),
        "next": np.array(batch.next_observations.state),
    }


def same(found, expected):
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_bad_data_is_named_at_once(tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        grain_batches(tmp_path, BATCH, HORIZON, num_steps=STEPS)


def test_without_grain_the_extra_is_named(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "grain", raising=False)
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name == "grain":
            raise ImportError("no grain")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"acrlpd\[grain\]"):
        grain_batches(folder, BATCH, HORIZON, num_steps=STEPS)
