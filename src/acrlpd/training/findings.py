"""Why a policy may fail although its loss fell: one question a function, each with a verdict, numbers and a remedy.

The questions are about what stands between recorded data and a policy: statistics, the convention of the actions,
grippers, cameras, prompts, the rate. They compare the data with what the checkpoint says of itself, so data that the
policy was trained on looks good, and data in another convention does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, UInt8

from acrlpd.data import statistics
from acrlpd.data.statistics import MIN_STD
from acrlpd.data.view.normalize import NormStats, normalize, ranges
from acrlpd.data.view.tokenizer import PromptTokenizer
from acrlpd.training.offline_evaluation import OfflineEvaluation

Verdict = Literal["good", "look", "wrong"]

FAR = 5.0  # normalized values beyond this are unusual: standard deviations, or half widths from q01 to q99
SOME_FAR, MANY_FAR = 0.005, 0.05  # shares of a dimension's values
OTHER_SCALE = 4.0  # ratio of two spreads that data of one convention does not have
NEAR = 0.9  # correlation with the state from which on actions are positions near it
AT_ENDS, END = 0.9, 0.15  # a switch has this share of its values within this part of its range at either end
RARELY = 0.02  # and at least this share at each of them
OTHER_ENDS = 0.3  # of the larger range: how far an end may lie from the checkpoint's
TURNED = 0.2  # of the range: how much nearer a mean must be to the data's when it is turned around
AGAINST = -0.5  # correlation of predicted and recorded actions from which on they go against each other
BLACK, FLAT, UNCHANGED = 4.0, 2.0, 0.25  # of 255: mean and deviation of a picture, mean change between pictures
FOREIGN = 0.2  # share of unknown tokens from which on a prompt says nothing
OTHER_RATE = 1.1


@dataclasses.dataclass(frozen=True)
class Finding:
    """The answer to one question."""

    name: str
    verdict: Verdict
    text: str  # the evidence, in numbers
    advice: str = ""  # what to do; empty if all is good
    details: tuple[str, ...] = ()  # of single dimensions or pictures


def of_statistics(key: str, values: Float[np.ndarray, "n d"], stats: NormStats, *, quantiles: bool) -> Finding:
    """Judge how ``values``, in the units of normalization, are normalized by the checkpoint's ``stats``."""
    normal = np.abs(normalize(values, stats, quantiles=quantiles))
    beyond, outside = (normal > FAR).mean(axis=0), float((normal > 1).mean())
    width = stats.std if not quantiles or stats.q01 is None or stats.q99 is None else (stats.q99 - stats.q01) / 2
    still, moving = width[: values.shape[1]] <= 1e-6, values.std(axis=0) > 1e-6
    own = summary(values)
    odd = np.zeros(values.shape[1], bool)
    for dims in statistics.misfits({key: _cut(stats, values.shape[1])}, {key: own}, quantiles=quantiles)[key].values():
        odd |= dims
    wrong, look = odd | (still & moving) | (beyond > MANY_FAR), still | (beyond > SOME_FAR)
    usual = "2 %" if quantiles else "32 %"
    text = (
        f"{outside:.0%} of the normalized values lie outside [-1, 1] (about {usual} is usual), and at most "
        f"{beyond.max():.1%} of a dimension's beyond {FAR:g} (dimension {int(beyond.argmax())})"
    )
    if still.any():
        text += f"; the statistics have no spread in {_named(still)}"
    details = tuple(_beside(d, own, stats) for d in np.flatnonzero(wrong | look).tolist())
    if wrong.any():
        advice = (
            "These are statistics of another robot, of other units or of other keys. Use those of the data that the "
            "policy was trained on, or data of its robot in its units"
        )
        return Finding(f"{key} statistics", "wrong", f"{text}; not as in training: {_named(wrong)}", advice, details)
    if look.any():
        advice = "Look at these dimensions: rare motions, recording faults, or a joint that stood still in training"
        return Finding(f"{key} statistics", "look", text, advice, details)
    return Finding(f"{key} statistics", "good", text)


