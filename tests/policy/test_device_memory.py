"""What is free of a machine's memory, and what a computation takes of it."""

import pytest
import torch

from nemo_rl_lora.policy import device_memory

CPU = torch.device("cpu")
MIB = 2**20


def test_the_peak_is_what_lives_at_a_time_and_not_what_was_there_before():
    kept = [torch.zeros(MIB, dtype=torch.uint8)]

    def run():
        first = torch.zeros(3 * MIB, dtype=torch.uint8)
        del first
        kept.append(torch.zeros(2 * MIB, dtype=torch.uint8))
        _ = torch.zeros(4 * MIB, dtype=torch.uint8)

    assert device_memory.peak_bytes(CPU, run) == pytest.approx(6 * MIB, abs=4096)


def test_a_backward_pass_counts():
    x = torch.randn(256, 256, requires_grad=True)

    def run():
        (x.exp().sin().sum()).backward()

    # exp's and sin's outputs, both kept for the backward pass, and one gradient beside them at least
    assert device_memory.peak_bytes(CPU, run) >= 3 * x.nbytes


def test_the_profiler_is_off_again_after_an_error():
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            device_memory.peak_bytes(CPU, lambda: 1 / 0)


def group(directory, files):
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)


def test_the_limits_of_every_group_around_the_process_count(tmp_path):
    """cgroup v2, on a machine: the process's own group has no limit, the one around it has."""
    group(
        tmp_path / "slice" / "job", {"memory.max": "max\n", "memory.current": "5", "memory.stat": "inactive_file 1\n"}
    )
    group(
        tmp_path / "slice",
        {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 400\ninactive_file 300\n"},
    )
    own = tmp_path / "own"
    own.write_text("0::/slice/job\n")
    assert device_memory._limits_and_use(tmp_path, own) == [(1000, 400)]


def test_a_container_shows_its_own_group_as_the_root(tmp_path):
    """The kernel names a path that the container does not have."""
    group(tmp_path, {"memory.max": "1000", "memory.current": "100", "memory.stat": "inactive_file 0\n"})
    own = tmp_path / "own"
    own.write_text("0::/docker/0123\n")
    assert device_memory._limits_and_use(tmp_path, own) == [(1000, 100)]


def test_version_1_of_control_groups_is_read_too(tmp_path):
    files = {
        "memory.limit_in_bytes": "2000\n",
        "memory.usage_in_bytes": "900\n",
        "memory.stat": "total_inactive_file 5",
    }
    group(tmp_path / "memory" / "job", files)
    group(tmp_path / "memory", {**files, "memory.limit_in_bytes": "9223372036854771712\n"})  # none
    own = tmp_path / "own"
    own.write_text("5:cpu,cpuacct:/job\n4:memory:/job\n0::/\n")
    assert device_memory._limits_and_use(tmp_path, own) == [(2000, 895)]


def test_a_group_with_less_than_the_machine_decides(monkeypatch):
    monkeypatch.setattr(device_memory, "_limits_and_use", lambda: [(3 * 2**30, 2**30), (4 * 2**30, 2**30)])
    assert device_memory.free_bytes(CPU) == 2 * 2**30
    assert device_memory.describe(CPU) == "CPU with 3 GiB"
    monkeypatch.setattr(device_memory, "_limits_and_use", lambda: [(10, 20)])
    assert device_memory.free_bytes(CPU) == 0
