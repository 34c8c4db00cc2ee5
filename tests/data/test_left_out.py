"""What is there and not read is told once at opening and by inspect, in every format; numbers that are not there."""

import json
import types

import h5py
import numpy as np
import pytest

from acrlpd.cli import data as command
from acrlpd.data import sources
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.layouts.columns import axis_angle
from acrlpd.data.store.episodes import OptionError
from acrlpd.data.tools import inspection
from acrlpd.types import Episode, FinalObservation

N = 5


def numbers(width, seed=0):
    return np.random.default_rng(seed).normal(size=(N, width) if width else N).astype(np.float32)


def write(path, arrays, attributes=()):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
        for place, name, value in attributes:
            file.require_group(place).attrs[name] = value
    return path


def frames(height=4, width=6):
    return np.random.default_rng(0).integers(0, 256, (N, height, width, 3), np.uint8)


ARM = {"eef_pos": 3, "eef_quat": 4, "gripper_qpos": 2}


def arms(*names):
    """robosuite's keys of some arms, and actions for them."""
    keys = {f"obs/{name}_{key}": numbers(width, at) for at, name in enumerate(names) for key, width in ARM.items()}
    return keys | {"actions": numbers(7 * len(names)), "rewards": np.zeros(N)}


def robomimic(path, keys):
    return write(path / "demos.hdf5", {f"data/demo_0/{key}": array for key, array in keys.items()})


# -- each writer: a data set with more than is read, and what should be told of it -------------------------------------


def make_aloha(folder):
    base = {"observations/qpos": numbers(14), "action": numbers(14), "observations/images/top": frames()}
    more = {"observations/qvel": numbers(14), "observations/effort": numbers(14), "base_action": numbers(2)}
    write(folder / "episode_0.hdf5", base | more | {"compress_len": numbers(0)})
    return folder, {"observations/qvel": "14 numbers", "observations/effort": "14 numbers", "base_action": "2 numbers"}


def make_own(folder):
    ends = np.arange(N) == N - 1
    episode = Episode(numbers(3), numbers(2), numbers(0), ends, "lift", {"top": frames()})
    path = hdf5.write_episode(hdf5.episode_path(folder, 0), episode)
    with h5py.File(path, "r+") as file:
        file["observations/force"] = numbers(6)
    return folder, {"observations/force": "6 numbers"}


def make_robomimic(folder):
    more = {
        "obs/object": numbers(10),
        "obs/table_cam": frames(),
        "action_dict/gripper": numbers(0),
        "dones": numbers(0),
    }
    more |= {"states": numbers(40), "next_obs/object": numbers(10), "obs/agentview_depth": np.zeros((N, 4, 6, 1), "f4")}
    path = robomimic(folder, arms("robot0") | {"obs/agentview_image": frames()} | more)
    told = {"obs/object": "10 numbers", "obs/table_cam": "4x6x3 numbers", "action_dict/gripper": "1 number"}
    return path, told | {"obs/agentview_depth": "4x6x1 numbers"}


def make_droid(folder):
    state = {"joint_positions": 7, "gripper_position": 0, "cartesian_position": 6}
    action = {"joint_velocity": 7, "gripper_position": 0, "joint_position": 7, "robot_state/joint_positions": 7}
    keys = {f"observation/robot_state/{key}": numbers(width) for key, width in state.items()}
    keys |= {f"action/{key}": numbers(width) for key, width in action.items()}
    keys |= {f"observation/camera_type/{serial}": np.zeros(N) for serial in ("11", "22")}
    write(folder / "success/trajectory.h5", keys)
    told = {"images/22": "a second camera on the wrist, beside 11"}
    return folder, told | {
        "action/joint_position": "7 numbers",
        "observation/robot_state/cartesian_position": "6 numbers",
    }


def make_lerobot(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    t = np.arange(N)
    one = {"dtype": "int64", "shape": [1]}
    keys = {"observation.state": 3, "action": 2, "observation.velocity": 3, "observation.environment_state": 4}
    keys |= {"observation.effort": 1, "action.gripper": 1, "next.reward": 1}
    features = {key: {"dtype": "float32", "shape": [width]} for key, width in keys.items()}
    features |= dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), one)
    features["timestamp"] = {"dtype": "float32", "shape": [1]}
    columns = {key: list(numbers(width if width > 1 else 0)) for key, width in keys.items()}
    columns |= {"timestamp": (t / 10).astype("f4"), "frame_index": t, "index": t}
    columns |= {"episode_index": t * 0, "task_index": t * 0}
    (folder / "data").mkdir(parents=True)
    (folder / "meta").mkdir()
    pq.write_table(pa.table(columns), folder / "data/0.parquet")
    info = {"codebase_version": "v2.1", "fps": 10, "total_episodes": 1, "total_frames": N, "features": features}
    (folder / "meta/info.json").write_text(json.dumps(info | {"data_path": "data/{episode_index}.parquet"}))
    (folder / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "do it"}\n')
    (folder / "meta/episodes.jsonl").write_text(f'{{"episode_index": 0, "tasks": ["do it"], "length": {N}}}\n')
    told = {"observation.velocity": "3 numbers", "observation.environment_state": "4 numbers"}
    return folder, told | {"observation.effort": "1 number", "action.gripper": "1 number"}