def summary(values: Float[np.ndarray, "n d"]) -> NormStats:
    """Return the statistics of vectors, without any floor."""
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    return NormStats(values.mean(axis=0), values.std(axis=0), q01, q99)


def _cut(stats: NormStats, dim: int) -> NormStats:
    parts = (None if each is None else each[:dim] for each in (stats.mean, stats.std, stats.q01, stats.q99))
    return NormStats(*parts)  # type: ignore[arg-type]


def _beside(dim: int, own: NormStats, stats: NormStats) -> str:
    return (
        f"dimension {dim}: data mean {own.mean[dim]:.4g}, std {own.std[dim]:.4g}; "
        f"checkpoint mean {stats.mean[dim]:.4g}, std {stats.std[dim]:.4g}"
    )


def _named(dims: Bool[np.ndarray, " d"]) -> str:
    return f"dimension{'s' if dims.sum() > 1 else ''} {ranges(np.flatnonzero(dims))}"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Sampled rows of the data, as recorded and as they come to normalization."""

    state: Float[np.ndarray, "n s"]  # as recorded
    first: Float[np.ndarray, "n a"]  # first actions of the chunks, as recorded
    model_state: Float[np.ndarray, "n ms"]
    model_first: Float[np.ndarray, "n ma"]
    model_actions: Float[np.ndarray, "m ma"]  # all real steps of the chunks


def of_convention(
    rows: Rows, stats: Mapping[str, NormStats], *, by_bounds: bool, delta_mask: Sequence[bool]
) -> Finding:
    """Judge whether actions are absolute or relative, dimension by dimension, as in the checkpoint.

    Actions are absolute where they follow the state. Those of another convention than the checkpoint's also have
    another scale than its statistics, or another middle. With ``by_bounds`` its statistics are the limits of the action
    space, which the data must keep.
    """
    near = _near(rows.first, rows.state)
    told = [f"{_named(near)} follow the state (absolute)"] if near.any() else []
    told += [f"{_named(~near)} do not (relative, velocities or a gripper)"] if not near.all() else []
    text = f"recorded actions: {', '.join(told)}"
    if any(delta_mask):
        text += f"; the checkpoint subtracts the state from {_named(np.array(delta_mask))}"
    dim = rows.model_actions.shape[1]
    given, own = _cut(stats["actions"], dim), summary(rows.model_actions)
    if by_bounds:
        out = (np.abs(rows.model_actions - given.mean) > 1.01 * given.std + 1e-3).mean(axis=0)
        text += f"; at most {out.max():.1%} of a dimension's values leave the action space"
        odd, wrong = out > SOME_FAR, out > MANY_FAR
        advice = (
            "The actions have another unit or another sign than those of the simulator that the policy was trained in"
        )
    else:
        odd = ~_of_one_scale(own, given)
        wrong, advice = _of_another_convention(rows, stats, odd, np.array(delta_mask, bool))
    details = tuple(_beside(d, own, given) for d in np.flatnonzero(odd).tolist())
    if wrong.any():
        return Finding("action convention", "wrong", f"{text}; not as in training: {_named(wrong)}", advice, details)
    if odd.any():
        advice = (
            "Look at the scale of these dimensions: another unit, another controller, or other motions than in training"
        )
        return Finding("action convention", "look", f"{text}; of another scale: {_named(odd)}", advice, details)
    return Finding("action convention", "good", f"{text}; in scale and middle they are as in training")


def _of_another_convention(
    rows: Rows, stats: Mapping[str, NormStats], odd: Bool[np.ndarray, " a"], mask: Bool[np.ndarray, " m"]
) -> tuple[Bool[np.ndarray, " a"], str]:
    """Return which ``odd`` dimensions have another relation to the state than in training, and what to do."""
    here = _near(rows.model_first, rows.model_state)
    there, twice = np.zeros_like(odd), np.zeros_like(odd)
    dims = min(len(odd), rows.model_state.shape[1])
    actions, state = _cut(stats["actions"], dims), _cut(stats["state"], dims)
    ratio = actions.std / np.maximum(state.std, 1e-9)
    there[:dims] = (np.abs(actions.mean - state.mean) < state.std) & (ratio > 1 / 3) & (ratio < 3)
    subtracted = np.zeros_like(odd)
    subtracted[: len(mask)] = mask
    twice = odd & subtracted & _near(-rows.model_first, rows.model_state)
    absolute, relative = odd & here & ~there, odd & ~here & there
    advice = []
    if twice.any():
        advice.append(
            f"{_named(twice)}: these are relative already, and the state is subtracted once more (delta_mask)"
        )
    if relative.any():
        advice.append(f"{_named(relative)}: relative here, absolute in training: choose other keys, or add the state")
    if absolute.any():
        advice.append(f"{_named(absolute)}: absolute here, relative in training: choose other keys, or a delta_mask")
    return twice | absolute | relative, "; ".join(advice)


def _near(actions: Float[np.ndarray, "n a"], state: Float[np.ndarray, "n s"]) -> Bool[np.ndarray, " a"]:
    """Return which dimensions of the actions follow the state's dimension of the same number."""
    found = np.zeros(actions.shape[1], bool)
    for d in range(min(actions.shape[1], state.shape[1])):
        a, s = actions[:, d], state[:, d]
        if a.std() > 1e-6 and s.std() > 1e-6:
            found[d] = np.corrcoef(a, s)[0, 1] > NEAR and np.abs(a - s).mean() < s.std()
    return found


