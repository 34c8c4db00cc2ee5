"""Chunks from rows: windows of H steps with their masks.

Readers decide where a recorded episode ends and ``formats/rewards.py`` where its task does; ``envs/env.py`` decides
both for a live one. Only this module turns these ends into masks.

A TD target looks ``backup_horizon`` steps ahead, so the next state and the two masks are of these steps alone.

A worked example, in which it looks ahead over all: an episode of 5 steps (0..4), horizon 4, window from step 3.

    steps read     3  4  4  4      the last action is repeated
    rewards       r3 r4  0  0
    valid          1  1  0  0
    next state     s4              t+4 leaves the episode: the last real step

If step 4 is a terminal, sequence_mask = 1 and bootstrap_mask = 0: the return ends there. If the episode was merely cut
(a time limit), sequence_mask = 0: it is unknown what would have followed, so the chunk stays out of the TD loss.

The window from step 1 reads all of 1..4 and ends exactly with the episode. After its four steps comes s5, the final
observation, which has no row of its own. If s5 was recorded, it is the next state. If it was not, and step 4 is no
terminal, sequence_mask = 0: one must not bootstrap from the state before the last action.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from acrlpd.data.store.episodes import IMAGE_PREFIX, EpisodeStore
from acrlpd.types import typed


@typed
def gather(
    store: EpisodeStore,
    rows: Int[np.ndarray, " b"],
    horizon: int,
    *,
    backup_horizon: int | None = None,
    images: bool = True,
    next_images: bool | None = None,
    ends_in_chunks: bool = True,
) -> dict[str, Any]:
    """Read the chunks that start at ``rows``, in raw units, with the fields of ``docs/algorithm.md``, section 1.

    ``state``, ``next_state`` [b s]; ``image``, ``next_image`` {camera: [b h w 3]} (empty without ``images``, or without
    ``next_images``, by default the same); ``actions`` [b h a]; ``rewards``, ``terminals``, ``valid`` [b h];
    ``bootstrap_mask``, ``sequence_mask`` [b];
    ``whole`` [b]: all steps are real; ``episode_id``, ``step_id`` [b]; ``row``, ``next_row`` [b] of the store, for
    ``observe``; ``prompt``, ``next_prompt`` [b] of str: the instruction at the chunk's first step and after it. Masks
    are float32, 0 or 1. What is next, ``bootstrap_mask``, ``sequence_mask`` and ``whole`` look at the first
    ``backup_horizon`` steps alone, by default at all.

    A terminal may lie in mid-episode (relabelled play data): the steps after it are read, but are not ``valid``.
    Without ``ends_in_chunks``, ``sequence_mask`` is 0 for all chunks that the end of an episode cuts short.
    """
    if horizon < 1:
        raise ValueError(f"horizon must be at least 1, got {horizon}")
    ahead = horizon if backup_horizon is None else backup_horizon
    if not 1 <= ahead <= horizon:
        raise ValueError(f"backup_horizon must lie between 1 and horizon ({horizon}), got {ahead}")
    episodes = store.episode_index(rows)
    start, end = store.starts[episodes], store.ends[episodes]
    steps = rows[:, None] + np.arange(horizon)[None, :]  # [b h]
    real = steps < end[:, None]
    steps = np.minimum(steps, end[:, None] - 1)
    ends_with = rows + ahead == end
    final = ends_with & store.knows_final(episodes)
    next_rows = np.where(final, store.num_rows + episodes, np.minimum(rows + ahead, end - 1))

    take = store.take
    next_images = images if next_images is None else next_images
    cameras, next_cameras = (store.cameras if wanted else () for wanted in (images, next_images))
    terminals = take("terminals", steps) & real
    terminal_before = np.cumsum(terminals, axis=1) > terminals  # strictly before: the terminal step itself is valid
    terminated = terminals[:, :ahead].any(axis=1)
    whole = real[:, :ahead].all(axis=1)
    followed = whole & (~ends_with | final | terminated)  # a state to bootstrap from follows, or none is needed
    return {
        "state": take("state", rows),
        "next_state": _seen(store, "state", next_rows, episodes),
        "image": {name: take(IMAGE_PREFIX + name, rows) for name in cameras},
        "next_image": {name: _seen(store, IMAGE_PREFIX + name, next_rows, episodes) for name in next_cameras},
        "actions": store.take_stretches("actions", steps),
        "rewards": take("rewards", steps) * real,
        "terminals": terminals.astype(np.float32),
        "valid": (real & ~terminal_before).astype(np.float32),
        "bootstrap_mask": (~terminated).astype(np.float32),
        "sequence_mask": (followed | (terminated & ends_in_chunks)).astype(np.float32),
        "whole": whole.astype(np.float32),
        "episode_id": episodes + store.first_episode_id,
        "step_id": rows - start,
        "row": rows,
        "next_row": next_rows,
        "prompt": store.instructions(rows),
        "next_prompt": store.instructions(np.minimum(rows + ahead, end - 1)),
    }


def gather_next(
    store: EpisodeStore, raw: dict[str, Any], horizon: int, *, backup_horizon: int, ends_in_chunks: bool
) -> dict[str, Any]:
    """Read the actions that follow the chunks ``raw`` of ``gather``, for a TD target at the data's own next chunk.

    ``next_actions`` [b h a] start at the next state. ``sequence_mask`` [b] is that of ``raw``, but also 0 for chunks
    that bootstrap and whose next chunk is missing, or is cut short within ``backup_horizon`` steps by anything but a
    terminal (by that as well, without ``ends_in_chunks``).
    """
    goes_on = raw["next_row"] < store.num_rows  # no action follows a final observation
    rows = np.where(goes_on, raw["next_row"], raw["row"])
    found = gather(store, rows, horizon, backup_horizon=backup_horizon, images=False)
    ended = (found["bootstrap_mask"] == 0) & ends_in_chunks
    usable = (raw["bootstrap_mask"] == 0) | (goes_on & ((found["whole"] > 0) | ended))
    return {"next_actions": found["actions"], "sequence_mask": raw["sequence_mask"] * usable}


def num_cut(store: EpisodeStore) -> int:
    """Count the episodes cut without terminal and final observation: no window that ends with them bootstraps."""
    cut = np.flatnonzero(~store.has_final)
    return int(np.sum(~store.take("terminals", store.ends[cut] - 1)))


@typed
def observe(store: EpisodeStore, rows: Int[np.ndarray, " b"]) -> dict[str, Any]:
    """Read ``state``, ``image`` and ``prompt`` at rows, named as in ``gather``.

    Row ``store.num_rows`` + n is the final observation of episode n; if that is not known, it is the observation in
    the episode's last row.
    """
    after = rows - store.num_rows
    episodes = np.where(after >= 0, after, store.episode_index(np.minimum(rows, store.num_rows - 1)))
    return {
        "state": _seen(store, "state", rows, episodes),
        "image": {name: _seen(store, IMAGE_PREFIX + name, rows, episodes) for name in store.cameras},
        "prompt": store.instructions(np.where(after >= 0, store.ends[episodes] - 1, rows)),
    }


def _seen(
    store: EpisodeStore, key: str, rows: Int[np.ndarray, " b"], episodes: Int[np.ndarray, " b"]
) -> Shaped[np.ndarray, "b *shape"]:
    """Read rows of a key of observations, numbered as in ``observe``."""
    after = rows >= store.num_rows
    found = store.take(key, np.where(after, store.ends[episodes] - 1, rows))
    final = after & store.knows_final(episodes)
    if final.any():
        found[final] = store.take_finals(key, episodes[final])
    return found


def step_rng(seed: int, step: int) -> np.random.Generator:
    """Return the generator of one training step. It depends on both numbers alone, so resumed runs draw the same."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64)))


