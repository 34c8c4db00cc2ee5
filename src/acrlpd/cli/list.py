"""``acrlpd list presets | environments | algorithms | robots``: the names that commands take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from acrlpd import presets
from acrlpd.config import TrainConfig
from acrlpd.data.view.robots.mapping import ROBOTS
from acrlpd.envs import registry

USAGE = """usage: acrlpd list WHAT

  presets                what acrlpd train takes: policy, environment or data, lengths of both phases
  environments [FAMILY]  what --env.name takes; without a family, how many each has
  algorithms             what --algorithm takes
  robots                 what --data.robot and acrlpd serve --robot take"""


def main(argv: Sequence[str]) -> int:
    what, *rest = argv or [""]
    if what in ("", "-h", "--help"):
        print(USAGE)
        return 0 if what else 2
    lists: dict[str, Callable[[], Iterator[str]]] = {
        "presets": _presets,
        "environments": lambda: _environments(*rest[:1]),
        "algorithms": _algorithms,
        "robots": lambda: iter(ROBOTS),
    }
    if what not in lists or len(rest) > (what == "environments"):
        raise ValueError(f"cannot list {' '.join(argv)!r}\n{USAGE}")
    for line in lists[what]():
        print(line)
    return 0


def _presets() -> Iterator[str]:
    for name in presets.PRESETS:
        yield f"{name:<14}{_described(presets.get_preset(name))}"


def _described(config: TrainConfig) -> str:
    place = config.env.name if config.env else "episodes of --data.path"
    cameras = f" and {len(config.env.cameras)} camera(s)" if config.env and config.env.cameras else ""
    return (
        f"{config.policy.kind}, {place}{cameras}: {config.offline_steps:,} updates, then {config.online_steps:,} steps"
    )


def _environments(family: str | None = None) -> Iterator[str]:
    families = (*registry.FAMILIES, *registry.LIBERO_SUITES)
    if family is not None:
        if family not in families:
            raise ValueError(f"unknown family {family!r}: there are {', '.join(families)}")
        yield from registry.names(family)
        return
    for each in families:
        try:
            found = registry.names(each)
        except ImportError:
            yield f"{each:<16}not installed: it needs acrlpd[{each.partition('_')[0]}]"
        else:
            yield f"{each:<16}{len(found)} environments, such as {found[0]}"
    yield f"{'custom':<16}your own: custom/MODULE:NAME"


def _algorithms() -> Iterator[str]:
    for name, changes in presets.ALGORITHMS.items():
        yield f"{name:<12}{(changes.__doc__ or '').strip().splitlines()[0]}"
