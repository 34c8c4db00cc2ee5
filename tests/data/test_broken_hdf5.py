"""Damaged copies of the small data sets: one clear error, or, when skipping, exactly the good episodes."""

import json
import re
import subprocess
import sys
import warnings

import h5py
import numpy as np
import pytest

from acrlpd.data import hdf5
from acrlpd.data.hdf5 import H5DatasetReader
from acrlpd.data.rewards import RewardConfig
from acrlpd.types import Episode

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


@pytest.mark.reference
def test_every_fault_is_named(broken, messages):
    folder, expected = broken
    for name, case in expected.items():
        assert (messages[name] is None) == (case["expect"] == "ok"), f"{name}: {messages[name]}"
        for words in case["mentions"]:
            message = messages[name].replace(str(folder / name), "").lower()  # the folder's name gives the fault away
            assert any(word.lower() in message for word in words), f"{name}: {words} not in {message!r}"


@pytest.mark.reference
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


def write_aloha(path, length=4):
    with h5py.File(path, "w") as file:
        for key in ("observations/qpos", "action"):
            file[key] = np.ones((length, 14))
        file["observations/images/top"] = np.zeros((length, 4, 5, 3), np.uint8)
        file.attrs["sim"] = True


def write_robomimic(path, length=4):
    with h5py.File(path, "w") as file:
        for number in range(2):
            demo = file.create_group(f"data/demo_{number}")
            for key, width in {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}.items():
                demo[f"obs/{key}"] = np.ones((length, width))
            demo["obs/agentview_image"] = np.zeros((length, 4, 5, 3), np.uint8)
            demo["actions"] = np.zeros((length, 7))
            demo["rewards"] = np.arange(length) // (length - 1) * 1.0
            demo.attrs.update(num_samples=length, ep_meta='{"lang": "lift"}')
        file["data"].attrs.update(total=2 * length, env_args='{"env_kwargs": {"control_freq": 20}}')
        file["mask/train"] = np.array([b"demo_1"])


def write_own(path, length=4):
    zeros = np.zeros((length, 2), np.float32)
    frames = {"top": np.zeros((length, 4, 5, 3), np.uint8)}
    ends = np.arange(length) == length - 1
    episode = Episode(zeros, zeros, ends.astype(np.float32), ends, task="lift", images=frames, success=True)
    hdf5.write_episode(path, episode, {"fps": 10})


def write_droid(path, length=4):
    with h5py.File(path, "w") as file:
        for key in ("observation/robot_state/joint_positions", "action/joint_velocity"):
            file[key] = np.zeros((length, 7))
        for key in ("observation/robot_state/gripper_position", "action/gripper_position"):
            file[key] = np.zeros(length)
        file["observation/controller_info/movement_enabled"] = np.ones(length, bool)
        file["observation/camera_type/1234"] = np.zeros(length)
        file.attrs["success"] = True


WRITERS = {
    "aloha": (write_aloha, "episode_0.hdf5"),
    "robomimic": (write_robomimic, "demos.hdf5"),
    "acrlpd": (write_own, "episode_0.hdf5"),
    "droid": (write_droid, "trajectory.h5"),
}


@pytest.mark.parametrize(
    ("layout", "key"),
    [
        ("aloha", "observations/qpos"),
        ("aloha", "action"),
        ("robomimic", "data/demo_0/obs/robot0_eef_pos"),
        ("robomimic", "data/demo_0/actions"),
        ("robomimic", "data/demo_0/rewards"),
        ("acrlpd", "observations/state"),
        ("acrlpd", "actions"),
        ("acrlpd", "rewards"),
        ("droid", "observation/robot_state/joint_positions"),
        ("droid", "action/gripper_position"),
    ],
)
def test_numbers_beyond_float32_are_named(tmp_path, layout, key):
    write, name = WRITERS[layout]
    write(tmp_path / name)
    with h5py.File(tmp_path / name, "r+") as file:
        values = file[key][...].astype(np.float64)
        values[2] = 1e300
        del file[key]
        file[key] = values
    label = key.removeprefix("data/demo_0/")
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: .*{label}: expected finite .*found 1e\+300 in row 2"):
        H5DatasetReader(tmp_path)
