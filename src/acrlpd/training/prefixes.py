"""Prefixes that the policy computes from each row of the prior data: computed once, then mapped from disk.

An update reads the images and prompt of a row only as pooled features, mask, keys and values, so a batch that brings
them along needs no forward or backward pass of the image tower and the vision-language expert. This holds only if both
are frozen (``policy.freeze_pi0_backbone``) and pictures are not augmented, which training here never does. The store
must fit into ``data.prefix_bytes``, which a full-size pi0's keys and values soon exceed (19 MB per row).

Pooled features alone are small (8 KB per row of a full-size pi0). Critics read nothing else, so the first updates of a
run, which train only critics (``critic_alone_steps``), read them back, whatever happens to the backbone later. An
implicit target reads nothing else of s', so the s' of every offline batch of a frozen backbone are features alone.

    <folder>/<key>/arrays.json    shape of a row and dtype of each array
                  /0.bin, ...     features, mask, then the cache's arrays; each has one row per row of the data set,
                                  and then one per episode, if final observations are known

The key is a digest of the weights, the data and all that happens to an observation on its way to the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Int

from acrlpd.agents.agent import ACRLPDAgent
from acrlpd.config import TrainConfig, to_dict
from acrlpd.data.loader import read_observations
from acrlpd.data.mixture import Mixture
from acrlpd.data.store.episodes import EpisodeStore
from acrlpd.data.store.metadata_cache import fingerprint
from acrlpd.data.view.normalize import NormStats
from acrlpd.data.view.transforms import Transform
from acrlpd.files import read_json, written_whole
from acrlpd.models import flow, parameters
from acrlpd.models.parameters import Params
from acrlpd.types import Observation

logger = logging.getLogger(__name__)

INDEX = "arrays.json"
VERSION = 2  # version of the files' layout and of what ``encode`` means; raise it when either changes


@dataclasses.dataclass(frozen=True)
class StoredPrefixes:
    """The ``flow.portable`` prefixes of a data set's rows, on disk."""

    arrays: Sequence[np.ndarray]
    structure: Any  # a pytree's definition

    def take(self, rows: Int[np.ndarray, " b"]) -> Any:
        """Return the prefixes of these rows of the data set, in memory."""
        return jax.tree.unflatten(self.structure, [np.array(each[rows]) for each in self.arrays])

    def features_alone(self) -> StoredPrefixes:
        """Return the pooled features of the same rows, without mask and cache."""
        return StoredPrefixes(self.arrays[:1], jax.tree.structure((0, None, None)))


def is_legal(config: TrainConfig) -> bool:
    """Return whether a run may read its prefixes back. With several hosts, each would need a store of its own."""
    return config.policy.freeze_pi0_backbone and config.data.prefix_bytes > 0 and jax.process_count() == 1


def are_features_of_use(config: TrainConfig, agent: ACRLPDAgent) -> bool:
    """Return whether the run will still train critics alone, on features that take a forward pass to compute."""
    reads = agent.config.critic.use_pi0_features and config.policy.traits.has_backbone
    return reads and int(agent.step) < config.critic_alone_steps and jax.process_count() == 1


def open_rows(
    config: TrainConfig,
    agent: ACRLPDAgent,
    prior: Mixture,
    transform: Transform,
    stats: Mapping[str, NormStats],
    *,
    data: Sequence[Path],
    folder: Path,
    features_alone: bool = False,
) -> list[StoredPrefixes] | None:
    """Open the rows of each store of this run, computed if missing; None if they exceed ``data.prefix_bytes``.

    ``data`` are the files that each of the stores was read from, ``stats`` what ``transform`` normalizes with.
    ``features_alone`` stores only what critics read, for any backbone and of any size.
    """
    encode, policy = _encoder(agent, features_alone)
    sizes = [store.num_rows + (store.num_episodes if store.has_final.any() else 0) for store in prior.stores]
    first = read_observations(prior.stores[0], transform, np.zeros(1, np.int64))
    like, structure = jax.tree.flatten(jax.eval_shape(encode, policy, first))
    needed = sum(sizes) * sum(math.prod(each.shape[1:]) * each.dtype.itemsize for each in like)
    if needed > config.data.prefix_bytes and not features_alone:
        logger.info(
            "the prefixes of %d rows are computed in every update: stored, they would take %.1f GiB, and "
            "data.prefix_bytes allows %.1f",
            *(sum(sizes), needed / 2**30, config.data.prefix_bytes / 2**30),
        )
        return None
    found = []
    for number, (store, files, num_rows) in enumerate(zip(prior.stores, data, sizes, strict=True)):
        target = folder / key(config, agent, stats, files, features_alone, number)
        if not (target / INDEX).exists():
            what = "pooled features" if features_alone else "prefixes"
            logger.info("computing the %s of %d rows of %s into %s", what, num_rows, files, target)
            _write(target, like, _computed(config, encode, policy, store, transform, num_rows))
        found.append(StoredPrefixes(_mapped(target, num_rows), structure))
    return found