def _of_one_scale(own: NormStats, given: NormStats) -> Bool[np.ndarray, " d"]:
    """Return where the spreads are alike and the middles not far apart; dimensions that hardly move always are."""
    wide, narrow = np.maximum(own.std, given.std), np.minimum(own.std, given.std)
    alike = (wide < OTHER_SCALE * np.maximum(narrow, MIN_STD)) & (np.abs(own.mean - given.mean) < 2 * wide)
    return alike | (wide < 10 * MIN_STD)


def of_grippers(actions: Float[np.ndarray, "n a"], stats: NormStats, *, by_bounds: bool = False) -> Finding:
    """Judge the sign and the range of the actions that switch between two ends, in the units of normalization.

    With ``by_bounds`` the checkpoint knows the limits of the action space and not how often a gripper is closed.
    """
    low, high = actions.min(axis=0), actions.max(axis=0)
    size = np.maximum(high - low, 1e-9)
    at_low, at_high = (np.abs(actions - end) <= END * size for end in (low, high))
    switch = ((at_low | at_high).mean(axis=0) >= AT_ENDS) & (high - low > MIN_STD)
    switch &= (at_low.mean(axis=0) >= RARELY) & (at_high.mean(axis=0) >= RARELY)
    places = np.flatnonzero(switch).tolist()
    if not places:
        return Finding("grippers", "good", "no dimension of the actions switches between two ends")
    problems, told = [], []
    for d in places:
        told.append(f"dimension {d} switches between {low[d]:.3g} and {high[d]:.3g}, mean {actions[:, d].mean():.3g}")
        if problem := _gripper(actions[:, d], low[d], high[d], d, stats, by_bounds):
            problems.append(problem)
    if problems:
        advice = (
            "Turn or rescale the data's gripper to the checkpoint's convention (open and closed, 0..1, -1..1, metres)"
        )
        return Finding("grippers", "wrong", "; ".join(told), advice, tuple(problems))
    return Finding("grippers", "good", f"{'; '.join(told)}: as in the checkpoint's statistics")


