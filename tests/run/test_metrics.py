"""The log directory: numbering, metrics.jsonl, sinks, the stopwatch, and rollouts to read."""

import json
import sys
import types
from types import SimpleNamespace

import pytest
import torch

from nemo_rl_lora.config.logger import LoggerConfig, PlotConfig
from nemo_rl_lora.run.gpus import GpuMonitor, mean_of, sample_gpus
from nemo_rl_lora.run.metrics import RolloutSample, RunLog, Stopwatch, check_sinks, read_metrics


def run_log(directory, **changes):
    return RunLog(LoggerConfig(log_dir=str(directory), monitor_gpus=False, **changes), "seed: 1\n")


def sample(**changes):
    values = {"prompt": "2+2?", "completion": "4", "reward": 1.0, "finish_reason": "stop"} | changes
    return RolloutSample(**values)


def test_each_run_takes_the_next_number_and_keeps_its_configuration(tmp_path):
    (tmp_path / "exp_007").mkdir()
    (tmp_path / "exp_x").mkdir()
    directories = [run_log(tmp_path).directory.name for _ in range(2)]
    assert directories == ["exp_008", "exp_009"]
    assert (tmp_path / "exp_008" / "config.yaml").read_text() == "seed: 1\n"


def test_a_line_is_one_json_object_and_there_at_once(tmp_path):
    log = run_log(tmp_path)
    log.log(3, "train", {"loss": 0.02, "reward": torch.tensor(0.5), "num_tokens": 1200.0, "timing/generation": 2.5})
    log.log(3, "validation", {"accuracy": 0.4})
    lines = (log.directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 3, "split": "train", "loss": 0.02, "reward": 0.5, "num_tokens": 1200, "timing/generation": 2.5},
        {"step": 3, "split": "validation", "accuracy": 0.4},
    ]