def key(
    config: TrainConfig,
    agent: ACRLPDAgent,
    stats: Mapping[str, NormStats],
    data: Path,
    features_alone: bool = False,
    number: int = 0,
) -> str:
    """Return the name of a store, which changes with any weight used, any file of the data, and any option of either.

    ``number``: place of the data set in the configuration, where several may read the same files differently.
    """
    digest = hashlib.sha256(f"{VERSION} {fingerprint(data)} {features_alone} {number}".encode())
    changes = features_alone and not config.policy.freeze_pi0_backbone  # whether training changes the encoder
    weights = (agent.frozen, agent.params["policy"] if changes else ())
    digest.update(json.dumps([to_dict(config.policy), to_dict(config.data)], sort_keys=True).encode())
    for array in jax.tree.leaves((weights, {name: dataclasses.asdict(each) for name, each in stats.items()})):
        digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()[:32]


def _encoder(agent: ACRLPDAgent, features_alone: bool) -> tuple[Any, Any]:
    """Return a compiled function of the policy's parameters and an observation, and those parameters."""

    @jax.jit
    def encode(params: Params, observation: Observation) -> Any:
        policy = nnx.merge(agent.nets.policy_def, params)
        features, mask, cache = flow.portable(policy, policy.encode(observation))
        return (features, None, None) if features_alone else (features, mask, cache)

    return encode, parameters.join(agent.params["policy"], agent.frozen)


def _computed(
    config: TrainConfig, encode: Any, policy: Any, store: EpisodeStore, transform: Transform, num_rows: int
) -> Iterator[list[np.ndarray]]:
    """Yield the arrays of some rows at a time, in order; all calls have one shape, so the last row is repeated."""
    size = min(config.data.batch_size, num_rows)
    for start in range(0, num_rows, size):
        rows = np.minimum(np.arange(start, start + size), num_rows - 1)
        found = jax.device_get(encode(policy, read_observations(store, transform, rows)))
        yield [each[: num_rows - start] for each in jax.tree.leaves(found)]


def _write(target: Path, like: list[Any], blocks: Iterator[list[np.ndarray]]) -> None:
    """Write the arrays, under another name until they are complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(target) as temporary:
        temporary.mkdir()
        index = [{"shape": each.shape[1:], "dtype": jnp.dtype(each.dtype).name} for each in like]
        (temporary / INDEX).write_text(json.dumps(index), encoding="utf-8")
        with contextlib.ExitStack() as stack:  # not through mappings: a full disk would then kill the process
            opened = [stack.enter_context((temporary / f"{number}.bin").open("wb")) for number in range(len(like))]
            for block in blocks:
                for file, rows in zip(opened, block, strict=True):
                    file.write(np.ascontiguousarray(rows).tobytes())


def _mapped(folder: Path, num_rows: int) -> list[np.memmap]:
    found = []
    for number, each in enumerate(read_json(folder / INDEX, list)):
        path, dtype, shape = folder / f"{number}.bin", jnp.dtype(each["dtype"]), (num_rows, *each["shape"])
        expected, size = math.prod(shape) * dtype.itemsize, path.stat().st_size
        if size != expected:
            raise ValueError(
                f"{path}: expected {expected} bytes of stored prefixes, found {size}: delete {folder}, and the next "
                "run computes them again"
            )
        found.append(np.memmap(path, dtype=dtype, mode="r", shape=shape))
    return found
