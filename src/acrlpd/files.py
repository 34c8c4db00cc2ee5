"""Guarded opening and parsing of files from outside, and whole-or-nothing writing of our own files and folders.

Data sets, checkpoints and configurations are made by others. Whatever they hold, reading ends soon and within bounded
memory, with the content or with a one-line error that names the file: a pipe is not waited for, a name does not lead
out of its folder, and a text that is too long, too deeply nested or not what was expected is refused.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError

MAX_TEXT_BYTES = 64 << 20  # limit for a JSON file; the annotations of all of DROID take 20 MB
MAX_YAML_BYTES = 1 << 20
MAX_YAML_NODES = 100_000  # including what its aliases stand for
MAX_DIGITS = 64  # digits of one number; no value of ours has more
MAX_LISTED = 30  # names in an error
MAX_TOLD = 400  # characters of a library's message
MAX_NAME = 1024  # characters of a name below a folder

# characters that act on a terminal instead of being seen: controls, changes of direction, halves of characters
UNSEEN = "\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff"


# -- opening -----------------------------------------------------------------------------------------------------------


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. A pipe, a device or a socket is refused without waiting for it.

    Raises:
        FileNotFoundError: nothing is there, or a link to nothing.
        ValueError: it is not a regular file.
    """
    check_file(path)
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # it was replaced meanwhile
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
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ValueError(f"{path}: expected a file, found a link that leads in a circle. Move it away.") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: expected a file, found {_kind_of_file(status.st_mode)}. Move it away.")
    return status


def _kind_of_file(mode: int) -> str:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def check_folder(path: str | os.PathLike[str]) -> None:
    """Raise as ``check_file`` does if a file below a folder is not regular. For libraries that read folders."""
    for folder, _, names in os.walk(path):
        for name in names:
            check_file(os.path.join(folder, name))


def cache_folder(*names: str) -> Path:
    """Return a folder of this package below the user's cache directory (XDG_CACHE_HOME), there or not."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").joinpath("acrlpd", *names)


def read_bytes(path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Return the content of a regular file; refuse one that is larger than ``max_bytes``."""
    with open_file(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"{path}: expected at most {max_bytes / 1e6:.0f} MB, found a larger file")
    return content