@typed
def start_rows(
    store: EpisodeStore, rng: np.random.Generator, batch_size: int, horizon: int, sequence_ratio: float
) -> Int[np.ndarray, " b"]:
    """Draw the rows at which the chunks of a batch start, uniformly with replacement.

    A share ``sequence_ratio`` starts where a full window fits, the rest anywhere, so that terminals and short tails
    occur as well. If no episode is as long as ``horizon``, all start anywhere.
    """
    num_full = round(sequence_ratio * batch_size)
    return draw_starts(store, rng, horizon, num_full=num_full, num_anywhere=batch_size - num_full)


def draw_starts(
    store: EpisodeStore, rng: np.random.Generator, horizon: int, *, num_full: int, num_anywhere: int
) -> Int[np.ndarray, " b"]:
    """Draw ``num_full`` rows where a full window fits, and ``num_anywhere`` of all; all anywhere if none fits."""
    if store.num_rows == 0:
        raise ValueError("cannot draw chunks from an empty EpisodeStore: append an episode first")
    last = store.full_windows(horizon)
    if not last[-1]:
        num_full, num_anywhere = 0, num_full + num_anywhere
    anywhere = rng.integers(store.num_rows, size=num_anywhere)
    if num_full == 0:
        return anywhere
    drawn = rng.integers(last[-1], size=num_full)
    index = np.searchsorted(last, drawn, side="right")  # episode of the drawn start
    before = np.where(index > 0, last[index - 1], 0)
    return np.concatenate([store.starts[index] + drawn - before, anywhere])
