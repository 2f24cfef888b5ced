"""Step directories: whole or absent, ranked, found again, refused where they do not fit."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from nemo_rl_lora.checkpoints.durable_files import make_unfinished
from nemo_rl_lora.checkpoints.record import TrainingInfo, config_differences
from nemo_rl_lora.checkpoints.steps import Checkpointer, CheckpointWriteError, SaveDeadline, is_finished
from nemo_rl_lora.config.checkpointing import CheckpointingConfig
from tests.children import exit_code, started

CONFIG = {
    "policy": {"lr": 1e-5, "lora": {"dim": 8, "targets": ["q_proj"]}},
    "grpo": {"max_num_steps": 10, "val_period": 5, "seed": 1},
    "logger": {"log_dir": "logs"},
}


def settings(directory, **changes):
    return CheckpointingConfig(checkpoint_dir=str(directory), **changes)


def checkpointer(directory, config=None, **changes):
    return Checkpointer(settings(directory, **changes), CONFIG if config is None else config)


def write_policy(directory):
    (directory / "policy" / "adapter").mkdir(parents=True)
    (directory / "policy" / "adapter" / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 8)
    (directory / "policy" / "optimizer").mkdir()
    (directory / "policy" / "optimizer" / "adapter.safetensors").write_bytes(b"moments" * 50)


def info(step, **values):
    return TrainingInfo(step=step, phase="grpo", **values)


def saved_steps(directory):
    return sorted(int(path.name.removeprefix("step_")) for path in directory.glob("step_*"))


def test_a_step_holds_the_records_and_what_the_policy_wrote(tmp_path):
    keeper = checkpointer(tmp_path / "run")
    keeper.prepare()
    path = keeper.save(
        info(3, epoch=1, data_position={"next": 48}, counters={"num_tokens": 9.0}, metrics={"train:reward": 0.5}),
        write_policy,
    )
    assert path == tmp_path / "run" / "step_3"
    files = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert files == {
        "training_info.json",
        "config.yaml",
        "checksums.json",
        "policy/adapter/adapter_model.safetensors",
        "policy/optimizer/adapter.safetensors",
    }
    record = json.loads((path / "training_info.json").read_text())
    assert record["step"] == 3
    assert record["data_position"] == {"next": 48}
    assert record["versions"]["torch"]
    assert yaml.safe_load((path / "config.yaml").read_text()) == CONFIG
    assert not list((tmp_path / "run").glob("tmp_*"))


def test_what_was_saved_is_found_with_everything_needed_to_go_on(tmp_path):
    before = info(3, epoch=1, data_position={"next": 48}, counters={"n": 2}, metrics={"val:accuracy": 0.25})
    checkpointer(tmp_path).save(before, write_policy)
    point = checkpointer(tmp_path).find_resume()
    assert point is not None
    assert (point.step, point.info.epoch, point.info.data_position) == (3, 1, {"next": 48})
    assert point.info.metrics == {"val:accuracy": 0.25}
    assert (point.info.versions, point.path) == (before.versions, tmp_path / "step_3")


def test_an_empty_or_missing_directory_is_a_new_run(tmp_path):
    assert checkpointer(tmp_path / "nothing").find_resume() is None
    assert not (tmp_path / "nothing").exists()


def test_the_newest_step_is_chosen_by_number_not_by_name(tmp_path):
    keeper = checkpointer(tmp_path)
    for step in (9, 10, 2):
        keeper.save(info(step), write_policy)
    assert checkpointer(tmp_path).find_resume().step == 10


def test_a_kill_between_writing_and_renaming_leaves_the_step_before(tmp_path):
    program = f"""
        import os, pathlib, signal
        from nemo_rl_lora.checkpoints.record import TrainingInfo
        from nemo_rl_lora.checkpoints.steps import Checkpointer
        from nemo_rl_lora.config.checkpointing import CheckpointingConfig
        keeper = Checkpointer(CheckpointingConfig(checkpoint_dir={str(tmp_path)!r}), {CONFIG!r})
        write = lambda path: (path / "weights").write_bytes(b"w" * 100)
        keeper.save(TrainingInfo(step=1, phase="grpo"), write)
        pathlib.Path.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        keeper.save(TrainingInfo(step=2, phase="grpo"), write)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, timeout=300)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "tmp_step_2" / "checksums.json").exists()
    keeper = checkpointer(tmp_path)
    assert keeper.find_resume().step == 1
    keeper.prepare()
    assert not list(tmp_path.glob("tmp_*"))


