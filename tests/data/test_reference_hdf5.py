"""Every HDF5 set that has reference values beside it, read to those values. Sets are found, layouts detected."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from acrlpd.data import chunks
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.rewards import RewardConfig
from acrlpd.data.store.episodes import EpisodeStore

pytestmark = pytest.mark.reference

FILE_NAMES = {"droid": {"joint_position": "joint_positions"}}  # where openpi's name of a key is not the file's
STATES = {"aloha": ["qpos"], "droid": ["joint_position", "gripper_position"]}  # robomimic's has a test of its own


@dataclasses.dataclass(frozen=True)
class ReferenceSet:
    path: Path
    values: dict[str, np.ndarray]

    def reader(self, **options) -> H5DatasetReader:
        filter_key = str(self.values["filter_key"]) if "filter_key" in self.values else ""
        return H5DatasetReader(self.path, filter_key=filter_key or None, **options)

    def frames(self, reader: H5DatasetReader, key: str) -> np.ndarray:
        """The rows of ``key`` that the reference values are about, read one by one."""
        places = zip(self.values["episode_index"], self.values["frame_index"], strict=True)
        return np.concatenate(
            [reader.window(int(episode), key, int(frame), int(frame) + 1) for episode, frame in places]
        )

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        return {key.removeprefix(prefix): value for key, value in self.values.items() if key.startswith(prefix)}


def data_path(reference: Path) -> Path | None:
    """The HDF5 data that a reference file is about; None if it is about something else."""
    name = reference.name.removesuffix("reference.npz").rstrip(".").partition(".")[0]
    file = reference.with_name(f"{name}.hdf5")
    folder = reference.parent / name
    if file.is_file():
        return file
    is_hdf5 = any(path.suffix in (".hdf5", ".h5") for path in folder.rglob("*"))
    return folder if folder.is_dir() and is_hdf5 else None


@pytest.fixture(scope="module")
def sets(shared) -> list[ReferenceSet]:
    found = []
    for reference in sorted((shared / "data").rglob("*reference.npz")):
        path = data_path(reference)
        if path is not None:
            with np.load(reference) as values:
                found.append(ReferenceSet(path, dict(values)))
    if not found:
        pytest.skip(f"{shared} holds no HDF5 set with reference values")
    return found


def test_episodes(sets):
    for each in sets:
        reader, values = each.reader(cameras=()), each.values
        np.testing.assert_array_equal(reader.lengths, values["episode_lengths"], err_msg=str(each.path))
        infos = [reader.info(index) for index in range(reader.num_episodes)]
        for info, name in zip(infos, values["episode_names"].tolist(), strict=True):
            assert info.source.removesuffix("/trajectory.h5").endswith(f"/{name}")
        if "episode_tasks" in values:
            assert [info.task for info in infos] == values["episode_tasks"].tolist()
        if "success" in values:
            known = {-1: None, 0: False, 1: True}
            assert [info.success for info in infos] == [known[success] for success in values["success"].tolist()]
        starts = np.cumsum(reader.lengths) - reader.lengths
        np.testing.assert_array_equal(starts[values["episode_index"]] + values["frame_index"], values["index"])


def test_numbers_are_exact_in_float32(sets):
    for each in sets:
        reader = each.reader(cameras=())
        actions = each.frames(reader, "actions")
        assert actions.dtype == np.float32
        np.testing.assert_array_equal(actions, each.values["action"].astype(np.float32), err_msg=str(each.path))
        if "reward" in each.values:
            np.testing.assert_array_equal(each.frames(reader, "rewards"), each.values["reward"].astype(np.float32))
        for key, expected in each.under("state__").items():
            name = FILE_NAMES.get(reader.format, {}).get(key, key)
            alone = each.reader(cameras=(), state_keys=[name])
            np.testing.assert_array_equal(each.frames(alone, "state"), expected.astype(np.float32), err_msg=key)
        if reader.format in STATES:
            joined = np.concatenate([each.values[f"state__{key}"] for key in STATES[reader.format]], axis=1)
            np.testing.assert_array_equal(each.frames(reader, "state"), joined.astype(np.float32))


def test_robomimic_state_is_position_rotation_vector_and_gripper(sets):
    found = [each for each in sets if "state__robot0_eef_quat" in each.values]
    if not found:
        pytest.skip("no robomimic set among the reference sets")
    for each in found:
        state, values = each.frames(each.reader(cameras=()), "state"), each.values
        np.testing.assert_array_equal(state[:, :3], values["state__robot0_eef_pos"].astype(np.float32))
        np.testing.assert_array_equal(state[:, 6:], values["state__robot0_gripper_qpos"].astype(np.float32))
        quaternions = values["state__robot0_eef_quat"]
        turned = Rotation.from_rotvec(state[:, 3:6]) * Rotation.from_quat(quaternions).inv()
        np.testing.assert_allclose(turned.magnitude(), 0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(state[:, 3:6], axis=1), 2 * np.arccos(quaternions[:, 3]), atol=1e-6)


def test_sums_over_all_frames(sets):
    for each in sets:
        for key, expected in each.under("sum__").items():
            is_action = key in ("action", "actions")
            reader = each.reader(cameras=())
            if not is_action:
                name = FILE_NAMES.get(reader.format, {}).get(key, key)
                reader = each.reader(cameras=(), state_keys=[name])
            read = "actions" if is_action else "state"
            rows = [reader.window(index, read, 0, length) for index, length in enumerate(reader.lengths.tolist())]
            total = np.sum(np.concatenate(rows), axis=0, dtype=np.float64)
            np.testing.assert_allclose(total, expected, rtol=1e-6, atol=1e-5, err_msg=f"{each.path}: {key}")


def test_pictures(sets):
    for each in sets:
        cameras = each.under("mean__")
        reader = each.reader()
        assert set(reader.cameras) == set(cameras)
        for camera, mean in cameras.items():
            frames = each.frames(reader, f"images/{camera}")
            assert frames.dtype == np.uint8
            np.testing.assert_allclose(frames.mean(axis=(1, 2)), mean, atol=1, err_msg=f"{each.path}: {camera}")
            grid = each.values[f"grid8__{camera}"]
            np.testing.assert_allclose(cells(frames), grid, atol=2, err_msg=f"{each.path}: {camera}")


def cells(frames: np.ndarray) -> np.ndarray:
    """Means over an 8x8 grid, whole-number division, end excluded."""
    height, width = frames.shape[1:3]
    grid = np.empty((len(frames), 8, 8, 3))
    for i in range(8):
        for j in range(8):
            cell = frames[:, i * height // 8 : (i + 1) * height // 8, j * width // 8 : (j + 1) * width // 8]
            grid[:, i, j] = cell.mean(axis=(1, 2))
    return grid


def test_chunks(sets):
    for each in sets:
        values = each.values
        # Sparse rewards end an episode at its last step, if at all: what is not valid is padding then.
        reader = each.reader(cameras=(), rewards=RewardConfig(source="sparse", success=False))
        store = EpisodeStore.from_source(reader)
        batch = chunks.gather(store, values["index"], horizon=values["action_chunk"].shape[1])
        np.testing.assert_array_equal(batch["actions"], values["action_chunk"].astype(np.float32))
        np.testing.assert_array_equal(batch["valid"] == 0, values["action_is_pad"], err_msg=str(each.path))
        np.testing.assert_array_equal(batch["episode_id"], values["episode_index"])
        np.testing.assert_array_equal(batch["step_id"], values["frame_index"])
