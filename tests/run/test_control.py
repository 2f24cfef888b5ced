"""How runs end: exit codes, messages, and signals, in real processes."""

import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from nemo_rl_lora.run.control import StopRequest, main_guard, running

LOOP = """
    import sys, time
    from pathlib import Path
    from nemo_rl_lora.run.control import main_guard, running

    def main():
        with running() as stop:
            print("training", flush=True)
            for step in range(1000):
                time.sleep(0.05)
                if stop.requested:
                    Path(sys.argv[1]).write_text(f"saved after {stop.signal_name}")
                    time.sleep(float(sys.argv[2]))
                    break
        return stop.exit_code

    sys.exit(main_guard(main))
"""


def start(tmp_path, seconds_after_save=0.0):
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(LOOP), str(tmp_path / "saved"), str(seconds_after_save)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "training\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_save(tmp_path, number):
    process = start(tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert (tmp_path / "saved").read_text() == f"saved after {number.name}"
    assert f"{number.name}: finishing this step, then saving" in errors
    assert "Traceback" not in errors


def test_a_second_interrupt_stops_at_once(tmp_path):
    process = start(tmp_path, seconds_after_save=60.0)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Interrupted" in errors
    assert "Traceback" not in errors


def test_an_interrupt_that_arrives_twice_counts_once():
    clock = iter([10.0, 10.1, 11.0])
    stop = StopRequest(now=lambda: next(clock))
    stop.handle(signal.SIGINT)
    stop.handle(signal.SIGINT)
    assert (stop.requested, stop.exit_code) == (True, 130)
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT)


def test_a_second_terminate_changes_nothing():
    stop = StopRequest()
    stop.handle(signal.SIGTERM)
    stop.handle(signal.SIGTERM)
    assert (stop.signal_name, stop.exit_code) == ("SIGTERM", 143)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with running() as stop:
        assert signal.getsignal(signal.SIGTERM) == stop.handle
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_run_in_another_thread_has_no_handlers_and_works():
    import threading

    codes = []

    def train():
        with running() as stop:
            codes.append(stop.exit_code)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert codes == [0]


def test_the_code_of_main_is_returned():
    assert main_guard(lambda: 0) == 0
    assert main_guard(lambda: 143) == 143


def test_a_value_error_before_training_is_one_paragraph_and_code_2(capsys):
    def main():
        raise ValueError("policy.lora.dim=0: must be at least 1.\n\nGive a rank, such as 8.\n")

    assert main_guard(main) == 2
    assert capsys.readouterr().err == ("Error: policy.lora.dim=0: must be at least 1.\nGive a rank, such as 8.\n")


def test_a_value_error_while_training_is_a_failure_with_its_traceback_in_the_log(tmp_path, capsys):
    def main():
        with running(tmp_path):
            raise ValueError("shapes [2, 3] and [4] do not fit")

    assert main_guard(main) == 1
    errors = capsys.readouterr().err
    assert errors == (
        f"The run failed: shapes [2, 3] and [4] do not fit\nThe traceback is in {tmp_path / 'run.log'}.\n"
    )
    log = (tmp_path / "run.log").read_text()
    assert "Traceback" in log
    assert 'raise ValueError("shapes' in log


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            True,
        ),
        (MemoryError(), True),
        (RuntimeError("shapes [2, 3] and [4] do not fit"), False),
    ],
)
def test_a_run_without_memory_says_what_takes_less(error, is_memory, capsys, tmp_path):
    def main():
        with running(tmp_path):
            raise error

    assert main_guard(main) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"The run failed: {type(error).__name__}")
    assert ("policy.train_micro_batch_size" in said) == is_memory


def test_the_type_is_named_where_the_message_says_too_little(capsys):
    def main():
        with running():
            raise FloatingPointError("loss is nan in step 3")

    assert main_guard(main) == 1
    errors = capsys.readouterr().err
    assert "The run failed: FloatingPointError: loss is nan in step 3" in errors
    assert "Traceback" in errors  # there is no log to put it in


def test_a_failure_whose_log_cannot_be_written_shows_its_traceback(tmp_path, capsys):
    def main():
        with running(tmp_path / "missing"):
            raise OSError(28, "No space left on device")

    assert main_guard(main) == 1
    errors = capsys.readouterr().err
    assert "Traceback" in errors
    assert "The run failed: No space left on device" in errors


def test_a_bug_before_training_is_no_configuration_error(capsys):
    assert main_guard(lambda: {}["missing"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_before_training_is_130(capsys):
    def main():
        raise KeyboardInterrupt

    assert main_guard(main) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_messages_of_the_run_are_in_its_log(tmp_path):
    import logging

    with running(tmp_path):
        logging.getLogger("nemo_rl_lora.anything").warning("the metric is nan")
    logging.getLogger("nemo_rl_lora.anything").warning("afterwards")
    assert "the metric is nan" in (tmp_path / "run.log").read_text()
    assert "afterwards" not in (tmp_path / "run.log").read_text()
