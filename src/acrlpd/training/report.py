"""One page about a run: what it reached, how it got there, what it cost, and how to go on.

The page is a single HTML file that needs no network: charts are inline SVG, whose colours follow the reader's light or
dark setting, and film frames are data URIs. It can be written at any time, also while the run is going.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from acrlpd.config import TrainConfig, from_dict
from acrlpd.envs.env import EnvConfig
from acrlpd.envs.registry import make
from acrlpd.files import read_json, written_whole
from acrlpd.named_code import StoredName
from acrlpd.training import charts, films, held_out_report, markup
from acrlpd.training.charts import POLICIES, Evaluated
from acrlpd.training.ending import OVER
from acrlpd.training.metrics import read_metrics
from acrlpd.training.overwriting import tell_of_set_aside
from acrlpd.training.run import RunFiles

SHOWN_FAULTS = 5  # episodes that were left out, with the reason


@dataclasses.dataclass(frozen=True)
class Run:
    """The content of a run's folder."""

    files: RunFiles
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]  # metrics.jsonl
    summary: Mapping[str, Any] | None  # None: not finished, or continued since
    named_env: str | None = None  # the environment that the command names, so its code may run

    @property
    def ended(self) -> Mapping[str, Any] | None:
        """The reason why the run ended; None: it was not written down."""
        return (self.summary or {}).get("ended")

    @property
    def is_over(self) -> bool:
        """True if the run is over. Summaries of older versions give no reason: only finished runs wrote them."""
        return self.summary is not None and (self.ended is None or self.ended["reason"] in OVER)

    @property
    def task(self) -> str:
        env = self.config.get("env") or {}
        data = self.config.get("data") or {}
        paths = [each["path"] for each in data.get("sources") or ()] or data.get("path") or "unknown task"
        return str(env.get("name") or (paths if isinstance(paths, str) else " + ".join(paths)))

    @functools.cached_property
    def training(self) -> list[Mapping[str, Any]]:
        """Records of updates by step; if a resumed run repeated a step, the later record."""
        by_step = {record["step"]: record for record in self.records if "train/total_loss" in record}
        return [by_step[step] for step in sorted(by_step)]

    @functools.cached_property
    def evaluations(self) -> dict[str, list[Evaluated]]:
        """Evaluations by policy, ordered by step; if a step was evaluated twice, the one with more episodes."""
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
        """The final result of each policy: the summary's, or the newest evaluation if there is no summary."""
        newest = {name: evaluations[-1] for name, evaluations in self.evaluations.items()}
        summary = self.summary or {}
        for name, result in summary.get("phases", {}).items():
            known = newest.get(name)
            if name == [*summary["phases"]][-1]:  # of the policy that the run keeps
                kept = summary.get("best", {}).get("step")
                known = next((each for each in self.evaluations.get(name, ()) if each.step == kept), known)
            where = (known.step, known.env_steps) if known else (None, None)
            newest[name] = Evaluated(*where, result["success"], result["low"], result["high"], int(result["episodes"]))
        return {name: newest[name] for name in POLICIES if name in newest}

    @functools.cached_property
    def held_out(self) -> list[Mapping[str, Any]]:
        """Records of evaluations on held-out episodes by step; if a step was evaluated twice, the later record."""
        by_step = {record["step"]: record for record in self.records if "eval/action_error" in record}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def boundary(self) -> int | None:
        """The update at which the online phase began; None if it has not begun."""
        begun = any(record.get("phase") == "online" for record in self.records)
        return self.config.get("offline_steps") if begun else None

    def total(self, name: str) -> Any:
        """Return ``updates``, ``env_steps`` or ``wall_s`` of the run so far."""
        if self.summary is not None:
            return self.summary[name]
        key = "step" if name == "updates" else name
        return max((record[key] for record in self.records), default=0)


