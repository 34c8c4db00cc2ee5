"""Damaged copies of the small data sets: one clear error, or, when skipping, exactly the good episodes."""

import json
import re
import subprocess
import sys
import warnings

import pytest

from acrlpd.data.hdf5 import H5DatasetReader
from acrlpd.data.rewards import RewardConfig

pytestmark = pytest.mark.reference

NAMES = ("aloha_", "rm_", "droid_")


@pytest.fixture(scope="module")
def broken(shared, tmp_path_factory):
    """Folder and expectations of the cases of our formats."""
    script = shared / "data" / "make_broken.py"
    if not script.is_file():
        pytest.skip(f"{script} is not there")
    folder = tmp_path_factory.mktemp("broken")
    subprocess.run([sys.executable, str(script), str(folder), *NAMES], check=True, capture_output=True)
    expected = json.loads((folder / "expected.json").read_text(encoding="utf-8"))
    assert expected
    return folder, expected


def open_case(path, case, **options) -> H5DatasetReader:
    asked = dict(case["options"])
    rewards = RewardConfig() if asked.pop("rewards", False) else None
    return H5DatasetReader(path, rewards=rewards, **asked, **options)


@pytest.fixture(scope="module")
def messages(broken) -> dict[str, str | None]:
    """What the reader says when it reads everything; None where nothing is wrong."""
    folder, expected = broken
    found: dict[str, str | None] = {}
    for name, case in expected.items():
        try:
            reader = open_case(folder / case["path"], case)
            assert [len(episode) for episode in reader] == reader.lengths.tolist()
            found[name] = None
        except (ValueError, OSError) as error:
            found[name] = str(error)
    return found


def test_every_fault_is_named(broken, messages):
    folder, expected = broken
    for name, case in expected.items():
        assert (messages[name] is None) == (case["expect"] == "ok"), f"{name}: {messages[name]}"
        for words in case["mentions"]:
            message = messages[name].replace(str(folder / name), "").lower()  # the folder's name gives the fault away
            assert any(word.lower() in message for word in words), f"{name}: {words} not in {message!r}"


def test_skipping_leaves_the_good_episodes(broken, messages):
    folder, expected = broken
    for name, case in expected.items():
        path = folder / case["path"]
        if case["good_episodes"] is None:
            with pytest.raises(ValueError, match=re.escape(messages[name])):  # of the whole set: no skipping helps
                open_case(path, case, on_bad_episode="skip")
            continue
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            reader = open_case(path, case, on_bad_episode="skip")
        assert list(reader.indices) == case["good_episodes"], name
        assert reader.num_episodes == len(case["good_episodes"])
        assert [reason for _, reason in reader.skipped] == [messages[name]] * (case["expect"] == "error"), name
        spoken = "\n".join(str(warning.message) for warning in said)
        if reader.skipped:
            total = len(reader.skipped) + reader.num_episodes
            assert messages[name] in spoken
            assert f"{len(reader.skipped)} of {total} episodes were left out" in spoken
