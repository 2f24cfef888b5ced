"""A run that is resumed by another process is the run that was not interrupted; and where it is not, that is said."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_rl_lora.checkpoints.durable_files import CHECKSUMS_FILE, write_checksums
from nemo_rl_lora.checkpoints.step_digests import DIGESTS_FILE
from nemo_rl_lora.run import cli
from nemo_rl_lora.run.verify_resume import Record, first_difference, main
from tests.driver import TinyRun

ROOT = Path(__file__).parents[2]
# Step 3 is in the middle of the warm-up, and of an epoch.
EVERY = [
    "policy.scheduler={name: cosine, warmup_steps: 4, total_steps: 8}",
    "policy.dtensor_cfg.lora_cfg.dropout=0.3",
    "checkpointing.save_period=3",
    "logger.record_digests=true",
]


def mixture(run: TinyRun) -> list[str]:
    """12 rows, four to one with 5 others, in steps of 4."""
    run.arguments()  # writes rows.jsonl
    name = "ResponseDataset" if run.algorithm == "sft" else "BinaryPreferenceDataset"
    rows, other = (run.root / "rows.jsonl").read_text().splitlines(), run.root / "other.jsonl"
    other.write_text("\n".join(row.replace("so", "oh") for row in rows[:5]) + "\n")
    sets = [f"{{dataset_name: {name}, data_path: '{run.root / file}', rate: {rate}}}" for file, rate in SHARES]
    return [f"data.train=[{', '.join(sets)}]", f"{run.algorithm}.max_num_epochs=5", f"{run.algorithm}.max_num_steps=6"]


SHARES = [("rows.jsonl", 4), ("other.jsonl", 1)]


def held(run: TinyRun) -> list[str]:
    """Every other group is dropped, and those beyond the four of a step wait for the next one."""
    return [
        f"env.tiny.reward_function={run.root}/rewards.py:reward_of_odd",
        "grpo.use_dynamic_sampling=true",
        "grpo.batch_multiplier=2.5",
        "grpo.keep_surplus_groups=true",
        "grpo.max_num_epochs=9",
        "grpo.max_num_steps=6",
        "loss_fn.reference_policy_kl_penalty=0.05",
        "policy.train_global_batch_size=8",
    ]


def verified(step: Path, steps: int = 3) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/verify_resume.py", "--checkpoint", str(step), "--steps", str(steps)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("algorithm", "data"),
    [
        ("sft", mixture),
        pytest.param("dpo", mixture, marks=(pytest.mark.slow, pytest.mark.long)),
        pytest.param("grpo", held, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_the_run_that_was_not_interrupted(tiny_llama, tmp_path, algorithm, data):
    run = TinyRun(root=tmp_path, model=tiny_llama, algorithm=algorithm)
    ended = run(*data(run), *EVERY)
    assert ended.code == 0, ended.err
    step = run.checkpoints / "step_3"
    if algorithm == "grpo":
        assert len(json.loads((step / "held_groups.json").read_text())) > 0
        assert any(line["num_reused_groups"] > 0 for line in run.metrics()[3:])
    else:
        position = json.loads((step / "training_info.json").read_text())["data_position"]
        assert 0 < position["offset"] < sum(position["num_rows"])
        assert min(position["num_taken"]) > 0

    ended = verified(step)

    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "Steps 4 to 6 after" in ended.stdout
    assert f"{3 * 28 * 3} tensors, token ids" in ended.stdout  # A and B of 14 modules and their moments, three steps
    assert run.steps() == ["step_3", "step_6"]  # nothing was written there
    assert not list(run.root.rglob("tmp_*"))


@pytest.mark.slow
def test_a_step_that_is_not_the_runs_own_is_told_by_its_first_difference(tiny_sft):
    ended = tiny_sft(*mixture(tiny_sft), *EVERY, "sft.max_num_steps=4")
    assert ended.code == 0, ended.err
    step = tiny_sft.checkpoints / "step_3"
    info = json.loads((step / "training_info.json").read_text())
    info["data_position"]["num_taken"][0] += 1
    (step / "training_info.json").write_text(json.dumps(info))
    (step / CHECKSUMS_FILE).unlink()
    write_checksums(step)

    ended = verified(step, 1)

    assert ended.returncode == 1, ended.stderr
    assert ended.stdout.startswith("step 4: the token ids differ\n")


@pytest.mark.slow
def test_without_digests_the_saved_steps_are_compared(tiny_sft, capsys):
    ended = tiny_sft(*mixture(tiny_sft), *EVERY, "logger.record_digests=false")
    assert ended.code == 0, ended.err
    assert not list(tiny_sft.logs.rglob(DIGESTS_FILE))
    arguments = cli.parse("verify-resume", ["--checkpoint", str(tiny_sft.checkpoints / "step_3"), "--steps", "3"], "")

    assert main(arguments) == 0

    assert "84 tensors, no token ids.\nlogger.record_digests=true in the run itself" in capsys.readouterr().out


def test_a_run_that_did_not_pass_the_step_is_no_record(tiny_sft):
    ended = tiny_sft(*EVERY, "sft.max_num_steps=3")
    assert ended.code == 0, ended.err
    arguments = cli.parse("verify-resume", ["--checkpoint", str(tiny_sft.checkpoints / "step_3"), "--steps", "1"], "")

    with pytest.raises(ValueError, match="did steps 3 to 4 without an interruption"):
        main(arguments)


RECORD = Record(
    metrics={
        (2, "train"): {"step": 2, "split": "train", "loss": 0.5, "timing/x": 1.0},
        (3, "train"): {"step": 3, "split": "train", "loss": 0.25, "tokens_per_second": 9},
        (3, "validation"): {"step": 3, "split": "validation", "accuracy": 0.5},
    },
    digests={2: {"tokens": "t2", "adapter: A": "a2"}, 3: {"tokens": "t3", "adapter: A": "a3", "adapter: B": "b3"}},
)


def changed(kind: str, key, **values) -> Record:
    """The record with these values at a place of `metrics` or `digests`."""
    part = getattr(RECORD, kind)
    return replace(RECORD, **{kind: part | {key: part[key] | values}})


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (RECORD, None),
        (changed("metrics", (2, "train"), **{"timing/x": 7.0}), None),
        (changed("metrics", (3, "train"), tokens_per_second=1, mfu=0.5, peak_gpu_gib=3.5), None),
        (changed("metrics", (3, "train"), loss=0.3), "step 3, train: loss was 0.25, and is 0.3 after resuming"),
        (changed("metrics", (3, "train"), new=1), "step 3, train: new was absent, and is 1 after resuming"),
        (changed("metrics", (3, "validation"), accuracy=1.0), "step 3, validation: accuracy was 0.5, and is 1.0"),
        (changed("digests", 2, tokens="x"), "step 2: the token ids differ"),
        (changed("digests", 3, **{"adapter: B": "x"}), "step 3: adapter: B differs"),
        (replace(RECORD, metrics={(2, "train"): RECORD.metrics[2, "train"]}), "step 3: the resumed run did not do it"),
    ],
)
def test_the_first_difference_is_named(found, said):
    difference = first_difference(RECORD, found, range(2, 4))
    assert difference == said or (said is not None and difference is not None and difference.startswith(said))
