"""Limits of a server: the rate of requests, the size of their contents, and who may connect."""

from __future__ import annotations

import ipaddress
import math
import time
from typing import Any

import numpy as np


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def client_address(peer: Any) -> str:
    """Return the address of a client; for IPv6 its /64 network, since one machine may have all addresses in it."""
    if not peer:
        return "gone"
    address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    if address.version == 4:
        return str(address)
    mapped = address.ipv4_mapped
    return str(mapped or ipaddress.ip_network((address, 64), strict=False))


class RateLimit:
    """A token bucket: ``per_s`` events per second on average, at most ``burst`` at once (default: one second's)."""

    def __init__(self, per_s: float | None, *, burst: float | None = None):
        self._per_s = per_s
        self._size = self._tokens = burst or max(1.0, per_s or 0.0)
        self._last = time.monotonic()

    def allows(self) -> bool:
        if self._per_s is None:
            return True
        now = time.monotonic()
        self._tokens = min(self._size, self._tokens + (now - self._last) * self._per_s)
        self._last = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def refill(self) -> None:
        self._tokens = self._size


MAX_SIDE = 8192  # pixels
MAX_TEXT = 4096  # characters in a prompt or a name


def check_size(value: Any, max_pixels: int, path: str = "observation") -> None:
    """Refuse arrays and texts larger than any real input: otherwise a small message could cause much computation."""
    if isinstance(value, dict):
        for key, entry in value.items():
            check_size(entry, max_pixels, f"{path}/{key!s:.50}")
        return
    shape = getattr(value, "shape", ())
    pixels = math.prod(sorted(shape)[-2:])
    if len(shape) > 1 and pixels > max_pixels:
        raise ValueError(
            f"{path} has the shape {shape}, {pixels} pixels; a picture has at most {max_pixels} here "
            "(--max_picture_pixels). The model reads far fewer: send it smaller."
        )
    if len(shape) > 3 or (len(shape) == 3 and max(shape) > MAX_SIDE):
        raise ValueError(f"{path} has the shape {shape}; the largest thing here is one picture, without a batch axis")
    is_text = isinstance(value, (str, bytes)) or (isinstance(value, np.ndarray) and value.dtype.kind in "US")
    length = value.nbytes // 4 if isinstance(value, np.ndarray) else len(value) if is_text else 0
    if is_text and length > MAX_TEXT:
        raise ValueError(f"{path} is a text of {length} characters; at most {MAX_TEXT} are allowed")
