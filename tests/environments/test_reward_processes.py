"""Reward functions of one's own that are slow, broken or async: limits, processes, concurrency."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nemo_rl_lora.environments.processes import _Place
from tests.environments.own_rewards import is_running, own, prompt_of, wait_until

FAILING = """
import asyncio, os, re, signal, subprocess, sys, time

def fails(completion):
    match completion:
        case "exception": raise KeyError("absent")
        case "interrupt": raise KeyboardInterrupt
        case "sys.exit": sys.exit("no")
        case "os._exit": os._exit(3)
        case "abort": os.abort()
        case "segfault": os.kill(os.getpid(), signal.SIGSEGV)
        case "sleep": time.sleep(3600)
        case "loop":
            while True: pass
        case "regex": re.match("(a+)+$", "a" * 60 + "b")
        case "child": subprocess.run(["sleep", "3600"])
    return float(len(completion))

def reward(prompt, completion, row):
    return fails(completion)

async def awaited(prompt, completion, row):
    if completion == "await":
        await asyncio.sleep(3600)
    await asyncio.sleep(0)
    return fails(completion)
"""
SEEN = [  # completion, kind, text
    ("exception", "exceptions", r"raised KeyError \('absent'\)"),
    ("interrupt", "exceptions", r"raised KeyboardInterrupt \(\)"),
    ("sys.exit", "exits", r"raised SystemExit \(no\)"),
    ("os._exit", "exits", "left with exit code 3"),
    ("abort", "crashes", "was ended by SIGABRT"),
    ("segfault", "crashes", "was ended by SIGSEGV"),
]
OVERLAPPING = """
import asyncio, threading, time

inside, most, lock = 0, 0, threading.Lock()

def change(by):
    global inside, most
    with lock:
        inside += by
        most = max(most, inside)

async def awaited(prompt, completion, row):
    change(1)
    await asyncio.sleep(0.05)
    change(-1)
    return most

def plain(prompt, completion, row):
    change(1)
    time.sleep(0.05)
    change(-1)
    return most

def mixed(prompt, completion, row):
    plain(prompt, completion, row)
    return len(completion) + (1000 if most > 3 else 0)
"""
MEETING = """
import asyncio, sys
from pathlib import Path

WAITS = "import sys, time; from pathlib import Path; here = Path(sys.argv[1]); (here / sys.argv[2]).touch()"
WAITS += "; exec('while len(list(here.iterdir())) < 4: time.sleep(0.01)')"

async def reward(prompt, completion, row):
    here = Path(__file__).with_name("there")
    here.mkdir(exist_ok=True)
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", WAITS, str(here), completion)
    return await process.wait()
