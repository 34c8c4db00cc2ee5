"""Damages and reads small data sets, in a process of its own. A line of input asks, a line of output answers.

{"name", "seed", "skip"} -> {"damage", "episodes": {source: {...}}, "fps", "cameras"} or {"damage", "error", ...}
"""

import hashlib
import json
import resource
import shutil
import sys
import traceback
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from corruption_sets import SETS, path_of
from corruptions import mutate

from acrlpd.data.sources import open_episodes

MEMORY = 6 << 30  # addresses, of which most are libraries and reserves of allocators


def digest(array):
    return f"{array.dtype.str}{array.shape}{hashlib.sha256(array.tobytes()).hexdigest()[:16]}"


def read(path, *, skip):
    data = open_episodes(path, on_bad_episode="skip" if skip else "error", remember=False)
    episodes = {}
    for index in range(data.num_episodes):
        episode = data.episode(index)
        arrays = {name: getattr(episode, name) for name in ("state", "actions", "rewards", "terminals")}
        found = {name: digest(array) for name, array in {**arrays, **episode.images}.items()}
        episodes[episode.source.removeprefix(str(path))] = found | {"task": episode.task, "success": episode.success}
    return {"episodes": episodes, "fps": data.fps, "cameras": list(data.cameras)}


def answer(path, *, skip):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return read(path, skip=skip)
    except Exception as error:  # noqa: BLE001 - whichever it is, the test judges it
        clear = isinstance(error, ValueError | FileNotFoundError) and not isinstance(error, UnicodeError)
        where = "" if clear else "".join(traceback.format_exception(error)[-4:])
        return {"error": str(error), "kind": type(error).__name__, "clear": clear, "where": where}


def case(folder, name, seed, skip):
    """The answer about a copy, damaged unless the seed is None."""
    whole, copy = folder / "whole" / name, folder / "case"
    if not whole.exists():
        whole.mkdir(parents=True)
        SETS[name](whole)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(whole, copy)
    damage = "" if seed is None else mutate(copy, name, np.random.default_rng(seed))
    found = answer(path_of(copy, name), skip=skip)
    return found | {"damage": damage, "peak": peak_bytes()}


def peak_bytes():
    """The most memory this process has held; ``ru_maxrss`` would begin with that of the process that started it."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin:
        print(json.dumps(case(Path(sys.argv[1]), **json.loads(line))), flush=True)
