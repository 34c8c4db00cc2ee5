"""Episodes as mp4 files, filmed by executing their recorded actions again."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from acrlpd.envs.env import Environment
from acrlpd.envs.episodes import Rollout, replay
from acrlpd.files import written_whole


def save_videos(
    environment: Environment, rollouts: Sequence[Rollout], directory: Path, *, count: int, size: int = 256
) -> list[Path]:
    """Film the first ``count`` successes and failures, as ``success-SEED.mp4`` and ``failure-SEED.mp4``.

    An episode in which the simulation failed is left out: it cannot be executed again to its end.
    """
    paths = []
    for solved, name in ((True, "success"), (False, "failure")):
        chosen = [each for each in rollouts if each.success == solved and each.error is None][:count]
        for each in chosen:
            path = directory / f"{name}-{each.seed}.mp4"
            write_mp4(path, replay(environment, each, size), fps=environment.spec.fps)
            paths.append(path)
    return paths


def write_mp4(path: Path, frames: UInt8[np.ndarray, "t h w 3"], *, fps: float) -> None:
    """Write H.264 in the pixel format that every browser plays; height and width must be even."""
    try:
        import av
    except ImportError as error:
        raise ImportError("videos need PyAV: pip install 'acrlpd[video]'") from error
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise ValueError(f"{path}: H.264 needs an even height and width, got {frames.shape[1:3]}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