def _gripper(
    values: Float[np.ndarray, " n"], low: float, high: float, d: int, stats: NormStats, by_bounds: bool
) -> str | None:
    """Return what is wrong with a switch, or None."""
    size, mean, known = high - low, float(values.mean()), float(stats.mean[d])
    if stats.q01 is not None and stats.q99 is not None:
        begin, end = float(stats.q01[d]), float(stats.q99[d])
        if end - begin > MIN_STD and max(abs(begin - low), abs(end - high)) > OTHER_ENDS * max(size, end - begin):
            if abs(begin + high) + abs(end + low) < 0.2 * size:
                return f"dimension {d}: its sign is turned around: the checkpoint knows {begin:.3g} to {end:.3g}"
            return f"dimension {d}: another range: the checkpoint knows {begin:.3g} to {end:.3g}"
    else:
        wide, narrow = sorted([float(values.std()), float(stats.std[d])])[::-1]
        if not low - 0.1 * size <= known <= high + 0.1 * size or wide > OTHER_SCALE * narrow:
            return (
                f"dimension {d}: another range: the checkpoint's mean is {known:.3g}, its deviation {stats.std[d]:.3g}"
            )
    turned = low + high - mean
    if not by_bounds and abs(known - turned) + TURNED * size < abs(known - mean):
        return f"dimension {d}: open and closed are swapped: the checkpoint's mean is {known:.3g}, here {mean:.3g}"
    return None


Pictures = UInt8[np.ndarray, "n h w 3"]


def of_cameras(missing: str | None, read: Mapping[str, Pictures], unread: Sequence[str]) -> Finding:
    """Judge the cameras: ``missing`` says in words which are not there; ``read`` has some pictures of the others."""
    told, worst, advice = [], "good", ""
    for name, pictures in read.items():
        found = pictures.astype(np.float64)
        mean, flat = found.mean(), found.std(axis=(1, 2)).mean()
        change = np.abs(np.diff(found, axis=0)).mean() if len(found) > 1 else np.inf
        line = f"{name}: {pictures.shape[2]}x{pictures.shape[1]}, brightness {mean:.0f} of 255, contrast {flat:.0f}"
        if flat < FLAT:
            worst, line = "wrong", f"{line}: {'black' if mean < BLACK else 'one colour everywhere'}"
        elif change < UNCHANGED:
            worst, line = max(worst, "look", key=_ORDER.index), f"{line}: it never changes"
        told.append(line)
    if worst != "good":
        advice = "Look at the pictures (--html): a camera that was off, a wrong key, or a frozen stream"
    text = "all cameras that the policy reads are there" if read else "the policy reads no pictures"
    if missing:
        worst, text, advice = "wrong", missing, "Rename the data's cameras, or choose other ones (--read.cameras)"
    if unread:
        text += f"; not read: {', '.join(unread)}"
    return Finding("cameras", worst, text, advice, tuple(told))  # type: ignore[arg-type]


_ORDER = ("good", "look", "wrong")


def of_prompts(
    tokenizer: PromptTokenizer, prompts: Mapping[str, int], states: Float[np.ndarray, "n s"] | None
) -> Finding:
    """Judge the instructions, given with their numbers of episodes; ``states`` (normalized) if the prompt has them."""
    counts = {text: tokenizer.count(text, None if states is None else states[0]) for text in prompts}
    empty = sum(number for text, number in prompts.items() if not text.strip())
    longest = max(counts, key=lambda text: counts[text][0])
    length, limit = counts[longest][0], tokenizer.max_length
    unknown = max(foreign / max(total, 1) for total, foreign in counts.values())
    text = (
        f"{len(prompts)} instructions, at most {length} tokens of {limit} ({longest[:60]!r}); at most {unknown:.0%} of "
        "one's tokens are unknown"
    )
    if empty:
        text += f"; {empty} of {sum(prompts.values())} episodes have none"
    if length > limit:
        advice = "Longer prompts are cut: raise max_token_len to what the policy was trained with, or shorten the text"
        return Finding("prompt", "wrong", text, advice)
    if empty == sum(prompts.values()) or unknown > FOREIGN:
        advice = "Give an instruction (--read.default_task) in the words of training, and the tokenizer of the model"
        return Finding("prompt", "wrong", text, advice)
    if empty or unknown:
        return Finding("prompt", "look", text, "Give every episode an instruction in the words of training")
    return Finding("prompt", "good", text)