def test_values_that_are_not_finite_become_null_with_one_warning(tmp_path, caplog):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    log = run_log(tmp_path)
    for step in (1, 2):
        log.log(step, "train", {"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 1e300})
    text = (log.directory / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert lines[0] == {"step": 1, "split": "train", "a": None, "b": None, "c": None, "d": 1e300}
    assert sum("metric a is nan" in message for message in caplog.messages) == 1


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    log = run_log(tmp_path)
    log.log(1, "train", {"loss": 1.0})
    with (log.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "sp')
    assert [line["step"] for line in read_metrics(log.directory)] == [1]


def test_tensorboard_reads_the_events_under_their_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = run_log(tmp_path, tensorboard_enabled=True)
    for step in (1, 2):
        log.log(step, "train", {"loss": step / 4, "timing/total_step_time": 2.0})
    log.log(2, "validation", {"accuracy": 0.75, "timing/total_validation_time": 3.0})
    log.close()
    events = EventAccumulator(str(log.directory / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "timing/train/total_step_time",
        "validation/accuracy",
        "timing/validation/total_validation_time",
    }
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.25), (2, 0.5)]


def test_tensorboard_goes_where_it_is_told(tmp_path):
    log = run_log(tmp_path, tensorboard_enabled=True, tensorboard={"log_dir": "events/here"})
    log.close()
    assert list((log.directory / "events" / "here").glob("events.out.*"))


@pytest.mark.parametrize("name", ["wandb", "mlflow", "swanlab"])
def test_a_sink_whose_package_is_missing_is_refused_with_the_remedy(tmp_path, name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(ValueError, match=rf"logger.{name}_enabled=True: the package {name} is not installed") as caught:
        run_log(tmp_path / "logs", **{f"{name}_enabled": True})
    assert "uv " in str(caught.value)
    assert f"logger.{name}_enabled=false" in str(caught.value)
    assert not (tmp_path / "logs").exists()


def test_loading_accepts_a_sink_whose_package_is_missing():
    assert LoggerConfig(wandb_enabled=True, wandb={"project": "sft-dev", "name": "x"}).wandb_enabled


class Calls(types.ModuleType):
    """Stands in for a sink's package: remembers the calls it got."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


@pytest.mark.parametrize(
    ("name", "section", "expected"),
    [
        ("wandb", {"project": "p", "name": "n"}, {"project": "p", "name": "n"}),
        ("swanlab", {"project": "p", "name": "n"}, {"project": "p", "experiment_name": "n"}),
        ("mlflow", {"experiment_name": "e", "run_name": "r"}, {"run_name": "r"}),
    ],
)
def test_a_sink_gets_its_settings_and_the_metrics_by_their_shown_names(tmp_path, name, section, expected, monkeypatch):
    package = Calls(name)
    monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: object())
    log = run_log(tmp_path, **{f"{name}_enabled": True, name: section})
    log.log(4, "train", {"loss": 0.5, "timing/generation": 1.0})
    log.close()
    opened = next(kwargs for call, _, kwargs in package.calls if call in ("init", "start_run"))
    assert expected.items() <= opened.items()
    logged = next((args, kwargs) for call, args, kwargs in package.calls if call in ("log", "log_metrics"))
    assert logged == (({"train/loss": 0.5, "timing/train/generation": 1.0},), {"step": 4})
    assert package.calls[-1][0] in ("finish", "end_run")


def test_a_log_directory_below_a_regular_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"logger.log_dir=.*: cannot be written \(Not a directory\)"):
        run_log(tmp_path / "file" / "logs")


def test_a_stopwatch_adds_up_by_name_and_starts_anew_when_taken():
    watch = Stopwatch()
    for _ in range(2):
        with watch.measure("generation"):
            pass
    watch.add("generation", 5.0)
    watch.add("weight_sync", 1.5)
    taken = watch.take()
    assert taken["timing/weight_sync"] == 1.5
    assert 5.0 < taken["timing/generation"] < 5.1
    assert watch.take() == {}


def test_a_stopwatch_counts_what_an_exception_cut_short():
    watch = Stopwatch()
    with pytest.raises(KeyError), watch.measure("generation"):
        raise KeyError
    assert "timing/generation" in watch.take()


def test_rollouts_can_be_read_with_prompt_completion_reward_and_reason(tmp_path):
    log = run_log(tmp_path, rollout_samples={"num_per_step": 1})
    log.log_rollouts(3, [sample(completion="# four\n`4`", reward=0.5, finish_reason="length"), sample(prompt="no")])
    text = (log.directory / "rollouts.md").read_text()
    assert "## Step 3, train, sample 1: reward 0.5 (length)" in text
    assert "    2+2?" in text
    assert "    # four\n    `4`" in text
    assert "no" not in text


def test_rollouts_follow_their_period_and_their_limit(tmp_path):
    log = run_log(tmp_path, rollout_samples={"period": 2, "max_megabytes": 0.02})
    for step in range(1, 40):
        log.log_rollouts(step, [sample(completion="word " * 3000)])
    text = (log.directory / "rollouts.md").read_text()
    assert "## Step 2," in text
    assert "## Step 3," not in text
    assert 20_000 <= len(text) < 30_000
    assert "more characters]" in text


def test_no_rollouts_are_written_where_none_are_asked_for(tmp_path):
    log = run_log(tmp_path, rollout_samples={"num_per_step": 0})
    log.log_rollouts(1, [sample()])
    assert not (log.directory / "rollouts.md").exists()


def has_nvidia_driver():
    import ctypes.util

    return ctypes.util.find_library("nvidia-ml") is not None


class TwoGpus:
    """NVML as two GPUs answer it. Nobody has compared it with real ones."""

    class NVMLError(Exception):
        pass

    nvmlMemory_v2 = 2  # noqa: N815
    nvmlInit = nvmlShutdown = staticmethod(lambda: None)  # noqa: N815
    nvmlDeviceGetCount = staticmethod(lambda: 2)  # noqa: N815
    nvmlDeviceGetHandleByIndex = staticmethod(lambda index: index)  # noqa: N815
    nvmlDeviceGetUtilizationRates = staticmethod(lambda gpu: SimpleNamespace(gpu=(37, 0)[gpu]))  # noqa: N815

    @staticmethod
    def nvmlDeviceGetMemoryInfo(gpu, version):  # noqa: N802
        assert version == TwoGpus.nvmlMemory_v2
        return SimpleNamespace(used=(2048, 512)[gpu] * 1024**2)


def test_gpus_become_named_values(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", TwoGpus)
    assert sample_gpus() == {
        "node.0.gpu.0.mem_gb": 2.0,
        "node.0.gpu.0.util": 37.0,
        "node.0.gpu.1.mem_gb": 0.5,
        "node.0.gpu.1.util": 0.0,
    }
    assert mean_of([{"a": 1.0}, {"a": 3.0, "b": 5.0}]) == {"a": 2.0, "b": 5.0}


def test_a_driver_that_fails_gives_no_sample(monkeypatch):
    def fail():
        raise TwoGpus.NVMLError("Driver/library version mismatch")

    monkeypatch.setitem(sys.modules, "pynvml", TwoGpus)
    monkeypatch.setattr(TwoGpus, "nvmlDeviceGetCount", staticmethod(fail))
    assert sample_gpus() == {}


@pytest.mark.skipif(has_nvidia_driver(), reason="there may be GPUs here")
def test_without_a_driver_there_is_no_sample():
    assert sample_gpus() == {}


def test_gpus_are_sampled_in_the_background_and_the_rest_is_recorded_at_the_end():
    import threading

    config = LoggerConfig(gpu_monitoring={"collection_interval": 0.01, "flush_interval": 60}).gpu_monitoring
    sampled, records = threading.Event(), []

    def take():
        sampled.set()
        return {"node.0.gpu.0.util": 50.0}

    monitor = GpuMonitor(config, records.append, take)
    assert sampled.wait(10)
    monitor.close()
    assert records == [{"node.0.gpu.0.util": 50.0}]


def test_nothing_is_imported_to_check_the_sinks():
    check_sinks(LoggerConfig(tensorboard_enabled=True))


def test_curves_are_drawn_every_period_of_training_steps(tmp_path):
    drawn = []
    config = LoggerConfig(log_dir=str(tmp_path), monitor_gpus=False, plot=PlotConfig(period=2))
    log = RunLog(config, "seed: 1\n", lambda directory: drawn.append((directory, len(read_metrics(directory)))))
    for step in range(1, 6):
        log.log(step, "train", {"loss": 1.0})
        log.log(step, "validation", {"accuracy": 1.0})
    log.close()
    assert drawn == [(log.directory, 3), (log.directory, 7)]
