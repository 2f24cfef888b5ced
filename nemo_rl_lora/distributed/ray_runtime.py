"""Ray on this machine, started for this run and ended with it.

Contract: workers use the driver's own environment, nothing is sent to anybody, and the run's handlers of SIGINT and
SIGTERM stay in place. Where Ray runs already, in this process or at RAY_ADDRESS, it is used and left running.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def running_ray() -> Iterator[None]:
    """Ray, until the end of the context."""
    # `uv run` would make Ray build an environment of its own for the workers.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray._private import ray_constants

    if os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0":
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # read when ray was imported, which may be long ago
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    directory = None if "RAY_ADDRESS" in os.environ else tempfile.mkdtemp(prefix="nrl-")  # sockets need short names
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, _temp_dir=directory)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        yield
    finally:
        ray.shutdown()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
