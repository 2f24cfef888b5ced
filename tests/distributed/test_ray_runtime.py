"""Ray as a run starts it."""

import http.server
import os
import socket
import threading
import time

import pytest
import ray

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.distributed import ray_runtime
from nemo_rl_lora.distributed.ray_runtime import running_ray


def visible_gpus() -> str | None:
    return os.environ.get("CUDA_VISIBLE_DEVICES")


def test_the_gpu_of_the_process_that_trains_is_not_given_away(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    with running_ray(taken_gpus=1):
        assert visible_gpus() == "3,5"
        assert ray.get(ray.remote(num_gpus=0)(visible_gpus).remote()) == "5"
        ray_runtime._refuse_silent_cluster(ray.get_runtime_context().gcs_address)  # this one answers


@pytest.fixture
def other_servers():
    """Addresses where something else listens: a server of HTTP, and one that never says a word."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            yield [f"127.0.0.1:{port}" for port in (web.server_port, silent.getsockname()[1])]
        web.shutdown()


def test_a_cluster_that_does_not_answer_is_named(monkeypatch, other_servers):
    monkeypatch.setattr(ray_runtime, "_CONNECT_SECONDS", 2)
    for address in ("127.0.0.1:1", "no.such.host.invalid:6379", *other_servers):
        monkeypatch.setenv("RAY_ADDRESS", address)
        said = f"^RAY_ADDRESS='{address}': no Ray cluster answers there within 2 s"
        begun = time.monotonic()
        with pytest.raises(ConfigError, match=said), running_ray():
            pass
        assert time.monotonic() - begun < 20
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(ConfigError, match="is no address of a cluster that a driver can join"), running_ray():
        pass
    assert not ray.is_initialized()
