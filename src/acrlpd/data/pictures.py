"""Which stored pictures are 8-bit colour, and how they become RGB. All others are refused with the reason.

Nothing is rescaled, clipped or blended on the way: a picture is read exactly, or not at all. 8-bit grey is read as
colour with three equal channels, a palette by its colours, floats in 0..1 as the nearest of 256 levels, and an alpha
channel that is opaque everywhere is dropped. 16 bits, transparency and CMYK are refused, and so is depth.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Shaped, UInt8
from PIL import Image

NOT_CHOSEN = "it is not among the cameras asked for"  # reasons why a camera is not read, beside a ``PictureError``
DEPTH_BY_NAME = "it is a depth camera by its name"
READABLE_MODES = ("RGB", "L", "P", "RGBA")  # of Pillow
NAMES_OF_MODES = {"LA": "grey with transparency", "PA": "a palette with transparency", "1": "black and white"}
FEW_BITS = ("1", "L;2", "L;4")  # Pillow's names of grey with less than 8 bits
OPAQUE = 255


class PictureError(ValueError):
    """Why a camera's pictures are not 8-bit colour."""


def is_depth(name: str) -> bool:
    """Whether a camera is called a depth camera."""
    return "depth" in name.lower()


def check_colour(image: Image.Image) -> None:
    """Raise ``PictureError`` unless an opened picture is 8-bit colour or grey. One with alpha is decoded for it."""
    rawmode = _rawmode(image)
    if "16" in rawmode or rawmode in FEW_BITS:
        bits = "16 bits" if "16" in rawmode else "less than 8 bits"
        raise PictureError(f"its pictures have {bits} a channel, expected 8-bit colour")
    if image.mode not in READABLE_MODES:
        raise PictureError(f"its pictures are {NAMES_OF_MODES.get(image.mode, image.mode)}, expected 8-bit colour")
    if "transparency" in image.info or (image.mode == "RGBA" and image.getchannel("A").getextrema()[0] != OPAQUE):
        raise PictureError("its pictures are partly transparent, expected opaque 8-bit colour")


def _rawmode(image: Image.Image) -> str:
    """How the file stores its numbers; Pillow's ``mode`` alone takes 16-bit RGB for RGB."""
    arguments = image.tile[0].args if image.tile else image.mode
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def decoded(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Return an opened picture as RGB; raises ``PictureError``, or what Pillow raises for damage."""
    check_colour(image)
    return np.asarray(image.convert("RGB"))


def as_rgb(picture: Shaped[np.ndarray, "..."], where: str) -> UInt8[np.ndarray, "h w 3"]:
    """Return one picture as RGB, if its shape and numbers leave no doubt; see ``as_rgb_rows``."""
    try:
        return as_rgb_rows(np.asarray(picture)[None])[0]
    except PictureError as error:
        raise PictureError(f"{where}: {error}") from error


def as_rgb_rows(rows: Shaped[np.ndarray, "t ..."]) -> UInt8[np.ndarray, "t h w 3"]:
    """Return pictures as RGB: (h, w, 3), (3, h, w), with alpha or grey; uint8, or floats that all lie in 0..1.

    >>> frames = as_rgb_rows(np.full((2, 3, 48, 64), 0.2, np.float32))
    >>> frames.shape, int(frames[0, 0, 0, 0])
    ((2, 48, 64, 3), 51)

    Raises:
        PictureError: the shape could be read in two ways or in none, or the numbers are no such levels.
    """
    axis = _channel_axis(rows.shape[1:], rows.dtype)
    levels = rows if rows.dtype == np.uint8 else _levels(rows)
    if axis is None:
        return np.repeat(levels[..., None], 3, axis=-1)
    frames = np.moveaxis(levels, axis, -1)
    if frames.shape[-1] == 4 and not (frames[..., 3] == OPAQUE).all():
        raise PictureError("its pictures are partly transparent, expected opaque 8-bit colour")
    return np.repeat(frames, 3, axis=-1) if frames.shape[-1] == 1 else frames[..., :3]


def rgb_shape(shape: tuple[int, ...], dtype: np.dtype) -> tuple[int, int, int]:
    """Return height, width and 3 of a picture stored in this shape and dtype; raises ``PictureError``."""
    axis = _channel_axis(shape, dtype)
    height, width = (size for at, size in enumerate(shape) if axis is None or at != axis % len(shape))
    return height, width, 3


def _channel_axis(shape: tuple[int, ...], dtype: np.dtype) -> int | None:
    """Which axis of a picture holds its channels; None: it has none."""
    if dtype != np.uint8 and dtype.kind != "f":
        raise PictureError(f"expected pictures of uint8, or of floats in 0..1, found {dtype} {shape}")
    if len(shape) == 2:
        return None
    for channels in ((3,), (1, 4)):  # one of 3 decides: the other axis may have any size
        axes = [axis for axis in (-3, -1) if len(shape) == 3 and shape[axis] in channels]
        if len(axes) == 1:
            return axes[0]
        if axes:
            raise PictureError(f"pictures of shape {shape} may have their channels first or last")
    raise PictureError(f"expected pictures of shape (h, w, 3), (3, h, w) or (h, w), found {shape}")


def _levels(values: Shaped[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Return floats in 0..1 as the nearest levels of 0..255."""
    if values.size and not (values.min() >= 0 and values.max() <= 1):  # NaN fails, too
        raise PictureError(f"expected floats in 0..1, found {values.min():g} to {values.max():g}")
    return np.rint(values.astype(np.float32) * np.float32(OPAQUE)).astype(np.uint8)
