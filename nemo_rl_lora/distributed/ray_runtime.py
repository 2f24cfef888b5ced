"""Ray for this run: the cluster at RAY_ADDRESS, or one on this machine that is started for the run and ends with it.

Contract: workers use the driver's own environment, nothing is sent to anybody, and the run's handlers of SIGINT and
SIGTERM stay in place. What is started here listens on the loopback interface alone. Where Ray runs already, in this
process or at RAY_ADDRESS, it is used and left running.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_rl_lora.config.cluster import RAY_ADDRESS, joins_ray
from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.distributed.shared_memory import owned_directory

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What the driver's process was started with (run/drivers.py); workers of a cluster do not inherit it.
_OF_THE_C_LIBRARIES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GOMP_SPINCOUNT")
_CONNECT_SECONDS = 30
# Ray speaks gRPC, over HTTP/2: what a client says first, and the kind of frame that a server answers with.
_HTTP2_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_HTTP2_SETTINGS = b"\4"
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LOOPBACK = "127.0.0.1"


@contextlib.contextmanager
def running_ray(num_cpus: int = 1, *, taken_gpus: int = 0) -> Iterator[None]:
    """Ray, until the end of the context. One that is started here has room for `num_cpus` processes at least, and does
    not give away the first `taken_gpus` GPUs, which this process uses itself."""
    # `uv run` would make Ray build an environment of its own for the workers.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray would have its workers give way to everything else
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "120")  # Ray's half a minute is too short on a busy machine
    import ray
    from ray._private import ray_constants

    if os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0":
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # read when ray was imported, which may be long ago
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        with contextlib.nullcontext({}) if joins_ray() else _local(num_cpus) as options:
            try:
                if joins_ray():
                    _refuse_silent_cluster(os.environ[RAY_ADDRESS])
                with _hidden_gpus(0 if joins_ray() else taken_gpus), _quiet_start():
                    try:
                        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
                    except ConnectionError as error:
                        raise (_no_cluster(os.environ[RAY_ADDRESS], error) if joins_ray() else error) from error
                for number, handler in handlers.items():
                    signal.signal(number, handler)
                yield
            finally:
                ray.shutdown()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _local(num_cpus: int) -> Iterator[dict[str, Any]]:
    """What Ray is started with on this machine, for this run."""
    from ray._private import ray_constants

    several = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False  # else Ray puts the machine's address in the place of the loopback's
    try:
        with owned_directory() as directory:
            yield {
                "address": "local",
                "include_dashboard": False,
                "num_cpus": max(num_cpus, os.cpu_count() or 1),
                "_node_ip_address": _LOOPBACK,
                "_temp_dir": str(directory),
            }
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = several


@contextlib.contextmanager
def _quiet_start() -> Iterator[None]:
    """The run's handler of SIGTERM stays while Ray starts, whose own would end the process without a word; and Ray
    prints nothing of its own when a process is lost, since the run says so."""
    from ray._private import utils, worker

    before = utils.set_sigterm_handler, worker.listen_error_messages
    utils.set_sigterm_handler = lambda sigterm_handler: None
    worker.listen_error_messages = lambda worker, threads_stopped: None
    try:
        yield
    finally:
        utils.set_sigterm_handler, worker.listen_error_messages = before


@contextlib.contextmanager
def _hidden_gpus(number: int) -> Iterator[None]:
    """The environment of Ray's start, which gives away the GPUs that it sees: without the first ones."""
    import torch

    visible = os.environ.get(_VISIBLE)
    gpus = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    if number:
        os.environ[_VISIBLE] = ",".join(gpus[number:])
    try:
        yield
    finally:
        if number:
            os.environ.pop(_VISIBLE)
            os.environ.update({} if visible is None else {_VISIBLE: visible})


def _refuse_silent_cluster(address: str) -> None:
    """ConfigError where no server of Ray's kind answers at `host:port` in time; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if "/" in address:
        raise ConfigError(
            f"{RAY_ADDRESS}={address!r}: is no address of a cluster that a driver can join. Write `host:port` of the "
            f"head, as `ray start --head` prints it, or unset {RAY_ADDRESS} to run on this machine alone."
        )
    if not port.isdigit():  # "auto"
        return
    deadline = time.monotonic() + _CONNECT_SECONDS
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "0":
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                connection.sendall(_HTTP2_GREETING)
                if connection.recv(4)[3:] != _HTTP2_SETTINGS:
                    raise OSError("another kind of server does")
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> ConfigError:
    said = " ".join(str(error).split())
    return ConfigError(
        f"{RAY_ADDRESS}={address!r}: no Ray cluster answers there within {_CONNECT_SECONDS} s ({said}). Start one "
        f"(`ray start --head`), or unset {RAY_ADDRESS} to run on this machine alone."
    )


def worker_environment(variables: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """A `runtime_env` with which an actor's process starts: the variables, and what the driver's process has itself."""
    inherited = {name: os.environ[name] for name in _OF_THE_C_LIBRARIES if name in os.environ}
    return {"env_vars": {**inherited, **variables}}
