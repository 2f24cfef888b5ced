"""A file of VeOmni, verl or theseus, given to a driver or translated first: what is trained, and what is refused."""

import json

import pytest
import yaml

from nemo_rl_lora.config.load import load_config
from tests.config.other_files import write_file
from tests.driver import run_command, run_driver

ALGORITHM = {"veomni": "sft", "verl_sft": "sft", "verl_grpo": "grpo", "theseus": "sft"}
QUIET = ("logger.plot.enabled=false", "policy.precision=float32")


def translated(file, output):
    ended = run_command("config", "translate", str(file), "--output", str(output))
    assert ended.code == 0, ended.err
    assert ended.out == f"{output} is written.\n"
    return ended.err


@pytest.mark.parametrize("tool", ["veomni", "verl_sft", "verl_grpo"])
def test_a_driver_trains_what_a_whole_file_says(tool, tiny_llama, tmp_path):
    file = write_file(tmp_path, tool, tiny_llama)
    settings = (*QUIET, f"logger.log_dir={tmp_path}/logs")
    ended = run_driver("--config", str(file), *settings, algorithm=ALGORITHM[tool])
    assert ended.code == 0, ended.err
    assert "configuration that is translated" in ended.err
    trained = [json.loads(line) for line in (tmp_path / "logs/exp_001/metrics.jsonl").read_text().splitlines()]
    steps = [line for line in trained if line["split"] == "train"]
    assert len(steps) == (1 if tool == "verl_grpo" else 2)
    assert all(line["grad_norm"] > 0 for line in steps)
    (adapter,) = (tmp_path / {"veomni": "veomni", "verl_sft": "own-sft", "verl_grpo": "verl"}[tool]).glob(
        f"step_{len(steps)}/policy/adapter/adapter_config.json"
    )
    read = json.loads(adapter.read_text())
    assert (read["r"], read["lora_alpha"], read["use_rslora"]) == (4, 8, tool == "veomni")
    adapted = {
        "veomni": ["q_proj", "v_proj", "down_proj"],
        "verl_sft": ["q_proj", "o_proj"],
        "verl_grpo": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"],
    }[tool]
    assert {name.split(".")[-1] for name in read["target_modules"]} == set(adapted)


@pytest.mark.parametrize("tool", ["veomni", "verl_sft", "verl_grpo"])
def test_a_translated_file_is_the_same_run_and_its_plan_passes(tool, tiny_llama, tmp_path):
    file, mine = write_file(tmp_path, tool, tiny_llama), tmp_path / "mine.yaml"
    translated(file, mine)
    assert load_config(mine, [], ALGORITHM[tool]) == load_config(file, [], ALGORITHM[tool])
    ended = run_driver("--config", str(mine), "--plan", *QUIET, algorithm=ALGORITHM[tool])
    assert ended.code == 0, ended.err + ended.out
    assert "*.self_attn.q_proj" in ended.out


def test_theseus_phases_are_translated_and_trained_once_its_datasets_have_files(tiny_llama, tmp_path):
    file, mine = write_file(tmp_path, "theseus", tiny_llama), tmp_path / "mine.yaml"
    said = translated(file, mine)
    assert "sft.phases.0.data.0.data_path: a file of chats in place of theseus's dataset 'fineweb'" in said
    assert "theseus's dataset 'cfq' (sparql)" in said
    ended = run_driver("--config", str(mine), "--plan", algorithm="sft")
    assert ended.code == 2
    assert "sft.phases.0.data.0.data_path='???': is mandatory" in ended.err
    assert "A .jsonl, .json or .parquet file" in ended.err
    chats = tmp_path / "chats.jsonl"
    given = [
        *(f"sft.phases.{phase}.data.0.data_path={chats}" for phase in (0, 1, 2)),
        f"sft.phases.1.data.1={{dataset_name: ResponseDataset, data_path: '{tmp_path / 'rows.jsonl'}', rate: 0.25}}",
        f"checkpointing.checkpoint_dir={tmp_path}/run",
        f"logger.log_dir={tmp_path}/logs",
        *QUIET,
    ]
    plan = run_driver("--config", str(mine), "--plan", *given, algorithm="sft")
    assert plan.code == 0, plan.err + plan.out
    ended = run_driver("--config", str(mine), *given, algorithm="sft")
    assert ended.code == 0, ended.err
    last = max((tmp_path / "run").glob("step_*"), key=lambda step: int(step.name.removeprefix("step_")))
    read = json.loads((last / "policy/adapter/adapter_config.json").read_text())
    assert (read["r"], read["lora_alpha"]) == (4, 8)
    lines = [json.loads(line) for line in (tmp_path / "logs/exp_001/metrics.jsonl").read_text().splitlines()]
    assert sum(line["total_num_tokens"] for line in lines if line["split"] == "train") >= 100 + 150 + 120


@pytest.mark.parametrize(
    ("tool", "change", "why"),
    [
        (
            "veomni",
            {"train": {"dyn_bsz": True}},
            "policy.train_global_batch_size: rows of a step. There a step is filled",
        ),
        ("veomni", {"train": {"new_loss": "focal"}}, "train.new_loss='focal' has no counterpart here"),
        ("verl_sft", {"optim": {"num_cycles": 2}}, "optim.num_cycles=2 has no counterpart here"),
        ("verl_grpo", {"custom_reward_function": None}, "data.default.env_name: what scores completions"),
        ("verl_grpo", {"actor_rollout_ref": {"actor": {"ppo_epochs": 2}}}, "grpo.num_prompts_per_step"),
        ("theseus", {}, "sft.phases.0.data.0.data_path: a file of chats in place of theseus's dataset 'fineweb'"),
    ],
)
def test_a_file_that_leaves_something_to_the_user_is_refused_with_the_command(tool, change, why, tmp_path):
    from nemo_rl_lora.config.tree import merged

    file = write_file(tmp_path, tool)
    file.write_text(yaml.safe_dump(merged(yaml.safe_load(file.read_text()), change)))
    ended = run_driver("--config", str(file), "--plan", algorithm=ALGORITHM[tool])
    assert ended.code == 2
    assert why in ended.err
    assert ended.err.strip().endswith(
        f"Translate it with: uv run tools/config_cli.py translate {file} --output {tool}_translated.yaml"
    )
    assert "Traceback" not in ended.err


def test_the_other_driver_is_named_and_an_adapter_alone_is_no_run(tmp_path):
    ended = run_driver("--config", str(write_file(tmp_path, "verl_grpo")), "--plan", algorithm="sft")
    assert ended.code == 2
    assert "belongs to examples/run_grpo.py" in ended.err
    adapter = tmp_path / "adapter_config.json"
    adapter.write_text(json.dumps({"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"]}))
    ended = run_driver("--config", str(adapter), "--plan", algorithm="sft")
    assert ended.code == 2
    assert "describes an adapter, and no run. Translate it with: uv run tools/config_cli.py translate" in ended.err


def test_an_output_that_exists_is_kept(tmp_path):
    file, mine = write_file(tmp_path, "veomni"), tmp_path / "mine.yaml"
    mine.write_text("kept")
    ended = run_command("config", "translate", str(file), "--output", str(mine))
    assert ended.code == 2
    assert f"--output={str(mine)!r}: exists. Name another file" in ended.err
    assert mine.read_text() == "kept"
    ended = run_command("config", "translate", str(file), "--output", str(tmp_path / "absent" / "mine.yaml"))
    assert ended.code == 2
    assert "cannot be written" in ended.err
