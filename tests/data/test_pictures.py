"""Every kind of stored picture in every container: it is read exactly, or left out and refused with the reason."""

import io
import json
import struct
import zlib

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from acrlpd.data import sources
from acrlpd.data.formats import pictures
from acrlpd.data.formats.video import import_av
from acrlpd.data.store.episodes import OptionError

N, HEIGHT, WIDTH = 4, 16, 24
RGB = np.kron(np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8), np.ones((8, 8, 1), np.uint8))
GREY = RGB[..., 0]


def png(levels, colour_type):
    """Of 16 bits, which Pillow does not write in colour."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(lowest):
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[3, 4] = lowest
    return np.dstack([RGB, alpha])


rgb, grey = Image.fromarray(RGB), Image.fromarray(GREY)
palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
deep = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) * 100
THREE = np.repeat(GREY[..., None], 3, axis=-1)
JPEG = saved(rgb, "JPEG")
GREY_JPEG = saved(grey, "JPEG")

# (bytes, the picture that they are, or the word in the reason why they are none)
ENCODED = {
    "png": (saved(rgb, "PNG"), RGB),
    "png of a palette": (saved(palette, "PNG"), np.asarray(palette.convert("RGB"))),
    "png in grey": (saved(grey, "PNG"), THREE),
    "png with an opaque alpha": (saved(Image.fromarray(with_alpha(255)), "PNG"), RGB),
    "jpeg": (JPEG, np.asarray(Image.open(io.BytesIO(JPEG)))),
    "jpeg in grey": (GREY_JPEG, np.asarray(Image.open(io.BytesIO(GREY_JPEG)).convert("RGB"))),
    "webp": (saved(rgb, "WEBP", lossless=True), RGB),
    "png with alpha": (saved(Image.fromarray(with_alpha(254)), "PNG"), "transparent"),
    "png in grey with alpha": (saved(grey.convert("LA"), "PNG"), "transparency"),
    "png of a palette with alpha": (saved(palette, "PNG", transparency=0), "transparent"),
    "png with a transparent colour": (saved(rgb, "PNG", transparency=(1, 2, 3)), "transparent"),
    "png in grey with a transparent level": (saved(grey, "PNG", transparency=7), "transparent"),
    "webp with alpha": (saved(Image.fromarray(with_alpha(9)), "WEBP", lossless=True), "transparent"),
    "png of 16 bits": (saved(Image.fromarray(deep), "PNG"), "16 bits"),
    "png in colour of 16 bits": (png(np.dstack([deep] * 3), 2), "16 bits"),
    "png in grey with alpha of 16 bits": (png(np.dstack([deep] * 2), 4), "16 bits"),
    "png in colour with alpha of 16 bits": (png(np.dstack([deep] * 4), 6), "16 bits"),
    "png in black and white": (saved(grey.convert("1"), "PNG"), "less than 8 bits"),
    "jpeg in CMYK": (saved(rgb.convert("CMYK"), "JPEG"), "CMYK"),
}
RAW = {
    "channels last": (RGB, RGB),
    "channels first": (np.moveaxis(RGB, -1, 0), RGB),
    "grey": (GREY, THREE),
    "grey with one channel": (GREY[..., None], THREE),
    "grey with one channel first": (GREY[None], THREE),
    "floats": ((RGB / 255).astype(np.float32), RGB),
    "doubles, channels first": (np.moveaxis(RGB / 255, -1, 0), RGB),
    "grey floats": ((GREY / 255).astype(np.float32), THREE),
    "16 bits": (deep, "uint16"),
    "16 bits of three channels": (np.dstack([deep] * 3), "uint16"),
    "floats up to 255": (RGB.astype(np.float32), "floats from 0 to 1"),
    "floats below 0": ((RGB / 127.5 - 1).astype(np.float32), "floats from 0 to 1"),
    "floats in m": (deep.astype(np.float32) / 1000, "floats from 0 to 1"),
    "not a number": (np.full(RGB.shape, np.nan, np.float32), "floats from 0 to 1"),
    "four channels": (with_alpha(255), "shape"),
    "two channels": (RGB[..., :2], "shape"),
    "channels first or last": (RGB[:3], "shape"),
}
KINDS = {f"encoded: {name}": case for name, case in ENCODED.items()} | {f"raw: {n}": case for n, case in RAW.items()}


def numbers(width):
    return np.random.default_rng(width).normal(size=(N, width)).astype(np.float32)


# -- containers: each writes a data set with the camera "good", and the camera "odd" of N equal pictures ---------------


def fill_fixed(group, name, content):
    group.create_dataset(name, data=np.array([content] * N, f"S{len(content) + 3}"))


def fill_variable(group, name, content):
    cells = group.create_dataset(name, (N,), h5py.vlen_dtype(np.uint8))
    for row in range(N):
        cells[row] = np.frombuffer(content + b"\0" * row, np.uint8)


def fill_padded(group, name, content):
    group[name] = np.array([np.frombuffer(content + b"\0" * 5, np.uint8)] * N)


def fill_opaque(group, name, content):
    group[name] = np.array([np.void(content)] * N)


def fill_raw(group, name, picture):
    group.create_dataset(name, data=np.stack([picture] * N), chunks=(1, *picture.shape), compression="gzip")


def fill_plain(group, name, picture):
    group[name] = np.stack([picture] * N)


def write_aloha(folder, fill, content):
    with h5py.File(folder / "episode_0.hdf5", "w") as file:
        file["observations/qpos"], file["action"] = numbers(14), numbers(14)
        images = file.create_group("observations/images")
        images["good"] = np.stack([RGB] * N)
        fill(images, "odd", content)
    return folder


def write_robomimic(folder, fill, content):
    with h5py.File(folder / "demos.hdf5", "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"], demo["rewards"] = numbers(7), np.zeros(N)
        obs = demo.create_group("obs")
        for key, width in {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}.items():
            obs[key] = numbers(width)
        obs["good"] = np.stack([RGB] * N)
        fill(obs, "odd", content)
        demo.move("obs/good", "obs/good_image")
        demo.move("obs/odd", "obs/odd_image")
    return folder / "demos.hdf5"


def write_own(folder, fill, content):
    with h5py.File(folder / "episode_0.hdf5", "w") as file:
        file.attrs.update(format="acrlpd", version=1, task="lift", metadata="{}")
        file["observations/state"], file["actions"] = numbers(3), numbers(2)
        file["rewards"], file["terminals"] = np.zeros(N, np.float32), np.arange(N) == N - 1
        images = file.create_group("observations/images")
        images["good"] = np.stack([RGB] * N)
        fill(images, "odd", content)
    return folder


HDF5 = {"aloha": write_aloha, "robomimic": write_robomimic, "acrlpd": write_own}
FILLS = {
    "encoded": {"fixed": fill_fixed, "variable": fill_variable, "padded": fill_padded, "opaque": fill_opaque},
    "raw": {"chunked": fill_raw, "plain": fill_plain},
}


def write_lerobot(root, features, columns, *, files=()):
    """A v2.1 set of one episode."""
    t = np.arange(N)
    one = {"dtype": "int64", "shape": [1], "names": None}
    known = dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), one)
    known |= {"timestamp": one | {"dtype": "float32"}}
    known |= {key: {"dtype": "float32", "shape": [2]} for key in ("observation.state", "action")}
    columns = {
        **{key: pa.array(numbers(2).tolist(), pa.list_(pa.float32())) for key in ("observation.state", "action")},
        **columns,
        "timestamp": (t / 10).astype("f4"),
    }
    columns |= {"frame_index": t, "episode_index": t * 0, "index": t, "task_index": t * 0}
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    pq.write_table(pa.table(columns), root / "data/chunk-000/episode_000000.parquet")
    info = {"codebase_version": "v2.1", "fps": 10, "total_episodes": 1, "total_frames": N, "total_tasks": 1}
    info |= {"data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"}
    info |= {"video_path": "videos/{video_key}/episode_{episode_index:06d}.mp4", "features": known | features}
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "do it"}\n')
    (root / "meta/episodes.jsonl").write_text(f'{{"episode_index": 0, "tasks": ["do it"], "length": {N}}}\n')
    for key, write in files:
        path = root / f"videos/{key}/episode_000000.mp4"
        path.parent.mkdir(parents=True)
        write(path)
    return root


GOOD = "observation.images.good"
ODD = "observation.images.odd"
GOOD_CELLS = [{"bytes": ENCODED["png"][0], "path": "x.png"}] * N


def with_odd(root, cells, feature):
    features = {GOOD: {"dtype": "image", "shape": [HEIGHT, WIDTH, 3]}, ODD: feature}
    return write_lerobot(root, features, {GOOD: GOOD_CELLS, ODD: cells})


def lerobot_struct(root, content):
    return with_odd(root, [{"bytes": content, "path": "x.png"}] * N, {"dtype": "image", "shape": [HEIGHT, WIDTH, 3]})


def lerobot_bytes(root, content):
    return with_odd(root, pa.array([content] * N, pa.binary()), {"dtype": "image", "shape": [HEIGHT, WIDTH, 3]})


def as_lists(picture, sizes):
    kind = pa.from_numpy_dtype(picture.dtype)
    for size in reversed(picture.shape):
        kind = pa.list_(kind, size) if sizes else pa.list_(kind)
    return pa.array([picture.tolist()] * N, kind)


def lerobot_lists(root, picture):
    return with_odd(root, as_lists(picture, sizes=False), {"dtype": "image", "shape": list(picture.shape)})


def lerobot_arrays(root, picture):
    return with_odd(root, as_lists(picture, sizes=True), {"dtype": str(picture.dtype), "shape": list(picture.shape)})


def containers(name):
    """(container, how it writes pictures of this kind)."""
    kind = name.partition(":")[0]
    for layout, write in HDF5.items():
        for form, fill in FILLS[kind].items():
            yield f"{layout}, {form}", lambda root, content, write=write, fill=fill: write(root, fill, content)
    written = {"encoded": (lerobot_struct, lerobot_bytes), "raw": (lerobot_lists, lerobot_arrays)}[kind]
    for write in written:
        yield write.__name__, lambda root, content, write=write: write(root / "set", content)


CASES = {
    f"{name} in {container}": (case, write) for name, case in KINDS.items() for container, write in containers(name)
}


@pytest.mark.parametrize(("case", "write"), CASES.values(), ids=CASES)
def test_a_picture_is_read_exactly_or_left_out_and_refused_with_the_reason(tmp_path, caplog, case, write):
    content, expected = case
    path = write(tmp_path, content)
    source = sources.open_episodes(path, remember=False)
    good, odd = next((f"good{end}", f"odd{end}") for end in ("", "_image") if f"good{end}" in source.cameras)
    np.testing.assert_array_equal(source.window(0, f"images/{good}", 1, 3), [RGB, RGB])
    if isinstance(expected, np.ndarray):
        for options in ({"cameras": [odd]}, {"check_images": True}):
            chosen = sources.open_episodes(path, remember=False, **options)
            assert odd in chosen.cameras
            np.testing.assert_array_equal(chosen.window(0, f"images/{odd}", 0, N), np.stack([expected] * N))
        return
    assert odd not in source.cameras
    (told,) = [entry for entry in source.left_out if odd in entry]
    assert told in caplog.text
    assert expected in told
    with pytest.raises(ValueError, match=f"left out: images/{odd}"):
        source.window(0, f"images/{odd}", 0, 1)
    with pytest.raises(OptionError, match=expected) as refused:
        sources.open_episodes(path, remember=False, cameras=[odd])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["damaged", "16 bits"])
@pytest.mark.parametrize(
    "write",
    [
        *(lambda root, rows, write=write: write(root, lambda group, name, _: fill_each(group, name, rows), None)
          for write in HDF5.values()),
        lambda root, rows: with_odd(
            root / "set", [{"bytes": row, "path": ""} for row in rows], {"dtype": "image", "shape": [HEIGHT, WIDTH, 3]}
        ),
    ],
    ids=[*HDF5, "lerobot"],
)  # fmt: skip
def test_one_odd_picture_among_good_ones_is_named(tmp_path, write, content):
    good = ENCODED["png"][0]
    bad = {"damaged": good[:40], "16 bits": ENCODED["png in colour of 16 bits"][0]}[content]
    path = write(tmp_path, [good, good, bad, good])
    source = sources.open_episodes(path, remember=False)
    odd = next(camera for camera in source.cameras if "odd" in camera)
    np.testing.assert_array_equal(source.window(0, f"images/{odd}", 0, 2), [RGB, RGB])
    with pytest.raises(ValueError, match=r"odd.*frame 2"):
        source.window(0, f"images/{odd}", 1, 3)


def fill_each(group, name, rows):
    cells = group.create_dataset(name, (N,), h5py.vlen_dtype(np.uint8))
    for row, content in enumerate(rows):
        cells[row] = np.frombuffer(content, np.uint8)


@pytest.mark.parametrize("name", ["top_depth", "depth_top", "depth", "Depth.left", "aligned_depth_to_color"])
@pytest.mark.parametrize("container", [*HDF5, "lerobot"])
def test_a_camera_named_depth_is_left_out_and_refused(tmp_path, caplog, name, container):
    """Whatever it holds: 8 bits of depth look like grey."""

    def fill(group, odd, picture):
        group[odd] = np.stack([picture] * N)
        group[name] = np.stack([picture] * N)

    if container == "lerobot":
        key = f"observation.images.{name}"
        features = {each: {"dtype": "image", "shape": [HEIGHT, WIDTH, 3]} for each in (GOOD, key)}
        path = write_lerobot(tmp_path / "set", features, {GOOD: GOOD_CELLS, key: GOOD_CELLS})
    else:
        path = HDF5[container](tmp_path, fill, GREY)
    source = sources.open_episodes(path, remember=False)
    assert not any(pictures.is_depth(camera) for camera in source.cameras)
    assert len([told for told in source.left_out if name in told]) == 1
    assert len(caplog.records) == 1
    with pytest.raises(OptionError, match="depth camera"):
        sources.open_episodes(path, remember=False, cameras=[name])


DECLARATIONS = {
    "in info": {"info": {"is_depth_map": True}},
    "of a video": {"info": {"video.is_depth_map": True}},
    "in video_info": {"video_info": {"video.is_depth_map": True}},
    "in the feature": {"is_depth_map": True},
}


@pytest.mark.parametrize("declared", DECLARATIONS.values(), ids=DECLARATIONS)
@pytest.mark.parametrize("dtype", ["image", "video"])
def test_a_camera_declared_as_depth_is_left_out_and_refused(tmp_path, declared, dtype):
    features = {GOOD: {"dtype": "image", "shape": [HEIGHT, WIDTH, 3]}, ODD: {"dtype": dtype, "shape": [4, 4, 1]}}
    features[ODD] |= declared
    columns = {GOOD: GOOD_CELLS} | ({ODD: GOOD_CELLS} if dtype == "image" else {})
    root = write_lerobot(tmp_path / "set", features, columns)
    source = sources.open_episodes(root, remember=False)
    assert source.cameras == ("good",)
    assert source.left_out == ["images/odd (it is declared as a depth camera (is_depth_map))"]
    for asked in ("odd", ODD):
        with pytest.raises(OptionError, match="declared as a depth camera"):
            sources.open_episodes(root, remember=False, cameras=[asked])


VIDEOS = {
    "yuv420p": ("libx264", None),
    "gray": ("ffv1", None),
    "gray16le": ("ffv1", "gray16le"),
    "gray10le": ("ffv1", "gray10le"),
    "yuv420p10le": ("libx264", "yuv420p10le"),
    "yuva420p": ("ffv1", "yuva420p"),
}


@pytest.mark.parametrize(("pix_fmt", "codec", "reason"), [(name, *case) for name, case in VIDEOS.items()], ids=VIDEOS)
def test_a_video_that_is_not_8_bit_colour_is_left_out_and_refused(tmp_path, pix_fmt, codec, reason):
    features = {GOOD: {"dtype": "image", "shape": [HEIGHT, WIDTH, 3]}, ODD: {"dtype": "video", "shape": [16, 24, 3]}}

    def write(path):
        write_video(path, codec, pix_fmt)

    root = write_lerobot(tmp_path / "set", features, {GOOD: GOOD_CELLS}, files=[(ODD, write)])
    source = sources.open_episodes(root, remember=False)
    if reason is None:
        assert source.cameras == ("good", "odd")
        assert np.abs(source.window(0, "images/odd", 0, N)[0].astype(int) - THREE).mean() < 30
        return
    assert source.cameras == ("good",)
    assert source.left_out == [f"images/odd (its pictures are {reason}, expected 8-bit colour)"]
    with pytest.raises(OptionError, match=rf"observation\.images\.odd: its pictures are {reason}"):
        sources.open_episodes(root, remember=False, cameras=["odd"])


def write_video(path, codec, pix_fmt):
    av = import_av()
    with av.open(str(path), "w", format="matroska" if codec == "ffv1" else "mp4") as output:
        stream = output.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, pix_fmt
        for number in range(N):
            frame = av.VideoFrame.from_ndarray(THREE, format="rgb24").reformat(format=pix_fmt)
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode())


def test_what_was_left_out_is_remembered_by_choice(tmp_path, monkeypatch):
    """What opening found out for the usual cameras is no answer for one that is asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = lerobot_struct(tmp_path / "set", ENCODED["png of 16 bits"][0])
    for _ in range(2):
        source = sources.open_episodes(root)
        assert source.cameras == ("good",)
        assert len(source.left_out) == 1
    with pytest.raises(OptionError, match="16 bits"):
        sources.open_episodes(root, cameras=["good", "odd"])


