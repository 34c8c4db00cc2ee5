"""Why does the loss fall and the robot fail? What a checkpoint expects beside what the data, or the robot, gives it.

``training.findings`` has the questions and their verdicts; here is where the numbers come from.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from acrlpd.data import chunks, held_out
from acrlpd.data.store import windows
from acrlpd.data.store.episodes import IMAGE_PREFIX, EpisodeStore, task_runs
from acrlpd.data.view.robots.mapping import ROBOTS
from acrlpd.data.view.tokenizer import PromptTokenizer
from acrlpd.data.view.transforms import DeltaActions, TokenizePrompt
from acrlpd.deploy.recorded import Beside, missing_cameras
from acrlpd.envs.env import EnvConfig, Environment
from acrlpd.envs.registry import make
from acrlpd.envs.rollout import episode_seed
from acrlpd.training import films, findings, markup
from acrlpd.training.findings import Finding, Pictures, Replay, Rows
from acrlpd.training.loading import with_task
from acrlpd.training.offline_evaluation import spread_starts

PICTURES = 12  # of each camera, evenly spread over all episodes
SHOWN_PICTURES = 8


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The findings about a checkpoint and recorded episodes."""

    findings: tuple[Finding, ...]
    pictures: Mapping[str, Pictures]  # by camera, as they are in the data

    @property
    def is_wrong(self) -> bool:
        return any(each.verdict == "wrong" for each in self.findings)


def diagnose(beside: Beside, *, num_chunks: int, seed: int) -> Diagnosis:
    """Answer every question of ``findings`` about a checkpoint and recorded episodes, but that of the simulator."""
    rows = _rows(beside, num_chunks)
    stats, quantiles = beside.stats, beside.normalize.quantiles
    bounded = beside.config is not None and beside.config.data.action_normalization == "bounds"
    found = [
        findings.of_statistics("state", rows.model_state, stats["state"], quantiles=quantiles),
        findings.of_convention(rows, stats, by_bounds=bounded, delta_mask=_delta_mask(beside)),
        findings.of_grippers(rows.model_actions, stats["actions"], by_bounds=bounded),
    ]
    if not bounded:  # limits of an action space are no statistics
        actions = findings.of_statistics("actions", rows.model_actions, stats["actions"], quantiles=quantiles)
        found.insert(1, actions)
    missing, read = missing_cameras(beside), _pictures(beside)
    unread = [name for name in beside.source.cameras if name not in read]
    found.append(findings.of_cameras(missing, read, unread))
    found += _prompt(beside, rows, quantiles)
    subject, lengths = beside.subject, beside.source.lengths.tolist()
    found.append(
        findings.of_rate(
            beside.fps, beside.source.fps, horizon=subject.horizon, executed=subject.executed, lengths=lengths
        )
    )
    if missing is None:  # else the policy cannot be asked
        found.append(findings.of_errors(beside.evaluate(num_chunks=num_chunks, seed=seed)))
    return Diagnosis(tuple(found), read)


def _rows(beside: Beside, num_chunks: int) -> Rows:
    """Read numbers of evenly spread rows, as recorded and after the robot's transform; no picture is read.

    They are of all episodes, also of those that were trained on: a few say little about a whole distribution.
    """
    store = windows.open_store(beside.whole, memory_bytes=0)
    starts = np.concatenate([each.rows for each in spread_starts([store], num_chunks)])
    raw = chunks.gather(store, starts, beside.subject.horizon, images=False)
    data = beside.before_normalization({key: raw[key] for key in ("state", "actions", "image", "prompt")})
    real = raw["valid"] > 0
    return Rows(
        state=raw["state"].astype(np.float64),
        first=raw["actions"][:, 0].astype(np.float64),
        model_state=np.asarray(data["state"], np.float64),
        model_first=np.asarray(data["actions"], np.float64)[:, 0],
        model_actions=np.asarray(data["actions"], np.float64)[real],
    )


def _delta_mask(beside: Beside) -> tuple[bool, ...]:
    masks = [each.mask for each in beside.subject.transform.transforms if isinstance(each, DeltaActions)]
    return tuple(masks[0]) if masks else ()


def _pictures(beside: Beside) -> dict[str, Pictures]:
    """Return some pictures of each camera of the data that the policy reads."""
    there = beside.source.cameras
    if not beside.subject.reads_images:
        return {}
    if beside.robot is not None and beside.cameras is None:
        wanted = list(ROBOTS[beside.robot].cameras.values())
        names = [next((name for name in each if name in there), None) for each in wanted]
    else:
        names = [name if name in there else None for name in beside.cameras or ()]
    rows = np.unique(np.linspace(0, beside.store.num_rows - 1, PICTURES).round().astype(int))
    return {name: beside.store.take(IMAGE_PREFIX + name, rows) for name in names if name is not None}