def make_npz(folder):
    folder.mkdir()
    arrays = {"observations": numbers(3), "actions": numbers(2), "terminals": np.arange(N) == N - 1}
    np.savez(folder / "play.npz", **arrays, qpos=numbers(21), name="play", button_states=np.zeros((N, 1), int))
    return folder / "play.npz", {"qpos": "21 numbers", "button_states": "1 number"}


MAKERS = {
    "aloha": (make_aloha, {}),
    "acrlpd": (make_own, {}),
    "robomimic": (make_robomimic, {}),
    "droid": (make_droid, {"cameras": ()}),
    "lerobot": (make_lerobot, {}),
    "npz": (make_npz, {}),
}


@pytest.mark.parametrize(("make", "options"), MAKERS.values(), ids=MAKERS)
def test_what_is_not_read_is_told_once_at_opening_and_by_inspect(tmp_path, caplog, capsys, monkeypatch, make, options):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path, expected = make(tmp_path / "set")
    for _ in range(2):  # the second time from what is remembered
        caplog.clear()
        source = sources.open_episodes(path, **options)
        assert sorted(told.partition(" (")[0] for told in source.left_out) == sorted(expected)
        for key, words in expected.items():
            assert any(told.startswith(f"{key} (") and words in told for told in source.left_out)
        (record,) = caplog.records
        assert "\n" not in record.message
        assert all(told in record.message for told in source.left_out)
    found = inspection.inspect(path, **options)
    assert found.usable
    assert found.contents.left_out == source.left_out
    if not options:
        assert command.main(["inspect", str(path)]) == 0
        assert f"not read  {', '.join(source.left_out)}\n" in capsys.readouterr().out


def test_nothing_is_told_where_everything_is_read(tmp_path, caplog, capsys):
    hdf5.write_episode(
        hdf5.episode_path(tmp_path, 0),
        Episode(
            *(numbers(3), numbers(2), numbers(0), np.arange(N) == 4),
            task="lift",
            images={"a": frames()},
            task_changes=((2, "wait"),),
            final=FinalObservation(numbers(3)[0], {"a": frames()[0]}),
        ),
    )
    assert sources.open_episodes(tmp_path, remember=False).left_out == []
    assert not caplog.records
    command.main(["inspect", str(tmp_path)])
    assert "not read  nothing\n" in capsys.readouterr().out


def test_minari_names_parts_infos_and_pictures_that_it_does_not_read(monkeypatch, tmp_path, caplog):
    observations = {"joints": numbers(3), "goal": numbers(2), "camera": np.moveaxis(frames(), -1, 1), "depth": frames()}
    observations |= {"mask": np.zeros((N, 4, 6, 2), np.uint8)}
    episode = types.SimpleNamespace(
        id=0, observations=observations, actions=numbers(2)[1:], rewards=np.zeros(N - 1), terminations=np.zeros(N - 1),
        truncations=np.zeros(N - 1), infos={"success": np.zeros(N), "qpos": numbers(9)},
    )  # fmt: skip

    class StandIn(list):
        total_episodes = 1

        def iterate_episodes(self):
            return iter(self)

    (tmp_path / "data").mkdir()
    (tmp_path / "data/metadata.json").write_text("{}")
    library = types.SimpleNamespace(MinariDataset=lambda path: StandIn([episode]))
    monkeypatch.setitem(__import__("sys").modules, "minari", library)
    source = sources.open_episodes(tmp_path, state_keys=["joints"])
    np.testing.assert_array_equal(source.window(0, "images/camera", 0, 4), frames()[:4])
    told = {entry.partition(" (")[0]: entry for entry in source.left_out}
    assert told.keys() == {"goal", "images/depth", "images/mask", "infos/qpos"}
    assert "depth camera by its name" in told["images/depth"]
    assert "shape (4, 6, 2)" in told["images/mask"]
    assert all(entry in caplog.text for entry in source.left_out)
    assert sources.open_episodes(tmp_path).window(0, "state", 0, 1).shape == (1, 5)  # goal ++ joints, and no mask