@pytest.mark.parametrize("container", [*HDF5, "lerobot"])
def test_a_camera_that_is_not_chosen_is_ignored_whatever_it_holds(tmp_path, container):
    def fill(group, name, _):
        group.create_dataset(name, (N, HEIGHT, WIDTH, 3), np.uint8, chunks=(1, HEIGHT, WIDTH, 3))  # never written

    if container == "lerobot":
        root = with_odd(tmp_path / "set", pa.nulls(N), {"dtype": "video", "shape": "none", "info": 5})
    else:
        root = HDF5[container](tmp_path, fill, None)
    with pytest.raises(ValueError, match="odd"):
        sources.open_episodes(root, remember=False)
    good = "good_image" if container == "robomimic" else "good"
    source = sources.open_episodes(root, remember=False, cameras=[good], check_images=True)
    assert source.cameras == (good,)
    assert any(told.startswith("images/odd") and pictures.NOT_CHOSEN in told for told in source.left_out)


def test_libero_turns_encoded_pictures_as_raw_ones(tmp_path):
    found = {}
    for form, fill in {"raw": fill_plain, "jpeg": lambda *place: fill_fixed(*place[:2], ENCODED["png"][0])}.items():
        (tmp_path / form).mkdir()
        with h5py.File(tmp_path / form / "demo.hdf5", "w") as file:
            demo = file.create_group("data/demo_0")
            demo["actions"] = numbers(7)
            for key, width in {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2}.items():
                demo[f"obs/{key}"] = numbers(width)
            fill(demo["obs"], "agentview_rgb", RGB)
        source = sources.open_episodes(tmp_path / form / "demo.hdf5", remember=False)
        found[form] = source.window(0, "images/agentview_rgb", 0, 1)[0]
    np.testing.assert_array_equal(found["raw"], RGB[::-1, ::-1])
    np.testing.assert_array_equal(found["jpeg"], RGB[::-1, ::-1])