def _prompt(beside: Beside, rows: Rows, quantiles: bool) -> list[Finding]:
    """Judge the instructions if the policy reads them by a tokenizer of text."""
    if beside.config is not None and not beside.config.policy.traits.has_backbone:
        return []
    steps = [each for each in beside.subject.transform.transforms if isinstance(each, TokenizePrompt)]
    if not steps:
        return []
    tokenizer: PromptTokenizer = steps[0].tokenizer
    infos = [beside.source.info(index) for index in range(beside.source.num_episodes)]
    prompts = collections.Counter(text for info in infos for text in {text for _, text in task_runs(info)})
    states = None
    if steps[0].discrete_state_input:
        states = np.asarray(beside.normalize({"state": rows.model_state})["state"])
    return [findings.of_prompts(tokenizer, prompts, states)]


# ---- in the simulator


def replay(beside: Beside, data: str, name: str, *, seed: int | None, episodes: int) -> Finding:
    """Execute recorded actions open loop in the environment ``name``, and judge what comes of it.

    Episode k of a data set that was collected here began with ``episode_seed(seed, k)``. ``seed`` is that of the
    collection; None: of the run, which collects with its own.
    """
    config = beside.config
    own = None if config is None or config.env is None else with_task(config, name).env
    environment = make(own or EnvConfig(name))
    try:
        _check_dims(environment, beside.store, data)
        known = seed if seed is not None else 0 if config is None else config.seed
        names = held_out.names_within(beside.source, data)
        scale = np.maximum(beside.store.state.std(axis=0), 1e-6)
        chosen = np.unique(np.linspace(0, len(names) - 1, min(episodes, len(names))).round().astype(int)).tolist()
        replays = [_replayed(environment, beside, k, episode_seed(known, _number(names[k], k)), scale) for k in chosen]
    finally:
        environment.close()
    return findings.of_replay(replays)


def _check_dims(environment: Environment, store: EpisodeStore, data: str) -> None:
    spec, found = environment.spec, (store.state.shape[1], store.actions.shape[1])
    if found != (spec.state_dim, spec.action_dim):
        raise ValueError(
            f"{data} has {found[0]} state and {found[1]} action dimensions, but {spec.name} has {spec.state_dim} and "
            f"{spec.action_dim}: name an environment of the same robot (--env.name)"
        )


def _number(name: str, position: int) -> int:
    """Return the number in an episode's name, by which it was seeded."""
    found = re.search(r"episode[_ ](\d+)", name)
    return int(found[1]) if found else position


def _replayed(environment: Environment, beside: Beside, index: int, seed: int, scale: np.ndarray) -> Replay:
    info = beside.source.info(index)
    recorded = beside.source.window(index, "state", 0, 1)[0]
    start = environment.reset(seed, render=False)["state"]
    solved = False
    for action in beside.source.window(index, "actions", 0, info.length):
        step = environment.step(np.asarray(action, np.float32))
        solved = solved or step.success
        if step.terminated or step.truncated:
            break
    return Replay(info.success, solved, float(np.mean(np.abs(start - recorded) / scale)))


# ---- what is shown

MARKS = {"good": "good ", "look": "look ", "wrong": "WRONG"}


def lines(found: Sequence[Finding]) -> list[str]:
    """Return the findings for a terminal: the verdict, the evidence, what to do, and details where it is not good."""
    told = []
    for each in found:
        told.append(f"{MARKS[each.verdict]} {each.name:<20}{each.text}")
        if each.verdict != "good":
            told += [f"      {detail}" for detail in each.details]
            told.append(f"      -> {each.advice}")
    return told


def page(title: str, found: Diagnosis) -> str:
    """Return the findings as one self-contained HTML page, with pictures of every camera that the policy reads."""
    rows = [
        (each.verdict.upper() if each.verdict == "wrong" else each.verdict, each.name, _cell(each))
        for each in found.findings
    ]
    sections = [markup.section("Findings", markup.table(("verdict", "question", "evidence and advice"), rows))]
    for name, pictures in found.pictures.items():
        kept = np.unique(np.linspace(0, len(pictures) - 1, SHOWN_PICTURES).round().astype(int)).tolist()
        sections.append(markup.section(f"Camera {name}", _strip(pictures[kept], name)))
    return markup.page(title, sections)


def _cell(each: Finding) -> Any:
    parts = [markup.element("p", each.text), *(markup.element("p", detail) for detail in each.details)]
    if each.advice:
        parts.append(markup.element("p", each.advice, "remark"))
    return markup.Html("".join(parts))


def _strip(pictures: Pictures, name: str) -> str:
    shown = "".join(
        f'<span><img src="{films.jpeg(picture)}" alt="{markup.escaped(name)}"></span>' for picture in pictures
    )
    return f'<figure><div class="film">{shown}</div></figure>'
