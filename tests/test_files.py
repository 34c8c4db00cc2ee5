"""Files that came from outside: everything ends soon, with content or with one line that names the file.

Our own are written whole or not at all, and nothing is lost at any moment at which a process may end.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from acrlpd import files


def of_kind(kind, path):
    """Something at ``path`` that is no file."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "broken link":
        path.symlink_to("nowhere")


@pytest.mark.timeout(60)  # a pipe that nobody writes to is not waited for
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device", "loop", "broken link", "nothing"])
@pytest.mark.parametrize("read", [files.open_file, files.read_text, files.read_json, files.read_yaml, files.check_file])
def test_what_is_no_file_is_refused_at_once(tmp_path, kind, read):
    path = tmp_path / "x"
    of_kind(kind, path)
    with pytest.raises((ValueError, OSError), match="x"):
        read(path)


JSON_TRAPS = {
    "cut": '{"a": [1, 2',
    "another kind": "[1, 2]",
    "null": "null",
    "empty": "",
    "not UTF-8": b'{"a": "\xff"}',
    "too deep": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"a": ' + "9" * 100_000 + "}",
    "fewer digits": '{"a": ' + "9" * 4000 + "}",
    "exponent": '{"a": 1e999}',
    "not a number": '{"a": NaN}',
    "infinite": '{"a": -Infinity}',
    "twice": '{"a": 1, "a": 2}',
    "half a character": r'{"a": "\ud800"}',
    "half a name": r'{"\ud800": 1}',
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", JSON_TRAPS)
def test_a_json_trap_is_one_line_that_names_the_file(tmp_path, name):
    path = tmp_path / "facts.json"
    content = JSON_TRAPS[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"facts\.json") as raised:
        files.read_json(path)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_what_python_writes_beside_json_is_read_where_it_is_asked_for(tmp_path):
    path = tmp_path / "facts.json"
    path.write_text('[1, 2.5, Infinity, "NaN"]')
    assert files.read_json(path, list, allow_nan=True) == [1, 2.5, float("inf"), "NaN"]


def laughs(levels=12, merged=False):
    """An alias for ten aliases for ten aliases ..."""
    lines = ["l0: &l0 {k0: 1}"]
    for level in range(1, levels):
        several = ", ".join([f"*l{level - 1}"] * 10)
        lines.append(f"l{level}: &l{level} " + ("{<<: [" + several + "]}" if merged else f"[{several}]"))
    return "\n".join(lines)


YAML_TRAPS = {
    "laughs": laughs(),
    "laughs of merged names": laughs(merged=True),
    "alias of itself": "a: &a [*a]",
    "too deep": "a: " + "[" * 5000 + "]" * 5000,
    "too deep by lines": "\n".join(" " * depth + "a:" for depth in range(2000)),
    "digits": "a: " + "9" * 100_000,
    "base 60": "a: 1" + ":59" * 100_000,
    "twice": "a: 1\nb: 2\na: 3",
    "twice inside": "a: {b: 1, b: 2}",
    "a list": "- 1\n- 2",
    "nothing": "",
    "two documents": "a: 1\n---\nb: 2",
    "an object": "a: !!python/object/apply:os.system [ls]",
    "a date that is none": "a: 2020-13-45",
    "a control character": "a: \x1b[31m",
    "not UTF-8": b"a: \xff",
    "a tab": "a:\n\tb: 1",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", YAML_TRAPS)
def test_a_yaml_trap_is_one_line_that_names_the_file(tmp_path, name):
    path = tmp_path / "run.yaml"
    content = YAML_TRAPS[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"run\.yaml") as raised:
        files.read_yaml(path)
    assert "\n" not in str(raised.value)


def test_aliases_that_stay_small_may_be_used(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a")
    assert files.read_yaml(path) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


def test_a_larger_file_is_refused(tmp_path):
    path = tmp_path / "long"
    path.write_bytes(b"x" * 101)
    with pytest.raises(ValueError, match="long: expected at most"):
        files.read_bytes(path, max_bytes=100)
    with pytest.raises(ValueError, match="long, line 1: expected at most"):
        list(files.read_lines(path, max_bytes=100))


LEADS_OUT = ["", ".", "/", "/etc/passwd", "..", "../x", "a/../../x", "a/..", "C:\\x", "c:x", "\\x", "..\\x", "a\\..\\x"]
UNPRINTABLE = ["a\0b", "a\nb", "a\x1b[31mb", "a\x7f", "a\x9b31m", "a\u202eb", "a\ud800"]


@pytest.mark.parametrize("name", [*LEADS_OUT, *UNPRINTABLE, "x" * 256, "x/" * 2000, None, 3, b"x"])
def test_a_name_that_leads_out_of_its_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"^facts: ") as raised:
        files.inside(tmp_path, name, "facts")
    assert files.printable(str(raised.value)) == str(raised.value)


@given(st.text(max_size=40))
def test_a_name_stays_in_its_folder_or_is_refused(name):
    try:
        path = files.inside("/data/set", name, "facts")
    except ValueError:
        return
    assert os.path.normpath(path).startswith("/data/set/")
    assert files.printable(name) == name


@given(st.text())
def test_what_is_printable_can_be_printed_and_keeps_its_lines(text):
    shown = files.printable(text)
    shown.encode()
    assert not any(ord(letter) < 32 and letter not in "\n\t" for letter in shown)
    assert shown.count("\n") == text.count("\n")


def test_an_array_larger_than_memory_is_refused():
    files.check_memory("x", 1 << 20)
    with pytest.raises(ValueError, match="x: expected what fits into memory"):
        files.check_memory("x", 1 << 60)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "x"
    with files.written_whole(path) as temporary:
        temporary.write_text("one")
    with pytest.raises(UnicodeEncodeError), files.written_whole(path) as temporary:
        temporary.write_text("two\ud800", encoding="utf-8")
    assert path.read_text() == "one"
    assert os.listdir(tmp_path) == ["x"]


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
    with files.written_whole(path) as temporary:
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
    with files.written_whole(path) as temporary:
        assert temporary.suffix == ".npz"
        fill(temporary, "new", kind)
    assert os.listdir(tmp_path) == ["a.npz"]
    assert content(path) == ("new" if kind == "file" else {"new": "new"})


def written_beside(path, kind):
    with files.written_whole(path, replaces=False) as temporary:
        fill(temporary, "new", "folder")
        of_kind(kind, path) if kind == "broken link" else fill(path, "other", kind)


@pytest.mark.parametrize("kind", ["file", "folder", "broken link"])
def test_what_came_into_being_meanwhile_is_not_replaced(tmp_path, kind):
    path = tmp_path / "a"
    with pytest.raises(FileExistsError, match="a exists already"):
        written_beside(path, kind)
    assert os.listdir(tmp_path) == ["a"]
    assert path.is_symlink() or content(path) == ("other" if kind == "file" else {"other": "other"})


def test_a_folder_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    """First its files, then the lists of names, then its own name: a loss of power leaves all of it or nothing."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.readlink(f"/proc/self/fd/{file}")) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append("replace") or replace(old, new))
    with files.written_whole(tmp_path / "a") as temporary:
        (temporary / "b").mkdir(parents=True)
        (temporary / "b" / "c").write_text("c")
    *parts, renamed, folder = done
    assert sorted(parts) == [str(temporary), str(temporary / "b"), str(temporary / "b" / "c")]
    assert (parts[-1], renamed, folder) == (str(temporary), "replace", str(tmp_path))


KILLED = """
import os, pathlib, shutil, sys
from acrlpd import files
path, moment = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def dying(call):
    def counted(*arguments, **options):
        global moment
        if not moment:
            os._exit(9)
        moment -= 1
        return call(*arguments, **options)
    return counted

with files.written_whole(path) as temporary:
    temporary.mkdir()
    (temporary / "new").write_text("new")
    os.replace, shutil.rmtree = dying(os.replace), dying(shutil.rmtree)
"""


def test_a_folder_that_is_replaced_is_there_whole_whenever_the_process_is_killed(tmp_path):
    """Before each of its renames and deletions: the old one or the new one, under names that say so."""
    outcomes = []
    for moment in range(9):
        path = tmp_path / str(moment) / "weights"
        path.parent.mkdir()
        fill(path, "old", "folder")
        code = subprocess.run([sys.executable, "-c", KILLED, str(path), str(moment)], check=False).returncode
        seen = {each: content(each) for each in (path, *files.those_set_aside(path)) if each.exists()}
        assert {"old": "old"} in seen.values() or seen == {path: {"new": "new"}}, (moment, seen)
        assert all(each in ({"old": "old"}, {"new": "new"}) for each in seen.values()), (moment, seen)
        files.remove_abandoned(path.parent)
        assert set(path.parent.iterdir()) == set(seen), moment
        outcomes.append(code)
        if code == 0:
            break
    assert outcomes == [9] * (len(outcomes) - 1) + [0]
    assert len(outcomes) > 4


def test_what_is_set_aside_takes_nobodys_name(tmp_path):
    for text in ("first", "second", "third"):
        fill(tmp_path / "a", text, "folder")
        aside = files.set_aside(tmp_path / "a")
        assert content(aside) == {text: text}
    (tmp_path / "a.overwritten-x").mkdir()
    (tmp_path / "b.overwritten").mkdir()
    found = files.those_set_aside(tmp_path / "a")
    assert [each.name for each in found] == ["a.overwritten", "a.overwritten-2", "a.overwritten-3"]
    assert files.those_set_aside(Path(tmp_path / "no" / "folder")) == []
