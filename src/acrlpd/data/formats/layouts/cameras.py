"""The choice of cameras in an episode file: the ones that are read, the ones that are left out, and other unused keys.

A camera that is not asked for is never opened. By default all cameras with 8-bit colour pictures are read; the others
are left out with a reason, which becomes an error if the user asked for them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import h5py
import numpy as np

from acrlpd import files
from acrlpd.data.formats import pictures
from acrlpd.data.formats.layouts import columns
from acrlpd.data.formats.layouts.columns import DatasetPictures, StoredRows
from acrlpd.data.formats.pictures import PictureError
from acrlpd.data.store.episodes import IMAGE_PREFIX, OptionError, told_numbers

KINDS = "fiubSVO"  # dtype kinds of numbers and of encoded pictures
BLOCK = 64  # pictures that are checked at a time
Found = TypeVar("Found")


def choose(
    where: str, openers: Mapping[str, Callable[[], Found]], wanted: Sequence[str] | None
) -> tuple[dict[str, Found], dict[str, str]]:
    """Open the cameras ``wanted``, by default all that hold 8-bit colour. Keys are ``images/<camera>``.

    Return the opened cameras, and the reason for each camera that was not opened. If ``wanted`` is empty, the user
    wants no pictures, and no reasons are returned.

    Raises:
        OptionError: a wanted camera does not exist, or its pictures are not 8-bit colour.
    """
    missing = [camera for camera in wanted or () if camera not in openers]
    if missing:
        raise OptionError(
            f"{where}: {IMAGE_PREFIX}{missing[0]}: no such camera; the episode has {files.listed(openers) or 'none'}"
        )
    found: dict[str, Found] = {}
    left_out = {IMAGE_PREFIX + camera: pictures.NOT_CHOSEN for camera in openers if wanted and camera not in wanted}
    for camera in openers if wanted is None else wanted:
        try:
            if pictures.is_depth(camera):
                raise PictureError(pictures.DEPTH_BY_NAME)
            found[IMAGE_PREFIX + camera] = openers[camera]()
        except PictureError as error:
            if wanted is not None:
                raise OptionError(f"{where}: {IMAGE_PREFIX}{camera}: {error}. Leave it out of cameras.") from error
            left_out[IMAGE_PREFIX + camera] = str(error)
    return found, left_out


def stored(
    where: str, group: h5py.Group, label: str, *, flip: tuple[int, ...] = (), bgr: bool = False
) -> DatasetPictures:
    """Return the pictures of a dataset: raw ones, or one JPEG or PNG per row, padded, of fixed or variable length.

    Raises:
        PictureError: the pictures are not 8-bit colour.
    """
    data = columns.dataset(where, group, label)
    rows = StoredRows.at(data, label)
    found = DatasetPictures.of(rows, is_encoded=_is_encoded(data), bgr=bgr, flip=flip)
    if rows.dtype.kind == "f":  # floats are colours only if all of them lie in 0..1
        for start in range(0, len(rows), BLOCK):
            pictures.rgb_rows(rows.read(start, min(start + BLOCK, len(rows))))
    return found


def _is_encoded(data: h5py.Dataset) -> bool:
    """Return whether the rows are image files: uint8 with two axes, byte strings, or rows of variable length."""
    opaque = data.dtype.kind == "S" or (data.dtype.kind == "V" and data.dtype.names is None)
    variable = h5py.check_vlen_dtype(data.dtype) == np.uint8
    return (data.ndim == 1 and (opaque or variable)) or (data.ndim == 2 and data.dtype == np.uint8)


def check_keys(
    where: str,
    group: h5py.Group,
    labels: Sequence[str],
    option: str,
    *,
    asked: bool,
    below: Sequence[str] = ("",),
) -> None:
    """Refuse keys of the state or the actions that are no datasets. The error lists those that are (``below``).

    Raises:
        OptionError: the user ``asked`` for the key with ``option``.
        ValueError: the key is one of the format's defaults.
    """
    missing = [label for label in labels if not isinstance(columns.find(where, group, label), h5py.Dataset)]
    if not missing:
        return
    kind = "nothing" if columns.find(where, group, missing[0]) is None else "a group"
    text = (
        f"{where}: {missing[0]}: expected a dataset, found {kind}. There are {files.listed(unused(group, (), below))}. "
        f"Choose with {option} (--data.{option}), and cameras with cameras (--data.cameras)."
    )
    raise OptionError(text) if asked else ValueError(text)


def unused(group: h5py.Group, used: Collection[str], below: Sequence[str] = ("",)) -> list[str]:
    """Describe the unused numbers and pictures of a group; only those whose names begin with one in ``below``."""
    found: dict[str, str] = {}

    def note(name: str, item: h5py.Dataset | h5py.Group) -> None:
        known = name in used or not name.startswith(tuple(below))
        if isinstance(item, h5py.Dataset) and item.ndim and item.dtype.kind in KINDS and not known:
            found[name] = told_numbers(item.shape[1:]) if item.dtype.kind in "fiub" else "bytes"

    group.visititems(note)
    return [f"{name} ({what})" for name, what in sorted(found.items())]
