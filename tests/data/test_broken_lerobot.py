"""Damaged LeRobot sets: one clear error each, or the bad episodes left out where that was asked for."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest

from acrlpd.data.lerobot import LeRobotSource

pytestmark = pytest.mark.reference


@pytest.fixture(scope="module")
def cases(shared, tmp_path_factory):
    """(folder, what is expected) by name."""
    script = shared / "data/make_broken.py"
    if not script.is_file():
        pytest.skip("this root has no make_broken.py")
    out = tmp_path_factory.mktemp("broken")
    subprocess.run([sys.executable, script, out, "lr21_", "lr30_"], check=True, capture_output=True)
    expected = json.loads((out / "expected.json").read_text(encoding="utf-8"))
    return {name: (out / case["path"], case) for name, case in expected.items()}


def read_all(folder, **options):
    source = LeRobotSource(folder, **options)
    for index in range(source.num_episodes):
        source.episode(index)
    return source


def error_of(folder, **options):
    """What reading everything complains about."""
    try:
        read_all(folder, **options)
    except (ValueError, OSError) as error:
        return str(error)
    return "read without an error"


def check_readable(source):
    """All numbers, and the frames at both ends of every episode."""
    for index, length in enumerate(source.lengths.tolist()):
        assert len(source.window(index, "actions", 0, length)) == length
        for frame in {0, length - 1}:
            for camera in source.cameras:
                assert source.window(index, f"images/{camera}", frame, frame + 1).any()


def unmentioned(text, folder, case):
    """Words that the message lacks; the case's own name in the path does not count."""
    text = text.replace(str(folder), "").lower()
    return [words for words in case["mentions"] if not any(word.lower() in text for word in words)]


def test_errors_are_clear(cases):
    faults = {name: case for name, case in cases.items() if case[1]["expect"] == "error"}
    assert faults
    for name, (folder, case) in faults.items():
        message = error_of(folder)
        assert not unmentioned(message, folder, case), f"{name}: {message}"


def test_skipping_leaves_the_good_episodes(cases):
    skippable = {name: case for name, case in cases.items() if case[1]["good_episodes"] is not None}
    assert skippable
    for name, (folder, case) in skippable.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            source = LeRobotSource(folder, on_bad_episode="skip")
        check_readable(source)
        assert source.numbers == case["good_episodes"], name
        told = "\n".join(str(warning.message) for warning in caught)
        if case["expect"] == "error":
            assert not unmentioned(told, folder, case), f"{name}: {told}"
            assert len(source.skipped) == len(source.meta.episodes) - len(case["good_episodes"]), name
        else:
            assert told == "", name
            assert source.skipped == [], name


def test_a_fault_of_the_whole_set_cannot_be_skipped(cases):
    hopeless = {name: case for name, case in cases.items() if case[1]["good_episodes"] is None}
    assert hopeless
    for name, (folder, case) in hopeless.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            message = error_of(folder, on_bad_episode="skip")
        assert not unmentioned(message, folder, case), f"{name}: {message}"


def test_unusual_but_valid_sets_are_read(cases):
    valid = {name: case for name, case in cases.items() if case[1]["expect"] == "ok"}
    assert valid
    for name, (folder, case) in valid.items():
        assert read_all(folder).numbers == case["good_episodes"], name


def test_rows_left_are_those_of_the_good_episodes(cases):
    for folder, case in cases.values():
        if case["expect"] == "ok" or case["good_episodes"] is None:
            continue
        chosen = LeRobotSource(folder, episodes=case["good_episodes"], cameras=())  # the faults of others do not matter
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            left = LeRobotSource(folder, on_bad_episode="skip")
        for index, length in enumerate(chosen.lengths.tolist()):
            for key in ("state", "actions"):
                np.testing.assert_array_equal(
                    left.window(index, key, 0, length), chosen.window(index, key, 0, length), err_msg=str(folder)
                )