def read_text(path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return a file's text, which must be UTF-8."""
    return _decoded(str(path), read_bytes(path, max_bytes=max_bytes))


def read_lines(path: str | os.PathLike[str], *, max_bytes: int = MAX_TEXT_BYTES) -> Iterator[tuple[str, str]]:
    """Yield for each line of a file, which may be long, its place for error messages, and its text with the line end.

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
    """Return the value of a JSON text; ``where`` names its place in errors.

    A name that occurs twice in an object is refused. Unless ``allow_nan``, so are numbers that no float holds, NaN and
    Infinity; Python writes the latter two, but JSON does not know them.

    Raises:
        ValueError: it is not such a text, or its outermost value is not of this ``kind``.
    """
    text = _decoded(where, text) if isinstance(text, bytes) else text
    hooks: dict[str, Any] = {} if allow_nan else {"parse_constant": _refuse_constant, "parse_float": _finite}
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_int=_whole, **hooks)
        if "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode()  # half a character cannot be written to a file
    except (ValueError, RecursionError) as error:  # not JSON, or refused by a hook; too many brackets
        raise ValueError(f"{where}: expected JSON, found {error}") from error
    if not isinstance(content, kind):
        told = "a JSON object" if kind is dict else f"a JSON {kind.__name__}"
        raise ValueError(f"{where}: expected {told}, found {_told_kind(content)}")
    return content


def _told_kind(content: object) -> str:
    kinds: dict[Any, str] = {dict: "object", list: "list", str: "text", bool: "true or false", type(None): "null"}
    return kinds.get(type(content), "number")


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
        ValueError: it is not such a file; the message is one line that names it.
    """
    return parse_yaml(read_text(path, max_bytes=MAX_YAML_BYTES), str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Return the content of a YAML text; ``where`` names its place in errors. See ``read_yaml``."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        _check_nodes(node)
        content = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, or ours
        raise ValueError(f"{where}: expected YAML, found {one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected names with values, found {_told_kind(content)}")
    return content


def _check_nodes(root: yaml.Node | None) -> None:
    """Refuse content that would take long to read or is ambiguous, before values are made of it."""
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


# -- names and sizes that come from data -------------------------------------------------------------------------------


def inside(folder: str | os.PathLike[str], name: object, where: str) -> Path:
    """Return the path of ``name`` below ``folder``. The name came from data, and must not lead anywhere else.

    The name may contain subfolders. ``where`` says in errors where the name came from.

    Raises:
        ValueError: the name is empty or absolute, leads upwards or to another drive, is too long, or holds characters
            that cannot be seen.
    """
    text = check_name(name, where)
    both = (PurePosixPath(text), PureWindowsPath(text))
    if not both[0].parts or any(path.anchor or ".." in path.parts for path in both):
        raise ValueError(f"{where}: expected a name inside of its folder, found {text!r}")
    if any(len(os.fsencode(part)) > 255 for part in both[0].parts):
        raise ValueError(f"{where}: expected a name of at most 255 bytes, found {text[:40]!r}...")
    return Path(folder) / text


def check_name(name: object, where: str) -> str:
    """Return a name that came from data if it is a text without invisible characters; raise ValueError otherwise."""
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected a name, found {type(name).__name__}")
    if len(name) > MAX_NAME:
        raise ValueError(f"{where}: expected a name of at most {MAX_NAME} characters, found {len(name)}")
    if re.search(f"[\\t\\n{UNSEEN}]", name):
        raise ValueError(f"{where}: expected a name that can be printed, found {name!r}")
    return name


def printable(text: str) -> str:
    """Return a text that is safe to print: characters that act on a terminal are escaped, except breaks and tabs."""
    return re.sub(f"[{UNSEEN}]", lambda found: ascii(found[0])[1:-1], text)


def listed(names: Iterable[object]) -> str:
    """Return names from data as errors list them: long names and long lists are cut."""
    found = [printable(f"{name:.60}") for name in itertools.islice(map(str, names), MAX_LISTED + 1)]
    return ", ".join(found[:MAX_LISTED]) + (", ..." if len(found) > MAX_LISTED else "")


def one_line(error: object) -> str:
    """Return a library's message, which may be long and of several lines, in a form that fits into a sentence."""
    return printable(" ".join(str(error)[:MAX_TOLD].split()))


def physical_memory() -> int:
    """Return the bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_memory(where: str, nbytes: int, error: type[ValueError] = ValueError) -> None:
    """Raise ``error`` if an array that a file announces is larger than this machine's memory."""
    memory = physical_memory()
    if nbytes > memory:
        raise error(
            f"{where}: expected what fits into memory ({memory / 1e9:.0f} GB), found {nbytes / 1e9:.0f} GB. "
            "Is the file damaged?"
        )


# the errors of zipfile and numpy for one wrong byte, in the directory, an array's header or its numbers
NPZ_DAMAGE = (
    *(OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, AttributeError, TypeError, RuntimeError),
    *(SyntaxError, LookupError, ArithmeticError, RecursionError, MemoryError, tokenize.TokenError),
)
MAX_RATIO = 1100  # the highest compression ratio of deflate and of HDF5's lzf, with a margin
_NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def npz_outline(path: str | os.PathLike[str]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return shape and dtype of each array in an ``.npz`` file, from headers that agree with the file's size.

    ``numpy.load`` may read a file that passes: it then takes no more memory than the headers say. Damage raises one of
    ``NPZ_DAMAGE``.
    """
    size = check_file(path).st_size
    found: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():
            name = check_name(member.filename.removesuffix(".npy"), str(path))
            if name in found:
                raise ValueError(f"{name} occurs twice")
            if member.file_size > MAX_RATIO * min(member.compress_size, size):
                raise ValueError(f"{name} claims {member.file_size} bytes, more than the file can hold")
            found[name] = _npy_header(file, member, name)
    return found


def _npy_header(file: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> tuple[tuple[int, ...], np.dtype]:
    with file.open(member) as content:
        version = np.lib.format.read_magic(content)
        if version not in _NPY_HEADERS:
            raise ValueError(f"{name} has version {version} of numpy's format, expected 1.0 or 2.0")
        shape, _, dtype = _NPY_HEADERS[version](content)
        if dtype.hasobject:
            raise ValueError(f"{name} holds pickled objects, which are never read (allow_pickle=False)")
        nbytes = math.prod(shape) * dtype.itemsize
        if nbytes != member.file_size - content.tell():
            raise ValueError(f"{name} has the shape {shape}, which is not that of its bytes")
        check_memory(name, nbytes)
    return shape, dtype


PICTURES = ("PNG", "JPEG", "WEBP")  # Pillow knows forty more, and starts other programs for some of them
MAX_PIXELS = 1 << 26
JPEG_SCAN, JPEG_END = b"\xff\xda", b"\xff\xd9"


def open_picture(content: bytes) -> Image.Image:
    """Return a picture after reading only its header: it is decoded when it is used, and may turn out damaged.

    Raises:
        ValueError: it is neither PNG nor JPEG nor WebP, its header is damaged, or it is larger than any camera gives.
    """
    try:
        picture = Image.open(io.BytesIO(content), formats=PICTURES)
    except UnidentifiedImageError as error:
        raise ValueError("these are no picture's bytes, neither PNG nor JPEG nor WebP") from error
    except (OSError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture is damaged: {error}") from error
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"the picture claims {picture.width}x{picture.height} pixels: it is damaged, or a trap")
    if content.startswith(b"\xff\xd8") and content.rfind(JPEG_END) < content.rfind(JPEG_SCAN):
        raise ValueError("the picture is cut: a JPEG without its end")  # it would decode, with grey for what is missing
    return picture


# -- writing -----------------------------------------------------------------------------------------------------------

HOST = platform.node() or "here"  # process ids mean nothing on another machine that shares the folder
ASIDE = "overwritten"  # NAME.overwritten, NAME.overwritten-2, ...


@contextlib.contextmanager
def written_whole(path: str | os.PathLike[str], *, replaces: bool = True) -> Iterator[Path]:
    """Yield a path of the same suffix to write a file or a folder to; it replaces ``path`` once all of it is on disk.

    Unless it ``replaces``, whatever is at ``path`` by then stays untouched, which is a ``FileExistsError``.

    A reader sees the old content or the new one, even after a loss of power. If the block raises, nothing is left and
    ``path`` is unchanged. A folder that is replaced is first set aside under a visible name and deleted last. The path
    lies in a hidden folder beside ``path``, which a killed process leaves behind: the next process that writes to the
    same place removes it.
    """
    path = Path(path)
    _tidy(path.parent)
    hidden = temporary_path(path)
    _remove(hidden)
    hidden.mkdir()
    try:
        new = hidden / f"content{path.suffix}"
        yield new
        for part in (*new.rglob("*"), new):
            _sync(part)
        if not replaces and os.path.lexists(path):
            raise FileExistsError(f"{path} exists already: name another place, or remove it first")
        (_replace if replaces else os.replace)(new, path)  # the latter replaces no folder that holds anything
        _sync(path.parent)
    finally:
        _remove(hidden)


def _sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(new: Path, path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        os.replace(new, path)
        return
    aside = set_aside(path)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(aside, path)
        raise
    discard(aside)


def set_aside(path: Path) -> Path:
    """Rename ``path`` to a free name beside it, and return the new path."""
    names = (path.with_name(f"{path.name}.{ASIDE}{'' if count == 1 else f'-{count}'}") for count in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    os.replace(path, aside)
    return aside


def those_set_aside(path: Path) -> list[Path]:
    """Return what was set aside in favour of ``path`` and still exists, sorted by name."""
    pattern = re.compile(rf"{re.escape(path.name)}\.{ASIDE}(-\d+)?")
    if not path.parent.is_dir():
        return []
    return sorted(other for other in path.parent.iterdir() if pattern.fullmatch(other.name))


def discard(path: Path) -> None:
    """Delete a folder so that it is never seen half deleted under its name, even if the process is killed."""
    doomed = temporary_path(path)
    _remove(doomed)
    os.replace(path, doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Delete a file, a link or a folder with its content, if it exists and can be deleted."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return the hidden path of this process's unfinished work on ``path``. Readers skip hidden files and folders."""
    return path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")


def is_temporary(path: Path) -> bool:
    """Return whether ``path`` has the name of unfinished work of a process, running or killed."""
    return re.fullmatch(r"\..+\.tmp", path.name) is not None


def remove_abandoned(folder: Path) -> None:
    """Remove what killed processes of this machine left in ``folder``; other machines' and other files stay."""
    if not folder.is_dir():
        return
    for path in folder.glob(".*.tmp"):
        found = re.fullmatch(rf"\..+\.{re.escape(HOST)}-(\d+)\.tmp", path.name)
        if found is not None and not _is_running(int(found[1])):
            _remove(path)


_tidy = functools.cache(remove_abandoned)  # once per process: listing a large folder takes longer than writing a file


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process; not a process id
        return True
    return True