def test_an_exception_while_writing_leaves_no_debris(tmp_path):
    def fail(directory):
        write_policy(directory)
        raise RuntimeError("lost a rank")

    keeper = checkpointer(tmp_path)
    keeper.save(info(1), write_policy)
    with pytest.raises(RuntimeError, match="lost a rank"):
        keeper.save(info(2), fail)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_saving_a_step_again_replaces_it(tmp_path):
    keeper = checkpointer(tmp_path)
    keeper.save(info(4, reason="period"), write_policy)
    keeper.save(info(4, reason="end"), write_policy)
    assert checkpointer(tmp_path).find_resume().info.reason == "end"
    assert [path.name for path in tmp_path.iterdir()] == ["step_4"]


@pytest.mark.parametrize(
    ("higher", "kept"),
    [(True, [2, 3, 5]), (False, [1, 4, 5])],
)
def test_keep_top_k_ranks_by_the_metric_and_keeps_the_newest(tmp_path, higher, kept):
    keeper = checkpointer(tmp_path, keep_top_k=2, metric_name="val:accuracy", higher_is_better=higher)
    for step, accuracy in ((1, 0.1), (2, 0.9), (3, 0.8), (4, 0.2), (5, 0.5)):
        keeper.save(info(step, metrics={"val:accuracy": accuracy}), write_policy)
    assert saved_steps(tmp_path) == kept
    assert keeper.best_step().name == ("step_2" if higher else "step_1")
    assert not list(tmp_path.glob("tmp_*"))


def test_keep_top_k_without_a_metric_keeps_the_newest(tmp_path):
    keeper = checkpointer(tmp_path, keep_top_k=2)
    for step in range(1, 6):
        keeper.save(info(step), write_policy)
    assert saved_steps(tmp_path) == [4, 5]


def test_a_metric_that_is_not_finite_ranks_last(tmp_path):
    keeper = checkpointer(tmp_path, keep_top_k=1, metric_name="train:reward")
    for step, reward in ((1, float("nan")), (2, 0.1), (3, float("inf")), (4, 0.0)):
        keeper.save(info(step, metrics={"train:reward": reward}), write_policy)
    assert saved_steps(tmp_path) == [2, 4]
    assert "NaN" not in (tmp_path / "step_4" / "training_info.json").read_text()


def test_a_step_without_validation_ranks_last_and_is_no_error(tmp_path):
    keeper = checkpointer(tmp_path, keep_top_k=1, metric_name="val:accuracy")
    keeper.save(info(1, metrics={"val:accuracy": 0.0}), write_policy)
    keeper.save(info(2, metrics={"train:reward": 1.0}), write_policy)
    assert saved_steps(tmp_path) == [1, 2]


def test_a_metric_name_that_does_not_exist_is_an_error_that_lists_those_that_do(tmp_path):
    keeper = checkpointer(tmp_path, keep_top_k=1, metric_name="val:acuracy")
    with pytest.raises(ValueError, match=r"metric_name='val:acuracy'.*train:reward, val:accuracy"):
        keeper.save(info(1, metrics={"val:accuracy": 0.0, "train:reward": 1.0}), write_policy)
    assert saved_steps(tmp_path) == [1]