"""
TRL = "def reward(completions, **kwargs):\n    return [1.0] * len(completions)\n"


def cpu_ticks(pid):
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))


def found(*arguments):
    """Whether pgrep finds such a process."""
    return bool(subprocess.run(["pgrep", *arguments], capture_output=True).stdout)


def pids_of(environment):
    return environment._calls._workers.pids()


@pytest.fixture
def made(tmp_path):
    """Makes environments, which are closed at the end; then no process of theirs is left."""
    with contextlib.ExitStack() as cleanup:

        def make(source=FAILING, reference="reward", **block):
            environment = own(tmp_path, source, reference, **block)
            cleanup.callback(environment.close)
            return environment

        yield make
    assert not found("-P", str(os.getpid()), "-f", "environments.worker")


def scored(environment, *texts):
    return environment.score([prompt_of(index=i) for i in range(len(texts))], texts)


# failures


@pytest.mark.parametrize(("completion", "kind", "text"), SEEN)
def test_a_failure_names_the_row_and_the_completion(made, completion, kind, text):
    environment = made(num_workers=1)
    message = f"mine.py:reward': {text} for row 1 and the completion '{completion}'. Return"
    with pytest.raises(ValueError, match=message):
        scored(environment, "ok", completion)
    assert scored(environment, "ok").rewards == (2.0,)


@pytest.mark.parametrize("reference", ["reward", "awaited"])
def test_a_failure_of_any_kind_is_worth_what_was_said_and_counted_by_its_kind(made, reference):
    environment = made(reference=reference, num_workers=2, timeout_seconds=4.0, on_failure=-1)
    scores = scored(environment, "ok", *(completion for completion, _, _ in SEEN), "regex", "fine")
    assert scores.rewards == (2.0, *[-1.0] * 7, 4.0)
    expected = {"mine_exceptions": 2.0, "mine_exits": 2.0, "mine_crashes": 2.0, "mine_timeouts": 1.0}
    assert scores.metrics == expected


@pytest.mark.parametrize("hang", ["sleep", "loop", "regex", "child"])
def test_a_hang_is_ended_with_what_it_started(made, hang):
    environment = made(num_workers=1, timeout_seconds=2.0)
    assert scored(environment, "ok").rewards == (2.0,)
    (pid,) = pids_of(environment)
    message = rf"env.mine.timeout_seconds=2.0: .*mine.py:reward took longer for row 0 and the completion '{hang}'."
    with pytest.raises(ValueError, match=message + r" Allow it more, or set env.mine.on_failure"):
        scored(environment, hang)
    assert not is_running(pid)
    wait_until(lambda: not found("-s", str(pid)))
    assert scored(environment, "ok").rewards == (2.0,)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_async_function_is_cancelled_at_its_limit(made, num_workers):
    environment = made(reference="awaited", num_workers=num_workers, timeout_seconds=2.0, on_failure=0.25)
    scores = scored(environment, "ok", "await", "fine")
    assert scores.rewards == (2.0, 0.25, 4.0)
    assert scores.metrics["mine_timeouts"] == 1.0


@pytest.mark.parametrize("reference", ["reward", "awaited"])
def test_in_the_drivers_process_what_is_raised_is_worth_what_was_said(made, reference):
    environment = made(reference=reference, on_failure=0.5, concurrency=2)
    scores = scored(environment, "exception", "ok", "sys.exit", "interrupt")
    assert scores.rewards == (0.5, 2.0, 0.5, 0.5)
    assert (scores.metrics["mine_exceptions"], scores.metrics["mine_exits"]) == (2.0, 1.0)


def test_what_is_no_reward_is_an_error_whatever_a_failure_is_worth(made):
    source = "def reward(prompt, completion, row):\n    return float(completion)\n"
    environment = made(source, num_workers=1, on_failure=0.0)
    with pytest.raises(ValueError, match="returned nan for row 1 and the completion 'nan'. Return a finite number"):
        scored(environment, "1", "nan")


def test_calls_that_shared_a_process_with_a_crash_are_made_again(made):
    environment = made(reference="awaited", num_workers=1, concurrency=8, on_failure=-1)
    texts = ["a", "bb", "segfault", "ccc", "os._exit", "dddd"]
    for _ in range(3):
        assert scored(environment, *texts).rewards == (1.0, 2.0, -1.0, 3.0, -1.0, 4.0)


def test_a_call_that_comes_to_a_process_that_has_just_crashed_is_made_by_another(made, monkeypatch):
    environment = made(num_workers=1, on_failure=-1)
    assert scored(environment, "a").rewards == (1.0,)
    ready, killed = _Place.process, []

    def crashed_meanwhile(place):
        process = ready(place)
        if not killed:
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            wait_until(lambda: process._how is not None)
        return process

    monkeypatch.setattr(_Place, "process", crashed_meanwhile)
    assert scored(environment, "bb").rewards == (2.0,)
    assert killed


def test_a_connection_is_not_closed_while_a_request_is_sent(made):
    environment = made(num_workers=1)
    assert scored(environment, "a").rewards == (1.0,)
    process = environment._calls._workers._places[0].process()
    closed = []

    class Request:
        def __reduce__(self):  # the request is being made into bytes: next they are written to the descriptor
            os.kill(process.pid, signal.SIGKILL)
            wait_until(lambda: process._how is not None)
            time.sleep(0.2)
            closed.append(process._connection.closed)  # its number could be another connection's by now
            return int, ()

    assert process.call(Request(), seconds=60.0).text == "was ended by SIGKILL"
    assert closed == [False]
    wait_until(lambda: process._connection.closed)


def test_a_failed_call_for_a_whole_rollout_counts_every_completion(made):
    source = "import os\n\ndef reward(completions, **kwargs):\n"
    source += "    if 'bad' in completions:\n        os._exit(1)\n    return [len(each) for each in completions]\n"
    environment = made(source, num_workers=1, on_failure=-1)
    assert scored(environment, "a", "bb").rewards == (1.0, 2.0)
    scores = scored(environment, "a", "bad", "c")
    assert scores.rewards == (-1.0, -1.0, -1.0)
    assert scores.metrics["mine_exits"] == 3.0


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_traceback_of_the_function_goes_with_the_error(made, num_workers):
    with pytest.raises(ValueError) as error:
        scored(made(num_workers=num_workers), "exception")
    assert 'raise KeyError("absent")' in str(error.value.__cause__)


# the start


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import absent_package\n", r"importing .*mine.py raised ModuleNotFoundError .*. Correct the file"),
        ("raise KeyboardInterrupt\n", r"importing .*mine.py raised KeyboardInterrupt"),
        ("import os\nos._exit(5)\n", r"a process of its own left with exit code 5 while it imported .*mine.py."),
        ("import os\nos.abort()\n", r"a process of its own was ended by SIGABRT while it imported"),
        ("def rewrd(p, c, r):\n    return 1.0\n", "has no function 'reward'. It has: rewrd"),
    ],
)
def test_what_cannot_be_imported_in_a_worker_is_found_at_the_start(made, source, message):
    with pytest.raises(ValueError, match="env.mine.reward_function=.*" + message):
        made(source, num_workers=1)


@pytest.mark.parametrize(
    ("source", "block", "message"),
    [
        (
            FAILING,
            {"timeout_seconds": 2},
            r"timeout_seconds=2.0: .* is no async function .*Set env.mine.num_workers to",
        ),
        (
            FAILING,
            {"num_workers": 2, "concurrency": 3},
            "concurrency=3: .* each of num_workers=2 processes runs one call",
        ),
        (TRL, {"num_workers": 2}, "num_workers=2: .* takes `completions`, all of a rollout in one call. Set it to 1"),
        (TRL, {"concurrency": 4}, "concurrency=4: .* takes `completions`"),
    ],
)
def test_a_key_that_the_function_would_not_use_is_refused(made, source, block, message):
    with pytest.raises(ValueError, match="env.mine." + message):
        made(source, **block)


def test_a_worker_imports_no_torch_and_sees_the_drivers_path(made, monkeypatch, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "found_there.py").write_text("ONE = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    source = (
        "import sys\nfrom found_there import ONE\n\ndef reward(p, c, r):\n    return ONE + ('torch' in sys.modules)\n"
    )
    assert scored(made(source, num_workers=1), "text").rewards == (1.0,)


def test_the_digest_of_the_file_does_not_depend_on_where_it_runs(made):
    assert made(num_workers=1).code_digest() == made().code_digest() is not None


# concurrency


@pytest.mark.parametrize(
    ("reference", "block", "most"),
    [
        ("awaited", {"concurrency": 5}, 5),
        ("awaited", {}, 16),
        ("awaited", {"concurrency": 6, "num_workers": 1}, 6),
        ("awaited", {"concurrency": 6, "num_workers": 2}, 3),
        ("plain", {"concurrency": 4}, 4),
        ("plain", {}, 1),
        ("plain", {"num_workers": 2}, 1),
    ],
)
def test_so_many_calls_overlap_in_a_process_and_no_more(made, reference, block, most):
    environment = made(OVERLAPPING, reference, **block)
    assert max(scored(environment, *["text"] * 48).rewards) == most


def test_overlapping_rollouts_share_the_limit_and_get_their_own_rewards(made):
    environment = made(OVERLAPPING, "mixed", concurrency=3)
    texts = [["a" * (i + j) for i in range(9)] for j in range(4)]
    results = {}

    def score(j):
        results[j] = scored(environment, *texts[j]).rewards

    threads = [threading.Thread(target=score, args=(j,)) for j in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {j: tuple(float(len(text)) for text in texts[j]) for j in range(4)}


@pytest.mark.parametrize("block", [{"concurrency": 8}, {"num_workers": 2}])
def test_rewards_stand_in_the_order_of_the_completions_whichever_ends_first(made, block):
    source = "import time\n\ndef reward(prompt, completion, row):\n"
    source += "    time.sleep(0.01 * (7 - len(completion)))\n    return len(completion)\n"
    texts = ["a" * i for i in range(8)]
    assert scored(made(source, **block), *texts).rewards == tuple(float(i) for i in range(8))


@pytest.mark.parametrize(
    ("signature", "body"),
    [
        ("prompt, completion, row, token_ids", "row['k'] + len(completion)"),
        ("p, c, r", "r['k'] + len(c)"),
        ("completions, k, **kwargs", "[a + len(c) for a, c in zip(k, completions)]"),
        ("data_source, solution_str, ground_truth", "{'score': ground_truth + len(solution_str)}"),
    ],
)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_async_functions_of_every_form_are_awaited(made, signature, body, num_workers):
    source = f"import asyncio\n\nasync def reward({signature}):\n    await asyncio.sleep(0)\n    return {body}\n"
    environment = made(source, num_workers=num_workers)
    rows = [prompt_of(k=10 * i, ground_truth=10 * i) for i in range(3)]
    assert environment.score(rows, ["", "a", "bb"]).rewards == (0.0, 11.0, 22.0)


def test_an_object_with_an_async_call_is_awaited(made):
    source = (
        "class Judge:\n    async def __call__(self, prompt, completion, row):\n        return 1.0\n\nreward = Judge()\n"
    )
    assert scored(made(source), "text").rewards == (1.0,)


def test_async_functions_share_one_event_loop(made):
    source = "import asyncio\n\nloops = set()\n\nasync def reward(p, c, r):\n"
    source += "    loops.add(id(asyncio.get_running_loop()))\n    return len(loops)\n"
    environment = made(source)
    assert [scored(environment, "a", "b").rewards for _ in range(2)] == [(1.0, 1.0)] * 2


def test_programs_that_async_functions_start_run_at_once(made):
    """Each waits until all four are there."""
    assert scored(made(MEETING, concurrency=4), "a", "b", "c", "d").rewards == (0.0,) * 4


# the end


def test_a_call_in_flight_ends_when_the_environment_is_closed(made):
    environment = made(num_workers=1)
    messages = []

    def score():
        with pytest.raises(ValueError) as error:
            scored(environment, "regex")
        messages.append(str(error.value))

    thread = threading.Thread(target=score)
    thread.start()
    wait_until(lambda: cpu_ticks(pids_of(environment)[0]) > 100)  # it is in the call
    environment.close()
    thread.join(30)
    assert "was ended with the run for row 0" in messages[0]


def test_an_environment_that_nobody_closes_leaves_no_process(tmp_path):
    environment = own(tmp_path, FAILING, num_workers=1)
    (pid,) = pids_of(environment)
    del environment
    wait_until(lambda: not is_running(pid))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_worker_that_hangs_ends_with_the_process_that_started_it(tmp_path, number):
    (tmp_path / "mine.py").write_text(FAILING)
    program = (
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores\n"
        "from tests.environments.own_rewards import environment_of, prompt_of\n"
        f"environment = environment_of('mine', reward_function='{tmp_path / 'mine.py'}:reward', num_workers=2)\n"
        "print(*environment._calls._workers.pids(), flush=True)\n"
        "environment.score([prompt_of()] * 2, ['regex', 'regex'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        wait_until(lambda: cpu_ticks(pid) > 100)  # it is in the call
        process.send_signal(number)
        wait_until(lambda: not is_running(pid))
    assert process.returncode == -number
