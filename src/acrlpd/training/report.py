"""One page about a run: what it reached, how it got there, what it cost, and how to go on.

The page is a single HTML file that needs no network: charts are inline SVG, whose colours follow the reader's light or
dark setting, and film frames are data URIs. It can be written at any time, also of a run that is still going.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import io
import json
import math
import os
import shlex
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image

from acrlpd.config import TrainConfig, from_dict
from acrlpd.envs.env import EnvConfig, Environment, PhysicsError, make
from acrlpd.training import charts
from acrlpd.training.charts import POLICIES, Evaluated
from acrlpd.training.metrics import read_jsonl
from acrlpd.training.run import RunFiles

NUM_FRAMES = 8  # of one filmstrip
FRAME_SIZE = 192  # pixels
SHOWN_FAULTS = 5  # episodes that were left out, with the reason


@dataclasses.dataclass(frozen=True)
class Run:
    """What lies in a run's folder."""

    files: RunFiles
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]  # metrics.jsonl
    summary: Mapping[str, Any] | None  # None: not finished, or gone on since

    @property
    def task(self) -> str:
        env = self.config.get("env") or {}
        return str(env.get("name") or self.config.get("data", {}).get("path") or "unknown task")

    @functools.cached_property
    def training(self) -> list[Mapping[str, Any]]:
        """Records of updates by step; of a step that a resumed run made again, the later record."""
        by_step = {record["step"]: record for record in self.records if "train/total_loss" in record}
        return [by_step[step] for step in sorted(by_step)]

    @functools.cached_property
    def evaluations(self) -> dict[str, list[Evaluated]]:
        """By policy, in the order of steps; of a step that was evaluated twice, the one with more episodes."""
        found: dict[str, dict[int, Evaluated]] = {name: {} for name in POLICIES}
        for record in self.records:
            if "eval/success_rate" not in record or record["phase"] not in found:
                continue
            evaluated = _from_record(record)
            known = found[record["phase"]].get(record["step"])
            if known is None or evaluated.episodes >= known.episodes:
                found[record["phase"]][record["step"]] = evaluated
        return {name: [each[step] for step in sorted(each)] for name, each in found.items() if each}

    @functools.cached_property
    def results(self) -> dict[str, Evaluated]:
        """The last word on each policy: the summary's, or the newest evaluation of a run without one."""
        newest = {name: evaluations[-1] for name, evaluations in self.evaluations.items()}
        for name, result in (self.summary or {}).get("phases", {}).items():
            known = newest.get(name)
            where = (known.step, known.env_steps) if known else (None, None)
            newest[name] = Evaluated(*where, result["success"], result["low"], result["high"], int(result["episodes"]))
        return {name: newest[name] for name in POLICIES if name in newest}

    @property
    def boundary(self) -> int | None:
        """The update at which the online phase began, if it has."""
        begun = any(record.get("phase") == "online" for record in self.records)
        return self.config.get("offline_steps") if begun else None

    def total(self, name: str) -> Any:
        """``updates``, ``env_steps`` or ``wall_s`` of the run so far."""
        if self.summary is not None:
            return self.summary[name]
        key = "step" if name == "updates" else name
        return max((record[key] for record in self.records), default=0)


class Html(str):
    """Text that is markup already; every other string is escaped on its way into the page."""


def write_report(run: str | Path) -> Path:
    """Writes ``report.html`` into a run's folder and returns its path.

    A missing summary, evaluation or renderer leaves a remark where its content would be.

    Raises:
        ValueError: the folder has no ``config.json``.
        ImportError: matplotlib is missing.
    """
    record = read_run(Path(run))
    path = record.files.directory / "report.html"
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(_page(record), encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_run(directory: Path) -> Run:
    files = RunFiles(directory)
    if not files.config.is_file():
        raise ValueError(f"{directory} has no {files.config.name}: expected the folder of a run, such as runs/demo")
    config = json.loads(files.config.read_text(encoding="utf-8"))
    records = read_jsonl(files.metrics) if files.metrics.is_file() else []
    summary = json.loads(files.summary.read_text(encoding="utf-8")) if files.summary.is_file() else None
    if summary is not None and any(record["step"] > summary["updates"] for record in records):
        summary = None  # of an earlier stretch of a run that was resumed
    return Run(files, config, records, summary)


def _from_record(record: Mapping[str, Any]) -> Evaluated:
    success, low, high = (float(record[f"eval/{name}"]) for name in ("success_rate", "low", "high"))
    return Evaluated(record["step"], record["env_steps"], success, low, high, int(record["eval/episodes"]))


# ---- the page, in the order of reading


def _page(run: Run) -> str:
    sections = [
        *(_overview(run), _results(run), _full_evaluation(run), _curves(run), _films(run), _time(run)),
        *(_configuration(run), _go_on(run)),
    ]
    return PAGE.substitute(
        title=_text(f"{run.task}, seed {run.config.get('seed')}"), style=STYLE, body="\n".join(sections)
    )


def _overview(run: Run) -> str:
    horizon = run.config.get("policy", {}).get("action_horizon")
    facts = {
        "updates": f"{run.total('updates'):,}",
        "environment steps": f"{run.total('env_steps'):,}",
        "wall time": _duration(run.total("wall_s")),
        "policy": f"{run.config.get('policy', {}).get('kind')}, chunks of {horizon} actions",
    }
    lines = [_element("p", headline(run), "headline")]
    if run.summary is None:
        remark = "This run has not finished: results are its newest evaluations, totals those of its newest record."
        lines.append(_element("p", remark, "remark"))
    data = (run.summary or {}).get("data")
    if data is not None:
        facts["prior data"] = f"{data['episodes']:,} episodes, {data['steps']:,} steps"
        if data["skipped"]:
            lines.append(_element("p", _left_out(data), "remark"))
    pairs = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items())
    return "\n".join([*lines, f"<dl>{pairs}</dl>"])