@pytest.mark.parametrize(
    "file", ["policy/adapter/adapter_model.safetensors", "policy/optimizer/adapter.safetensors", "config.yaml"]
)
@pytest.mark.parametrize("harm", ["flip", "truncate", "remove"])
def test_a_damaged_file_is_named_with_the_ways_out(tmp_path, file, harm):
    keeper = checkpointer(tmp_path)
    keeper.save(info(1), write_policy)
    path = keeper.save(info(2), write_policy) / file
    data = bytearray(path.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif harm == "truncate":
        path.write_bytes(data[:-1])
    else:
        path.unlink()
    with pytest.raises(ValueError) as caught:
        checkpointer(tmp_path).find_resume()
    message = str(caught.value)
    assert str(path) in message
    assert "load_path=none" in message
    assert f"Remove {tmp_path / 'step_2'}" in message


@pytest.mark.parametrize("file", ["training_info.json", "checksums.json"])
@pytest.mark.parametrize("contents", [None, b"", b"[]", b'{"step": 2', b"\xff\xfe"])
def test_damaged_records_are_named(tmp_path, file, contents):
    path = checkpointer(tmp_path).save(info(2), write_policy) / file
    path.unlink() if contents is None else path.write_bytes(contents)
    with pytest.raises(ValueError, match=f"step_2/{file}: .*damaged"):
        checkpointer(tmp_path).find_resume()


def damage(path, file="policy/adapter/adapter_model.safetensors"):
    data = bytearray((path / file).read_bytes())
    data[0] ^= 1
    (path / file).write_bytes(data)


def test_only_on_damage_previous_goes_back_to_the_newest_whole_step(tmp_path, caplog):
    keeper = checkpointer(tmp_path)
    paths = [keeper.save(info(step), write_policy) for step in (1, 2, 3, 4)]
    damage(paths[3])
    (paths[2] / "training_info.json").unlink()
    with pytest.raises(ValueError, match="step_4/policy.*sha256 differs.*on_damage=previous"):
        checkpointer(tmp_path).find_resume()
    going_back = checkpointer(tmp_path, on_damage="previous")

    assert going_back.find_resume().step == 2

    assert "step_4/policy/adapter/adapter_model.safetensors has other contents" in caplog.text
    assert "step_3/training_info.json is missing" in caplog.text
    going_back.save(info(3), write_policy)
    assert saved_steps(tmp_path) == [1, 2, 3]
    assert saved_steps(tmp_path / "set_aside_001") == [3, 4]  # nothing is deleted
    assert checkpointer(tmp_path).find_resume().step == 3


def test_on_damage_previous_goes_back_from_a_step_that_was_named_too(tmp_path):
    keeper = checkpointer(tmp_path)
    for step in (1, 2, 3):
        path = keeper.save(info(step), write_policy)
        damage(path) if step == 2 else None
    named = checkpointer(tmp_path, on_damage="previous", load_path=str(tmp_path / "step_2"))
    assert named.find_resume().step == 1


def test_where_no_step_is_whole_the_run_stops(tmp_path):
    damage(checkpointer(tmp_path).save(info(1), write_policy))
    with pytest.raises(ValueError, match="step_1/policy.*damaged"):
        checkpointer(tmp_path, on_damage="previous").find_resume()


def test_another_configuration_is_no_damage(tmp_path):
    for step, rate in ((1, 1e-5), (2, 1e-3)):
        checkpointer(tmp_path, changed(policy__lr=rate)).save(info(step), write_policy)
    with pytest.raises(ValueError, match="policy.lr was 0.001, is 1e-05"):
        checkpointer(tmp_path, changed(policy__lr=1e-5), on_damage="previous").find_resume()


def _killed_while_it_replaces(directory: Path) -> None:
    rename = Path.rename

    def killed(path, name):  # the name was taken away, and not yet given to the new one
        if path.name == "tmp_step_1":
            os._exit(9)
        return rename(path, name)

    keeper = checkpointer(directory)
    keeper.save(info(1), write_policy)
    Path.rename = killed
    keeper.save(info(1), write_policy)


def test_a_kill_while_a_step_is_replaced_keeps_it(tmp_path):
    assert exit_code(started(_killed_while_it_replaces, tmp_path)) == 9
    assert {path.name for path in tmp_path.iterdir()} == {"tmp_old_step_1", "tmp_step_1"}
    keeper = checkpointer(tmp_path)
    keeper.prepare()
    assert keeper.find_resume().step == 1
    assert {path.name for path in tmp_path.iterdir()} == {"step_1", ".lock"}


def metrics_of(path):
    return json.loads((path / "training_info.json").read_text())["metrics"]


def test_what_is_measured_after_a_save_is_added_to_the_step_and_ranks_it(tmp_path):
    ranked = {"metric_name": "eval:sums/accuracy", "higher_is_better": True, "keep_top_k": 1}
    keeper = checkpointer(tmp_path, **ranked)
    path = keeper.save(info(1, metrics={"train:loss": 2.0}), write_policy)
    (path / "notes.txt").write_text("mine")
    weights = (path / "policy" / "adapter" / "adapter_model.safetensors").stat().st_ino

    keeper.add_metrics(path, {"eval:sums/accuracy": 0.9, "eval:sums/other": float("nan")})

    assert metrics_of(path) == {"train:loss": 2.0, "eval:sums/accuracy": 0.9, "eval:sums/other": None}
    assert (path / "policy" / "adapter" / "adapter_model.safetensors").stat().st_ino == weights  # nothing is copied
    assert (path / "notes.txt").read_text() == "mine"
    point = checkpointer(tmp_path).find_resume()  # verifies every file
    assert (point.step, point.info.reason) == (1, "period")
    assert [entry.name for entry in tmp_path.iterdir()] == ["step_1"]
    for step in (2, 3):
        keeper.save(info(step, metrics={"eval:sums/accuracy": 0.1}), write_policy)
    assert saved_steps(tmp_path) == [1, 3]
    damage(path)
    keeper.add_metrics(path, {"eval:sums/accuracy": 0.8})
    with pytest.raises(ValueError, match="adapter_model.safetensors: has"):  # what was damaged stays so
        checkpointer(tmp_path, load_path=str(path)).find_resume()


@pytest.mark.parametrize("at", ["tmp_step_1", "step_1"])
def test_a_kill_while_metrics_are_added_keeps_the_step(tmp_path, at):
    """Before the step's name is taken away, and before it is given to the new one."""
    assert exit_code(started(_killed_while_it_adds, tmp_path, at)) == 9
    keeper = checkpointer(tmp_path)
    keeper.prepare()
    point = keeper.find_resume()
    assert point.info.metrics == {"train:loss": 2.0}
    assert {path.name for path in tmp_path.iterdir()} == {"step_1", ".lock"}
    keeper.add_metrics(point.path, {"val:loss": 1.0})
    assert checkpointer(tmp_path).find_resume().info.metrics == {"train:loss": 2.0, "val:loss": 1.0}


def _killed_while_it_adds(directory: Path, at: str) -> None:
    rename = Path.rename
    keeper = checkpointer(directory)
    path = keeper.save(info(1, metrics={"train:loss": 2.0}), write_policy)
    Path.rename = lambda path, name: os._exit(9) if path.name == at else rename(path, name)
    keeper.add_metrics(path, {"val:loss": 1.0})


def test_metrics_that_cannot_be_added_are_said_and_the_step_stays(tmp_path, monkeypatch, caplog):
    path = checkpointer(tmp_path / "run").save(info(1, metrics={"train:loss": 2.0}), write_policy)
    caplog.clear()  # of what a save says where an earlier test has set up logging

    checkpointer(tmp_path / "other").add_metrics(path, {"val:loss": 1.0})  # another run's
    assert metrics_of(path) == {"train:loss": 2.0}
    assert not caplog.records

    def no_links(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    checkpointer(tmp_path / "run").add_metrics(path, {"val:loss": 1.0})
    assert "could not be added to it ([Errno 1] Operation not permitted)" in caplog.text
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["step_1"]
    assert checkpointer(tmp_path / "run").find_resume().info.metrics == {"train:loss": 2.0}


# What a user may have in checkpoint_dir, under any name that a save uses.
OWN = (
    "tmp_notes/a",
    "tmp_step_3/a",
    "tmp_old_step_2/a",
    "tmp_removed_step_1/a",
    "tmp_export_x/a",
    "step_4/a",
    "step_9/a",
)


def test_only_what_this_product_began_is_removed(tmp_path, caplog):
    for name in OWN:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("mine")
    (tmp_path / "tmp_file").write_text("mine")
    (tmp_path / "tmp_step_2").symlink_to(tmp_path / "tmp_notes")
    (tmp_path / "tmp_dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "step_5").write_text("mine")
    keeper = checkpointer(tmp_path, keep_top_k=1)
    keeper.prepare()
    assert keeper.find_resume() is None

    for step in range(1, 7):
        keeper.save(info(step), write_policy)

    moved = tmp_path / "set_aside_001" / "step_4" / "a", tmp_path / "set_aside_002" / "step_5"
    kept = [tmp_path / name for name in (*OWN, "tmp_file", "tmp_step_2/a") if name != "step_4/a"]
    assert [path.read_text() for path in (*kept, *moved)] == ["mine"] * (len(kept) + 2)
    assert (tmp_path / "tmp_dangling").is_symlink()
    assert checkpointer(tmp_path).find_resume().step == 6
    assert saved_steps(tmp_path) == [6, 9]
    assert f"{tmp_path / 'step_9'} has the name of a checkpoint and is none: it is left alone" in caplog.text


def test_copies_of_a_step_and_of_an_unfinished_one_are_their_makers(tmp_path):
    keeper = checkpointer(tmp_path, keep_top_k=1)
    first = keeper.save(info(1), write_policy)
    for name in ("step_8", "tmp_best", "tmp_step_1", "tmp_old_step_1"):
        shutil.copytree(first, tmp_path / name)
    shutil.copytree(make_unfinished(tmp_path / "tmp_step_2"), tmp_path / "tmp_rescued")
    names = {path.name for path in tmp_path.iterdir()}

    keeper.prepare()
    for step in (2, 3):
        keeper.save(info(step), write_policy)

    assert {path.name for path in tmp_path.iterdir()} == names - {"step_1", "tmp_step_2"} | {"step_3", ".lock"}


@pytest.mark.parametrize("checksums", ["whole", "missing", "damaged"])
def test_what_others_put_into_a_step_outlives_it(tmp_path, checksums, caplog):
    """Beside it, where keep_top_k removes the step, and where the step is saved again."""
    keeper = checkpointer(tmp_path, keep_top_k=1)
    for number in (1, 2):
        path = keeper.save(info(number), write_policy)
        (path / "notes.txt").write_text("mine")
        (path / "policy" / "adapter" / "merged").mkdir()
        (path / "policy" / "adapter" / "merged" / "model.gguf").write_text("mine")
        (path / "policy" / "adapter" / "empty").mkdir()
        (path / "latest").symlink_to(tmp_path)
        if checksums != "whole":
            (path / "checksums.json").write_text("{") if checksums == "damaged" else (path / "checksums.json").unlink()
        keeper.save(info(number + 1), write_policy)
    keeper.save(info(3), write_policy)
    (tmp_path / "step_3" / "notes.txt").write_text("mine")
    keeper.add_metrics(tmp_path / "step_3", {"train:reward": 1.0})
    assert (tmp_path / "step_3" / "notes.txt").read_text() == "mine"
    keeper.save(info(3), write_policy)

    kept = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("kept_from_*/**/*") if not path.is_dir()}
    inside = ("notes.txt", "policy/adapter/merged/model.gguf")
    assert {name for name in kept if name.endswith(inside)} == {
        *(f"kept_from_step_{number}/{name}" for number in (1, 2) for name in inside),
        "kept_from_step_3/notes.txt",
    }
    assert (tmp_path / "kept_from_step_1" / "latest").is_symlink()
    assert (len(kept) == 5) == (checksums == "whole")
    assert saved_steps(tmp_path) == [3]
    assert not list(tmp_path.glob("tmp_*"))
    assert f"{tmp_path / 'step_1'}: what it held besides its own files was moved to" in caplog.text


def make_base(path, index, step=2):
    path.mkdir()
    (path / "phase_base.json").write_text(json.dumps({"step": step, "index": index}))


@pytest.mark.parametrize("name", ["base_of_phase_2_my_backup", "base_of_phase_3", "base_of_phase_02", "base_of_phase_"])
def test_a_copy_of_a_base_is_its_makers(tmp_path, name):
    make_base(tmp_path / "base_of_phase_2", index=1)
    make_base(tmp_path / name, index=1)
    checkpointer(tmp_path, load_path="none").save(info(3), write_policy)
    assert (tmp_path / "set_aside_001" / "base_of_phase_2").is_dir()
    make_base(tmp_path / "base_of_phase_2", index=1)
    keeper = checkpointer(tmp_path)
    keeper.find_resume()
    keeper.save(info(4), write_policy)
    assert not (tmp_path / "base_of_phase_2").exists()
    assert (tmp_path / name / "phase_base.json").is_file()


def test_a_step_of_another_product_is_no_step(tmp_path):
    (tmp_path / "step_2").mkdir()
    (tmp_path / "step_2" / "training_info.json").write_text('{"epoch": 0, "step": 2}')
    assert checkpointer(tmp_path).find_resume() is None
    with pytest.raises(ValueError, match="is no checkpoint"):
        checkpointer(tmp_path, load_path=str(tmp_path / "step_2")).find_resume()


@pytest.mark.parametrize("contents", ["mine", None])
def test_a_file_in_the_place_of_the_lock_is_left_alone(tmp_path, contents, caplog):
    own = tmp_path / "own"
    own.write_text("mine")
    if contents is None:
        (tmp_path / ".lock").symlink_to(own)
    else:
        (tmp_path / ".lock").write_text(contents)
    keeper = checkpointer(tmp_path)
    keeper.prepare()
    keeper.close()
    assert [own.read_text(), (tmp_path / ".lock").read_text()] == ["mine", "mine"]
    assert "is no lock of this product's" in caplog.text


def test_after_the_damaged_step_is_removed_the_one_before_is_found(tmp_path):
    keeper = checkpointer(tmp_path)
    keeper.save(info(1), write_policy)
    shutil.rmtree(keeper.save(info(2), write_policy))
    assert checkpointer(tmp_path).find_resume().step == 1


def changed(**dotted):
    config = json.loads(json.dumps(CONFIG))
    for key, value in dotted.items():
        *sections, name = key.split("__")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return config


def test_another_configuration_is_refused_with_keys_values_and_ways_out(tmp_path):
    checkpointer(tmp_path).save(info(1), write_policy)
    other = changed(policy__lr=3e-4, policy__lora__dim=16, policy__new=True)
    with pytest.raises(ValueError) as caught:
        checkpointer(tmp_path, other).find_resume()
    message = str(caught.value)
    assert "policy.lr was 1e-05, is 0.0003" in message
    assert "policy.lora.dim was 8, is 16" in message
    assert "policy.new was '<absent>', is True" in message
    assert "load_path=none" in message
    assert "another checkpointing.checkpoint_dir" in message
    assert message.startswith("checkpointing.checkpoint_dir=")


@pytest.mark.parametrize(
    "change",
    [
        {"grpo__max_num_steps": 500},
        {"grpo__val_period": 0},
        {"logger__log_dir": "elsewhere"},
        {"logger__wandb__name": "again"},
        {"cluster__num_nodes": 4},
        {"checkpointing__save_period": 3},
        {"checkpointing__keep_top_k": None},
        {"checkpointing__load_path": "auto"},
    ],
)
def test_logger_cluster_steps_and_periods_may_change(tmp_path, change):
    checkpointer(tmp_path).save(info(1), write_policy)
    assert checkpointer(tmp_path, changed(**change)).find_resume().step == 1


@pytest.mark.parametrize(
    "change", [{"grpo__seed": 2}, {"policy__lora__targets": ["q_proj", "k_proj"]}, {"loggers__log_dir": "x"}]
)
def test_anything_else_may_not_change(tmp_path, change):
    checkpointer(tmp_path).save(info(1), write_policy)
    with pytest.raises(ValueError, match="another configuration"):
        checkpointer(tmp_path, changed(**change)).find_resume()


def test_a_configuration_equals_itself_after_yaml(tmp_path):
    config = {"betas": (0.9, 0.999), "lr": 5e-06, "big": 10000000000, "none": None, "text": "1e-5", "empty": {}}
    checkpointer(tmp_path, config).save(info(1), write_policy)
    assert checkpointer(tmp_path, config).find_resume().step == 1
    assert config_differences(config, config | {"empty": {"a": 1}}) != {}


def test_load_path_none_starts_anew_and_sets_old_steps_aside(tmp_path):
    old = checkpointer(tmp_path)
    for step in (1, 2):
        old.save(info(step), write_policy)
    keeper = checkpointer(tmp_path, changed(policy__lr=1.0), load_path="none")
    assert keeper.find_resume() is None
    assert saved_steps(tmp_path) == [1, 2]  # nothing moves before the first save
    keeper.save(info(1), write_policy)
    assert saved_steps(tmp_path) == [1]
    assert saved_steps(tmp_path / "set_aside_001") == [1, 2]
    keeper.save(info(2), write_policy)
    assert saved_steps(tmp_path) == [1, 2]
    assert checkpointer(tmp_path, changed(policy__lr=1.0)).find_resume().step == 2


def test_load_path_names_a_step_and_later_steps_are_set_aside(tmp_path):
    old = checkpointer(tmp_path)
    for step in (1, 2, 3):
        old.save(info(step), write_policy)
    keeper = checkpointer(tmp_path, load_path=str(tmp_path / "step_2"))
    assert keeper.find_resume().step == 2
    keeper.save(info(3), write_policy)
    assert saved_steps(tmp_path) == [1, 2, 3]
    assert saved_steps(tmp_path / "set_aside_001") == [3]


def test_load_path_names_the_directory_of_another_run(tmp_path):
    checkpointer(tmp_path / "old").save(info(7), write_policy)
    keeper = checkpointer(tmp_path / "new", load_path=str(tmp_path / "old"))
    assert keeper.find_resume().path == tmp_path / "old" / "step_7"
    keeper.save(info(8), write_policy)
    assert saved_steps(tmp_path / "old") == [7]
    assert saved_steps(tmp_path / "new") == [8]


def test_load_path_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"checkpointing.load_path=.*: is no checkpoint"):
        checkpointer(tmp_path, load_path=str(tmp_path / "typo")).find_resume()


def test_a_step_without_optimizer_state_is_complete_but_not_continued(tmp_path):
    path = checkpointer(tmp_path, save_optimizer=False).save(info(5), write_policy)
    assert not (path / "policy" / "optimizer").exists()
    keeper = checkpointer(tmp_path)
    point = keeper.find_resume()
    assert is_finished(point, 5)
    with pytest.raises(ValueError, match="save_optimizer=false.*load_path=none"):
        keeper.refuse_without_optimizer(point)


def test_a_run_is_finished_when_it_did_its_steps(tmp_path):
    checkpointer(tmp_path).save(info(5), write_policy)
    point = checkpointer(tmp_path).find_resume()
    assert not is_finished(None, 5)
    assert not is_finished(point, 6)
    assert is_finished(point, 5)
    assert is_finished(point, 4)


def test_when_a_save_is_due(tmp_path):
    assert [step for step in range(1, 10) if checkpointer(tmp_path, save_period=3).is_due(step)] == [3, 6, 9]
    assert not any(checkpointer(tmp_path, save_period=0).is_due(step) for step in range(1, 10))
    epochs = checkpointer(tmp_path, save_period=0, save_epochs=True)
    assert epochs.is_due(7, num_finished_epochs=1)
    assert not epochs.is_due(8)
    every_other = checkpointer(tmp_path, save_period=0, save_epochs=2)
    assert [n for n in (1, 2, 3, 4) if every_other.is_due(n * 5, num_finished_epochs=n)] == [2, 4]
    assert not checkpointer(tmp_path, enabled=False, save_period=1).is_due(1)


def test_the_deadline_leaves_room_for_a_step_and_its_save():
    clock = iter([100.0, 150.0, 190.5])
    deadline = SaveDeadline(100.0, now=lambda: next(clock))
    assert not deadline.is_near(10.0)  # 50 s passed
    assert deadline.is_near(10.0)  # 90.5 s passed
    assert not SaveDeadline(None).is_near(1e9)


def test_the_deadline_counts_from_the_first_start_of_a_run():
    assert SaveDeadline(100.0, now=lambda: 190.5, started=100.0).is_near(10.0)
    assert not SaveDeadline(100.0, now=lambda: 190.5, started=None).is_near(10.0)


@pytest.mark.parametrize(("text", "seconds"), [("00:03:45:00", 13500.0), ("2:00:00:05", 172805.0), (None, None)])
def test_the_wall_clock_is_days_hours_minutes_seconds(text, seconds):
    assert CheckpointingConfig(checkpoint_must_save_by=text).must_save_by_seconds == seconds


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metric_name", "accuracy"),
        ("checkpoint_must_save_by", "3:45:00"),
        ("checkpoint_must_save_by", "00:25:00:00"),
        ("keep_top_k", 0),
        ("save_period", -1),
        ("save_epochs", 0.5),
        ("load_path", ""),
        ("checkpoint_dir", " "),
    ],
)
def test_values_without_a_meaning_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        CheckpointingConfig(**{field: value})


