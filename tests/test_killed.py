"""Killed by SIGKILL wherever it is, a run with `BackupAndRestore` ends as if it never was."""

import os
import random
import signal

import killed_run
import numpy as np
import pytest

KILLS = int(os.environ.get("KILLS", "3"))

needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="not on Windows")


@needs_sigkill
@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    """Every run gets at most as far as an epoch and a half: only what is kept brings it on."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    expected = killed_run.to_the_end(whole)
    moments = random.Random(0)
    hits = sum(
        killed_run.kill_after(killed, moments.randint(1, 9), moments.uniform(0.0, 0.03))
        for _ in range(KILLS)
    )
    # With many kills the run comes to its end in between, and begins anew.
    assert hits >= min(3, KILLS)
    found = killed_run.to_the_end(killed)
    assert found.keys() == expected.keys()
    assert any(name.startswith("hypergradients_5/") for name in expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, name)
