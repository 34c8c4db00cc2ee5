"""Conversion of stored pictures to 8-bit RGB. All other pictures are refused with a reason.

Nothing is rescaled, clipped or blended on the way to RGB: a picture is read exactly, or not at all. 8-bit grey becomes
colour with three equal channels, a palette becomes its colours, and an alpha channel that is opaque everywhere is
dropped. 16 bits, transparency, CMYK and depth are refused. ``acrlpd.pictures`` reads raw pixels.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

from acrlpd.pictures import to_rgb

NOT_CHOSEN = "it is not among the cameras asked for"  # reasons why a camera is not read, beside a ``PictureError``
DEPTH_BY_NAME = "it is a depth camera by its name"
READABLE_MODES = ("RGB", "L", "P", "RGBA")  # modes of Pillow
NAMES_OF_MODES = {"LA": "grey with transparency", "PA": "a palette with transparency", "1": "black and white"}
FEW_BITS = ("1", "L;2", "L;4")  # Pillow's raw modes of grey with fewer than 8 bits
OPAQUE = 255


class PictureError(ValueError):
    """An error with the reason why a camera's pictures are not 8-bit colour."""


def is_depth(name: str) -> bool:
    """Return whether the name of a camera says that it is a depth camera."""
    return "depth" in name.lower()


def check_colour(image: Image.Image) -> None:
    """Raise ``PictureError`` unless an opened picture is 8-bit colour or grey. With alpha it is decoded to check."""
    rawmode = _rawmode(image)
    if "16" in rawmode or rawmode in FEW_BITS:
        bits = "16 bits" if "16" in rawmode else "less than 8 bits"
        raise PictureError(f"its pictures have {bits} a channel, expected 8-bit colour")
    if image.mode not in READABLE_MODES:
        raise PictureError(f"its pictures are {NAMES_OF_MODES.get(image.mode, image.mode)}, expected 8-bit colour")
    if "transparency" in image.info or (image.mode == "RGBA" and image.getchannel("A").getextrema()[0] != OPAQUE):
        raise PictureError("its pictures are partly transparent, expected opaque 8-bit colour")


def _rawmode(image: Image.Image) -> str:
    """Return the raw mode of the file; Pillow's ``mode`` alone reports 16-bit RGB as RGB."""
    tiles = getattr(image, "tile", None)
    arguments = tiles[0].args if tiles else image.mode
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def decoded(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Return an opened picture as RGB; raise ``PictureError``, or Pillow's errors for damaged data."""
    check_colour(image)
    return np.asarray(image.convert("RGB"))


def rgb_rows(rows: Shaped[np.ndarray, "t ..."]) -> UInt8[np.ndarray, "t h w 3"]:
    """Return raw pictures as RGB; raise ``PictureError`` if ``acrlpd.pictures`` finds one of them ambiguous."""
    if rows.dtype.kind == "f":
        rows = rows.astype(np.float32)  # keeps all 256 levels on the way to 0..1 and back
    if rows.dtype == np.uint8 and rgb_shape(rows.shape[1:], rows.dtype) == rows.shape[1:]:
        return rows
    return np.stack([_rgb(row) for row in rows])


def rgb_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, int, int]:
    """Return height, width and 3 of a picture stored with this shape and dtype; may raise ``PictureError``."""
    height, width, channels = _rgb(np.broadcast_to(np.zeros((), dtype), shape)).shape
    return height, width, channels


def _rgb(picture: Shaped[np.ndarray, "..."]) -> UInt8[np.ndarray, "h w 3"]:
    try:
        return to_rgb(picture, "its picture")
    except ValueError as error:
        raise PictureError(str(error)) from error