def test_a_directory_below_a_regular_file_is_refused_at_the_start(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"checkpointing.checkpoint_dir=.*: cannot be written \(Not a directory\)"):
        checkpointer(tmp_path / "file" / "a" / "b").prepare()


def test_a_disk_without_room_for_one_checkpoint_is_refused_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"one checkpoint needs 1,000,000,000,000,000,000"):
        checkpointer(tmp_path / "a" / "b").prepare(required_bytes=10**18)
    assert not (tmp_path / "a").exists()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_refused_at_the_start(tiny_disk):
    (tiny_disk / "filler").write_bytes(b"x" * (220 * 1024))
    with pytest.raises(ValueError, match="No space left on device.*Free some space"):
        checkpointer(tiny_disk / "run").prepare()
    assert [path.name for path in tiny_disk.iterdir()] == ["filler"]


def test_a_disk_that_fills_up_while_saving_keeps_the_step_before(tiny_disk):
    keeper = checkpointer(tiny_disk / "run")
    keeper.prepare()
    keeper.save(info(1), write_policy)
    with pytest.raises(CheckpointWriteError, match="no space left to save step 2") as caught:
        keeper.save(info(2), lambda path: (path / "weights").write_bytes(b"x" * 300_000))
    assert "step_1" in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert not list((tiny_disk / "run").glob("tmp_*"))
    assert checkpointer(tiny_disk / "run").find_resume().step == 1


