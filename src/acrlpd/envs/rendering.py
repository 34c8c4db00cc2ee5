"""Headless rendering with MuJoCo: the choice of OpenGL, and settings that make a frame ten times cheaper."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8

PACKAGES = {
    "egl": "libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libgles2",
    "osmesa": "libosmesa6 libgl1",
}
"""The packages that each backend needs on Debian and Ubuntu."""


def choose_backend() -> str:
    """Set ``MUJOCO_GL`` unless the user did: EGL, else OSMesa, else no rendering. Call before mujoco is imported.

    MuJoCo reads the variable once, at import, and fails there if the backend does not work; hence the probe.
    """
    chosen = os.environ.get("MUJOCO_GL", "")
    if chosen or sys.platform != "linux" or "mujoco" in sys.modules:
        return chosen
    backend = "egl" if _egl_has_device() else "osmesa" if _loads("libOSMesa.so.8", "libOSMesa.so") else "disabled"
    os.environ["MUJOCO_GL"] = backend
    return backend


@contextlib.contextmanager
def simulator(name: str, package: str) -> Iterator[None]:
    """Choose the backend for a simulator that the block imports; if it is not installed, say how to install it."""
    choose_backend()
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{name}/... environments need {package}: pip install 'acrlpd[{name}]'") from error


class Renderer:
    """A renderer of one model at one (square) size. Shadows, reflections and multisampling are off to save time."""

    def __init__(self, model: Any, size: int, hidden_geoms: tuple[int, ...] = ()):
        import mujoco

        if os.environ.get("MUJOCO_GL", "").lower() in ("disable", "disabled", "off", "false", "0"):
            raise RuntimeError(_unavailable("MUJOCO_GL turns it off"))
        # These settings are read when the renderer is created; later changes have no effect.
        model.vis.quality.shadowsize = 0
        model.vis.quality.offsamples = 0
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, size)
        model.vis.global_.offheight = max(model.vis.global_.offheight, size)
        try:
            self._renderer = mujoco.Renderer(model, size, size)
        except (mujoco.FatalError, RuntimeError, AttributeError) as error:  # AttributeError: no context class at all
            raise RuntimeError(_unavailable(str(error))) from error
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
        self._renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        self._options = mujoco.MjvOption()
        self._options.geomgroup[list(hidden_geoms)] = 0
        self.size = size

    def render(self, data: Any, camera: str) -> UInt8[np.ndarray, "h w 3"]:
        self._renderer.update_scene(data, camera, self._options)
        return self._renderer.render().copy()

    def close(self) -> None:
        self._renderer.close()


class Renderers:
    """One renderer per size, created on first use: policies and videos need different sizes of the same scene.

    ``hidden_geoms`` are groups of geoms that are not drawn, in addition to those that MuJoCo hides by default.
    """

    def __init__(self, hidden_geoms: tuple[int, ...] = ()) -> None:
        self._hidden_geoms = hidden_geoms
        self._by_size: dict[int, Renderer] = {}

    def render(self, model: Any, data: Any, camera: str, size: int) -> UInt8[np.ndarray, "h w 3"]:
        if size not in self._by_size:
            self._by_size[size] = Renderer(model, size, self._hidden_geoms)
        return self._by_size[size].render(data, camera)

    def close(self) -> None:
        for renderer in self._by_size.values():
            renderer.close()
        self._by_size.clear()


def _unavailable(reason: str) -> str:
    return (
        f"rendering was asked for and is not possible: {reason}. On Debian or Ubuntu install {PACKAGES['egl']} and set "
        f"MUJOCO_GL=egl, or install {PACKAGES['osmesa']} and set MUJOCO_GL=osmesa, before Python starts. "
        "Without cameras and videos no rendering is needed."
    )


def _egl_has_device() -> bool:
    """Return whether EGL finds a device: in some containers the library is installed, but there is no device."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return False
    count = ctypes.c_int(0)
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(address)
    return bool(query(0, None, ctypes.byref(count))) and count.value > 0


def _loads(*names: str) -> bool:
    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False
