"""Damaged copies of the small data sets: one clear error, or, when skipping, exactly the good episodes."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from acrlpd.data import sources
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.store.metadata_cache import MetadataCache
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


def put(values):
    return lambda parent, key: parent.__setitem__(key, values)


CONTENTS = {  # what takes the place of a dataset or group
    "nothing": lambda parent, key: None,
    "a group": lambda parent, key: parent.create_group(key),
    "a dead link": put(h5py.SoftLink("/nowhere")),
    "no content": put(h5py.Empty("f4")),
    "a number": put(1.0),
    "rows": put(np.zeros(2)),
    "no rows": put(np.zeros(0)),
    "many axes": put(np.zeros((4, 2, 2, 2, 2), np.float32)),
    "complex numbers": put(np.zeros((4, 2), complex)),
    "texts": put(np.array([b"a"] * 4)),
    "a text": put("demo_0"),
    "records": put(np.zeros(4, [("a", "f4"), ("b", "i4")])),
    "a type": put(np.dtype("i4")),
}
ATTRIBUTES = [
    *(None, "abc", "", "{}", "[1, 2]", '{"env_kwargs": 3}', '{"env_kwargs": {"control_freq": "x"}}', '{"fps": "x"}'),
    *(np.bytes_(b"\xff"), 7, np.nan, np.array([1, 2]), np.array(["a", "b"], object), h5py.Empty("f4"), 1j),
]


def places(path) -> tuple[list[str], list[tuple[str, str]]]:
    """The datasets and groups of a file, and its attributes; of several demos, the first one's."""
    with h5py.File(path) as file:
        items, holders = [], ["/"]
        file.visit(items.append)
        items = [item for item in items if not re.match(r"data/demo_[1-9]", item)]
        holders += items
        return items, [(holder, name) for holder in holders for name in file[holder].attrs]