# -- robomimic's relatives ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["robot0"], ["robot0"]),
        (["robot0", "robot1"], ["robot0", "robot1"]),
        ([f"robot{number}" for number in range(11)], [f"robot{number}" for number in range(11)]),
        (["robot0_left", "robot0_right"], ["robot0_right", "robot0_left"]),
        (["robot1", "robot0_left", "robot0_right"], ["robot0_right", "robot0_left", "robot1"]),
    ],
)
def test_the_state_is_that_of_all_arms(tmp_path, names, order):
    keys = arms(*names)
    source = sources.open_episodes(robomimic(tmp_path, keys), remember=False)
    assert source.left_out == []
    expected = [
        axis_angle(keys[f"obs/{name}_{key}"]) if key == "eef_quat" else keys[f"obs/{name}_{key}"]
        for name in order
        for key in ARM
    ]
    np.testing.assert_allclose(source.window(0, "state", 0, N), np.concatenate(expected, axis=1), rtol=1e-6)


def test_a_second_arm_is_told_where_one_is_chosen(tmp_path):
    path = robomimic(tmp_path, arms("robot0", "robot1"))
    source = sources.open_episodes(path, remember=False, state_keys=[f"robot0_{key}" for key in ARM])
    assert source.left_out == [f"obs/robot1_{key} ({width} numbers)" for key, width in ARM.items()]


def isaac(folder):
    keys = {"actions": numbers(7), "obs/joint_pos": numbers(9), "obs/eef_quat": numbers(4), "obs/table_cam": frames()}
    keys |= {"obs/policy/gripper": numbers(2), "states/articulation/robot/joint_position": numbers(9)}
    keys["initial_state/articulation/robot/root_pose"] = numbers(7)[:1]
    return robomimic(folder, keys)


def test_other_names_are_told_with_the_flags_that_choose(tmp_path):
    path = isaac(tmp_path)
    with pytest.raises(
        ValueError, match=r"data/demo_0: obs/robot0_eef_pos: expected a dataset, found nothing"
    ) as error:
        sources.open_episodes(path, remember=False)
    text = str(error.value)
    assert "\n" not in text
    for key in ("obs/joint_pos (9 numbers)", "obs/table_cam (4x6x3 numbers)", "obs/policy/gripper (2 numbers)"):
        assert key in text
    assert all(
        word in text for word in ("states/articulation/robot/joint_position", "--data.state_keys", "--data.cameras")
    )
    for options in ({"state_keys": ["elbow"]}, {"state_keys": ["joint_pos"], "action_keys": ["deltas"]}):
        with pytest.raises(
            OptionError, match=r"(elbow|deltas): expected a dataset, found nothing\. There are .*obs/joint_pos"
        ):
            sources.open_episodes(path, remember=False, **options)


def test_keys_and_cameras_that_are_named_are_read_whatever_they_are_called(tmp_path):
    path = isaac(tmp_path)
    chosen = ["joint_pos", "policy/gripper", "states/articulation/robot/joint_position"]
    source = sources.open_episodes(path, remember=False, state_keys=chosen, cameras=["table_cam"])
    np.testing.assert_array_equal(source.window(0, "state", 0, N)[:, 9:11], numbers(2))
    assert source.window(0, "state", 0, N).shape == (N, 20)
    np.testing.assert_array_equal(source.window(0, "images/table_cam", 0, N), frames())
    with pytest.raises(OptionError, match="images/joint_pos: its picture has the shape"):
        sources.open_episodes(path, remember=False, state_keys=chosen, cameras=["joint_pos"])


def test_robosuites_own_recordings_have_no_observations(tmp_path):
    path = robomimic(tmp_path, {"states": numbers(40), "actions": numbers(7)})
    with pytest.raises(
        ValueError, match=r"There are actions \(7 numbers\), states \(40 numbers\)\. Choose with state_keys"
    ):
        sources.open_episodes(path, remember=False)
    assert sources.open_episodes(path, remember=False, state_keys=["states"]).window(0, "state", 0, 1).shape == (1, 40)


# -- OGBench's visual sets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3, 9])
def test_pictures_as_observations(tmp_path, channels):
    rows = np.random.default_rng(0).integers(0, 256, (8, 16, 12, channels), np.uint8)
    ends = np.isin(np.arange(8), [3, 7])
    np.savez(tmp_path / "visual.npz", observations=rows, actions=np.zeros((8, 2)), terminals=ends)
    source = sources.open_episodes(tmp_path / "visual.npz")
    names = ["front_pixels"] if channels < 9 else [f"front_pixels_{number}" for number in range(3)]
    assert source.cameras == tuple(names)
    for number, name in enumerate(names):
        expected = np.repeat(rows, 3, axis=-1) if channels == 1 else rows[..., 3 * number : 3 * number + 3]
        np.testing.assert_array_equal(source.window(1, f"images/{name}", 0, 3), expected[4:7])
    assert source.window(0, "state", 0, 3).tolist() == [[0], [0], [0]]


