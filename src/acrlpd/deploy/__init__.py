"""From a checkpoint to a policy that answers requests, for ``acrlpd serve``, or to files, for ``acrlpd export``."""

from acrlpd.deploy.export import OptimizationLevel, export_acrlpd_model
from acrlpd.deploy.openpi import openpi_policy
from acrlpd.deploy.options import ActingOptions, OpenPIOptions
from acrlpd.deploy.recorded import Beside, RecordedOptions, put_beside
from acrlpd.deploy.trained import Follower, is_ours, load_trained, trained_policy
from acrlpd.training.loading import Trained

__all__ = [
    "ActingOptions",
    "Beside",
    "Follower",
    "OpenPIOptions",
    "OptimizationLevel",
    "RecordedOptions",
    "Trained",
    "export_acrlpd_model",
    "is_ours",
    "load_trained",
    "openpi_policy",
    "put_beside",
    "trained_policy",
]
