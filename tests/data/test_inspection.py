"""What inspect and validate say of good data, of suspicious data, and of every broken case."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest

from acrlpd.data.formats import hdf5
from acrlpd.data.tools.inspection import inspect
from acrlpd.types import Episode


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write(folder, number, *, length=20, **changes):
    rng = np.random.default_rng(number)
    steps = np.arange(length)
    episode = Episode(
        state=rng.normal(size=(length, 3)).astype(np.float32),
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        rewards=np.where(steps == length - 1, 0, -1).astype(np.float32),
        terminals=steps == length - 1,
        task="lift" if number % 3 else "push",
        images={"top": np.full((length, 5, 6, 3), number, np.uint8)},
        success=number % 2 == 0,
    )
    return hdf5.write_episode(hdf5.episode_path(folder, number), dataclasses.replace(episode, **changes))


def test_contents(tmp_path):
    for number in range(4):
        write(tmp_path, number, length=20 + number, success=None if number == 3 else number < 2)
    found = inspect(tmp_path)
    assert found.usable
    assert found.problems == []
    contents = found.contents
    assert (contents.format, contents.fps, contents.episodes, contents.steps) == ("acrlpd", None, 4, 86)
    assert contents.lengths == (20, 21.5, 23)
    assert contents.tasks == {"push": 2, "lift": 2}
    assert contents.cameras == {"top": (5, 6)}
    assert (contents.successes, contents.failures, contents.success_rate) == (2, 1, 2 / 3)
    assert contents.rewards == (-1.0, 0.0)
    actions = np.concatenate([hdf5.read_episode(hdf5.episode_path(tmp_path, number)).actions for number in range(4)])
    np.testing.assert_array_equal(contents.actions.low, actions.min(axis=0))
    np.testing.assert_array_equal(contents.actions.high, actions.max(axis=0))
    np.testing.assert_allclose(contents.actions.mean, actions.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(contents.actions.std, actions.std(axis=0), rtol=1e-5)


def texts(found):
    return "\n".join(problem.text for problem in found.problems)


def test_suspicious_data_is_told_but_usable(tmp_path):
    first = write(tmp_path, 0)
    twin = hdf5.read_episode(first)
    for number in (1, 2):
        write(tmp_path, number)
    write(tmp_path, 3, state=twin.state, actions=twin.actions)
    constant = np.random.default_rng(9).normal(size=(20, 3)).astype(np.float32)
    assert inspect(tmp_path).problems == []  # only validate looks for it
    found = inspect(tmp_path, thorough=True)
    assert found.usable
    assert [problem.episode for problem in found.problems] == [str(hdf5.episode_path(tmp_path, 3))]
    assert f"are those of {first}: recorded twice" in texts(found)
    constant[:, 1] = 0.5
    for number in range(4):
        write(tmp_path, number, state=constant + np.float32(number) * np.array([1, 0, 1], np.float32))
    assert "state: dimension 1 is constant: it is 0.5 in every step" in texts(inspect(tmp_path, thorough=True))


def test_clipping_is_told_from_rest_and_from_switches(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        clipped = np.clip(2 * rng.normal(size=200), -1, 1)
        resting = np.concatenate([np.zeros(100), rng.uniform(0, 1, size=100)])
        switch = rng.integers(0, 2, size=200)
        free = rng.normal(size=200)
        write(tmp_path, number, length=200, actions=np.stack([clipped, resting, switch, free], 1).astype(np.float32))
    found = inspect(tmp_path, thorough=True)
    assert len(found.problems) == 2
    assert "actions: dimension 0 lies at its lowest value, -1, in 3" in texts(found)
    assert "actions: dimension 0 lies at its highest value, 1, in 3" in texts(found)


def test_a_moved_end_forgets_what_lay_at_the_old_one(tmp_path):
    wave = np.tile([0.0, 1.0], 10)
    write(tmp_path, 0, actions=np.stack([wave, np.linspace(0, 1, 20)], 1).astype(np.float32))
    for number in (1, 2):
        write(tmp_path, number, actions=np.stack([np.linspace(-3, 3, 20), np.linspace(0, 1, 20)], 1).astype("f4"))
    assert inspect(tmp_path, thorough=True).problems == []


@pytest.mark.reference
def test_every_broken_case_is_unusable_and_its_rest_is_described(shared, tmp_path):
    script = shared / "data/make_broken.py"
    if not script.is_file():
        pytest.skip("this root has no make_broken.py")
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    expected = json.loads((tmp_path / "expected.json").read_text(encoding="utf-8"))
    assert expected
    for name, case in expected.items():
        options = dict(case.get("options", {}))
        if options.pop("rewards", False):
            continue  # inspect asks for no rewards
        found = inspect(tmp_path / case["path"], thorough=True, decode=True, **options)
        errors = [problem for problem in found.problems if problem.level == "error"]
        assert found.usable == (case["expect"] == "ok"), f"{name}: {found.problems}"
        if case["expect"] == "ok":
            continue
        told = "\n".join(f"{problem.episode}: {problem.text}" for problem in errors).replace(str(tmp_path / name), "")
        for words in case["mentions"]:
            assert any(word.lower() in told.lower() for word in words), f"{name}: {words} not in {told}"
        good = case["good_episodes"]
        if good is not None:
            assert found.contents is not None, name
            bad = {problem.episode for problem in errors}
            assert found.contents.episodes - len(good) <= len(bad), name
        else:
            assert found.contents is None, name
