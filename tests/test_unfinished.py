"""What is there whole or not at all, and what is replaced: nothing is lost at any moment at which a process may end."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from acrlpd import unfinished


def content(path):
    if path.is_file():
        return path.read_text()
    return {each.name: each.read_text() for each in path.iterdir()}


def fill(path, text, kind):
    if kind == "file":
        path.write_text(text)
    else:
        path.mkdir()
        (path / text).write_text(text)


def interrupted(path, kind):
    with unfinished.whole(path) as temporary:
        fill(temporary, "new", kind)
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("before", [True, False])
def test_what_was_written_takes_its_place_or_vanishes(tmp_path, kind, before):
    path = tmp_path / "a.npz"
    if before:
        fill(path, "old", kind)
    known = content(path) if before else None
    with pytest.raises(KeyboardInterrupt):
        interrupted(path, kind)
    assert os.listdir(tmp_path) == (["a.npz"] if before else [])
    assert not before or content(path) == known
    with unfinished.whole(path) as temporary:
        assert temporary.name == "a.npz"
        fill(temporary, "new", kind)
    assert os.listdir(tmp_path) == ["a.npz"]
    assert content(path) == ("new" if kind == "file" else {"new": "new"})


KILLED = """
import os, pathlib, shutil, sys
from acrlpd import unfinished
path, moment = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def dying(call):
    def counted(*arguments, **options):
        global moment
        if not moment:
            os._exit(9)
        moment -= 1
        return call(*arguments, **options)
    return counted

with unfinished.whole(path) as temporary:
    temporary.mkdir()
    (temporary / "new").write_text("new")
    pathlib.Path.rename, shutil.rmtree = dying(pathlib.Path.rename), dying(shutil.rmtree)
"""


def test_a_folder_that_is_replaced_is_there_whole_whenever_the_process_is_killed(tmp_path):
    """Before each of its renames and deletions: the old one or the new one, under names that say so."""
    outcomes = []
    for moment in range(9):
        path = tmp_path / str(moment) / "weights"
        path.parent.mkdir()
        fill(path, "old", "folder")
        code = subprocess.run([sys.executable, "-c", KILLED, str(path), str(moment)], check=False).returncode
        seen = {each: content(each) for each in (path, *unfinished.those_set_aside(path)) if each.exists()}
        assert {"old": "old"} in seen.values() or seen == {path: {"new": "new"}}, (moment, seen)
        assert all(each in ({"old": "old"}, {"new": "new"}) for each in seen.values()), (moment, seen)
        unfinished.remove_abandoned(path.parent)
        assert set(path.parent.iterdir()) == set(seen), moment
        outcomes.append(code)
        if code == 0:
            break
    assert outcomes == [9] * (len(outcomes) - 1) + [0]
    assert len(outcomes) > 4


def test_what_is_set_aside_takes_nobodys_name(tmp_path):
    for text in ("first", "second", "third"):
        fill(tmp_path / "a", text, "folder")
        aside = unfinished.set_aside(tmp_path / "a")
        assert content(aside) == {text: text}
    (tmp_path / "a.overwritten-x").mkdir()
    (tmp_path / "b.overwritten").mkdir()
    found = unfinished.those_set_aside(tmp_path / "a")
    assert [each.name for each in found] == ["a.overwritten", "a.overwritten-2", "a.overwritten-3"]
    assert unfinished.those_set_aside(Path(tmp_path / "no" / "folder")) == []