def write_report(run: str | Path, named_env: str | None = None) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    To film an environment that is the user's own code (``custom/...``), ``named_env`` must name it. A missing summary,
    evaluation or renderer leaves a remark where its content would be.

    Raises:
        ValueError: the folder has no ``config.json``.
        ImportError: matplotlib is missing.
    """
    record = dataclasses.replace(read_run(Path(run)), named_env=named_env)
    path = record.files.directory / "report.html"
    try:
        page = _page(record)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{record.files.directory}: config.json, summary.json or evaluations/full.json: expected what a run writes "
            f"there ({error!r:.200})"
        ) from error
    with written_whole(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def read_run(directory: Path) -> Run:
    files = RunFiles(directory)
    if not files.config.is_file():
        tell_of_set_aside(directory)
        raise ValueError(f"{directory} has no {files.config.name}: expected the folder of a run, such as runs/demo")
    config = read_json(files.config, allow_nan=True)
    records = read_metrics(files.metrics) if files.metrics.is_file() else []
    summary = read_json(files.summary, allow_nan=True) if files.summary.is_file() else None
    if summary is not None and not isinstance(summary.get("updates"), int):
        raise ValueError(f"{files.summary}: expected the number of updates, found {summary.get('updates')!r:.100}")
    if summary is not None and any(record["step"] > summary["updates"] for record in records):
        summary = None  # it belongs to an earlier part of a resumed run
    return Run(files, config, records, summary)


def _from_record(record: Mapping[str, Any]) -> Evaluated:
    success, low, high = (float(record[f"eval/{name}"]) for name in ("success_rate", "low", "high"))
    return Evaluated(record["step"], record["env_steps"], success, low, high, int(record["eval/episodes"]))


# ---- the page, in the order of reading


def _page(run: Run) -> str:
    if run.held_out and not run.results:  # there is no simulator to solve anything in
        judged = [held_out_report.section(run.files, run.held_out), _curves(run)]
    else:
        judged = [_results(run), _full_evaluation(run), _curves(run), _films(run)]
    sections = [_overview(run), *judged, _time(run), _configuration(run), _go_on(run)]
    return markup.page(f"{run.task}, seed {run.config.get('seed')}", sections)


def _overview(run: Run) -> str:
    horizon = run.config.get("policy", {}).get("action_horizon")
    facts = {
        "updates": f"{run.total('updates'):,}",
        "environment steps": f"{run.total('env_steps'):,}",
        "wall time": markup.duration(run.total("wall_s")),
        "policy": f"{run.config.get('policy', {}).get('kind')}, chunks of {horizon} actions",
    }
    lines = [markup.element("p", headline(run), "headline")]
    if run.summary is None:
        remark = "This run has not finished: results are its newest evaluations, totals those of its newest record."
        lines.append(markup.element("p", remark, "remark"))
    elif run.ended is not None and run.ended["reason"] != "finished":
        remark = f"This run {'' if run.is_over else 'has not finished: it '}{run.ended['text']}."
        lines.append(markup.element("p", remark, "remark"))
    if lost := (run.summary or {}).get("lost_steps"):
        facts["environment steps"] += f", of which {lost:,} were cut off with their episodes"
    data = (run.summary or {}).get("data")
    if data is not None:
        facts["prior data"] = f"{data['episodes']:,} episodes, {data['steps']:,} steps"
        for each in data.get("sets", ()):
            facts[f"of {each['name']}"] = (
                f"{each['share']:.1%} of the batches; {each['episodes']:,} episodes, {each['steps']:,} steps"
            )
        if data["skipped"]:
            lines.append(markup.element("p", _left_out(data), "remark"))
    pairs = "".join(
        f"<div><dt>{markup.escaped(name)}</dt><dd>{markup.escaped(value)}</dd></div>" for name, value in facts.items()
    )
    return "\n".join([*lines, f"<dl>{pairs}</dl>"])


def _left_out(data: Mapping[str, Any]) -> str:
    """Return which episodes of the prior data were not used, and why."""
    faults, total = data["skipped"], data["episodes"] + len(data["skipped"])
    more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
    told = "; ".join(fault for _, fault in faults[:SHOWN_FAULTS])
    return f"{len(faults)} of {total} episodes of the prior data could not be used and were left out: {told}{more}."


def headline(run: Run) -> str:
    """Return what happened, in one sentence.

    >>> headline(read_run(Path("runs/demo")))
    'Imitation solved 15 of 50 episodes; after 4,000 online steps the policy solves 49 of 50.'
    """
    results = run.results
    if not results and run.held_out:
        return held_out_report.headline(run.held_out[-1])
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
        remark = (
            "No evaluation was recorded: the run has not come to its first one, or it has neither an environment "
            "(env.name) nor held-out episodes (data.validation_fraction)."
        )
        return markup.section("Success", markup.element("p", remark, "remark"))
    rows = [
        (
            *POLICIES[name],
            f"{each.successes} of {each.episodes}",
            markup.percent(each.success),
            f"{markup.percent(each.low)} to {markup.percent(each.high)}",
            "" if each.step is None else f"{each.step:,}",
        )
        for name, each in run.results.items()
    ]
    table = markup.table(("policy", "what acted", "solved", "success", "95 % interval", "at update"), rows)
    figures = [charts.results(run.results)]
    if sum(map(len, run.evaluations.values())) > 1:
        figures.append(charts.learning(run.evaluations, run.boundary))
    return markup.section("Success", table, markup.grid(figures), _paired(run))


def _paired(run: Run) -> str:
    """Compare seed by seed, which says more than two intervals that overlap."""
    pair = _before_and_after(run)
    if pair is None:
        return ""
    name, before, after = pair
    failed, solved = before.failed & after.seeds, before.solved & after.seeds
    text = (
        f"Seed by seed, the {POLICIES[name][0]} policy solved {len(failed & after.solved)} of the {len(failed)} "
        f"episodes that imitation failed, and failed {len(solved & after.failed)} of the {len(solved)} that it solved."
    )
    return markup.element("p", text)


def _full_evaluation(run: Run) -> str:
    """Return the results of ``acrlpd eval --full`` by task; an empty text if it has not been run."""
    if not run.files.full_evaluation.is_file():
        return ""
    found = read_json(run.files.full_evaluation, allow_nan=True)
    intro = f"By acrlpd eval --full, of update {found['step']:,}. Every line met the same seeds as the first."
    parts: list[str] = [markup.element("p", intro)]
    for task, findings in found["tasks"].items():
        parts += [markup.element("h3", task), markup.table(TRIAL_HEADER, _trial_rows(findings))]
        if "comparison" in findings:
            parts.append(markup.element("p", _comparison(found, findings["comparison"])))
        if findings["agreement"] is not None:
            parts += [markup.element("p", _agreement(findings["agreement"]))]
            parts.append(markup.grid([charts.calibration(findings["agreement"]["bins"])]))
    return markup.section("Full evaluation", *parts)


TRIAL_HEADER = ("trial", "solved", "success", "95 % interval", "return", "steps", "against the first line")


def _trial_rows(findings: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    kinds = {"observation_noise": "noise {} on observations", "action_noise": "noise {} on actions"}
    trials = [("the task as it is", findings["task"])]
    for kind, name in {**kinds, "best_of_n": "best of {}", "guidance": "guidance weight {}"}.items():
        trials += [(name.format(level), trial) for level, trial in findings.get(kind, {}).items()]
    for name, trial in trials:
        paired = trial.get("against_task")
        yield (
            name,
            f"{trial['successes']} of {trial['episodes']}",
            markup.percent(trial["success"]),
            f"{markup.percent(trial['low'])} to {markup.percent(trial['high'])}",
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
    """Return the agreement in words; what the episodes do not determine is left out."""
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
        return markup.section("Training", markup.element("p", "No update was logged yet.", "remark"))
    figures = [charts.curves(each, run.training, run.boundary) for each in charts.CURVES]
    every = run.config.get("log_frequency")
    remark = f"Each point is the mean over the {every} updates before it. Nothing else is smoothed."
    return markup.section("Training", markup.element("p", remark), markup.grid(filter(None, figures)))


def _films(run: Run) -> str:
    pair = _before_and_after(run)
    if pair is None:
        remark = "A film needs the evaluations that end a phase: of imitation, and of the policy trained on from it."
        return markup.section("Before and after", markup.element("p", remark, "remark"))
    name, before, after = pair
    seed = films.improved_seed(before, after)
    if seed is None:
        remark = f"There is no seed on which imitation failed and the {POLICIES[name][0]} policy succeeded."
        return markup.section("Before and after", markup.element("p", remark, "remark"))
    try:
        strips = _filmstrips(run, seed, {"bc": before, name: after})
    except films.RENDERING_ERRORS as error:
        lines = [markup.element("p", "The films could not be made here.", "remark"), markup.element("pre", str(error))]
        return markup.section("Before and after", *lines)
    intro = (
        f"The same task twice, seed {seed}: the first on which imitation failed and the {POLICIES[name][0]} policy "
        "succeeded. The recorded actions were executed again and filmed."
    )
    return markup.section("Before and after", markup.element("p", intro), *strips)


def _time(run: Run) -> str:
    breakdown = (run.summary or {}).get("breakdown")
    if run.summary is None or not breakdown:
        remark = "Where the time went is known when the run has finished."
        return markup.section("Time", markup.element("p", remark, "remark"))
    wall, cpu = run.summary["wall_s"], run.summary["cpu_s"]
    seconds = {name.removesuffix("_s"): value for name, value in breakdown.items() if name.endswith("_s")}
    rows = [
        (name, SPANS.get(name, ""), markup.duration(value), markup.share_bar(value / wall if wall > 0 else math.nan))
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    text = (
        f"{markup.duration(wall)} of wall time, {markup.duration(cpu)} of processor time. Outside updates and "
        f"simulator, the training itself spent {markup.percent(breakdown['outside_share'], 1)} of its time (evaluation "
        "and compiler do not count as training)."
    )
    return markup.section("Time", markup.element("p", text), markup.table(("", "what it is", "time", "share"), rows))


def _configuration(run: Run) -> str:
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in _flat(run.config):
        groups.setdefault(name.split(".")[0] if "." in name else "run", []).append((name, json.dumps(value)))
    tables = [markup.table((name, "value"), rows) for name, rows in groups.items()]
    return markup.section(
        "Configuration", markup.Html(f"<details><summary>Every field</summary>{''.join(tables)}</details>")
    )


def _go_on(run: Run) -> str:
    """Return commands with the folder's present place and name: a run may have been moved since it was configured."""
    folder = run.files.directory.resolve()
    shown = shlex.quote(str(run.files.directory))
    train = ["acrlpd train", shlex.quote(str(run.config.get("preset") or "PRESET"))]
    if run.files.directory.parent != Path(TrainConfig.run_dir):
        train.append(f"--run_dir {shlex.quote(str(folder.parent))}")
    train += [f"--name {shlex.quote(folder.name)}", "--resume"]
    code = shlex.quote(run.task) if run.task.startswith("custom/") else None  # it only runs if a command names it
    tasks, env = (f" {flag} {code}" if code else "" for flag in ("--tasks", "--env.name"))
    commands = [("write this page again", f"acrlpd report {shown}{env}")]
    if run.config.get("env") and run.results:
        test = f"acrlpd eval --checkpoint {shown}{tasks}"
        commands.insert(0, ("evaluate the best policy", test))
        commands.insert(1, ("with noise, best of N and the critic's word", f"{test} --full"))
    if not run.is_over:
        commands.insert(0, ("go on where it stopped", " ".join(train) + env))
    elif run.config.get("env") and run.config.get("online_steps"):
        commands.append(("train on online", f"{' '.join([*train, _longer(run)])}{env}"))
    lines = "\n".join(f"# {purpose}\n{command}" for purpose, command in commands)
    return markup.section("Going on", markup.element("pre", lines))


