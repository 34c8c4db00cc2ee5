import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import acrlpd
from acrlpd import files
from acrlpd.data.formats import hdf5
from acrlpd.data.replay import ReplayJournal
from acrlpd.data.sources import open_episodes
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.training.run import Interaction
from acrlpd.types import Episode


def make_episode(number: int) -> Episode:
    return Episode(
        state=np.full((number + 1, 2), number, np.float32),
        actions=np.zeros((number + 1, 1), np.float32),
        rewards=-np.ones(number + 1, np.float32),
        terminals=np.zeros(number + 1, np.bool_),
        task="push",
        success=number % 2 == 0,
    )


@pytest.fixture
def journal(tmp_path) -> ReplayJournal:
    journal = ReplayJournal(tmp_path / "replay")
    assert [journal.append(make_episode(number)) for number in range(4)] == [0, 1, 2, 3]
    return journal


def abandoned(path):
    """What a process that was killed while it wrote ``path`` leaves behind."""
    process = subprocess.Popen(["true"])
    process.wait()
    name = files.temporary_path(path).name.replace(f"-{os.getpid()}.", f"-{process.pid}.")
    path.with_name(name).write_bytes(b"half")


def lengths(journal: ReplayJournal) -> list[int]:
    return [len(episode) for episode in journal.load()]


def damaged(journal: ReplayJournal) -> list[str]:
    return sorted(path.name for path in (journal.directory / "damaged").iterdir())


def test_an_empty_journal(tmp_path):
    journal = ReplayJournal(tmp_path / "new" / "replay")
    assert len(journal) == 0
    assert list(journal.load()) == []


def test_what_was_appended_is_loaded_in_order(journal):
    again = ReplayJournal(journal.directory)
    assert len(again) == 4
    loaded = list(again.load())
    assert [len(episode) for episode in loaded] == [1, 2, 3, 4]
    assert [episode.success for episode in loaded] == [True, False, True, False]
    np.testing.assert_array_equal(loaded[2].state, make_episode(2).state)
    assert again.append(make_episode(4)) == 4
    assert lengths(ReplayJournal(journal.directory)) == [1, 2, 3, 4, 5]
    assert not (journal.directory / "damaged").exists()


