"""Evaluation without a simulator: a policy's actions beside the recorded ones, on episodes that it has not seen.

The error of an action is its absolute difference from the recorded one, in the robot's units. Dimensions have different
units, so the relative error divides each by the spread (standard deviation) of the actions of the whole data set, and
averages over the dimensions that move; the recorded actions themselves have 0. Beside the policy stand two baselines
that see nothing: the last action once more, and the mean action of the compared chunks.

This is a proxy. Success needs more than small errors, and a policy that improves on its data departs from it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray, UInt8

from acrlpd.data import chunks
from acrlpd.data.mixture import Mixture
from acrlpd.data.statistics import MIN_STD, Moments
from acrlpd.data.store.episodes import IMAGE_PREFIX, EpisodeSource, EpisodeStore
from acrlpd.data.view.transforms import to_observation
from acrlpd.pictures import fit
from acrlpd.training.agreement import auc, auc_interval
from acrlpd.training.measuring import Subject

Predictor = Literal["best", "sample", "repeat", "mean"]
BATCH = 32  # chunks in a call
COURSE_CHUNKS = 40  # at most, of an episode that is followed from its start
STILL = MIN_STD  # raw units: a dimension with a smaller spread does not move
NUM_PICTURES, PICTURE = 8, 160  # of each camera of an episode that is followed, and their size in pixels
PICTURES_PREFIX = "camera/"  # of their names in a run's file
SUMMED_EPISODES = 1000  # at most, evenly spread, from which the spread of a data set is computed


@dataclasses.dataclass(frozen=True)
class Errors:
    """Errors of one predictor."""

    dims: tuple[float, ...]  # mean absolute error of each dimension over the executed steps, in the robot's units
    relative: float  # the mean over the dimensions that move, each in units of its spread
    steps: tuple[float, ...]  # the relative error of each step of the chunk that some episode is long enough for


@dataclasses.dataclass(frozen=True)
class Telling:
    """The chance that the mean Q of a success's recorded chunks lies above that of a failure's."""

    auc: float
    low: float  # 95 % interval
    high: float
    successes: int
    failures: int


@dataclasses.dataclass(frozen=True)
class Course:
    """One episode from its start: what was recorded, and what the policy would have done in the same places."""

    episode: str
    success: bool | None
    task: str
    places: tuple[int, ...]  # steps at which a chunk begins
    q: tuple[float, ...] | None  # of the recorded chunks; None: there are no critics
    recorded: tuple[tuple[float, ...], ...]  # [steps a]
    predicted: tuple[tuple[float, ...], ...]  # the executed parts of the chunks, one after the other


@dataclasses.dataclass(frozen=True)
class OfflineEvaluation:
    """A policy on recorded episodes. Errors leave out episodes that failed, unless all did; the rest has all."""

    episodes: int
    judged_episodes: int  # those that did not fail, as far as is known
    chunks: int
    executed: int  # steps of a chunk
    num_samples: int  # candidates of the best of N
    spread: tuple[float, ...]  # standard deviation of the data set's actions, by dimension
    errors: Mapping[Predictor, Errors]
    # of the policy's executed actions with the recorded ones, by dimension; None: one of them does not move
    correlation: tuple[float | None, ...]
    flow_loss: float | None
    telling: Telling | None  # None: no critics, or not both successes and failures
    has_critics: bool
    courses: tuple[Course, ...]  # of a success and of a failure, where there are

    @property
    def acting(self) -> Errors:
        """The errors of the policy as it acts: the best of N, or its sample."""
        return self.errors.get("best", self.errors["sample"])

    @property
    def score(self) -> float:
        """The number by which the best checkpoint is chosen, smaller is better: the relative error as it acts."""
        return self.acting.relative

    @property
    def baseline(self) -> float:
        """The relative error of the better of both baselines."""
        return min(self.errors[name].relative for name in ("repeat", "mean"))

    def metrics(self) -> dict[str, float]:
        """Return flat metrics; what the episodes do not determine is left out."""
        found = {f"eval/action_error_{name}": each.relative for name, each in self.errors.items()}
        found |= {"eval/action_error": self.score, "eval/action_error_baseline": self.baseline}
        found |= {"eval/held_out_episodes": self.episodes, "eval/held_out_chunks": self.chunks}
        if self.flow_loss is not None:
            found["eval/flow_loss"] = self.flow_loss
        if self.telling is not None:
            found |= {"eval/q_auc": self.telling.auc}
            found |= {"eval/q_auc_low": self.telling.low, "eval/q_auc_high": self.telling.high}
        return found

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"score": self.score, "baseline": self.baseline}


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out episodes of a run without a simulator, on which it is evaluated on its way."""

    stores: tuple[EpisodeStore, ...]
    spread: Float[np.ndarray, " a"]  # of the actions of all episodes, those of training among them
    num_chunks: int

    def evaluate(self, subject: Subject, rng: PRNGKeyArray) -> OfflineEvaluation:
        return evaluate_offline(subject, self.stores, spread=self.spread, num_chunks=self.num_chunks, rng=rng)

    def pictures(self, course: Course) -> dict[str, UInt8[np.ndarray, "n h w 3"]]:
        """Return a few pictures of each camera along an episode, small enough for a page."""
        places = [(store, k) for store in self.stores for k in range(store.num_episodes)]
        store, index = next((s, k) for s, k in places if s.info(k).source == course.episode)
        rows = int(store.starts[index]) + pictured_steps(len(course.recorded))
        taken = {camera: store.take(IMAGE_PREFIX + camera, rows) for camera in store.cameras}
        return {camera: np.stack([fit(each, PICTURE, PICTURE, camera) for each in x]) for camera, x in taken.items()}

    def close(self) -> None:
        """Stop the processes that read pictures."""
        Mixture(self.stores).close()