def of_rate(known: float | None, fps: float | None, *, horizon: int, executed: int, lengths: Sequence[int]) -> Finding:
    """Judge the rate and the horizon of the checkpoint beside those of the data."""
    short = float(np.mean(np.asarray(lengths) < horizon))
    rate = fps or known
    lasts = f"{horizon / rate:.2g} s" if rate else "an unknown time"
    text = (
        f"checkpoint {_rate(known)}, data {_rate(fps)}; a chunk of {horizon} steps lasts {lasts}, and "
        f"{executed} of them are executed; episodes have {np.median(lengths):.0f} steps (median), {short:.0%} fewer "
        "than a chunk"
    )
    if known and fps and max(known / fps, fps / known) > OTHER_RATE:
        advice = (
            f"Run the policy at {known:g} steps a second, or resample the data: at {fps:g} it moves {fps / known:.2g} "
            "times as fast as it was trained to"
        )
        return Finding("rate and horizon", "wrong", text, advice)
    if not known or not fps:
        return Finding("rate and horizon", "look", text, "Compare the robot's rate with that of the training data")
    if short > 0.5:
        return Finding("rate and horizon", "look", text, "Most chunks are padding: a shorter action_horizon may do")
    return Finding("rate and horizon", "good", text)


def of_errors(found: OfflineEvaluation) -> Finding:
    """Judge the policy's actions beside the recorded ones, by step of the chunk."""
    repeat, mean = found.errors["repeat"], found.errors["mean"]
    steps = found.acting.steps
    shown = np.unique(np.linspace(0, len(steps) - 1, 5).round().astype(int)).tolist()
    details = [
        f"step {k + 1}: policy {steps[k]:.3f}, last action {repeat.steps[k]:.3f}, mean {mean.steps[k]:.3f}"
        for k in shown
    ]
    against = [d for d, each in enumerate(found.correlation) if each is not None and each < AGAINST]
    details += [
        f"dimension {d} goes against the recorded actions: correlation {found.correlation[d]:.2f}" for d in against
    ]
    text = (
        f"error {found.score:.3f} of the actions' spread; the last action once more has {repeat.relative:.3f}, "
        f"the mean action {mean.relative:.3f}"
    )
    if against or found.score >= mean.relative:
        advice = (
            "The policy has not learned these actions, or sees them in another convention: look at what is wrong above"
        )
        if against:
            advice = "A sign is turned around in the data, or in what the robot is sent: compare these dimensions"
        return Finding("actions", "wrong", text, advice, tuple(details))
    if found.score >= found.baseline:
        advice = "Better than a constant and worse than holding still: train longer, or on more data like this"
        return Finding("actions", "look", text, advice, tuple(details))
    return Finding("actions", "good", text, details=tuple(details))


@dataclasses.dataclass(frozen=True)
class Replay:
    """Recorded actions of one episode, executed open loop."""

    recorded: bool | None  # whether the episode succeeded when it was recorded
    replayed: bool
    start: float  # distance of the simulator's first state from the recorded one, in deviations of the state


def of_replay(replays: Sequence[Replay]) -> Finding:
    """Judge whether recorded actions do in the simulator what they did when they were recorded."""
    solved = [each for each in replays if each.recorded is not False]
    again, start = sum(each.replayed for each in solved), float(np.median([each.start for each in replays]))
    text = (
        f"{again} of {len(solved)} episodes that had not failed succeed again with their recorded actions; the first "
        f"states lie {start:.2g} deviations from the recorded ones"
    )
    if start > 0.05:
        advice = (
            "The simulator does not begin as the recordings did, so this says little: name their seed (--replay_seed)"
        )
        return Finding("replay", "look", text, advice)
    if not solved:
        return Finding("replay", "look", text, "Name episodes that succeeded")
    if again < 0.8 * len(solved):
        advice = "The actions mean something else in this simulator: another controller, rate, unit or sign"
        return Finding("replay", "wrong", text, advice)
    return Finding("replay", "good", text)


def _rate(fps: float | None) -> str:
    return "of an unknown rate" if fps is None else f"{fps:g} steps a second"