def _left_out(data: Mapping[str, Any]) -> str:
    """Which episodes of the prior data were not used, and why."""
    faults, total = data["skipped"], data["episodes"] + len(data["skipped"])
    more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
    told = "; ".join(fault for _, fault in faults[:SHOWN_FAULTS])
    return f"{len(faults)} of {total} episodes of the prior data could not be used and were left out: {told}{more}."


def headline(run: Run) -> str:
    """What happened, in one sentence.

    >>> headline(read_run(Path("runs/demo")))
    'Imitation solved 15 of 50 episodes; after 4,000 online steps the policy solves 49 of 50.'
    """
    results = run.results
    if not results:
        return f"No evaluation yet: the run is at update {run.total('updates'):,}."
    names = {"bc": "imitation", "offline": "offline training"}
    counts = {name: f"{result.successes} of {result.episodes}" for name, result in results.items()}
    counts[next(iter(counts))] += " episodes"
    sentence = ", ".join(f"{names[name]} solved {count}" for name, count in counts.items() if name in names)
    if "online" in results:
        steps = results["online"].env_steps
        online = f"after {run.total('env_steps') if steps is None else steps:,} online steps the policy solves "
        sentence = "; ".join(filter(None, [sentence, online + counts["online"]]))
    return f"{sentence[0].upper()}{sentence[1:]}."


def _results(run: Run) -> str:
    if not run.results:
        remark = "No evaluation was recorded: the run has no environment, or has not come to its first evaluation."
        return _section("Success", _element("p", remark, "remark"))
    rows = [
        (
            *POLICIES[name],
            f"{each.successes} of {each.episodes}",
            _percent(each.success),
            f"{_percent(each.low)} to {_percent(each.high)}",
            "" if each.step is None else f"{each.step:,}",
        )
        for name, each in run.results.items()
    ]
    table = _table(("policy", "what acted", "solved", "success", "95 % interval", "at update"), rows)
    figures = [charts.results(run.results)]
    if sum(map(len, run.evaluations.values())) > 1:
        figures.append(charts.learning(run.evaluations, run.boundary))
    return _section("Success", table, _grid(figures), _paired(run))


def _paired(run: Run) -> str:
    """Seed by seed, which says more than two intervals that overlap."""
    pair = _before_and_after(run)
    if pair is None:
        return ""
    name, before, after = pair
    failed, solved = before.failed & after.seeds, before.solved & after.seeds
    text = (
        f"Seed by seed, the {POLICIES[name][0]} policy solved {len(failed & after.solved)} of the {len(failed)} "
        f"episodes that imitation failed, and failed {len(solved & after.failed)} of the {len(solved)} that it solved."
    )
    return _element("p", text)


def _full_evaluation(run: Run) -> str:
    """What ``acrlpd eval --full`` found, task by task; nothing where it has not been run."""
    if not run.files.full_evaluation.is_file():
        return ""
    found = json.loads(run.files.full_evaluation.read_text(encoding="utf-8"))
    intro = f"By acrlpd eval --full, of update {found['step']:,}. Every line met the same seeds as the first."
    parts: list[str] = [_element("p", intro)]
    for task, findings in found["tasks"].items():
        parts += [_element("h3", task), _table(TRIAL_HEADER, _trial_rows(findings))]
        if "comparison" in findings:
            parts.append(_element("p", _comparison(found, findings["comparison"])))
        if findings["agreement"] is not None:
            parts += [_element("p", _agreement(findings["agreement"]))]
            parts.append(_grid([charts.calibration(findings["agreement"]["bins"])]))
    return _section("Full evaluation", *parts)