def pictured_steps(length: int) -> Int[np.ndarray, " n"]:
    """Return the steps of an episode's pictures."""
    return np.unique(np.linspace(0, length - 1, NUM_PICTURES).round().astype(int))


class Starts(NamedTuple):
    """Chunks to look at: each begins at a row of a store."""

    store: EpisodeStore
    episode: int  # in the store
    rows: Int[np.ndarray, " n"]


def evaluate_offline(
    subject: Subject,
    stores: Sequence[EpisodeStore],
    *,
    spread: Float[np.ndarray, " a"],
    num_chunks: int,
    rng: PRNGKeyArray,
) -> OfflineEvaluation:
    """Compare ``subject`` with about ``num_chunks`` recorded chunks, evenly spread over all episodes of ``stores``.

    ``spread`` is what ``spread_of`` returns for the data set, of which these may be a small part. The draws of a chunk
    depend on ``rng`` and its place alone, so two evaluations differ only in their policies.

    Raises:
        ValueError: no episode has two steps, no action moves, or these are actions of another robot.
    """
    starts = spread_starts(stores, num_chunks)
    tables = _of_episodes(subject, starts, rng)
    infos = [each.store.info(each.episode) for each in starts]
    judged = [info.success is not False for info in infos]
    if not any(judged):
        judged = [True] * len(infos)
    used = [table for table, use in zip(tables, judged, strict=True) if use]
    known = [table for table in tables if table.flow_loss is not None]
    followed = _followed(starts)
    courses = [_course(subject, stores_of, rng, 2**20 * (1 + place)) for place, stores_of in enumerate(followed)]
    return OfflineEvaluation(
        episodes=len(starts),
        judged_episodes=sum(judged),
        chunks=sum(len(each.rows) for each in starts),
        executed=subject.executed,
        num_samples=subject.num_samples,
        spread=tuple(spread.tolist()),
        errors=_errors(used, subject.executed, spread),
        correlation=_correlation(used, subject.executed),
        flow_loss=float(np.concatenate([table.flow_loss for table in known]).mean()) if known else None,
        telling=_telling(tables, [info.success for info in infos]),
        has_critics=subject.has_critics,
        courses=tuple(courses),
    )