@pytest.mark.parametrize(
    "rows", [np.zeros((4, 6, 5, 4), np.uint8), np.zeros((4, 6, 5, 3), np.uint16), np.full((4, 6, 5, 3), 2.0)]
)
def test_observations_that_are_no_pictures(tmp_path, rows):
    np.savez(tmp_path / "a.npz", observations=rows, actions=np.zeros((4, 2)), terminals=np.arange(4) == 3)
    with pytest.raises(ValueError, match=r"a\.npz: observations: its picture "):
        sources.open_episodes(tmp_path / "a.npz")


# -- numbers that are not there ----------------------------------------------------------------------------------------


def virtual(file, key, source):
    """Replaces a dataset by a virtual one of its shape."""
    layout = h5py.VirtualLayout(file[key].shape, file[key].dtype)
    del file[key]
    layout[:] = source(layout.shape)
    file.create_virtual_dataset(key, layout)


def no_source_file(file, key):
    virtual(file, key, lambda shape: h5py.VirtualSource("elsewhere.h5", "x", shape))


def no_source_dataset(file, key):
    virtual(file, key, lambda shape: h5py.VirtualSource(".", "/gone", shape))


def half_a_source(file, key):
    shape, dtype = file[key].shape, file[key].dtype
    file["half"] = file[key][: N // 2]
    del file[key]
    layout = h5py.VirtualLayout(shape, dtype)
    layout[: N // 2] = h5py.VirtualSource(file["half"])
    file.create_virtual_dataset(key, layout)


def unwritten_source(file, key):
    file.create_dataset("never", file[key].shape, file[key].dtype)
    virtual(file, key, lambda shape: h5py.VirtualSource(file["never"]))


def replaced(file, key, **storage):
    values = file[key][...]
    del file[key]
    return file.create_dataset(key, values.shape, values.dtype, **storage), values


def external(file, key):
    data, values = replaced(file, key, external=[(file.filename + ".raw", 0, h5py.h5f.UNLIMITED)])
    data[...] = values


def never_written(file, key):
    replaced(file, key)


def never_written_in_chunks(file, key):
    replaced(file, key, chunks=True)


def some_rows_never_written(file, key):
    data, values = replaced(file, key, chunks=(1, *file[key].shape[1:]), fillvalue=1)
    data[: N - 1] = values[: N - 1]


def compressed_and_cut_off(file, key):
    data, values = replaced(file, key, chunks=(2, *file[key].shape[1:]), compression="gzip")
    data[:2] = values[:2]


FAULTS = [
    no_source_file, no_source_dataset, half_a_source, unwritten_source, external, never_written,
    never_written_in_chunks, some_rows_never_written, compressed_and_cut_off,
]  # fmt: skip
PLACES = {
    "aloha": (make_aloha, "episode_0.hdf5", ["observations/qpos", "action", "observations/images/top"]),
    "acrlpd": (
        make_own,
        "episode_000000.hdf5",
        ["observations/state", "actions", "rewards", "terminals", "observations/images/top"],
    ),
    "robomimic": (
        make_robomimic,
        "demos.hdf5",
        [f"data/demo_0/{key}" for key in ("obs/robot0_eef_quat", "actions", "rewards", "obs/agentview_image")],
    ),
    "droid": (
        make_droid,
        "success/trajectory.h5",
        ["observation/robot_state/joint_positions", "action/joint_velocity", "observation/camera_type/11"],
    ),
}
NUMBERS = {
    f"{fault.__name__}-{layout}-{key}": (fault, make, name, key, {"cameras": ()} if layout == "droid" else {})
    for layout, (make, name, keys) in PLACES.items()
    for key in keys
    for fault in FAULTS
}


@pytest.mark.parametrize(("fault", "make", "name", "key", "options"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_that_are_not_there_are_an_error(tmp_path, fault, make, name, key, options):
    path, _ = make(tmp_path / "set")
    with h5py.File(tmp_path / "set" / name, "r+") as file:
        fault(file, key)
    with pytest.raises(ValueError, match=rf"{key.removeprefix('data/demo_0/')}: ") as error:
        sources.open_episodes(path, remember=False, **options)
    assert str(tmp_path / "set" / name) in str(error.value)
    assert "\n" not in str(error.value)
    if make is make_own:
        with pytest.raises(ValueError, match=key):
            hdf5.read_episode(tmp_path / "set" / name)


def test_a_virtual_dataset_of_its_own_file_is_read(tmp_path):
    path, _ = make_aloha(tmp_path / "set")
    with h5py.File(path / "episode_0.hdf5", "r+") as file:
        file.move("action", "stored")
        layout = h5py.VirtualLayout((N, 14), np.float32)
        layout[:] = h5py.VirtualSource(file["stored"])
        file.create_virtual_dataset("action", layout)
    np.testing.assert_array_equal(sources.open_episodes(path, remember=False).window(0, "actions", 0, N), numbers(14))
