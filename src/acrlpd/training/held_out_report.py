"""The part of a report that a run without a simulator has: its evaluations on held-out episodes, with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from acrlpd.files import NPZ_DAMAGE, npz_outline, one_line, read_json
from acrlpd.training import charts, films, markup
from acrlpd.training.offline_evaluation import PICTURES_PREFIX as PREFIX
from acrlpd.training.offline_evaluation import pictured_steps
from acrlpd.training.run import RunFiles

NAMES = {"best": "best of N", "sample": "one sample", "repeat": "the last action once more", "mean": "the mean action"}


def headline(record: Mapping[str, Any]) -> str:
    """Return the newest evaluation in one sentence."""
    return (
        f"At update {record['step']:,} the policy's actions on held-out episodes are off by "
        f"{record['eval/action_error']:.2f} of their spread; the better of two baselines that see nothing is off by "
        f"{record['eval/action_error_baseline']:.2f}."
    )


def section(run_files: RunFiles, records: Sequence[Mapping[str, Any]]) -> str:
    """Return the section; ``records`` are those of evaluations on held-out episodes, by step."""
    figures = [charts.held_out(records)]
    if not run_files.offline_evaluation.is_file():
        return markup.section("Held-out episodes", markup.grid(figures))
    found = read_json(run_files.offline_evaluation, allow_nan=True)
    course = found["courses"][0]
    figures += [charts.by_step(found["errors"], NAMES), charts.actions(course["recorded"], course["predicted"])]
    rows = [(NAMES[name], f"{each['relative']:.3f}") for name, each in found["errors"].items()]
    intro = (
        f"At update {found['step']:,}, over {found['chunks']} chunks of {found['episodes']} episodes. Errors are in "
        "units of the spread of the data's actions. The best checkpoint is the one of the smallest error of the "
        "executed steps."
    )
    table = markup.table(("what acts", "action error"), rows)
    strips = _strips(run_files, course)
    return markup.section("Held-out episodes", markup.element("p", intro), table, markup.grid(figures), *strips)


def _strips(run_files: RunFiles, course: Mapping[str, Any]) -> list[str]:
    """Return a strip of pictures for each camera of the episode, if they were kept."""
    if not run_files.held_out_pictures.is_file():
        return []
    try:
        npz_outline(run_files.held_out_pictures)
        with np.load(run_files.held_out_pictures, allow_pickle=False) as kept:
            if str(kept["episode"]) != course["episode"]:  # of an evaluation of other data since
                return []
            cameras = {key.removeprefix(PREFIX): kept[key] for key in kept if key.startswith(PREFIX)}
    except NPZ_DAMAGE as error:
        where = run_files.held_out_pictures
        raise ValueError(f"{where}: expected a complete .npz file of pictures ({one_line(error)})") from error
    steps = pictured_steps(len(course["recorded"])).tolist()
    return [_strip(name, dict(zip(steps, frames, strict=False)), course) for name, frames in cameras.items()]


def _strip(name: str, frames: Mapping[int, np.ndarray], course: Mapping[str, Any]) -> str:
    alt = markup.escaped(name)
    pictures = "".join(
        f'<span><img src="{films.jpeg(frame)}" alt="{alt}, step {step}"><small>step {step}</small></span>'
        for step, frame in frames.items()
    )
    ending = {True: "a success", False: "a failure", None: "an episode"}[course["success"]]
    caption = f"Camera {name} along {ending}: {course['task'] or 'no instruction'}."
    return f'<figure>{markup.element("figcaption", caption)}<div class="film">{pictures}</div></figure>'
