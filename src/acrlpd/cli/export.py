"""``acrlpd export --checkpoint PATH --output_dir OUT``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tyro

from acrlpd.deploy import OptimizationLevel, export_acrlpd_model
from acrlpd.fields import NonNegativeFloat
from acrlpd.serving.production import Platform


@dataclasses.dataclass(frozen=True)
class ExportArguments:
    """Export a trained agent: a checkpoint to serve, a function for XLA, weights for openpi's PyTorch port."""

    checkpoint: str  # a run (runs/demo), its checkpoints folder, or one step
    output_dir: str  # a new folder
    optimization_level: OptimizationLevel = "standard"  # fast: 3 critics, 10 flow steps; accurate: all critics, 50
    platform: Platform | None = None  # use flow steps, candidates and critics of the production table
    data: str | None = None  # episodes to compare critics on, preferably not trained on; None: the run's
    extraction: str | None = None  # how to choose instead; code of your own (FILE.py:NAME) must be named here
    guidance_weights: tuple[NonNegativeFloat, ...] | None = None  # of the extraction guided; None: as trained


def main(argv: Sequence[str]) -> int:
    arguments = tyro.cli(ExportArguments, args=argv, prog="acrlpd export")
    print(
        export_acrlpd_model(
            arguments.checkpoint,
            arguments.output_dir,
            arguments.optimization_level,
            platform=arguments.platform,
            data=arguments.data,
            extraction=arguments.extraction,
            guidance_weights=arguments.guidance_weights,
        )
    )
    return 0
