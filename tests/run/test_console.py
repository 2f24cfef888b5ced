"""What a person sees: plain lines without a terminal, a bar on one, a summary at the end."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from nemo_rl_lora.run.console import KeyMetric, TrainingConsole, format_seconds, format_value, trend
from nemo_rl_lora.run.metrics import RolloutSample

METRICS = (
    KeyMetric(name="reward", higher_is_better=True),
    KeyMetric(name="loss", higher_is_better=False),
    KeyMetric(name="accuracy", split="validation", higher_is_better=True),
)


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def out():
    return io.StringIO()


def console(out, clock, **changes):
    return TrainingConsole(title="GRPO", num_steps=10, metrics=METRICS, file=out, now=clock, **changes)


def test_without_a_terminal_a_step_is_one_plain_line_with_the_metrics_in_order(out, clock):
    with console(out, clock) as view:
        view.stage("generating")
        clock.seconds = 30.0
        view.step(2, {"loss": 0.25, "reward": 0.5, "grad_norm": 3.0}, seconds=15.0)
    assert out.getvalue() == "step 2/10     reward 0.500  loss 0.250  15.0 s  2 min 00 s left\n"


def test_a_continued_run_estimates_from_its_own_steps(out, clock):
    with console(out, clock, first_step=8) as view:
        clock.seconds = 7.0
        view.step(9, {"reward": 0.5})
    assert "7 s left" in out.getvalue()


def test_a_missing_metric_is_left_out(out, clock):
    with console(out, clock) as view:
        view.step(10, {"loss": 1e-5})
    assert out.getvalue() == "step 10/10    loss 1.0e-05\n"


def test_long_lines_are_not_broken_without_a_terminal(out, clock):
    with console(out, clock) as view:
        view.say("x" * 300)
    assert out.getvalue() == "x" * 300 + "\n"


def test_markup_in_texts_is_shown_as_it_is(out, clock):
    with console(out, clock) as view:
        view.samples([RolloutSample(prompt="[bold]p[/]", completion="[red]\\n", reward=0.0, finish_reason="length")])
    assert "[bold]p[/]" in out.getvalue()
    assert "    [red]\\n" in out.getvalue()


def test_the_summary_says_first_last_best_where_and_how_to_go_on(out, clock):
    with console(out, clock) as view:
        for step, reward in ((1, 0.1), (2, 0.9), (3, 0.4)):
            view.step(step, {"reward": reward, "loss": 1.0 / step})
        view.validation(3, {"accuracy": 0.25})
        clock.seconds = 65.0
    view.summary(
        "stopped by SIGINT",
        log_directory=Path("logs/exp_001"),
        checkpoint=Path("results/step_3"),
        continue_command="uv run examples/run_grpo.py",
    )
    text = out.getvalue()
    assert "GRPO stopped by SIGINT: step 3 of 10, 1 min 05 s." in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line}
    assert rows["reward"] == ["0.100", "0.400", "0.900", "2"]
    assert rows["loss"] == ["1.000", "0.333", "0.333", "3"]
    assert re.search(r"validation accuracy +0.250 +0.250 +0.250 +3", text)
    assert re.search(r"Logs: +logs/exp_001\n", text)
    assert re.search(r"Checkpoint: +results/step_3\n", text)
    assert re.search(r"Continue with: +uv run examples/run_grpo.py\n", text)


def test_a_finished_run_has_nothing_to_continue(out, clock):
    with console(out, clock) as view:
        pass
    view.summary("completed", log_directory=Path("logs"))
    assert "Continue" not in out.getvalue()


def test_on_a_terminal_the_bar_shows_step_stage_time_and_trend(out, clock):
    view = console(out, clock)
    view.console = Console(file=out, force_terminal=True, width=160, color_system=None)
    with view:
        clock.seconds = 20.0
        view.step(1, {"reward": 0.1})
        view.step(2, {"reward": 0.9})
        view.stage("training")
    text = out.getvalue()
    for part in ("GRPO", "2/10", "training", "20 s elapsed", "1 min 20 s left", "▁█", "0.900"):
        assert part in text
    assert "step 1/10" in text


def test_the_bar_is_taken_down_after_an_exception(out, clock):
    view = console(out, clock)
    view.console = Console(file=out, force_terminal=True, width=100)
    with pytest.raises(KeyError), view:
        raise KeyError
    assert out.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in out.getvalue()  # the cursor is shown again


def test_the_trend_goes_from_lowest_to_highest():
    assert trend([0.0, 1.0, 0.5]) == "▁█▅"
    assert trend([2.0, 2.0]) == "▁▁"
    assert trend([float("nan")]) == ""
    assert len(trend(list(range(100)))) == 24


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.12345, "0.123"), (-1.5, "-1.500"), (123.45, "123.5"), (2.5e-6, "2.5e-06"), (3e7, "3.0e+07")],
)
def test_values_are_short(value, text):
    assert format_value(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(42.2, "42 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_times_are_read_at_a_glance(seconds, text):
    assert format_seconds(seconds) == text
