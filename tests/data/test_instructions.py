"""Where an instruction comes from, what is told where there is none, and what becomes of one that changes."""

import json

import h5py
import numpy as np
import pytest

from acrlpd.data import chunks
from acrlpd.data.formats import hdf5
from acrlpd.data.formats.hdf5 import H5DatasetReader
from acrlpd.data.formats.lerobot.reader import LeRobotSource
from acrlpd.data.sources import open_episodes
from acrlpd.data.store import windows
from acrlpd.data.store.metadata_cache import MetadataCache
from acrlpd.data.tools import convert, instructions
from acrlpd.data.tools.inspection import inspect
from acrlpd.types import Episode

STEPS = 6


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def write_demos(path, *, libero=True, attributes=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    state = {"ee_pos": 3, "ee_ori": 3, "gripper_states": 2} if libero else {"robot0_eef_pos": 3}
    state |= {} if libero else {"robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
    with h5py.File(path, "w") as file:
        for key, width in state.items():
            file[f"data/demo_0/obs/{key}"] = rng.normal(size=(STEPS, width))
        file[f"data/demo_0/obs/{'agentview_rgb' if libero else 'agentview_image'}"] = np.zeros(
            (STEPS, 4, 4, 3), np.uint8
        )
        file["data/demo_0/actions"] = rng.uniform(-1, 1, (STEPS, 7))
        file["data"].attrs.update({key: json.dumps(value) for key, value in (attributes or {}).items()})
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("turn_on_the_stove_demo", "turn on the stove"),
        (
            "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it_demo",
            "turn on the stove and put the moka pot on it",
        ),
        ("LIVING_ROOM_SCENE2_pick_up_the_milk_demo", "pick up the milk"),
        ("STUDY_SCENE10_pick_up_the_book", "pick up the book"),
        ("demo", ""),
        ("libero_object", ""),  # of what several files were put together into
        ("part_0", ""),
    ],
)
def test_libero_names_a_file_after_its_task(tmp_path, name, text):
    path = write_demos(tmp_path / f"{name}.hdf5")
    assert H5DatasetReader(path).info(0).task == text
    assert H5DatasetReader(path, default_task="do it").info(0).task == (text or "do it")
    stated = write_demos(path, attributes={"problem_info": {"language_instruction": "stated"}})
    assert H5DatasetReader(stated).info(0).task == "stated"


def test_a_name_of_robomimics_is_no_text(tmp_path):
    path = write_demos(tmp_path / "turn_on_the_stove_demo.hdf5", libero=False)
    assert H5DatasetReader(path).info(0).task == ""


def own(folder, *tasks, changes=()):
    for number, task in enumerate(tasks):
        rows = np.random.default_rng(number).normal(size=(STEPS, 2)).astype(np.float32)
        episode = Episode(rows, rows, rows[:, 0], np.zeros(STEPS, bool), task, success=True, task_changes=changes)
        hdf5.write_episode(hdf5.episode_path(folder, number), episode, {"fps": 10})
    return folder


def lerobot(folder, *tasks):
    """A LeRobot set with these texts under task_index 0, 1, ..., an episode of each."""
    pytest.importorskip("pyarrow")
    names = [f"task {number}" for number in range(len(tasks))]
    own(folder / "own", *names)
    convert.to_lerobot(H5DatasetReader(folder / "own"), folder / "set")
    write_tasks(folder / "set", list(range(len(tasks))), list(tasks))
    return folder / "set"


def write_tasks(folder, indices, texts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"task_index": indices, "task": texts}), folder / "meta/tasks.parquet")


def libero(folder, *names):
    for name in names:
        write_demos(folder / f"{name}.hdf5")
    return folder


def robomimic(folder, *environments):
    for number, name in enumerate(environments):
        write_demos(folder / f"{number}.hdf5", libero=False, attributes={"env_args": {"env_name": name}})
    return folder


SILENT = {  # a data set, how many of its episodes have no text, what tells their tasks apart
    "all say something": (own, ["a", "b"], 0, []),
    "blanks": (own, ["a", " \n"], 1, []),
    "none, of nobody knows how many tasks": (own, ["", ""], 2, []),
    "LeRobot, one": (lerobot, ["a", ""], 1, ["task_index 1"]),
    "LeRobot, several": (lerobot, ["", "a", ""], 2, ["task_index 0", "task_index 2"]),
    "LIBERO, one file": (libero, ["part_0"], 1, ["part_0.hdf5"]),
    "LIBERO, two": (libero, ["part_0", "part_1"], 2, ["part_0.hdf5", "part_1.hdf5"]),
    "LIBERO, one says it": (libero, ["part_0", "turn_it_demo"], 1, ["part_0.hdf5"]),
    "robomimic, one environment": (robomimic, ["Lift", "Lift"], 2, ["environment Lift"]),
    "robomimic, two": (robomimic, ["Lift", "Can"], 2, ["environment Can", "environment Lift"]),
}


