"""A checkpoint is compared with what it did."""

import shutil

import pytest

from acrlpd.founding.regression import ACRLPDRegressionTester
from acrlpd.training import setup


def test_a_sound_checkpoint_passes_and_a_damaged_one_does_not(copied_run):
    files = setup.run_files(copied_run)
    found = ACRLPDRegressionTester().run_regression_suite(files.directory)
    assert found == {"api_compatibility": True, "numerical_stability": True, "openpi_integration": True}
    with pytest.raises(ValueError, match="no recorded evaluation"):
        ACRLPDRegressionTester().test_performance_metrics(files.directory)
    shutil.rmtree(files.checkpoints / "8" / "params")
    with pytest.raises(ValueError, match="is damaged"):
        ACRLPDRegressionTester().test_numerical_stability(files.directory)
