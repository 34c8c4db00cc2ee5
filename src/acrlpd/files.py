"""Files that came from outside, opened and parsed in one guarded way; and our own, written whole or not at all.

Data sets, checkpoints and configurations are made by others. Whatever they hold, reading one ends soon, within bounded
memory, with its content or with an error of one line that names the file: a pipe is not waited for, a name does not
lead out of its folder, a text that is too long, too deep or not what was expected is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import yaml

MAX_TEXT_BYTES = 64 << 20  # of a JSON file: the annotations of all of DROID take 20 MB
MAX_YAML_BYTES = 1 << 20
MAX_YAML_NODES = 100_000  # with what its aliases stand for
MAX_DIGITS = 64  # of a number: no value of ours has more
MAX_NAME = 1024  # characters of a name below a folder

# what acts on a terminal instead of being seen on it: controls, changes of direction, halves of characters
UNSEEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"


# -- opening -----------------------------------------------------------------------------------------------------------


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. A pipe, a device or a socket is refused without waiting for it.

    Raises:
        FileNotFoundError: nothing is there, or a link that leads nowhere.
        ValueError: it is no regular file.
    """
    check_file(path)
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # exchanged meanwhile
        file.close()
        raise ValueError(f"{path}: expected a file, found something else. Move it away.")
    return file


def check_file(path: str | os.PathLike[str]) -> os.stat_result:
    """Return the status of a regular file; raise as ``open_file`` does. For libraries that open files themselves."""
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        reason = "the link leads to no file" if os.path.islink(path) else "no such file"
        raise FileNotFoundError(f"{path}: {reason}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: expected a file, found {_kind_of_file(status.st_mode)}. Move it away.")
    return status


