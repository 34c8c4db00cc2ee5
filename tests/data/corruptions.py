"""Damage to copies of small data sets, made by what their files mean, and the same for the same seed.

A change after which a file is as good as before, with another legal number or text in it, nobody can notice: those are
not made. Each function gets a file and a generator, and returns what it did; None where it does not apply.
"""

import io
import json
import os
import socket

import h5py
from array_corruptions import (
    DEEP,
    h5_array,
    h5_attribute,
    h5_jpeg,
    h5_link,
    h5_name,
    h5_size,
    npz_array,
    npz_member,
    pick,
    pq_cell,
    pq_column,
    pq_rows,
)

TEXTS = ("task", "language_instruction1", "__index_level_0__")  # any text is as good as another
EPISODE_FILES = ("own", "aloha", "aloha-jpeg")  # whole episodes, of which one fewer is legal


def mutate(folder, name, rng):
    """Damages one of the files; returns what was done to which."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    suffixes = sorted({path.suffix for path in found})
    while True:
        suffix = pick(rng, suffixes)  # a kind of file first: there are many videos and one info.json
        path = pick(rng, [path for path in found if path.suffix == suffix])
        change = pick(rng, [*ANY, *3 * BY_SUFFIX[suffix]])
        if change in (gone, exchanged) and (name in EPISODE_FILES or name == "droid"):
            continue
        if change is no_file and path.suffix == ".mp4" and name == "droid":
            continue
        told = exchanged(path, rng, found) if change is exchanged else change(path, rng)
        if told is not None:
            return f"{path.relative_to(folder)}: {change.__name__}: {told}"


# -- any file


def cut(path, rng):
    size = path.stat().st_size
    kept = int(rng.integers(size))
    if path.suffix == ".jsonl" and path.read_bytes()[kept - 1 : kept + 1].count(b"\n"):
        return None
    os.truncate(path, kept)
    return f"{kept} of {size} bytes"


def emptied(path, rng):
    path.write_bytes(b"")
    return "0 bytes"


def longer(path, rng):
    """Harmless in formats that know their size."""
    with path.open("ab") as file:
        file.write(rng.bytes(int(rng.integers(1, 5000))))
    return "random bytes"


def flipped(path, rng):
    return spoilt(path, rng, lambda byte: byte ^ (1 << int(rng.integers(8))), int(rng.integers(1, 4)))


def zeroed(path, rng):
    return spoilt(path, rng, lambda byte: 0, int(rng.integers(1, 400)))


def spoilt(path, rng, of, count):
    """Some bytes that follow one another, where a reader could see that something is wrong."""
    if path.suffix in (".json", ".jsonl"):
        return None
    before = path.read_bytes()
    for _ in range(20):
        start = int(rng.integers(max(1, len(before) - count)))
        content = bytearray(before)
        content[start : start + count] = bytes(of(byte) for byte in content[start : start + count])
        path.write_bytes(content)
        if content != before and not LEGAL[path.suffix](before, bytes(content), start, count):
            return f"{count} bytes at {start}"
    path.write_bytes(before)
    return None


def scrambled(path, rng):
    """Some bytes of a video, which may show other pictures then: whoever reads it cannot tell."""
    content = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 5))):
        content[int(rng.integers(len(content)))] = int(rng.integers(256))
    path.write_bytes(content)
    return "some bytes"


def no_file(path, rng):
    kind = pick(rng, ["pipe", "socket", "loop", "broken link", "device"])
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made, moved_to(path.parent):
            made.bind(path.name)
    else:
        path.symlink_to({"loop": path.name, "broken link": "nowhere", "device": "/dev/zero"}[kind])
    return kind


class moved_to:  # noqa: N801 - names of sockets are short
    def __init__(self, folder):
        self.folder = folder

    def __enter__(self):
        self.before = os.getcwd()
        os.chdir(self.folder)

    def __exit__(self, *_):
        os.chdir(self.before)


def linked(path, rng):
    """Harmless: data sets may be folders of links."""
    target = path.with_name(f".{path.name}")
    path.rename(target)
    path.symlink_to(target.name)
    return "behind a link"


def gone(path, rng):
    path.unlink()
    return "removed"


def exchanged(path, rng, found):
    """With another file of its kind, where its content tells whose it is."""
    others = [other for other in found if other != path and other.suffix == path.suffix]
    if not others or path.suffix == ".mp4":
        return None
    other = pick(rng, others)
    content = path.read_bytes()
    if content == other.read_bytes():
        return None
    path.write_bytes(other.read_bytes())
    other.write_bytes(content)
    return f"with {other.name}"


ANY = [cut, emptied, longer, flipped, zeroed, no_file, linked, gone, exchanged]


# -- JSON

TRAPS = [None, [], {}, -1, 10**30, "../x", "/etc/passwd", "\x1b[31m", "a\0b", [None], {"a": {}}, 1.5, True]
RAW = ["9" * 5000, "NaN", "-Infinity", "1e999", DEEP, "", '"\\ud800"', '{"a": 1, "a": 2}']
TEMPLATES = [
    "{",
    "{0}",
    "{x}",
    "{episode_index:999999999d}",
    "{chunk_index:99999999}",
    "{file_index.real}",
    "../{x}",
]


def json_value(path, rng):
    """One value of another kind, size or form."""
    where, lines, number = place_in(path, rng)
    if where is None:
        return None
    holder, key = where
    if key in TEXTS or "annotations" in path.name or key == "success":
        trap = pick(rng, [[], {"a": {}}, 5, True])
    elif str(key).endswith("_path") and rng.random() < 0.7:
        trap = pick(rng, TEMPLATES)
    else:
        trap = pick(rng, TRAPS)
    if "annotations" in path.name and trap == {}:
        return None
    holder[key] = trap
    write_lines(path, lines)
    return f"line {number}: {key} = {str(trap)[:30]!r}"


def json_raw(path, rng):
    """Text in the place of a value that JSON's own writer would not write."""
    where, lines, number = place_in(path, rng)
    if where is None:
        return None
    holder, key = where
    if path.name.startswith("metadata_") and key == "uuid":
        return None
    holder[key] = "@@@"
    raw = pick(rng, RAW)
    text = "\n".join(map(json.dumps, lines)).replace('"@@@"', raw, 1)
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return f"line {number}: {key} = {raw[:20]}"


