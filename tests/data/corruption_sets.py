"""Small data sets of every format, the same each time; for tests that damage copies of them."""

import io
import json
from fractions import Fraction

import h5py
import numpy as np
from PIL import Image

from acrlpd.data.formats import hdf5
from acrlpd.types import Episode

LENGTHS = (5, 6, 7)
FPS = 10
TASKS = ("lift the cube", "close the drawer", "lift the cube")
V2_INFO = {"chunks_size": 2, "robot_type": "arm", "splits": {"train": "0:3"}}


def numbers(number, length, width):
    return np.random.default_rng(100 * number + width).normal(size=(length, width)).astype(np.float32)


def frames(number, length, size=(16, 16)):
    """Noise on a gradient: every picture differs from every other."""
    rng = np.random.default_rng(1000 + number)
    return rng.integers(0, 256, (length, *size, 3)).astype(np.uint8)


def png(frame):
    return encoded(frame, "PNG")


def encoded(frame, kind):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, kind)
    return buffer.getvalue()


def write_mp4(path, pictures):
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS), options={"g": "2", "bf": "0", "crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], "yuv420p"
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_own(folder):
    for number, length in enumerate(LENGTHS):
        ends = np.arange(length) == length - 1
        state, actions = numbers(number, length, 4), numbers(number, length, 3)
        images = {"top": frames(number, length), "wrist": frames(number + 10, length)}
        episode = Episode(state, actions, ends.astype(np.float32), ends, TASKS[number], images, success=True)
        compression = "gzip" if number == 1 else None
        hdf5.write_episode(hdf5.episode_path(folder, number), episode, {"fps": FPS}, compression=compression)


def write_aloha(folder, *, jpegs=False):
    for number, length in enumerate(LENGTHS):
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            file["observations/qpos"] = numbers(number, length, 14).astype(np.float64)
            file["observations/qvel"] = numbers(number, length, 13)
            file["action"] = numbers(number + 5, length, 14)
            file["observations/images/top"] = jpeg_rows(number, length) if jpegs else frames(number, length)
            file.attrs["sim"] = True


def jpeg_rows(number, length):
    """Padded with zeros, as ALOHA's recorders have it."""
    cells = [encoded(frame, "JPEG") for frame in frames(number, length)]
    rows = np.zeros((length, max(map(len, cells)) + 5), np.uint8)
    for row, cell in zip(rows, cells, strict=True):
        row[: len(cell)] = np.frombuffer(cell, np.uint8)
    return rows


def write_robomimic(folder):
    with h5py.File(folder / "demos.hdf5", "w") as file:
        for number, length in enumerate(LENGTHS):
            demo = file.create_group(f"data/demo_{number}")
            for key, width in {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}.items():
                demo[f"obs/{key}"] = np.abs(numbers(number, length, width)) / 10
            demo.create_dataset("obs/agentview_image", data=frames(number, length), compression="gzip")
            demo["actions"] = numbers(number, length, 7)
            demo["rewards"] = (np.arange(length) == length - 1).astype(np.float64)
            demo.attrs.update(num_samples=length, ep_meta=json.dumps({"lang": TASKS[number]}))
        file["data"].attrs.update(total=sum(LENGTHS), env_args=json.dumps({"env_kwargs": {"control_freq": FPS}}))
        file["mask/train"] = np.array([b"demo_1"])


def write_droid(folder):
    texts = {}
    for number, length in enumerate(LENGTHS):
        place = folder / ("failure" if number == 1 else "success") / "2023-07-07" / f"at_{number}"
        place.mkdir(parents=True)
        with h5py.File(place / "trajectory.h5", "w") as file:
            for key, seed in {"observation/robot_state/joint_positions": 0, "action/joint_velocity": 5}.items():
                file[key] = numbers(number + seed, length, 7)
            for key in ("observation/robot_state/gripper_position", "action/gripper_position"):
                file[key] = numbers(number, length, 1)[:, 0]
            file["observation/controller_info/movement_enabled"] = np.ones(length, bool)
            file["observation/timestamp/control/step_start"] = 66 * np.arange(length)
            for serial, kind in {"11": 0, "22": 1}.items():
                file[f"observation/camera_type/{serial}"] = np.full(length, kind)
                write_mp4(place / f"recordings/MP4/{serial}.mp4", frames(number + int(serial), length, (32, 32)))
            file.attrs["success"] = number != 1
        (place / f"metadata_u{number}.json").write_text(json.dumps({"uuid": f"u{number}", "success": number != 1}))
        texts[f"u{number}"] = {"language_instruction1": TASKS[number]}
    (folder / "aggregated-annotations-030724.json").write_text(json.dumps(texts))


def write_lerobot(folder, version="v2.1", *, video=False):
    """LeRobot by hand, v2 with a file an episode, v3 with one file for all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    v3, key = version == "v3.0", "observation.images.top"
    kind = "video" if video else "image"
    features = {
        "observation.state": {"dtype": "float32", "shape": [4]},
        "action": {"dtype": "float32", "shape": [3]},
        "next.reward": {"dtype": "float32", "shape": [1]},
        key: {"dtype": kind, "shape": [32, 32, 3]},
        "timestamp": {"dtype": "float32", "shape": [1]},
    }
    features |= {
        name: {"dtype": "int64", "shape": [1]} for name in ("frame_index", "episode_index", "index", "task_index")
    }
    tasks = list(dict.fromkeys(TASKS))
    tables, episodes, clips, first = [], [], [], 0
    for number, length in enumerate(LENGTHS):
        steps = np.arange(length)
        columns = {
            "observation.state": pa.FixedSizeListArray.from_arrays(numbers(number, length, 4).ravel(), 4),
            "action": pa.FixedSizeListArray.from_arrays(numbers(number, length, 3).ravel(), 3),
            "next.reward": (steps == length - 1).astype(np.float32),
            "timestamp": (steps / FPS).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(length, number),
            "index": first + steps,
            "task_index": np.full(length, tasks.index(TASKS[number])),
        }
        clips.append(frames(number, length, (32, 32)))
        if not video:
            columns[key] = [{"bytes": png(frame), "path": f"{at}.png"} for at, frame in enumerate(clips[-1])]
        tables.append(pa.table(columns))
        row = {"episode_index": number, "tasks": [TASKS[number]], "length": length}
        if v3:
            row |= {"data/chunk_index": 0, "data/file_index": 0}
            row |= {"dataset_from_index": first, "dataset_to_index": first + length}
            if video:
                span = {"from_timestamp": first / FPS, "to_timestamp": (first + length) / FPS}
                row |= {f"videos/{key}/{name}": value for name, value in (span | PLACE).items()}
        episodes.append(row)
        first += length
    number_of = ("chunk_index", "file_index") if v3 else ("episode_chunk", "episode_index")
    place = f"chunk-{{{number_of[0]}:03d}}/file-{{{number_of[1]}:06d}}"
    info = V2_INFO | {
        "codebase_version": version,
        "fps": FPS,
        "total_episodes": len(LENGTHS),
        "total_frames": first,
        "total_tasks": len(tasks),
        "data_path": f"data/{place}.parquet",
        "video_path": f"videos/{{video_key}}/{place}.mp4",
        "features": features,
    }
    (folder / "meta").mkdir()
    (folder / "meta/info.json").write_text(json.dumps(info, indent=1))
    for number, table in enumerate([pa.concat_tables(tables)] if v3 else tables):
        path = folder / info["data_path"].format(**dict(zip(number_of, (number // 2, number), strict=True)))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, compression="zstd")
    for number, clip in enumerate([np.concatenate(clips)] if v3 else clips):
        if video:
            at = dict(zip(number_of, (number // 2, number), strict=True))
            write_mp4(folder / info["video_path"].format(**at, video_key=key), clip)
    task_rows = [{"task_index": at, "task": task} for at, task in enumerate(tasks)]
    if v3:
        (folder / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(episodes), folder / "meta/episodes/chunk-000/file-000.parquet")
        pq.write_table(pa.Table.from_pylist(task_rows), folder / "meta/tasks.parquet")
    else:
        (folder / "meta/episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in episodes))
        (folder / "meta/tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in task_rows))


PLACE = {"chunk_index": 0, "file_index": 0}


def write_npz(folder):
    rows = sum(LENGTHS)
    terminals = np.zeros(rows, bool)
    terminals[np.cumsum(LENGTHS) - 1] = True
    arrays = {"observations": numbers(0, rows, 6), "actions": np.tanh(numbers(1, rows, 3)), "terminals": terminals}
    np.savez_compressed(folder / "play.npz", **arrays, qpos=numbers(2, rows, 21))


SETS = {
    "own": write_own,
    "aloha": write_aloha,
    "aloha-jpeg": lambda folder: write_aloha(folder, jpegs=True),
    "robomimic": write_robomimic,
    "droid": write_droid,
    "lerobot-v2.0": lambda folder: write_lerobot(folder, "v2.0"),
    "lerobot-v2.1-video": lambda folder: write_lerobot(folder, "v2.1", video=True),
    "lerobot-v3.0": lambda folder: write_lerobot(folder, "v3.0"),
    "lerobot-v3.0-video": lambda folder: write_lerobot(folder, "v3.0", video=True),
    "npz": write_npz,
}


def path_of(folder, name):
    """What a user would name."""
    return folder / {"npz": "play.npz", "robomimic": "demos.hdf5"}.get(name, "")