def _kind_of_file(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Return what a regular file holds; refuse one that is larger than ``max_bytes``."""
    with open_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path}: expected at most {max_bytes / 1e6:.0f} MB, found a larger file")
    return content


def read_text(path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return a file's text, which must be UTF-8."""
    return _decoded(str(path), read_bytes(path, max_bytes=max_bytes))


def read_lines(path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT_BYTES) -> Iterator[tuple[str, str]]:
    """Give each line of a file that may be long, with its end, and how to name its place in an error.

    ``max_bytes`` is the limit of one line.
    """
    with open_file(path) as file:
        number = 0
        while content := file.readline(max_bytes + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(content) > max_bytes:
                raise ValueError(f"{where}: expected at most {max_bytes / 1e6:.0f} MB a line, found a longer one")
            yield where, _decoded(where, content)


def _decoded(where: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: expected UTF-8, found a byte that is none ({error}). Save it as UTF-8.") from error


# -- JSON and YAML -----------------------------------------------------------------------------------------------------


def read_json(path: str | os.PathLike[str], kind: type = dict, *, allow_nan: bool = False) -> Any:
    """Return the content of a JSON file, an object unless ``kind`` says otherwise; see ``parse_json``."""
    return parse_json(read_text(path), str(path), kind, allow_nan=allow_nan)


def parse_json(text: str | bytes, where: str, kind: type = dict, *, allow_nan: bool = False) -> Any:
    """Return what a JSON text says; ``where`` names its place in errors.

    Refused are a name that occurs twice in an object, a number that no float holds, and unless ``allow_nan``, NaN and
    Infinity, which Python writes and JSON does not know.

    Raises:
        ValueError: it is no such text, or its outermost value is not of this ``kind``.
    """
    hooks: dict[str, Any] = {} if allow_nan else {"parse_constant": _refuse_constant, "parse_float": _finite}
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_int=_whole, **hooks)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, what the hooks refuse; too many brackets
        raise ValueError(f"{where}: expected complete JSON, found {error}") from error
    if not isinstance(content, kind):
        told = {dict: "a JSON object", list: "a JSON list"}.get(kind, kind.__name__)
        raise ValueError(f"{where}: expected {told}, found {_told_kind(content)}")
    return content


def _told_kind(content: object) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if content is None else kinds.get(type(content), "a number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} twice in one object")
    return found


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:MAX_DIGITS]}, which is too large")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name}, which is no JSON")


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the content of a YAML file: names with values, each name once.

    Aliases may be used, as long as all that they stand for stays small.

    Raises:
        ValueError: it is no such file; in one line, which names it.
    """
    text = read_text(path, max_bytes=MAX_YAML_BYTES)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _check_nodes(node)
        content = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none, or ours
        raise ValueError(f"{path}: expected YAML, found {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else _told_kind(content)
        raise ValueError(f"{path}: expected names with values, found {found}")
    return content


def _check_nodes(root: yaml.Node | None) -> None:
    """Refuse what would take long or change its meaning, before values are made of it."""
    waiting = [] if root is None else [root]
    count = 0
    while waiting:
        node = waiting.pop()
        count += 1
        if count + len(waiting) > MAX_YAML_NODES:
            raise ValueError(f"more than {MAX_YAML_NODES} values, or an alias inside of what it stands for")
        place = f"in line {node.start_mark.line + 1}"
        if isinstance(node, yaml.MappingNode):
            keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if len(set(keys)) < len(keys):
                twice = next(value for tag, value in keys if keys.count((tag, value)) > 1)
                raise ValueError(f"the name {twice!r} twice among the names that begin {place}")
            waiting += [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise ValueError(f"a number of {len(node.value)} digits {place}")


# -- names and sizes that data tell ------------------------------------------------------------------------------------


def inside(folder: str | os.PathLike[str], name: object, where: str) -> Path:
    """Return the path of ``name`` below ``folder``. The name came from data, and must not lead anywhere else.

    Folders inside ``folder`` may be named too. ``where`` says in errors who named it.

    Raises:
        ValueError: the name is empty or absolute, leads upwards or to another drive, is too long, or holds characters
            that nobody can see.
    """
    text = check_name(name, where)
    both = (PurePosixPath(text), PureWindowsPath(text))
    if not both[0].parts or any(path.anchor or ".." in path.parts for path in both):
        raise ValueError(f"{where}: expected a name inside of its folder, found {text!r}")
    if any(len(os.fsencode(part)) > 255 for part in both[0].parts):
        raise ValueError(f"{where}: expected a name of at most 255 bytes, found {text[:40]!r}...")
    return Path(folder) / text


def check_name(name: object, where: str) -> str:
    """Return a name that came from data, if it is a text that can be seen as a whole; raise ValueError otherwise."""
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected a name, found {type(name).__name__}")
    if len(name) > MAX_NAME:
        raise ValueError(f"{where}: expected a name of at most {MAX_NAME} characters, found {len(name)}")
    if re.search(f"[\\t\\n{UNSEEN}]", name):
        raise ValueError(f"{where}: expected a name that can be printed, found {name!r}")
    return name


def printable(text: str) -> str:
    """Return a text that is safe to print: what would act on a terminal is escaped, but for line breaks and tabs."""
    return re.sub(f"[{UNSEEN}]", lambda found: ascii(found[0])[1:-1], text)


def check_memory(where: str, nbytes: int) -> None:
    """Raise ValueError if an array that a file tells of is larger than this machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if nbytes > memory:
        raise ValueError(
            f"{where}: expected what fits into memory ({memory / 1e9:.0f} GB), found {nbytes / 1e9:.0f} GB. "
            "Is the file damaged?"
        )


# -- writing -----------------------------------------------------------------------------------------------------------

HOST = platform.node() or "here"  # process ids mean nothing on another machine that shares the folder
NAME = re.compile(rf"\..+\.{re.escape(HOST)}-(\d+)\.tmp")


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside ``path`` to write a file to, which takes its place once it lies on the disk as a whole.

    A reader sees the old file or the new one, even after a loss of power. Where the block raises, nothing is left.
    """
    path = Path(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """Return where this process writes what will be ``path``. Readers pass over hidden files.

    A process that is killed meanwhile leaves it behind.
    """
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes of this machine left in ``folder``; other files, and other machines', stay."""
    if not folder.is_dir():
        return
    for path in folder.glob(".*.tmp"):
        found = NAME.fullmatch(path.name)
        if found is not None and not _is_running(int(found[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's; no process id at all
        return True
    return True