def opens_or_names(path, **options):
    """The set opens and its numbers are read, or the error is one for people and names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            reader = H5DatasetReader(path.parent, **options)
        for index in range(reader.num_episodes):
            reader.episode(index)
    except (ValueError, FileNotFoundError) as error:
        assert path.parent.name in str(error), error  # noqa: PT017 every other kind of error fails the test
        return str(error)
    return None


@pytest.mark.parametrize("layout", [*WRITERS, pytest.param("committed", marks=pytest.mark.slow)])
def test_whatever_takes_the_place_of_something_is_no_traceback(tmp_path, layout):
    if layout == "committed":
        original = Path(__file__).parent / "shared/data/h5-robomimic/low_dim.hdf5"
    else:
        write, name = WRITERS[layout]
        original = tmp_path / name
        write(original)
    path = tmp_path / "broken" / original.name
    path.parent.mkdir()
    options = [{"rewards": RewardConfig(success=True)}, {"on_bad_episode": "skip"}]
    options += [{"filter_key": "train"}] if (layout in ("robomimic", "committed")) else []
    items, attributes = places(original)
    assert items
    failures = []

    def attempt(change):
        shutil.copyfile(original, path)
        with h5py.File(path, "r+") as file:
            change(file)
        failures.extend(message for asked in options if (message := opens_or_names(path, **asked)))

    for item in items:
        for place in CONTENTS.values():

            def change(file, item=item, place=place):
                del file[item]
                place(file, item)

            attempt(change)
    for holder, name in attributes:
        for value in ATTRIBUTES:

            def change(file, holder=holder, name=name, value=value):
                file[holder].attrs.pop(name)
                if value is not None:
                    file[holder].attrs[name] = value

            attempt(change)
    assert failures


@pytest.mark.parametrize(
    ("layout", "place", "name", "value", "message"),
    [
        (
            "robomimic",
            "data/demo_0",
            "num_samples",
            "many",
            r"demo_0: attribute num_samples: it says many steps, but 4",
        ),
        ("robomimic", "data", "env_args", '{"env_kwargs": 3}', "attribute env_args: expected an object env_kwargs"),
        ("acrlpd", "/", "success", "perhaps", "success: expected true or false, found 'perhaps'"),
        ("acrlpd", "/", "task", 5, "attribute task: expected text, found .*5"),
        ("acrlpd", "/", "metadata", "[1]", "attribute metadata: expected a JSON object, found list"),
        ("acrlpd", "/", "metadata", '{"fps": "x"}', "attribute metadata: expected a positive fps, found 'x'"),
        ("droid", "/", "success", np.array([1, 0]), "success: expected true or false, found array"),
    ],
)
def test_attributes_of_the_wrong_type_are_named(tmp_path, layout, place, name, value, message):
    write, file_name = WRITERS[layout]
    write(tmp_path / file_name)
    with h5py.File(tmp_path / file_name, "r+") as file:
        file[place].attrs[name] = value
    with pytest.raises(ValueError, match=rf"{re.escape(file_name)}: .*{message}|{re.escape(file_name)}: {message}"):
        H5DatasetReader(tmp_path)


def test_one_bad_demo_does_not_cost_the_others(tmp_path):
    write_robomimic(tmp_path / "demos.hdf5")
    with h5py.File(tmp_path / "demos.hdf5", "r+") as file:
        file["data/demo_0"].attrs["num_samples"] = "many"
        file["data/demo_2"] = h5py.SoftLink("/nowhere")
    with pytest.warns(UserWarning, match="left out"):
        reader = H5DatasetReader(tmp_path, on_bad_episode="skip")
    assert [name.rpartition("/")[2] for name, _ in reader.skipped] == ["demo_0", "demo_2"]
    assert "data/demo_2: expected a group, found nothing" in reader.skipped[1][1]


@pytest.mark.parametrize("bad", [0, 1])
def test_one_truncated_file_does_not_cost_the_others(tmp_path, bad):
    for number in range(2):
        write_robomimic(tmp_path / f"task_{number}.hdf5")
    os.truncate(tmp_path / f"task_{bad}.hdf5", 3000)
    with pytest.raises(ValueError, match=rf"task_{bad}\.hdf5: expected a complete HDF5 file"):
        H5DatasetReader(tmp_path)
    with pytest.warns(UserWarning, match=f"left out: .*task_{bad}"):
        reader = H5DatasetReader(tmp_path, on_bad_episode="skip")
    assert reader.num_episodes == 2
    assert [source for source, _ in reader.skipped] == [str(tmp_path / f"task_{bad}.hdf5")]
    with pytest.raises(ValueError, match=rf"task_{bad}\.hdf5: expected a complete HDF5 file"):
        H5DatasetReader(tmp_path / f"task_{bad}.hdf5", on_bad_episode="skip")


@pytest.mark.parametrize(("stored", "expected"), [("False", False), ("true", True), (0, False), (np.bool_(True), True)])
def test_a_success_that_is_a_word_is_read_as_it_says(tmp_path, stored, expected):
    write_own(tmp_path / "episode_0.hdf5")
    with h5py.File(tmp_path / "episode_0.hdf5", "r+") as file:
        file.attrs["success"] = stored
    assert H5DatasetReader(tmp_path).info(0).success is expected
    assert hdf5.read_episode(tmp_path / "episode_0.hdf5").success is expected


def test_a_folder_is_no_episode(tmp_path):
    write_own(tmp_path / "episode_0.hdf5")
    (tmp_path / "episode_1.hdf5").mkdir()
    assert H5DatasetReader(tmp_path).num_episodes == 1
    (tmp_path / "episode_0.hdf5").unlink()
    with pytest.raises(ValueError, match="and no episodes"):
        sources.open_episodes(tmp_path)
    with pytest.raises(ValueError, match="expected files named"):
        H5DatasetReader(tmp_path)


def test_links_that_lead_nowhere(tmp_path):
    cache = MetadataCache(tmp_path / "cache")
    folder = tmp_path / "set"
    write_own(folder / "episode_0.hdf5")
    (folder / "notes.txt").symlink_to("gone")
    (folder / "around").symlink_to("around")
    (folder / "up").symlink_to(folder)
    assert H5DatasetReader(folder, metadata_cache=cache).num_episodes == 1
    (folder / "episode_1.hdf5").symlink_to("gone.hdf5")
    (folder / "episode_2.hdf5").symlink_to("episode_2.hdf5")
    os.replace(folder / "episode_0.hdf5", folder / "episode_3.hdf5")
    with pytest.raises(FileNotFoundError, match=r"episode_1\.hdf5: the link leads to no file"):
        H5DatasetReader(folder, metadata_cache=cache)
    with pytest.warns(UserWarning, match="left out"):
        reader = H5DatasetReader(folder, metadata_cache=cache, on_bad_episode="skip")
    assert [name.rpartition("/")[2] for name, _ in reader.skipped] == ["episode_1.hdf5", "episode_2.hdf5"]


def test_linked_folders_of_droid_count_once(tmp_path):
    root, elsewhere = tmp_path / "set", tmp_path / "disk"
    for folder in (root / "success/1", elsewhere / "2"):
        folder.mkdir(parents=True)
        write_droid(folder / "trajectory.h5")
        with h5py.File(folder / "trajectory.h5", "r+") as file:
            del file.attrs["success"]
    (root / "failure").symlink_to(elsewhere)
    (root / "latest").symlink_to(root / "success/1")
    (elsewhere / "up").symlink_to(root)
    reader = sources.open_episodes(root, cameras=[], remember=False)
    found = {reader.info(index).source: reader.info(index).success for index in range(reader.num_episodes)}
    assert found == {f"{root}/failure/2/trajectory.h5": False, f"{root}/success/1/trajectory.h5": True}
    (tmp_path / "all").mkdir()
    (tmp_path / "all/set").symlink_to(root)
    assert sources.open_episodes(tmp_path / "all", cameras=[], remember=False).num_episodes == 2


@pytest.mark.parametrize(
    ("annotations", "task"),
    [
        ({"u1": {"language_instruction1": "lift"}}, "lift"),
        ({"u1": {"language_instruction2": "lift"}}, "none said"),
        ({"u1": "lift"}, None),
        ({"u1": ["lift"]}, None),
        ({"u1": {"language_instruction1": ["lift"]}}, None),
    ],
)
def test_annotations_of_another_form_are_named(tmp_path, annotations, task):
    write_droid(tmp_path / "trajectory.h5")
    (tmp_path / "metadata_u1.json").write_text("{}", encoding="utf-8")
    (tmp_path / "aggregated-annotations-1.json").write_text(json.dumps(annotations), encoding="utf-8")
    if task is None:
        with pytest.raises(ValueError, match=r"aggregated-annotations-1\.json: u1: expected an object .*lift"):
            H5DatasetReader(tmp_path, cameras=[])
    else:
        assert H5DatasetReader(tmp_path, cameras=[], default_task="none said").info(0).task == task


@pytest.mark.parametrize("frame", [0, 2])
def test_a_jpeg_that_claims_an_enormous_size_is_skipped(tmp_path, frame):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6)).save(buffer, "JPEG")
    row = np.frombuffer(buffer.getvalue(), np.uint8)
    for number in range(2):
        rows = np.tile(row, (4, 1))
        if number == 1:
            size = buffer.getvalue().index(b"\xff\xc0") + 5
            rows[frame, size : size + 4] = 255
        write_aloha(tmp_path / f"episode_{number}.hdf5")
        with h5py.File(tmp_path / f"episode_{number}.hdf5", "r+") as file:
            del file["observations/images/top"]
            file["observations/images/top"] = rows
    with pytest.warns(UserWarning, match="left out"):
        reader = H5DatasetReader(tmp_path, on_bad_episode="skip")
    ((source, reason),) = reader.skipped
    assert source == str(tmp_path / "episode_1.hdf5")
    assert f"images/top: the image of frame {frame} cannot be decoded" in reason


DEEP = "[" * 100_000


def test_json_of_too_many_brackets_is_named(tmp_path):
    write_droid(tmp_path / "trajectory.h5")
    (tmp_path / "metadata_u1.json").write_text(DEEP, encoding="utf-8")
    with pytest.raises(ValueError, match=r"metadata_u1\.json: expected JSON"):
        H5DatasetReader(tmp_path, cameras=[])
    write_robomimic(tmp_path / "demos.hdf5")
    with h5py.File(tmp_path / "demos.hdf5", "r+") as file:
        file["data"].attrs["env_args"] = DEEP[:60_000]  # an attribute holds no more than 64 KiB
    with pytest.raises(ValueError, match=r"demos\.hdf5: attribute env_args: expected JSON"):
        H5DatasetReader(tmp_path / "demos.hdf5")
