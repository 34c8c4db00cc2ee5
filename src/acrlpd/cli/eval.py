"""``acrlpd eval --checkpoint PATH [--compare PATH] [--data PATH]``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from acrlpd import fields
from acrlpd.agents.agent import ActingMode
from acrlpd.data.formats.options import ReaderOptions
from acrlpd.deploy import OpenPIOptions, RecordedOptions, put_beside
from acrlpd.deploy.recorded import check_cameras
from acrlpd.envs.registry import make
from acrlpd.fields import Interval, NonNegativeFloat, NonNegativeInt, PositiveInt
from acrlpd.files import printable
from acrlpd.training import loading, setup
from acrlpd.training.comparison import compare
from acrlpd.training.evaluate import Evaluation, summarize
from acrlpd.training.loading import Trained
from acrlpd.training.metrics import write_json
from acrlpd.training.offline_evaluation import sentences
from acrlpd.training.protocol import ACRLPDEvaluationProtocol, Findings, ProtocolConfig
from acrlpd.training.run import RunFiles
from acrlpd.training.videos import save_videos


@dataclasses.dataclass(frozen=True)
class EvalArguments:
    """Measure the success rate of a checkpoint in its simulator, alone or against a second one on the same seeds.

    With --data, without any simulator: compare its actions with those of recorded episodes.
    """

    checkpoint: str  # a run (runs/demo), its checkpoints folder, or the folder of one step; with --data also openpi's
    data: str | None = None  # recorded episodes in any supported format; of a run's own data, those that it held out
    # share of the episodes of --data to hold out and use; None: as the run, and all of other data
    validation_fraction: Annotated[float, Interval("(0, 1)")] | None = None
    chunks: PositiveInt = 512  # with --data: recorded chunks to compare with, evenly spread
    execute_horizon: PositiveInt | None = None  # with --data: steps of a chunk that are executed; None: as trained
    read: ReaderOptions = dataclasses.field(default_factory=ReaderOptions)  # with --data: as acrlpd data takes them
    openpi: Annotated[OpenPIOptions, tyro.conf.arg(name="")] = dataclasses.field(default_factory=OpenPIOptions)
    compare: str | None = None  # a second checkpoint: paired difference, bootstrap interval, McNemar's test
    tasks: tuple[str, ...] = ()  # environments of the same robot; none: the run's own
    episodes: PositiveInt | None = None  # number for each task; None: as in the run's own final evaluations
    first_seed: NonNegativeInt | None = None  # None: the run's own, so results can be compared seed by seed
    mode: ActingMode = "greedy"  # bc: imitation, one sample of the flow without the critic
    extraction: str | None = None  # how to choose instead; code of your own (FILE.py:NAME) must be named here
    guidance_weights: tuple[NonNegativeFloat, ...] | None = None  # of the extraction guided; None: as trained
    compare_extraction: str | None = None  # the same for the second checkpoint
    compare_guidance_weights: tuple[NonNegativeFloat, ...] | None = None  # the same for the second checkpoint
    num_envs: PositiveInt | None = None  # None: as in the run's own evaluations
    seed: NonNegativeInt = 0  # seeds the policy's noise
    full: bool = False  # also test noise, best of N, and whether Q predicts the outcome; shown by acrlpd report
    protocol: ProtocolConfig = dataclasses.field(default_factory=ProtocolConfig)  # the trials of --full
    videos: NonNegativeInt = 0  # number of successes and of failures of each task to save as mp4 files
    output: str | None = None  # a file for the JSON; None: with --full, evaluations/full.json of the run
    json: bool = False  # print the JSON instead of sentences


WITH_DATA = ("validation_fraction", "chunks", "execute_horizon", "read", "openpi")
IN_SIMULATOR = (
    *("compare", "tasks", "episodes", "first_seed", "mode", "compare_extraction", "compare_guidance_weights"),
    *("num_envs", "full", "protocol", "videos"),
)


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(EvalArguments, args=argv, prog="acrlpd eval")
    fields.check(arguments)
    if arguments.data is not None:
        return _on_data(arguments, arguments.data)
    _refuse_without_effect(arguments, WITH_DATA, "only with --data, which compares with recorded episodes")
    loaded = loading.load_stored(arguments.checkpoint, arguments.extraction, arguments.guidance_weights)
    if loaded.config.env is None and not arguments.tasks:
        raise ValueError(
            f"{arguments.checkpoint} has no simulator to act in. Name recorded episodes instead, --data "
            f"{loaded.config.data.name}: its actions are then compared with theirs"
        )
    other = None
    if arguments.compare:
        other = loading.load_stored(arguments.compare, arguments.compare_extraction, arguments.compare_guidance_weights)
    tasks = arguments.tasks or (loaded.config.env.name if loaded.config.env else "",)
    findings = {task: _evaluate(loaded, task, arguments) for task in tasks}
    rollouts = [each for of_task in findings.values() for each in of_task.task.rollouts]
    result: dict[str, Any] = {
        "checkpoint": arguments.checkpoint,
        "step": loaded.step,
        "mode": arguments.mode,
        **summarize(rollouts).to_dict(),
        "tasks": {task: each.to_dict() for task, each in findings.items()},
    }
    if other is not None:
        result["compare"] = arguments.compare
        for task, each in findings.items():
            theirs = _evaluate(other, task, dataclasses.replace(arguments, full=False, videos=0))
            difference = compare(each.task.rollouts, theirs.task.rollouts)
            result["tasks"][task]["comparison"] = {**difference.to_dict(), "second": theirs.task.evaluation.to_dict()}
            if not arguments.json:
                print(f"{task}: {arguments.checkpoint} against {arguments.compare}: {difference}")
    if arguments.output or arguments.full:
        write_json(arguments.output or _run_files(arguments.checkpoint).full_evaluation, result)
    if arguments.json:
        print(json.dumps(result))
    else:
        _describe(result, findings, summarize(rollouts))
    return 0


def _on_data(arguments: EvalArguments, data: str) -> int:
    """Compare the checkpoint's actions with recorded ones, print what was found, and keep it beside the run."""
    _refuse_without_effect(arguments, IN_SIMULATOR, "in a simulator, and --data needs none")
    options = RecordedOptions(arguments.validation_fraction, arguments.read, arguments.execute_horizon)
    beside = put_beside(
        arguments.checkpoint,
        data,
        options,
        arguments.openpi,
        extraction=arguments.extraction,
        guidance_weights=arguments.guidance_weights,
    )
    check_cameras(beside, data)
    found = beside.evaluate(num_chunks=arguments.chunks, seed=arguments.seed)
    result = {"checkpoint": arguments.checkpoint, "step": beside.step, "data": data, "remarks": beside.told}
    result |= found.to_dict()
    if arguments.output or beside.config is not None:
        write_json(arguments.output or _run_files(arguments.checkpoint).offline_evaluation, result)
    if arguments.json:
        print(json.dumps(result))
    else:
        print(printable("\n".join([*beside.told, *sentences(found)])))
    return 0


