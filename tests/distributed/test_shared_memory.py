"""Files for other processes of this machine: gone with the context, and with a process that is killed."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from nemo_rl_lora.distributed.shared_memory import (
    OWNER_FILE,
    owned_directory,
    remove_leftovers,
    shared_directory,
)

HOLD = """
import sys, time
from nemo_rl_lora.distributed.shared_memory import shared_directory
others = [open("/dev/null") for _ in range(20)]  # as in a process that has many files open
with shared_directory("nrl-test-") as path:
    (path / "file").write_text("x")
    print(path, flush=True)
    time.sleep(100)
"""


def test_a_directory_ends_with_its_context():
    with shared_directory("nrl-test-") as path:
        (path / "file").write_text("x")
    assert not path.exists()


def test_a_directory_ends_with_its_process():
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    assert (path / "file").exists()
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while path.exists():
        assert time.monotonic() < deadline, "the directory outlived its process"
        time.sleep(0.02)


def test_a_directory_needs_room():
    with shared_directory("nrl-test-", num_bytes=2**60) as path:
        assert Path("/dev/shm") not in path.parents


OWN = """
import time
from nemo_rl_lora.distributed.shared_memory import owned_directory, shared_memory
with owned_directory("nrl-test-") as one, owned_directory("nrl-test-", shared_memory()) as other:
    (one / "sub").mkdir()
    (one / "sub" / "file").write_text("x")
    print(one, other, flush=True)
    time.sleep(100)
"""


def test_what_a_killed_process_left_is_removed_by_the_next_start_and_what_a_living_one_has_is_not(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", OWN], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    (killed, living) = [[Path(name) for name in process.stdout.readline().split()] for process in processes]
    users = Path(tempfile.mkdtemp(prefix="nrl-"))
    link = users.with_name(users.name + "-link")
    link.symlink_to(killed[0])
    processes[0].kill()
    processes[0].wait()
    assert all(path.exists() for path in killed)
    try:
        with owned_directory("nrl-test-") as own:
            remove_leftovers()
            assert [path.exists() for path in (*killed, *living, own, users)] == [False] * 2 + [True] * 4
            assert link.is_symlink()
    finally:
        processes[1].kill()
        processes[1].wait()
        users.rmdir()
        link.unlink()
    remove_leftovers()
    assert not any(path.exists() for path in living)


def test_a_process_with_the_same_number_is_another_one():
    with owned_directory("nrl-test-") as path:
        pass
    path.mkdir()
    (path / OWNER_FILE).write_text(f"{os.getpid()} 1000.0\n")
    remove_leftovers()
    assert not path.exists()


MAPPING = """
import sys, time
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
resource_tracker.register = lambda *arguments: None  # which would remove it too
from nemo_rl_lora.distributed.shared_memory import mapped_files, removed_at_end
shared = SharedMemory(create=True, size=4096)
found = mapped_files(("psm_",))
with removed_at_end([Path(path) for path in found]):
    print(*found, flush=True)
    time.sleep(60)
"""


def test_files_that_a_process_has_mapped_end_with_it_when_it_is_killed():
    process = subprocess.Popen([sys.executable, "-c", MAPPING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    assert path.name.startswith("psm_")
    assert path.exists()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
