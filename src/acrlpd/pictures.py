"""Pictures in the form that the whole project uses: uint8 RGB [h w 3], resized with their aspect ratio kept.

Pictures of data, simulators, robots and a server's clients all pass through here, so a round ball stays round.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from acrlpd.types import typed


def fit(picture: Any, height: int, width: int, where: str) -> UInt8[np.ndarray, "*batch h w 3"]:
    """Read a camera's picture and resize it; a picture of that size is not changed."""
    rgb = to_rgb(picture, where)
    return rgb if rgb.shape[-3:-1] == (height, width) else resize_with_pad(rgb, height, width)


def to_rgb(picture: Any, where: str) -> UInt8[np.ndarray, "*batch h w 3"]:
    """Read a camera's picture, or a batch of colour pictures: channels last or first, or grey; uint8 or 0 to 1.

    >>> to_rgb(np.ones((3, 48, 96), np.float32), "top").shape
    (48, 96, 3)

    Raises:
        ValueError: the shape can be read in several ways, or in none. ``where`` names the camera.
    """
    levels = _whole_levels(np.asarray(picture), where)
    shape = levels.shape
    if levels.ndim >= 3 and shape[-1] == 3 and (shape[-3] != 3 or levels.ndim > 3):
        return levels
    if levels.ndim >= 3 and shape[-3] == 3 and shape[-1] != 3:
        return np.moveaxis(levels, -3, -1)
    if levels.ndim == 2 or (levels.ndim == 3 and 1 in (shape[0], shape[2]) and shape[0] != shape[2]):
        height, width = shape if levels.ndim == 2 else (shape[:2] if shape[2] == 1 else shape[1:])
        return np.repeat(levels.reshape(height, width, 1), 3, axis=-1)
    raise ValueError(
        f"{where} has the shape {shape}: expected a picture of (height, width, 3) or (3, height, width), or a grey one "
        "of (height, width). Send it so, or leave the camera out."
    )


def _whole_levels(picture: np.ndarray, where: str) -> UInt8[np.ndarray, "..."]:
    """Return levels from 0 to 255. Floats are truncated, not rounded, as in openpi."""
    if not picture.size or picture.dtype.kind not in "fiu":
        raise ValueError(f"{where} is no picture: {picture.dtype} of shape {picture.shape}. Expected uint8 RGB.")
    if picture.dtype == np.uint8:
        return picture
    low, high = picture.min(), picture.max()
    if picture.dtype.kind != "f" or not (low >= 0 and high <= 1):
        raise ValueError(
            f"{where} is {picture.dtype} from {low:g} to {high:g}: expected uint8 from 0 to 255, or floats from 0 to 1."
            " Convert it first."
        )
    return (255 * picture).astype(np.uint8)


@typed
def resize_with_pad(images: UInt8[np.ndarray, "*batch h w 3"], height: int, width: int) -> UInt8[np.ndarray, "..."]:
    """Resize with Pillow's bilinear filter to the largest size that fits, centred on black (the smaller rim first).

    The width is resized first, then the height, in two calls: in a single call newer Pillow chooses the order, and
    levels differ by one.
    """
    old_height, old_width = images.shape[-3:-1]
    scale = max(old_width / width, old_height / height)
    new_height, new_width = (max(1, int(old / scale)) for old in (old_height, old_width))
    top, left = int((height - new_height) / 2), int((width - new_width) / 2)
    resized = np.zeros((*images.shape[:-3], height, width, 3), dtype=np.uint8)
    targets = resized.reshape(-1, height, width, 3)
    for source, target in zip(images.reshape(-1, old_height, old_width, 3), targets, strict=True):
        narrow = Image.fromarray(source).resize((new_width, old_height), resample=Image.Resampling.BILINEAR)
        small = narrow.resize((new_width, new_height), resample=Image.Resampling.BILINEAR)
        target[top : top + new_height, left : left + new_width] = np.asarray(small)
    return resized
