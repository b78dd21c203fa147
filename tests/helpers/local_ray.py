"""One Ray for a module of tests."""

import contextlib
import os

import pytest

from tests.helpers import ROOT


@contextlib.contextmanager
def local_ray():
    """Ray on two cores, whose workers find the tests' modules."""
    import ray

    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # beside another suite, 15 waits for minutes
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
        try:
            yield
        finally:
            ray.shutdown()