@pytest.mark.parametrize(("make", "given", "count", "tasks"), SILENT.values(), ids=SILENT)
def test_what_has_no_text_is_told_and_cured(tmp_path, make, given, count, tasks):
    folder = make(tmp_path / "data", *given)
    for _ in range(2):  # the second time from the cache
        silent = instructions.untold(open_episodes(folder))
        found = inspect(folder)
        assert found.usable  # by a policy that reads no language
        assert [problem.text for problem in found.problems] == ([] if silent is None else [silent.told])
    if count == 0:
        assert silent is None
        return
    assert (silent.episodes, silent.tasks, silent.is_shared) == (count, tuple(tasks), len(tasks) > 1)
    assert "--data.default_task" in silent.told
    assert ("it is not trained on them" in silent.told) == silent.is_shared
    assert all(name in silent.told for name in tasks if silent.is_shared)
    cured = open_episodes(folder, default_task="do it")
    assert instructions.untold(cured) is None
    assert inspect(folder, default_task="do it").problems == []
    texts = [cured.info(index).task for index in range(cured.num_episodes)]
    assert texts.count("do it") == count


CHANGES = ((2, "wait"), (4, ""), (5, "open"))
TEXTS = ["open", "open", "wait", "wait", "", "open"]


def test_a_chunk_has_the_instruction_of_its_first_step(tmp_path):
    """In LeRobot's rows; as lerobot and openpi have it."""
    pytest.importorskip("pyarrow")
    own(tmp_path / "own", "open", changes=CHANGES)
    folder = convert.to_lerobot(H5DatasetReader(tmp_path / "own"), tmp_path / "set")
    for _ in range(2):
        source = LeRobotSource(folder, metadata_cache=MetadataCache(tmp_path / "cache"))
        assert source.info(0).task_changes == CHANGES
        assert source.window(0, "task", 0, STEPS).tolist() == TEXTS
        for store in (windows.open_store(source), mapped_store(source)):
            batch = chunks.gather(store, np.arange(STEPS), 2)
            assert batch["prompt"].tolist() == TEXTS
            assert batch["next_prompt"].tolist() == [*TEXTS[2:], TEXTS[-1], TEXTS[-1]]
    assert inspect(folder).contents.tasks == {"open": 1, "wait": 1, "": 1}
    cured = LeRobotSource(folder, default_task="rest")
    assert cured.window(0, "task", 0, STEPS).tolist() == ["open", "open", "wait", "wait", "rest", "open"]
    assert cured.episode(0).task_changes == ((2, "wait"), (4, "rest"), (5, "open"))
    assert H5DatasetReader(tmp_path / "own", default_task="rest").info(0).task_changes == cured.info(0).task_changes


def mapped_store(source):
    """As of a set that does not fit into memory: nothing is copied when it is opened."""
    return windows._stored(source, 0, 0)


def test_two_texts_under_one_index_are_refused(tmp_path):
    folder = lerobot(tmp_path, "a", "b")
    write_tasks(folder, [0, 1, 1], ["a", "b", "c"])
    for on_bad_episode in ("error", "skip"):
        with pytest.raises(ValueError, match=r"tasks\.parquet: task_index 1: expected one text, found 'b' and 'c'"):
            LeRobotSource(folder, on_bad_episode=on_bad_episode)
    write_tasks(folder, [0, 1, 1], ["a", "b", "b"])
    assert LeRobotSource(folder).info(1).task == "b"


def test_an_index_without_a_text_is_named(tmp_path):
    folder = lerobot(tmp_path, "a", "b")
    write_tasks(folder, [0, 2], ["a", "b"])
    with pytest.raises(ValueError, match=r"episode 1: task_index: 1 is not in .*tasks\.parquet, which has .* 0, 2"):
        LeRobotSource(folder)
    with pytest.warns(UserWarning, match="task_index: 1 is not in"):
        assert LeRobotSource(folder, on_bad_episode="skip").numbers == [0]


def test_a_copy_of_libero_keeps_what_the_name_said(tmp_path):
    path = write_demos(tmp_path / "turn_on_the_stove_demo.hdf5")
    copy = convert.to_hdf5(open_episodes(path), tmp_path / "copy")
    assert open_episodes(copy).info(0).task == "turn on the stove"
