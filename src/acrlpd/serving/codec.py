"""openpi's messages: MessagePack, with numpy arrays and scalars as maps whose keys are bytes.

    array   {__ndarray__: true, data: bytes in C order, dtype: "<f4", shape: [2, 3]}
    scalar  {__npgeneric__: true, data: a plain number, dtype: "<f4"}

Nothing is ever pickled: objects, structures and complex numbers are refused in both directions, and so is bfloat16,
whose dtype string gives only its size. float64 scalars and numpy strings are sent as plain numbers and texts, because
they are subclasses of Python's; tuples come back as lists.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"
DTYPE = re.compile(r"[<>|=]?[a-zA-Z]\d+(\[\w+\])?")  # numpy itself accepts far more, even Python literals
MAX_ITEMS = 10_000  # entries of a list or dictionary, and of all in a message: each costs much more than its bytes
MAX_TEXT_BYTES = 2**16
REFUSED = "VOc"  # kinds of dtype: structures and bfloat16, objects, complex numbers


def pack(message: Any) -> bytes:
    """Return the message's bytes, identical to openpi's.

    Raises:
        ValueError: an array has a dtype that is refused.
        TypeError: a value is neither a plain Python value nor numpy's, such as an array on a device.
    """
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """Return the message; its arrays are read-only views of ``data``.

    Raises:
        ValueError: the bytes are no message, an array does not match its description, or there are too many values.
    """
    items = 0

    def count(entries: Any) -> Any:
        nonlocal items
        items += 1 + len(entries)
        if items > MAX_ITEMS:
            raise ValueError(f"a message holds at most {MAX_ITEMS} values outside of arrays; send numbers as an array")
        return entries

    try:
        return msgpack.unpackb(
            data,
            object_hook=lambda entry: _decode(count(entry)),
            list_hook=count,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
            max_str_len=MAX_TEXT_BYTES,
        )
    except (msgpack.UnpackException, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"expected one MessagePack message, got {len(data)} bytes that are none: {error}") from error


def _encode(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise TypeError(
            f"a message holds numbers, texts, lists, dictionaries and numpy arrays, not {type(value).__name__}; "
            "convert it first (np.asarray for an array on a device)"
        )
    dtype = _checked(value.dtype)
    if isinstance(value, np.generic):
        return {SCALAR: True, b"data": value.item(), b"dtype": dtype.str}
    return {ARRAY: True, b"data": value.tobytes(), b"dtype": dtype.str, b"shape": value.shape}


def _decode(entry: dict[Any, Any]) -> Any:
    if ARRAY in entry:
        shape, dtype = _field(entry, b"shape", list), _dtype(entry)
        data = _field(entry, b"data", bytes)
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise ValueError(f"an array's shape must be whole numbers from 0, got {shape}")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} and dtype {dtype.str} does not have {len(data)} bytes")
        return np.ndarray(shape, dtype, buffer=data)
    if SCALAR in entry:
        return _scalar(_dtype(entry), _field(entry, b"data", (bool, int, float, str, bytes)))
    return entry


def _scalar(dtype: np.dtype, value: Any) -> np.generic:
    try:
        return dtype.type(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{value!r:.100} in a message is no scalar of dtype {dtype.str}: {error}") from error


def _dtype(entry: dict[Any, Any]) -> np.dtype:
    name = _field(entry, b"dtype", str)
    try:
        if not DTYPE.fullmatch(name):
            raise TypeError("expected a byte order, a letter and a size")
        return _checked(np.dtype(name))
    except TypeError as error:
        raise ValueError(f"a message names the dtype {name!r:.100}, which numpy does not know: {error}") from error


def _checked(dtype: np.dtype) -> np.dtype:
    if dtype.kind in REFUSED:
        raise ValueError(
            f"a message cannot hold the dtype {dtype}: structures, objects, complex numbers and bfloat16 are refused. "
            "Send float32 instead."
        )
    return dtype


def _field(entry: dict[Any, Any], key: bytes, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(entry.get(key), kind):
        raise ValueError(f"an array or scalar in a message has no usable {key.decode()}: {entry.get(key)!r:.100}")
    return entry[key]