def json_key(path, rng):
    """A name that is gone or another, unless nobody needs it."""
    where, lines, number = place_in(path, rng, required=True)
    if where is None:
        return None
    holder, key = where
    if rng.random() < 0.5:
        holder[pick(rng, ["../x", "\x1b[2J", "", "x" * 5000])] = holder[key]
    del holder[key]
    write_lines(path, lines)
    return f"line {number}: without {key}"


def json_lines(path, rng):
    """Rows twice or removed."""
    lines = path.read_text().splitlines()
    if path.suffix != ".jsonl" or len(lines) < 2:
        return None
    at = int(rng.integers(len(lines)))
    if rng.random() < 0.5:
        path.write_text("\n".join(lines[:at] + lines[at + 1 :]))
        return f"without line {at}"
    path.write_text("\n".join([*lines, lines[at]]))
    return f"line {at} twice"


def json_bytes(path, rng):
    at = path.read_bytes().find(b'"') + 1
    content = bytearray(path.read_bytes())
    content[at : at + 1] = pick(rng, [b"\xff", b"\0", b"\x1b", b"\xed\xa0\x80"])
    path.write_bytes(content)
    return f"a bad byte at {at}"


def place_in(path, rng, *, required=False):
    """Where a value lies: its holder and key; the lines of the file, and the number of its own."""
    text = path.read_text()
    lines = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
    number = int(rng.integers(len(lines)))
    places = [(holder, key) for holder, key in values_of(lines[number]) if not required or key in REQUIRED]
    return (pick(rng, places) if places else None), lines, number


REQUIRED = ("codebase_version", "fps", "features", "total_episodes", "total_frames", "data_path", "dtype")
REQUIRED += ("task_index", "task", "episode_index", "length", "action", "timestamp", "observation.state")


def values_of(value):
    if isinstance(value, dict):
        for key in sorted(value):
            yield value, key
            yield from values_of(value[key])
    elif isinstance(value, list):
        for at in range(len(value)):
            yield value, at


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


BY_SUFFIX = {
    ".json": [json_value, json_raw, json_key, json_bytes],
    ".jsonl": [json_value, json_raw, json_key, json_lines, json_bytes],
    ".hdf5": [h5_array, h5_size, h5_link, h5_name, h5_attribute, h5_jpeg],
    ".h5": [h5_array, h5_size, h5_link, h5_name, h5_attribute],
    ".parquet": [pq_cell, pq_column, pq_rows],
    ".npz": [npz_array, npz_member],
    ".mp4": [scrambled],
}


# -- what nobody could notice


def h5_is_legal(before, after, start, count):
    """Whether HDF5 reads the same structure, with other numbers or attributes in it."""
    names = []
    with h5py.File(io.BytesIO(before)) as file:
        file.visit(names.append)
    one, other = h5_content(before, names), h5_content(after, names)
    return any(one[name][0] == other[name][0] and one[name] != other[name] for name in one.keys() & other.keys())


def h5_content(content, names):
    """Form and content by name, of what can be read."""
    found = {}
    for name in ["/", *names]:
        try:
            with h5py.File(io.BytesIO(content)) as file:
                each = file[name]
                found[name + "@"] = ((), sorted((key, str(value)) for key, value in each.attrs.items()))
                if isinstance(each, h5py.Dataset) and each.size < 10**6:
                    found[name] = ((each.shape, each.dtype.kind, each.dtype.itemsize), each[...].tobytes())
        except Exception:  # noqa: BLE001 - whatever h5py raises for damage
            continue
    return found


def pq_is_legal(before, after, start, count):
    import pyarrow as pa
    import pyarrow.parquet as pq

    one = pq.read_table(io.BytesIO(before))
    try:
        other = pq.read_table(io.BytesIO(after))
        return one.column_names == other.column_names and not one.equals(other) and len(one) == len(other)
    except (pa.ArrowException, OSError, ValueError):
        return False


def mp4_is_legal(before, after, start, count):
    """Damage to compressed pictures shows as other pictures: only what says where they lie is known to be wrong."""
    at = 0
    while at + 8 <= len(before):
        size, kind = int.from_bytes(before[at : at + 4], "big"), before[at + 4 : at + 8]
        if kind in (b"mdat", b"moov") and at - 400 < start < at + size:
            return True
        at += max(size, 8)
    return False


LEGAL = {".hdf5": h5_is_legal, ".h5": h5_is_legal, ".parquet": pq_is_legal, ".mp4": mp4_is_legal}
LEGAL[".npz"] = lambda *_: False  # a checksum covers every array