TRIAL_HEADER = ("trial", "solved", "success", "95 % interval", "return", "steps", "against the first line")


def _trial_rows(findings: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    kinds = {"observation_noise": "noise {} on observations", "action_noise": "noise {} on actions"}
    trials = [("the task as it is", findings["task"])]
    for kind, name in {**kinds, "best_of_n": "best of {}"}.items():
        trials += [(name.format(level), trial) for level, trial in findings[kind].items()]
    for name, trial in trials:
        paired = trial.get("against_task")
        yield (
            name,
            f"{trial['successes']} of {trial['episodes']}",
            _percent(trial["success"]),
            f"{_percent(trial['low'])} to {_percent(trial['high'])}",
            f"{trial['return_mean']:.1f}",
            f"{trial['length_mean']:.0f}",
            _difference(paired) if paired else "",
        )


def _difference(paired: Mapping[str, Any]) -> str:
    points = [f"{100 * paired[name]:+.0f}" for name in ("difference", "low", "high")]
    return "{} points ({} to {})".format(*points)


def _comparison(found: Mapping[str, Any], paired: Mapping[str, Any]) -> str:
    return (
        f"On the same {paired['episodes']} seeds this policy solved {paired['first_successes']} and {found['compare']} "
        f"{paired['second_successes']}, a difference of {_difference(paired)}, by paired bootstrap, 95 %. "
        f"{paired['only_first']} seeds were solved by this policy alone, {paired['only_second']} by the other alone "
        f"(exact McNemar test: p = {paired['p_value']:.2g})."
    )


def _agreement(facts: Mapping[str, Any]) -> str:
    """In words; what the episodes do not determine is left out."""
    said = [f"Q lies {facts['overestimation']:+.2f} from the return, counted to the time limit"]
    if facts["overestimation_solved"] is not None:
        said.append(f"{facts['overestimation_solved']:+.2f} in solved episodes, where the return is exact")
    if facts["auc"] is not None:
        said.append(f"the first Q of a solved episode exceeds that of an unsolved one {facts['auc']:.0%} of the time")
    if facts["q_return_correlation"] is not None:
        said.append(f"the rank correlation of Q and return is {facts['q_return_correlation']:.2f}")
    said.append(f"the chosen chunk lies {facts['choice_gain']:.2f} above its candidates' mean")
    return f"Over {facts['chunks']:,} executed chunks: {'; '.join(said)}."


def _curves(run: Run) -> str:
    if not run.training:
        return _section("Training", _element("p", "No update was logged yet.", "remark"))
    figures = [charts.curves(each, run.training, run.boundary) for each in charts.CURVES]
    every = run.config.get("log_frequency")
    remark = f"Each point is the mean over the {every} updates before it. Nothing else is smoothed."
    return _section("Training", _element("p", remark), _grid(filter(None, figures)))


def _films(run: Run) -> str:
    pair = _before_and_after(run)
    if pair is None:
        remark = "A film needs the evaluations that end a phase: of imitation, and of the policy trained on from it."
        return _section("Before and after", _element("p", remark, "remark"))
    name, before, after = pair
    seed = improved_seed(before, after)
    if seed is None:
        remark = f"There is no seed on which imitation failed and the {POLICIES[name][0]} policy succeeded."
        return _section("Before and after", _element("p", remark, "remark"))
    try:
        strips = _filmstrips(run, seed, {"bc": before, name: after})
    except RENDERING_ERRORS as error:
        lines = [_element("p", "The films could not be made here.", "remark"), _element("pre", str(error))]
        return _section("Before and after", *lines)
    intro = (
        f"The same task twice, seed {seed}: the first on which imitation failed and the {POLICIES[name][0]} policy "
        "succeeded. The recorded actions were executed again and filmed."
    )
    return _section("Before and after", _element("p", intro), *strips)


def _time(run: Run) -> str:
    breakdown = (run.summary or {}).get("breakdown")
    if run.summary is None or not breakdown:
        remark = "Where the time went is known when the run has finished."
        return _section("Time", _element("p", remark, "remark"))
    wall, cpu = run.summary["wall_s"], run.summary["cpu_s"]
    seconds = {name.removesuffix("_s"): value for name, value in breakdown.items() if name.endswith("_s")}
    rows = [
        (name, SPANS.get(name, ""), _duration(value), _share_bar(value / wall if wall > 0 else math.nan))
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    text = (
        f"{_duration(wall)} of wall time, {_duration(cpu)} of processor time. Outside updates and simulator, the "
        f"training itself spent {_percent(breakdown['outside_share'], 1)} of its time (evaluation and compiler do not "
        "count as training)."
    )
    return _section("Time", _element("p", text), _table(("", "what it is", "time", "share"), rows))


def _configuration(run: Run) -> str:
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in _flat(run.config):
        groups.setdefault(name.split(".")[0] if "." in name else "run", []).append((name, json.dumps(value)))
    tables = [_table((name, "value"), rows) for name, rows in groups.items()]
    return _section("Configuration", Html(f"<details><summary>Every field</summary>{''.join(tables)}</details>"))


def _go_on(run: Run) -> str:
    """Commands, with this folder's own place and name: a run may have been moved since it was configured."""
    folder = run.files.directory.resolve()
    shown = shlex.quote(str(run.files.directory))
    train = ["acrlpd train", shlex.quote(str(run.config.get("preset") or "PRESET"))]
    if run.files.directory.parent != Path(TrainConfig.run_dir):
        train.append(f"--run_dir {shlex.quote(str(folder.parent))}")
    train += [f"--name {shlex.quote(folder.name)}", "--resume"]
    commands = [("write this page again", f"acrlpd report {shown}")]
    if run.config.get("env") and run.results:
        commands.insert(0, ("evaluate the newest checkpoint", f"acrlpd eval --checkpoint {shown}"))
        commands.insert(1, ("with noise, best of N and the critic's word", f"acrlpd eval --checkpoint {shown} --full"))
    if run.summary is None:
        commands.insert(0, ("go on where it stopped", " ".join(train)))
    elif run.config.get("env") and run.config.get("online_steps"):
        steps = f"--online_steps {2 * run.config['online_steps']}"
        commands.append(("train on online", " ".join([*train, steps])))
    lines = "\n".join(f"# {purpose}\n{command}" for purpose, command in commands)
    return _section("Going on", _element("pre", lines))


# ---- films


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """An evaluation at the end of a phase, seed by seed, as ``loop.save_rollouts`` leaves it."""

    seed: Int[np.ndarray, " n"]
    success: Bool[np.ndarray, " n"]
    length: Int[np.ndarray, " n"]
    actions: Float[np.ndarray, "n t a"]  # executed; zero past the length

    @property
    def seeds(self) -> set[int]:
        return set(self.seed.tolist())

    @property
    def solved(self) -> set[int]:
        return set(self.seed[self.success].tolist())

    @property
    def failed(self) -> set[int]:
        return self.seeds - self.solved

    def episode(self, seed: int) -> tuple[bool, Float[np.ndarray, "t a"]]:
        row = self.seed.tolist().index(seed)
        return bool(self.success[row]), self.actions[row, : self.length[row]]


RENDERING_ERRORS = (RuntimeError, ImportError, ValueError, AttributeError)
"""No renderer, no simulator, or not the one of the run. PyOpenGL raises AttributeError where its library is missing."""


def _before_and_after(run: Run) -> tuple[str, Outcomes, Outcomes] | None:
    """Imitation, and the last policy trained on from it, which is named."""
    kept = [name for name in POLICIES if run.files.evaluation(name).is_file()]
    if len(kept) < 2 or kept[0] != "bc":
        return None
    return kept[-1], load_outcomes(run.files.evaluation("bc")), load_outcomes(run.files.evaluation(kept[-1]))


def load_outcomes(path: Path) -> Outcomes:
    with np.load(path, allow_pickle=False) as arrays:
        return Outcomes(**{field.name: arrays[field.name] for field in dataclasses.fields(Outcomes)})


def improved_seed(before: Outcomes, after: Outcomes) -> int | None:
    """The first seed that failed before and succeeded after; None if there is none."""
    return next((seed for seed in before.seed.tolist() if seed in before.failed & after.solved), None)


def _filmstrips(run: Run, seed: int, policies: Mapping[str, Outcomes]) -> list[str]:
    environment = make(from_dict(EnvConfig, run.config["env"]))
    try:
        strips = []
        for name, outcomes in policies.items():
            success, actions = outcomes.episode(seed)
            frames, solved = film(environment, seed, actions)
            strips.append(_filmstrip(POLICIES[name][0], frames, success, solved, len(actions)))
        return strips
    finally:
        environment.close()


def film(environment: Environment, seed: int, actions: Float[np.ndarray, "t a"]) -> tuple[dict[int, np.ndarray], bool]:
    """Executes recorded actions again: pictures by the number of steps before them, and whether the task was solved.

    Only the ``NUM_FRAMES`` moments that are shown are rendered, the start and the end among them.
    """
    moments = set(np.linspace(0, len(actions), NUM_FRAMES).round().astype(int).tolist())
    environment.reset(seed, render=False)
    frames = {0: environment.render(FRAME_SIZE)}
    for number, action in enumerate(actions, 1):
        try:
            step = environment.step(action)
        except PhysicsError:
            return frames, False  # the episode was lost here when it was recorded, too
        ended = step.terminated or step.truncated
        if number in moments or ended:
            frames[number] = environment.render(FRAME_SIZE)
        if ended:
            return frames, step.success
    return frames, False


def _filmstrip(name: str, frames: Mapping[int, np.ndarray], success: bool, solved: bool, length: int) -> str:
    outcome = "solved" if success else "not solved"
    caption = f"{name[0].upper()}{name[1:]}: {outcome} in {length} steps."
    if solved != success:
        caption += " Executed again here it ended otherwise: this is not the simulator that the run was made with."
    pictures = "".join(
        f'<span><img src="{_jpeg(frame)}" width="{FRAME_SIZE}" height="{FRAME_SIZE}" '
        f'alt="{_text(name)}, step {number}"><small>step {number}</small></span>'
        for number, frame in frames.items()
    )
    return f'<figure>{_element("figcaption", caption)}<div class="film">{pictures}</div></figure>'


def _jpeg(frame: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---- words and markup

SPANS = {
    "update": "gradient updates, with waiting for the device",
    "compile": "the first update and the first choice of a chunk, compiled",
    "data": "making batches",
    "act": "the policy's choice of chunks online",
    "simulator": "online episodes",
    "replay": "keeping online episodes",
    "evaluation": "evaluations, policy and simulator",
    "checkpoint": "saving",
    "log": "writing metrics",
    "other": "what nobody measured: loading, imports, the bar",
}


def _section(title: str, *parts: str) -> str:
    return "\n".join([f"<section>{_element('h2', title)}", *filter(None, parts), "</section>"])


def _element(tag: str, text: str, name: str = "") -> Html:
    attribute = f' class="{name}"' if name else ""
    return Html(f"<{tag}{attribute}>{_text(text)}</{tag}>")


def _grid(figures: Iterable[charts.Chart]) -> str:
    return f'<div class="grid">{"".join(map(_figure, figures))}</div>'


def _figure(chart: charts.Chart) -> str:
    return f"<figure>{_element('h3', chart.title)}{chart.svg}{_element('figcaption', chart.caption)}</figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(_element("th", each) for each in header)
    body = "".join(f"<tr>{''.join(_element('td', cell) for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _share_bar(share: float) -> Html:
    width = 100 * share if math.isfinite(share) else 0.0
    return Html(f'<span class="bar" style="width:{width:.1f}px"></span> {_percent(share, 1)}')


def _text(value: Any) -> str:
    return value if isinstance(value, Html) else html.escape(str(value))


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else "unknown"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Fields by dotted name, as the command line has them."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --faint: #8a929b; --panel: #f3f5f7;
  --orange: #c65102; --purple: #8a5a9e; --blue: #0068a8; }
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --ink: #e4e7ea; --faint: #7d868f; --panel: #20252a;
    --orange: #f0954a; --purple: #c79bdb; --blue: #5ab4e8; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 3rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--faint); }
h3 { font-size: 1rem; margin: 0 0 .25rem; }
.headline { font-size: 1.2rem; margin: 0 0 1rem; }
.remark { padding: .5rem .75rem; background: var(--panel); border-left: 3px solid var(--orange); }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 0; }
dt, figcaption, small { color: var(--ink); opacity: .75; font-size: .85rem; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.5rem;
  align-items: start; }
figure { margin: 1rem 0 0; break-inside: avoid; }
svg { display: block; width: 100%; height: auto; }
svg * { stroke-linejoin: round; }
svg text { font-family: inherit !important; }
.film { display: grid; grid-template-columns: repeat(8, 1fr); gap: .25rem; margin-top: .25rem; }
.film span { display: block; min-width: 0; }
.film img { display: block; width: 100%; height: auto; }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1rem .25rem 0; border-bottom: 1px solid var(--panel); }
.bar { display: inline-block; height: .6rem; background: var(--blue); }
pre { padding: .75rem; background: var(--panel); white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
@media (max-width: 40rem) { .film { grid-template-columns: repeat(8, 9rem); overflow-x: auto; } }
@media print { body { max-width: none; padding: 0; font-size: .8rem; } .bar { print-color-adjust: exact; } }
"""

PAGE = string.Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
