"""``acrlpd doctor``: check that everything a run needs is installed and works."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import tyro

from acrlpd.doctor import validate_installation


@dataclasses.dataclass(frozen=True)
class DoctorArguments:
    """Check versions, devices, a forward pass of a small pi0 and of a critic, a batch, a checkpoint, rendering."""

    json: bool = False


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(DoctorArguments, args=argv, prog="acrlpd doctor")
    checks = validate_installation()
    if arguments.json:
        print(json.dumps([dataclasses.asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            mark = "ok  " if check.ok else ("no  " if check.optional else "FAIL")
            print(f"{mark} {check.name:<12}{check.text}")
    return 0 if all(check.ok or check.optional for check in checks) else 1