def test_the_index_is_readable_without_us(journal):
    lines = [json.loads(line) for line in (journal.directory / "journal.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2, 3]
    assert [line["file"] for line in lines] == [f"episode_{number:06d}.hdf5" for number in range(4)]
    assert [line["length"] for line in lines] == [1, 2, 3, 4]
    assert [line["success"] for line in lines] == [True, False, True, False]


@pytest.mark.parametrize("number", [1, 3])
def test_a_truncated_file_is_set_aside(journal, number):
    path = hdf5.episode_path(journal.directory, number)
    path.write_bytes(path.read_bytes()[:500])
    again = ReplayJournal(journal.directory)
    with pytest.warns(UserWarning, match=rf"{path.name}: expected sha256"):
        assert lengths(again) == [length for length in (1, 2, 3, 4) if length != number + 1]
    assert damaged(again) == [path.name]
    assert again.append(make_episode(4)) == 4
    assert len(ReplayJournal(journal.directory)) == 4  # the entry is gone for good, and nothing warns again


def test_a_flipped_bit_is_found(journal):
    path = hdf5.episode_path(journal.directory, 2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.warns(UserWarning, match="expected sha256"):
        assert lengths(ReplayJournal(journal.directory)) == [1, 2, 4]


def test_a_missing_file_is_reported(journal):
    hdf5.episode_path(journal.directory, 0).unlink()
    with pytest.warns(UserWarning, match=r"episode_000000\.hdf5: the index names it, but it is missing"):
        assert lengths(ReplayJournal(journal.directory)) == [2, 3, 4]


@pytest.mark.parametrize("cut", [1, 30])
def test_half_an_index_line_is_made_whole_from_its_file(journal, cut):
    index = journal.directory / "journal.jsonl"
    before = index.read_bytes()
    index.write_bytes(before[:-cut])  # cut 1 takes only the newline
    with (
        pytest.warns(UserWarning, match=r"journal\.jsonl: lines that are not a complete entry"),
        pytest.warns(UserWarning, match=r"journal\.jsonl: no line for episode_000003\.hdf5: made anew"),
    ):
        again = ReplayJournal(journal.directory)
    assert damaged(again) == ["journal.jsonl"]
    assert index.read_bytes() == before
    assert lengths(again) == [1, 2, 3, 4]
    assert again.append(make_episode(4)) == 4


def test_a_crash_between_file_and_line(journal, tmp_path):
    hdf5.write_episode(hdf5.episode_path(journal.directory, 4), make_episode(4))
    abandoned(journal.directory / "episode_000005.hdf5")
    abandoned(journal.directory / "journal.jsonl")
    with pytest.warns(UserWarning, match=r"journal\.jsonl: no line for episode_000004\.hdf5"):
        again = ReplayJournal(journal.directory)
    assert lengths(again) == [1, 2, 3, 4, 5]
    assert not list(journal.directory.glob(".*.tmp"))


@pytest.mark.parametrize(
    "changes",
    [
        *({"number": "1"}, {"number": None}, {"number": 0}, {"number": 7}, {"file": None}, {"sha256": None}),
        *({"file": "../replay/episode_000001.hdf5"}, {"length": "a"}, {"success": "x"}, {"more": 1}),
        *({"number": 0, "file": "episode_000000.hdf5"}, {"length": 3}, {"sha256": "0" * 64}, {"check": 5}),
        *("[" * 100_000, "[]", '["number", "file"]'),
    ],
    ids=lambda changes: str(changes)[:50],
)
def test_a_line_that_is_not_as_it_was_written_is_made_anew(journal, changes):
    index = journal.directory / "journal.jsonl"
    before = index.read_text()
    lines = before.splitlines()
    lines[1] = changes if isinstance(changes, str) else json.dumps(json.loads(lines[1]) | changes)
    index.write_text("\n".join([*lines, ""]))
    with (
        pytest.warns(UserWarning, match="not a complete entry"),
        pytest.warns(UserWarning, match=r"no line for episode_000001\.hdf5: made anew"),
    ):
        again = ReplayJournal(journal.directory)
    assert index.read_text() == before
    assert lengths(again) == [1, 2, 3, 4]
    assert damaged(again) == ["journal.jsonl"]


def test_lines_of_earlier_versions_have_no_checksum_of_their_own(journal):
    index = journal.directory / "journal.jsonl"
    lines = [json.loads(line) for line in index.read_text().splitlines()]
    index.write_text(
        "".join(json.dumps(line | {"check": None}).replace(', "check": null', "") + "\n" for line in lines)
    )
    assert lengths(ReplayJournal(journal.directory)) == [1, 2, 3, 4]
    assert not (journal.directory / "damaged").exists()


def test_a_check_before_damaged_files_are_left_out(journal):
    path = hdf5.episode_path(journal.directory, 1)
    path.write_bytes(path.read_bytes()[:500])
    before = sorted(journal.directory.rglob("*"))

    def refuse(damaged):
        raise ValueError(f"missed: {[entry.file for entry in damaged]}")

    with pytest.raises(ValueError, match=r"missed: \['episode_000001\.hdf5'\]"):
        list(journal.load(refuse))
    assert sorted(journal.directory.rglob("*")) == before


@pytest.mark.parametrize("metadata", [None, {"episode": 7}])
def test_an_episode_under_two_names_is_there_once(journal, metadata):
    """A copy byte by byte; and the same rollout of a collector, written twice."""
    first = journal.append(make_episode(8), metadata)
    copy = hdf5.episode_path(journal.directory, 9)
    if metadata is None:
        copy.write_bytes(hdf5.episode_path(journal.directory, first).read_bytes())
    else:
        hdf5.write_episode(copy, make_episode(8), metadata | {"seed": 3})
    (journal.directory / "journal.jsonl").unlink()
    with pytest.warns(UserWarning, match=r"its episode is there already, as episode_000004\.hdf5"):
        again = ReplayJournal(journal.directory)
    assert lengths(again) == [1, 2, 3, 4, 9]
    assert damaged(again) == ["episode_000009.hdf5"]


def test_a_folder_in_the_place_of_the_index_is_named(journal):
    index = journal.directory / "journal.jsonl"
    index.unlink()
    index.mkdir()
    with pytest.raises(ValueError, match=r"journal\.jsonl: expected the journal's index, found something that"):
        ReplayJournal(journal.directory)
    index.rmdir()
    with pytest.warns(UserWarning, match=r"no line for episode_000000\.hdf5, .*3\.hdf5: made anew from those files"):
        assert lengths(ReplayJournal(journal.directory)) == [1, 2, 3, 4]


@pytest.mark.parametrize("left", [None, b"", b"\0" * 300])
def test_a_lost_index_is_made_anew(journal, left):
    index = journal.directory / "journal.jsonl"
    before = index.read_bytes()
    index.unlink()
    if left is not None:
        index.write_bytes(left)
    bad = hdf5.episode_path(journal.directory, 1)
    bad.write_bytes(bad.read_bytes()[:500])
    with (
        pytest.warns(UserWarning, match=r"no line for episode_000000\.hdf5, .*2\.hdf5, .*3\.hdf5: made anew"),
        pytest.warns(
            UserWarning, match=r"episode_000001\.hdf5: journal\.jsonl has no line for it, and it can get none"
        ),
    ):
        again = ReplayJournal(journal.directory)
    assert lengths(again) == [1, 3, 4]
    assert damaged(again) == ["episode_000001.hdf5", *(["journal.jsonl"] if left else [])]
    lines = before.splitlines()
    assert index.read_bytes().splitlines() == [lines[0], *lines[2:]]
    assert again.append(make_episode(4)) == 4
    assert lengths(ReplayJournal(journal.directory)) == [1, 3, 4, 5]  # and nothing warns again


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": [[0.0]] * 5}, "actions: expected an array of numbers, found list"),
        ({"state": np.zeros(5, np.float32)}, r"observations/state: expected 2 axes, found shape \(5,\)"),
        ({"actions": np.float32(1)}, "actions: expected an array of numbers, found float32"),
        ({"actions": np.array(1.0)}, r"actions: expected 2 axes, found shape \(\)"),
        ({"rewards": np.array(["a"] * 5)}, "rewards: expected an array of numbers, found <U1"),
        ({"terminals": None}, "terminals: expected an array of numbers, found NoneType"),
        ({"images": {"top": [1, 2]}}, "observations/images/top: expected an array of numbers, found list"),
        ({"task": 3}, "task: expected text, found int"),
        ({"success": "perhaps"}, "success: expected true or false, found 'perhaps'"),
    ],
)
def test_what_is_no_episode_is_refused_before_anything_is_written(journal, changes, message):
    before = sorted(journal.directory.rglob("*"))
    with pytest.raises(ValueError, match=rf"episode_000004\.hdf5: {message}"):
        journal.append(dataclasses.replace(make_episode(4), **changes))
    assert (sorted(journal.directory.rglob("*")), len(journal)) == (before, 4)


def test_an_episode_that_the_replay_cannot_hold_is_not_journalled(journal):
    replay = EpisodeStore(max_bytes=100)
    interaction = Interaction(None, journal, replay)
    with pytest.raises(ValueError, match=r"more than max_bytes \(100\).*--data\.max_replay_bytes"):
        interaction.keep(SimpleNamespace(episode=make_episode(9), seed=0, number=0))
    interaction.keep(SimpleNamespace(episode=make_episode(3), seed=0, number=1))
    assert (len(journal), replay.num_episodes) == (5, 1)


def test_what_is_set_aside_overwrites_nothing(journal):
    for _ in range(2):
        hdf5.episode_path(journal.directory, 4).write_bytes(b"half")
        with pytest.warns(UserWarning, match="no line for it"):
            again = ReplayJournal(journal.directory)
    assert damaged(again) == ["1-episode_000004.hdf5", "episode_000004.hdf5"]


def test_its_folder_is_prior_data(journal):
    prior = open_episodes(journal.directory, remember=False)
    assert (prior.format, prior.lengths.tolist()) == ("acrlpd", [1, 2, 3, 4])
    np.testing.assert_array_equal(prior.episode(3).state, make_episode(3).state)


WRITER = """
import sys
import numpy as np
from acrlpd.data.replay import ReplayJournal
from acrlpd.types import Episode

journal = ReplayJournal(sys.argv[1])
while True:
    rows = np.full((50, 20), len(journal), np.float32)
    journal.append(Episode(rows, rows, rows[:, 0], rows[:, 0] < 0, task="push"))
    print(len(journal), flush=True)
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*no line for")
def test_a_killed_writer_loses_the_running_episode_alone(tmp_path):
    confirmed = 0
    for delay_s in (0.0, 0.003, 0.011):  # after an episode was confirmed
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        writer = subprocess.Popen(command, env=subprocess_env(), stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(3):
            confirmed = int(writer.stdout.readline())
        time.sleep(delay_s)
        writer.kill()
        rest = writer.stdout.read().split()
        assert writer.wait() == -signal.SIGKILL
        confirmed = max(confirmed, *map(int, rest)) if rest else confirmed
        loaded = list(ReplayJournal(tmp_path).load())
        assert confirmed <= len(loaded) <= confirmed + 1
        assert [episode.state[0, 0] for episode in loaded] == list(range(len(loaded)))


def subprocess_env():
    source = str(Path(acrlpd.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