def _longer(run: Run) -> str:
    """Return the flag that lets a finished run continue."""
    rule = (run.ended or {}).get("rule")
    if rule == "early_stopping_success":
        return "--early_stopping_success None"
    field = rule or "online_steps"
    return f"--{field} {2 * run.config[field]}"


# ---- films


def _before_and_after(run: Run) -> tuple[str, films.Outcomes, films.Outcomes] | None:
    """Return the name of the last policy trained on from imitation, and the outcomes of imitation and of it."""
    kept = [name for name in POLICIES if run.files.evaluation(name).is_file()]
    if len(kept) < 2 or kept[0] != "bc":
        return None
    return (
        kept[-1],
        films.load_outcomes(run.files.evaluation("bc")),
        films.load_outcomes(run.files.evaluation(kept[-1])),
    )


def _filmstrips(run: Run, seed: int, policies: Mapping[str, films.Outcomes]) -> list[str]:
    stored = from_dict(EnvConfig, run.config["env"])
    name = stored.name if run.named_env == stored.name else StoredName(stored.name)
    environment = make(dataclasses.replace(stored, name=name))
    try:
        strips = []
        for name, outcomes in policies.items():
            success, actions = outcomes.episode(seed)
            frames, solved = films.film(environment, seed, actions)
            strips.append(_filmstrip(POLICIES[name][0], frames, success, solved, len(actions)))
        return strips
    finally:
        environment.close()


def _filmstrip(name: str, frames: Mapping[int, np.ndarray], success: bool, solved: bool, length: int) -> str:
    outcome = "solved" if success else "not solved"
    caption = f"{name[0].upper()}{name[1:]}: {outcome} in {length} steps."
    if solved != success:
        caption += " Executed again here it ended otherwise: this is not the simulator that the run was made with."
    pictures = "".join(
        f'<span><img src="{films.jpeg(frame)}" width="{films.FRAME_SIZE}" height="{films.FRAME_SIZE}" '
        f'alt="{markup.escaped(name)}, step {number}"><small>step {number}</small></span>'
        for number, frame in frames.items()
    )
    return f'<figure>{markup.element("figcaption", caption)}<div class="film">{pictures}</div></figure>'


# ---- words

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
    "other": "not measured: loading, imports, the progress bar",
}


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield fields by dotted name, as on the command line."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