def spread_of(sources: Sequence[EpisodeSource]) -> Float[np.ndarray, " a"]:
    """Return the standard deviation of the actions of data sets, by dimension."""
    moments = Moments()
    places = [(source, index) for source in sources for index in range(source.num_episodes)]
    kept = np.unique(np.linspace(0, len(places) - 1, min(len(places), SUMMED_EPISODES)).round().astype(int))
    for place in kept.tolist():
        source, index = places[place]
        moments.add(source.window(index, "actions", 0, int(source.lengths[index])))
    return moments.std


def spread_starts(stores: Sequence[EpisodeStore], num_chunks: int) -> list[Starts]:
    """Return about ``num_chunks`` starts, at least one an episode, evenly spread over the episodes and over each.

    A chunk begins at the second step of its episode or later, so that there is a last action to repeat. If there are
    more episodes than chunks, as many episodes are used, evenly spread.
    """
    found = [(store, k, int(n)) for store in stores for k, n in enumerate(store.lengths) if n > 1]
    if not found:
        raise ValueError("no episode has two steps: there is nothing to compare actions with")
    kept = np.unique(np.linspace(0, len(found) - 1, min(num_chunks, len(found))).round().astype(int))
    total = sum(found[place][2] - 1 for place in kept)
    starts = []
    for place in kept.tolist():
        store, episode, length = found[place]
        count = min(length - 1, max(1, round(num_chunks * (length - 1) / total)))
        steps = np.unique((1 + (np.arange(count) + 0.5) * (length - 1) / count).astype(int))
        starts.append(Starts(store, episode, int(store.starts[episode]) + steps))
    return starts


@dataclasses.dataclass(frozen=True)
class _Table:
    """Recorded and predicted chunks, in the robot's units."""

    recorded: Float[np.ndarray, "n h a"]
    real: Float[np.ndarray, "n h"]  # 1 where the step is
    last: Float[np.ndarray, "n a"]  # the action before the chunk; of a chunk at the start, its own first one
    predicted: Mapping[Predictor, Float[np.ndarray, "n h a"]]
    flow_loss: Float[np.ndarray, " n"] | None
    q: Float[np.ndarray, " n"] | None

    def cut(self, start: int, stop: int) -> _Table:
        """Return these rows."""

        def part(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: part(each) for name, each in value.items()}
            return None if value is None else value[start:stop]

        return _Table(*(part(getattr(self, field.name)) for field in dataclasses.fields(self)))


def _of_episodes(subject: Subject, starts: Sequence[Starts], rng: PRNGKeyArray) -> list[_Table]:
    """Run the policy on the chunks of each episode; episodes of one store share their calls."""
    found: list[_Table] = []
    for store, group in itertools.groupby(starts, key=lambda each: each.store):
        own = [each.rows for each in group]
        first = sum(len(table.real) for table in found)
        table = _measured(subject, store, np.concatenate(own), rng, first)
        cuts = np.cumsum([0, *map(len, own)]).tolist()
        found += [table.cut(*ends) for ends in itertools.pairwise(cuts)]
    return found


