"""Names and links in data never lead to files that are not part of it, whether those are there or not."""

import json
import os
import shutil

import h5py
import numpy as np
import pytest

from acrlpd import presets
from acrlpd.config import ConfigError
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.frame_cache import FrameCache, FrameOrigin
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.layouts.columns import Reading, check_inside
from acrlpd.data.formats.lerobot.reader import LeRobotSource, hub_folder
from acrlpd.data.formats.video import VideoError, frame_times
from acrlpd.data.sources import open_episodes
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.tools import convert
from acrlpd.files import open_picture
from acrlpd.models import weights
from acrlpd.overrides import apply_config_overrides
from acrlpd.types import Episode

OUTSIDE = ["../other", "/etc/passwd", "a/../../other", "C:\\other", "..\\other", "a\0b", "\x1b[31m"]


def episode(camera="top"):
    ends = np.arange(3) == 2
    numbers = np.zeros((3, 2), np.float32)
    images = {camera: np.zeros((3, 16, 16, 3), np.uint8)}
    return Episode(numbers, numbers, ends.astype(np.float32), ends, "lift", images, success=True, source="made here")


@pytest.fixture
def lerobot(tmp_path):
    """A data set with a video, and a whole copy of it beside."""
    hdf5.write_episode(tmp_path / "made/episode_0.hdf5", episode(), {"fps": 10})
    folder = convert.to_lerobot(H5DatasetReader(tmp_path / "made"), tmp_path / "set", pictures="h264")
    shutil.copytree(folder, tmp_path / "other")
    return folder


TEMPLATES = [f"{way}{{rest}}" for way in ("../other/", "a/../../other/", "/etc/", "C:\\")]
TEMPLATES += [
    "{rest:>999999999}",
    "{rest!r}",
    "{x}{rest}",
    "{rest.real}",
    "{rest[0]}",
    "{rest:{rest}}",
    "\x1b[31m{rest}",
    "",
]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["data_path", "video_path"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_leads_to_files_of_the_set(lerobot, kind, template):
    path = lerobot / "meta/info.json"
    info = json.loads(path.read_text())
    whole = info[kind]
    number = "file_index" if "{rest:" in template or "{rest." in template or "{rest[" in template else None
    info[kind] = template.replace("rest", number) if number else template.replace("{rest}", whole).replace("rest", "x")
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=rf"info\.json: {kind}"):
        LeRobotSource(lerobot)


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_name_of_a_camera_leads_to_files_of_the_set(lerobot, name):
    path = lerobot / "meta/info.json"
    info = json.loads(path.read_text())
    key = "observation.images.top"
    info["features"] = {name if each == key else each: feature for each, feature in info["features"].items()}
    path.write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"info\.json"):
        LeRobotSource(lerobot)


@pytest.mark.parametrize("name", OUTSIDE)
def test_nothing_is_written_outside(tmp_path, name):
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="camera"):
        FrameCache(tmp_path / "cache").record_path(name, FrameOrigin("episode", file, ""))
    with pytest.raises(ConfigError, match="asset_id"):
        apply_config_overrides(presets.get_preset("demo"), {"asset_id": name})
    with pytest.raises(ValueError, match="name"):
        hub_folder(f"hf://{name}")
    with pytest.raises(ValueError, match="name"):
        weights.fetch(f"gs://{name.strip('/')}/../../x")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("name", [name for name in OUTSIDE if "\0" not in name])
def test_a_conversion_writes_nothing_outside(tmp_path, name):
    """Whatever the names of the cameras are that a data set brings."""
    dataset = EpisodeStore.from_episodes([episode(name)])
    dataset.fps, dataset.format = 10.0, "made here"
    with pytest.raises(ValueError, match="camera"):
        convert.to_lerobot(dataset, tmp_path / "new/set", pictures="h264")
    assert os.listdir(tmp_path / "new") == []


def into_another(kind, path, other):
    with h5py.File(path, "r+") as file:
        if kind == "link":
            del file["actions"]
            file["actions"] = h5py.ExternalLink(other.name, "/actions")
        elif kind == "group":
            file.move("observations", "moved")
            file["observations"] = h5py.ExternalLink(other.name, "/observations")
        elif kind == "behind a link":
            del file["actions"]
            file["elsewhere"] = h5py.ExternalLink(other.name, "/")
            file["actions"] = h5py.SoftLink("/elsewhere/actions")
        elif kind == "storage":
            del file["actions"]
            file.create_dataset("actions", (3, 2), "f4", external=[(str(other), 0, 24)])
        else:
            del file["actions"]
            layout = h5py.VirtualLayout((3, 2), "f4")
            layout[...] = h5py.VirtualSource(str(other), "actions", (3, 2), "f4")
            file.create_virtual_dataset("actions", layout)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pipe", [False, True])
@pytest.mark.parametrize("kind", ["link", "group", "behind a link", "storage", "virtual"])
def test_hdf5_content_of_another_file_is_refused(tmp_path, kind, pipe):
    path, other = tmp_path / "set/episode_0.hdf5", tmp_path / "set/other.bin"
    hdf5.write_episode(path, episode(), {"fps": 10})
    os.mkfifo(other) if pipe else shutil.copy(path, other)
    into_another(kind, path, other)
    for read in (lambda: H5DatasetReader(tmp_path / "set"), lambda: hdf5.read_episode(path)):
        with pytest.raises(ValueError, match=r"episode_0\.hdf5: .*links to other files are not followed"):
            read()
    with pytest.raises(ValueError, match=r"episode_0\.hdf5: .*not followed"), Reading(path) as file:
        check_inside(str(path), file)


def test_links_inside_of_a_file_are_followed(tmp_path):
    path = tmp_path / "episode_0.hdf5"
    hdf5.write_episode(path, episode(), {"fps": 10})
    with h5py.File(path, "r+") as file:
        file.move("actions", "observations/real")
        file["actions"] = h5py.SoftLink("observations/near")
        file["observations/near"] = h5py.SoftLink("real")
    assert H5DatasetReader(tmp_path).num_episodes == 1


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{other}\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile {other}\n",
    "address": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_video_is_no_playlist_of_other_files(lerobot, kind):
    (path,) = lerobot.rglob("*.mp4")
    other = path.with_name("other.mp4")
    path.rename(other)
    path.write_text(PLAYLISTS[kind].format(other=other))
    with pytest.raises(VideoError, match="cannot be opened"):
        frame_times(path)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM", "TGA", "ICO", "PDF", "JPEG2000"])
def test_pictures_of_other_kinds_are_refused(kind):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, kind)
    with pytest.raises(ValueError, match="neither PNG nor JPEG nor WebP"):
        open_picture(buffer.getvalue())


@pytest.mark.timeout(60)
def test_a_maze_of_links_ends(tmp_path):
    """Twelve folders, each with eight links to the next one: billions of ways to the last."""
    for level in range(12):
        folder = tmp_path / f"set/level{level}"
        folder.mkdir(parents=True)
        for link in range(8):
            (folder / f"link{link}").symlink_to(f"../level{level + 1}")
    with pytest.raises(ValueError, match="ways of links"):
        open_episodes(tmp_path / "set")


def test_links_that_lead_back_are_followed_once(tmp_path):
    hdf5.write_episode(tmp_path / "set/episode_0.hdf5", episode(), {"fps": 10})
    (tmp_path / "set/again").symlink_to(".")
    assert open_episodes(tmp_path / "set").num_episodes == 1
