"""The rows and frames of a LeRobot dataset's episodes, read from its parquet files and videos."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8

from acrlpd.data.formats import video
from acrlpd.data.formats.lerobot import checks
from acrlpd.data.formats.lerobot.meta import REWARD, TERMINAL, TIMESTAMP, EpisodeRow, Meta
from acrlpd.data.formats.parquet import DataError, ParquetReader
from acrlpd.data.formats.rewards import Labeller


@dataclasses.dataclass(frozen=True)
class EpisodeFacts:
    """The facts about an episode that opening finds out."""

    row: EpisodeRow
    first: int  # row of the parquet file at which the episode begins
    tasks: tuple[tuple[int, int], ...]  # frame and task_index wherever the task changes; usually one entry
    success: bool | None

    @property
    def where(self) -> str:
        return f"{self.row.file}: episode {self.row.number}"


class LeRobotFiles:
    """A reader of the files. Columns that are read in one go are ``columns``; ``tolerance_s`` applies to video frames.

    ``sizes`` has the height and width of the embedded pictures, by feature; it must be known before frames are read.
    """

    def __init__(self, meta: Meta, columns: tuple[str, ...], tolerance_s: float):
        self.meta = meta
        self.columns = columns
        self.tolerance_s = tolerance_s
        self.sizes: dict[str, tuple[int, int]] = {}
        self.parquet = ParquetReader()
        self._videos = video.VideoReaders()
        self._outlines: dict[Path, video.Outline] = {}  # episodes may share a video

    def rows(self, episode: EpisodeFacts, key: str) -> np.ndarray:
        """Return all rows of an episode in one column, as they are stored."""
        file = episode.row.file
        with blaming(episode.row, file):
            table = self.parquet.columns(file, self.columns if key in self.columns else (key,))
        return table[key][episode.first : episode.first + episode.row.length]

    def joined(self, episode: EpisodeFacts, keys: Sequence[str]) -> Float[np.ndarray, "t d"]:
        """Return all rows of an episode in several columns, side by side."""
        parts = [self.rows(episode, key) for key in keys]
        blocks = [part.reshape(len(part), math.prod(part.shape[1:])) for part in parts]
        return np.concatenate(blocks, axis=1).astype(np.float32)

    def frames(self, episode: EpisodeFacts, key: str, start: int, stop: int) -> UInt8[np.ndarray, "t h w 3"]:
        """Decode the frames ``start`` to ``stop`` of a feature."""
        if start == stop:
            return self.frames(episode, key, 0, 1)[:0]
        row = episode.row
        if key in row.videos:
            span = row.videos[key]
            with blaming(row, span.path, key):
                times = self.frame_times(episode, key)[start:stop]
                return self._videos.frames(span.path, times, self.tolerance_s, (span.start_s, span.stop_s))
        with blaming(row, row.file, key):
            cells = self.parquet.cells(row.file, key, episode.first + start, episode.first + stop)
            return checks.decode_images(cells, start, self.sizes[key])

    def frame_times(self, episode: EpisodeFacts, key: str) -> Float[np.ndarray, " t"]:
        """Return the times of an episode's frames in its mp4, in seconds.

        Timestamps are rounded to float32, after 17 minutes by more than the tolerance. A timestamp that equals
        frame / fps up to this rounding is replaced by exactly frame / fps.
        """
        stored = self.rows(episode, TIMESTAMP).ravel()
        exact = np.arange(len(stored)) / self.meta.fps
        rounded = np.abs(stored - exact) <= np.spacing(np.abs(stored))
        return episode.row.videos[key].start_s + np.where(rounded, exact, stored.astype(np.float64))

    def outline(self, row: EpisodeRow, key: str) -> video.Outline:
        """Return what the header of an episode's video says."""
        path = row.videos[key].path
        with blaming(row, path, key):
            if path not in self._outlines:
                self._outlines[path] = video.outline(path)
            return self._outlines[path]

    @property
    def num_frames(self) -> dict[Path, int]:
        """The number of frames of each video whose header was read."""
        return {path: outline.num_frames for path, outline in self._outlines.items()}

    def label(
        self, episode: EpisodeFacts, labeller: Labeller
    ) -> tuple[Float[np.ndarray, " t"], Bool[np.ndarray, " t"]]:
        """Return the rewards and terminals of an episode."""
        stored = self.rows(episode, REWARD).astype(np.float32).ravel() if labeller.are_known else None
        terminals = self.rows(episode, TERMINAL).astype(bool).ravel() if TERMINAL in self.columns else None
        length, success = episode.row.length, episode.success
        return labeller.label(length, success=success, stored=stored, terminals=terminals, where=episode.where)


@contextlib.contextmanager
def blaming(row: EpisodeRow, file: Path, key: str | None = None) -> Iterator[None]:
    """Add file, episode and key to errors that only say what is wrong."""
    try:
        yield
    except (DataError, video.VideoError) as error:
        raise fault(row, file, str(error), key) from error


def fault(row: EpisodeRow, file: Path, text: str, key: str | None = None) -> ValueError:
    return ValueError(f"{file}: episode {row.number}: {'' if key is None else key + ': '}{text}")