def _measured(subject: Subject, store: EpisodeStore, rows: Int[np.ndarray, " n"], rng: Any, number: int) -> _Table:
    """Run the policy on the chunks at ``rows``, in calls of one shape; ``number`` is that of the first one's draws."""
    parts = [_call(subject, store, rows[k : k + BATCH], rng, number + k) for k in range(0, len(rows), BATCH)]
    return _Table(*(_joined([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(_Table)))


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return None if parts[0] is None else np.concatenate(parts)


def _call(subject: Subject, store: EpisodeStore, rows: Int[np.ndarray, " n"], rng: Any, number: int) -> _Table:
    count = len(rows)
    padded = np.concatenate([rows, np.repeat(rows[-1:], BATCH - count)])
    raw = chunks.gather(store, padded, subject.horizon, images=subject.reads_images, next_images=False)
    keys = ("state", "image", "prompt", *(("actions",) if subject.reads_actions else ()))
    data = subject.transform({key: raw[key] for key in keys})
    actions = np.asarray(data["actions"] if subject.reads_actions else raw["actions"], np.float32)
    found = subject.measure(to_observation(data), actions, raw["valid"], _keys(rng, number))
    found = jax.device_get(found)
    predicted: dict[Predictor, np.ndarray] = {}
    for name in ("sample", "best"):
        if (chunk := getattr(found, name)) is not None:
            back = subject.transform.inverse({"state": data["state"], "actions": np.asarray(chunk)})["actions"]
            predicted[name] = np.asarray(back, np.float64)[:count]
    recorded = raw["actions"][:count].astype(np.float64)
    first = rows == store.starts[store.episode_index(rows)]
    last = store.take("actions", np.where(first, rows, rows - 1)).astype(np.float64)
    q, loss = (None if each is None else np.asarray(each)[:count] for each in (found.q, found.flow_loss))
    return _Table(recorded, raw["valid"][:count], last, predicted, loss, q)


@jax.jit
def _fold_in(rng: PRNGKeyArray, numbers: Any) -> Any:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, numbers)


def _keys(rng: PRNGKeyArray, number: int) -> Any:
    return _fold_in(rng, np.arange(number, number + BATCH, dtype=np.uint32))


def _errors(tables: Sequence[_Table], executed: int, spread: Float[np.ndarray, " a"]) -> dict[Predictor, Errors]:
    """Return the errors of the policy and of both baselines."""
    recorded = np.concatenate([table.recorded for table in tables])
    real = np.concatenate([table.real for table in tables])
    used = real[:, :executed]
    predicted = _joined([dict(table.predicted) for table in tables])
    predicted["repeat"] = np.broadcast_to(np.concatenate([each.last for each in tables])[:, None], recorded.shape)
    predicted["mean"] = np.broadcast_to(_mean(recorded[:, :executed], used), recorded.shape)
    moves = spread >= STILL
    if not moves.any():
        raise ValueError("the recorded actions do not move in any dimension: there is nothing to predict")
    found: dict[Predictor, Errors] = {}
    for name, chunk in predicted.items():
        if chunk.shape != recorded.shape:
            raise ValueError(
                f"the policy gives chunks of {chunk.shape[1]} steps with {chunk.shape[2]} dimensions, and the data has "
                f"actions of {recorded.shape[2]}: this is data of another robot, or another choice of its keys"
            )
        away = np.abs(chunk - recorded)
        steps = [_mean(away[:, k], real[:, k]) for k in range(away.shape[1]) if real[:, k].any()]
        dims = _mean(away[:, :executed], used)
        relative = [float((each[moves] / spread[moves]).mean()) for each in (dims, *steps)]
        found[name] = Errors(tuple(dims.tolist()), relative[0], tuple(relative[1:]))
    return found


def _correlation(tables: Sequence[_Table], executed: int) -> tuple[float | None, ...]:
    real = np.concatenate([table.real[:, :executed] for table in tables]) > 0
    acting = [table.predicted.get("best", table.predicted["sample"]) for table in tables]
    chunks_of = (np.concatenate(each)[:, :executed][real] for each in (acting, [table.recorded for table in tables]))
    pairs = zip(*(each.T for each in chunks_of), strict=True)
    return tuple(
        float(np.corrcoef(one, other)[0, 1]) if min(one.std(), other.std()) > STILL else None for one, other in pairs
    )


def _mean(values: Float[np.ndarray, "*lead a"], real: Float[np.ndarray, "*lead"]) -> Float[np.ndarray, " a"]:
    """Return the mean over the real steps."""
    return np.average(values.reshape(-1, values.shape[-1]), axis=0, weights=real.reshape(-1))


def _telling(tables: Sequence[_Table], successes: Sequence[bool | None]) -> Telling | None:
    q = [
        (float(np.mean(table.q)), success)
        for table, success in zip(tables, successes, strict=True)
        if table.q is not None
    ]
    solved, failed = (np.array([value for value, success in q if success is kind]) for kind in (True, False))
    area = auc(solved, failed)
    if area is None:
        return None
    return Telling(area, *auc_interval(area, len(solved), len(failed)), len(solved), len(failed))


def _followed(starts: Sequence[Starts]) -> list[Starts]:
    """Return the first episode that succeeded and the first that failed; if no outcome is known, the first one."""
    found = {each.store.info(each.episode).success: each for each in reversed(starts)}
    return [found[kind] for kind in (True, False) if kind in found] or [starts[0]]


def _course(subject: Subject, episode: Starts, rng: PRNGKeyArray, number: int) -> Course:
    """Follow an episode from its start: a chunk after every ``executed`` steps, up to ``COURSE_CHUNKS`` of them."""
    store, index, _ = episode
    info, first = store.info(index), int(store.starts[index])
    places = np.arange(0, info.length, subject.executed)[:COURSE_CHUNKS]
    table = _measured(subject, store, first + places, rng, number)
    predicted = table.predicted.get("best", table.predicted["sample"])[:, : subject.executed]
    length = min(info.length, len(places) * subject.executed)
    q = None if table.q is None else tuple(np.asarray(table.q, np.float64).tolist())
    actions = store.take("actions", np.arange(first, first + length))
    return Course(
        info.source,
        info.success,
        info.task,
        tuple(places.tolist()),
        q,
        tuple(map(tuple, actions.astype(np.float64).tolist())),
        tuple(map(tuple, predicted.reshape(-1, predicted.shape[-1])[:length].tolist())),
    )


def sentences(found: OfflineEvaluation) -> list[str]:
    """Return what was found, for a terminal: a line for each fact."""
    names = {"best": f"best of {found.num_samples}", "sample": "one sample", "repeat": "the last action once more"}
    names["mean"] = "the mean action"
    told = [
        f"{found.chunks} chunks of {found.episodes} episodes, {found.executed} steps of each executed"
        + (
            ""
            if found.judged_episodes == found.episodes
            else f"; errors over {found.judged_episodes} that did not fail"
        ),
        "action error, in units of the spread of the data's actions (0: as recorded):",
    ]
    told += [f"  {names[name]:<28}{each.relative:.3f}" for name, each in found.errors.items()]
    told.append(_judgement(found))
    last = len(found.acting.steps) - 1
    shown = sorted({0, min(found.executed - 1, last), last // 2, last})
    steps = [f"step {k + 1}: {found.acting.steps[k]:.3f} ({_trivial(found, k):.3f})" for k in shown]
    told.append(f"by step of the chunk (in brackets the better baseline): {', '.join(steps)}")
    told.append(f"by dimension, in the robot's units: {'':<6}{'policy':>10}{'repeat':>10}{'mean':>10}{'spread':>10}")
    columns = [found.acting.dims, found.errors["repeat"].dims, found.errors["mean"].dims, found.spread]
    told += [f"  {k:<40}" + "".join(f"{column[k]:>10.4g}" for column in columns) for k in range(len(found.spread))]
    if found.flow_loss is not None:
        told.append(f"flow loss {found.flow_loss:.4f}, which compares with the training's imitation loss (bc_loss)")
    return [*told, *_critics(found)]


def _judgement(found: OfflineEvaluation) -> str:
    if found.score < found.baseline:
        return f"the policy's error is {1 - found.score / found.baseline:.0%} below that of the better baseline"
    return (
        "the policy is no better than a baseline that sees nothing: it has not learned these actions, or sees them in "
        "another convention (acrlpd diagnose)"
    )


def _trivial(found: OfflineEvaluation, step: int) -> float:
    return min(found.errors[name].steps[step] for name in ("repeat", "mean"))


def _critics(found: OfflineEvaluation) -> list[str]:
    if not found.has_critics:
        return ["Q: this policy has no critics"]
    told = []
    if found.telling is None:
        told.append("Q: whether it tells successes from failures needs episodes of both kinds")
    else:
        each = found.telling
        told.append(
            f"Q of a success lies above that of a failure {each.auc:.0%} of the time [{each.low:.0%}, {each.high:.0%}] "
            f"({each.successes} successes, {each.failures} failures; 50 % is chance)"
        )
    for course in found.courses:
        if course.q:
            ends = {True: "a success", False: "a failure", None: "an episode"}[course.success]
            shown = np.unique(np.linspace(0, len(course.q) - 1, 6).round().astype(int))
            values = ", ".join(f"{course.q[k]:.2f}" for k in shown)
            told.append(f"Q along {ends}, at step {', '.join(str(course.places[k]) for k in shown)}: {values}")
    return told