def _refuse_without_effect(arguments: Any, names: Sequence[str], where: str) -> None:
    """Refuse flags that would have no effect."""
    defaults = {field.name: field for field in dataclasses.fields(arguments)}

    def default(field: dataclasses.Field) -> Any:
        return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()

    given = [name for name in names if getattr(arguments, name) != default(defaults[name])]
    if given:
        raise ValueError(f"--{' and --'.join(given)} would have no effect: it is used {where}. Leave it out")


def _evaluate(loaded: Trained, task: str, arguments: EvalArguments) -> Findings:
    """Evaluate the task alone, or with ``--full`` every trial."""
    config = loading.with_task(loaded.config, task)
    first = config.eval.first_seed if arguments.first_seed is None else arguments.first_seed
    episodes = arguments.episodes or config.eval.episodes
    environments = setup.make_environments(config, min(episodes, arguments.num_envs or config.eval.num_envs))
    protocol = ACRLPDEvaluationProtocol(
        arguments.protocol if arguments.full else ProtocolConfig((), (), (), ()),
        environments,
        loaded.transform,
        range(first, first + episodes),
        execute_horizon=config.executed_steps,
        mode=arguments.mode,
        seed=arguments.seed,
    )
    findings = protocol.run(loaded.agent)
    if arguments.videos and config.env:
        directory = _run_files(arguments.checkpoint).videos / f"step-{loaded.step}" / task.replace("/", "-")
        stage = make(config.env)
        for path in save_videos(stage, findings.task.rollouts, directory, count=arguments.videos):
            if not arguments.json:
                print(path)
        stage.close()
    environments.close()
    return findings


def _run_files(checkpoint: str) -> RunFiles:
    """Return the files of the run that a checkpoint belongs to."""
    checkpoints, _ = loading.locate_checkpoint(Path(checkpoint))
    return RunFiles(checkpoints.parent)


def _describe(result: dict[str, Any], findings: dict[str, Findings], overall: Evaluation) -> None:
    print(f"step {result['step']}, {result['mode']}: success {overall}")
    for task, each in findings.items():
        if len(findings) > 1:
            print(f"{task}: success {each.task.evaluation}")
        for kind, trials in (
            ("observation noise", each.observation_noise),
            ("action noise", each.action_noise),
            ("best of", each.best_of_n),
            ("guidance weight", each.guidance),
        ):
            for level, trial in trials.items():
                print(f"  {kind} {level}: success {trial.evaluation}, return {trial.evaluation.return_mean:.1f}")
        if each.agreement is not None:
            facts = each.agreement.to_dict()
            del facts["bins"]
            print("  critic: " + ", ".join(f"{name} {value}" for name, value in facts.items()))