@pytest.mark.parametrize("library", ["safetensors", "torch"])
def test_a_full_disk_is_recognised_through_the_errors_of_libraries(tiny_disk, library):
    import safetensors.torch
    import torch

    def write(path):
        tensors = {"x": torch.zeros(200_000)}
        if library == "torch":
            torch.save(tensors, path / "weights")
        else:
            path.joinpath("weights").write_bytes(safetensors.torch.save(tensors))

    with pytest.raises(CheckpointWriteError, match="no space left"):
        checkpointer(tiny_disk / "run").save(info(1), write)


def test_a_full_disk_is_recognised_before_what_filled_it_is_removed(tiny_disk):
    def write(path):
        with contextlib.suppress(OSError):
            (path / "weights").write_bytes(b"x" * 300_000)
        raise RuntimeError("unexpected position")  # as a library may say it, without a reason

    with pytest.raises(CheckpointWriteError, match="no space left"):
        checkpointer(tiny_disk / "run").save(info(1), write)
    assert list((tiny_disk / "run").iterdir()) == []


@pytest.mark.parametrize("killed", [False, True])
def test_a_directory_in_use_by_a_living_run_is_refused(tmp_path, killed):
    program = f"""
        import sys
        from nemo_rl_lora.checkpoints.steps import Checkpointer
        from nemo_rl_lora.config.checkpointing import CheckpointingConfig
        keeper = Checkpointer(CheckpointingConfig(checkpoint_dir={str(tmp_path)!r}), {{}})
        keeper.prepare()
        print("ready", flush=True)
        sys.stdin.read()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None
    assert other.stdout.readline() == "ready\n"
    with pytest.raises(ValueError, match=f"in use by a run that is still alive \\(process {other.pid}\\)"):
        checkpointer(tmp_path).prepare()
    other.kill() if killed else None
    other.communicate("", timeout=120)
    checkpointer(tmp_path).prepare()


def test_a_run_holds_its_directory_until_it_is_closed(tmp_path):
    keeper = checkpointer(tmp_path)
    keeper.prepare()
    keeper.prepare()  # the same process may
    attempt = f"import filelock; filelock.FileLock({str(tmp_path / '.lock')!r}, blocking=False).acquire()"
    outcomes = []
    for _ in range(2):
        ended = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True, check=False)
        outcomes.append(ended.returncode)
        keeper.close()
    assert outcomes == [1, 0]
    assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_disabled_checkpointing_touches_nothing(tmp_path):
    checkpointer(tmp_path).save(info(1), write_policy)
    keeper = checkpointer(tmp_path, enabled=False)
    keeper.prepare()
    assert keeper.find_resume() is None
    assert os.listdir(tmp_path) == ["step_1"]
