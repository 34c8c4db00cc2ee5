"""Parameters that never change, in a checkpoint: links to the files that they came from, instead of copies."""

from __future__ import annotations

import dataclasses
import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from acrlpd.config import PolicyConfig
from acrlpd.models import weights
from acrlpd.models.parameters import Params

logger = logging.getLogger(__name__)

COMMITTED = "commit_success.txt"  # Orbax writes it into every folder that is complete: never into a linked one

_UNLINKABLE = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS)


def unchanging_params(policy: PolicyConfig, like: Params) -> Path | None:
    """Return the Orbax folder that a frozen policy was read from, if it holds what a checkpoint would: ``like``.

    None if the policy trains, or if its parameters have to be written: a line says why.
    """
    if not policy.frozen or policy.weights is None:
        return None
    found = weights.locate(policy.weights)
    stored = weights.stored_shapes(found) if found.is_dir() else {}
    wanted = {("params", *path, "value"): tuple(leaf.shape) for path, leaf in flatten_dict(like).items()}
    if stored == wanted:
        return found
    logger.warning("%s is not in the layout of a checkpoint: its parameters are copied into the run's", found)
    return None


class LinkHandler(ocp.CheckpointHandler):
    """Orbax's handler for an item whose files are those of another folder."""

    def save(self, directory: os.PathLike[str], args: LinkSave) -> None:
        link_folder(args.source, Path(directory))

    def restore(self, directory: os.PathLike[str], args: Any = None) -> None:
        raise NotImplementedError("linked parameters are read as those that Orbax wrote")


@ocp.args.register_with_handler(LinkHandler, for_save=True, for_restore=True)
@dataclasses.dataclass
class LinkSave(ocp.args.CheckpointArgs):
    source: Path


def link_folder(source: Path, target: Path) -> bool:
    """Hard-link every file below ``source`` to ``target``; return False if files had to be copied, which is logged."""
    linked = True
    for file in sorted(path for path in source.rglob("*") if path.is_file() and path.name != COMMITTED):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        real = file.resolve()  # a link to a symbolic link would break when that is moved
        try:
            if not linked:
                raise OSError(errno.EXDEV, "an earlier file could not be linked")
            os.link(real, place)
        except OSError as error:
            if error.errno not in _UNLINKABLE:
                raise
            if linked:
                logger.warning("%s cannot be linked to %s (%s): copied", source, target.parent, error.strerror)
            linked = False
            shutil.copyfile(real, place)
    return linked
