"""curves.png from metrics.jsonl."""

import json

from nemo_rl_lora.run.plots import curves_of, draw_curves, smoothed

PNG = b"\x89PNG\r\n\x1a\n"


def write_lines(directory, lines):
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def grpo_lines(num_steps):
    for step in range(1, num_steps + 1):
        timings = {"timing/generation": 2.0, "timing/policy_training": 1.0, "timing/total_step_time": 3.5}
        yield {"step": step, "split": "train", "loss": None, "reward": step / 9, "gen_kl_error": 0.0, **timings}
    yield {"step": num_steps, "split": "validation", "accuracy": 0.5}


def test_a_run_of_any_length_gives_a_picture(tmp_path):
    for num_steps in (1, 2, 50):
        write_lines(tmp_path, grpo_lines(num_steps))
        path = draw_curves(tmp_path)
        assert path == tmp_path / "curves.png"
        assert path.read_bytes().startswith(PNG)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_there_is_no_picture_without_a_metric_to_show(tmp_path):
    write_lines(tmp_path, [{"step": 1, "split": "train", "unknown": 1.0}])
    assert draw_curves(tmp_path) is None


def test_curves_are_by_split_and_leave_out_what_is_null():
    lines = [
        {"step": 1, "split": "train", "loss": 1.0},
        {"step": 2, "split": "train", "loss": None},
        {"step": 2, "split": "validation", "loss": 3},
        {"step": 3, "split": "train", "loss": 0.5},
    ]
    assert curves_of(lines) == {"train/loss": ([1, 3], [1.0, 0.5]), "validation/loss": ([2], [3.0])}


def test_smoothing_keeps_a_constant_and_evens_out_a_jump():
    assert smoothed([2.0] * 30) == [2.0] * 30
    assert smoothed([0.0, 0.0, 3.0, 0.0, 0.0])[1:4] == [1.0, 1.0, 1.0]
