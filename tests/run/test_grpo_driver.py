"""The GRPO driver from its command line to its files, on a tiny random model with a reward that varies."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nemo_rl_lora.generation.in_process import engine
from nemo_rl_lora.generation.protocol import GenerationFailed
from nemo_rl_lora.generation.replay import write_replay
from nemo_rl_lora.run.drivers import continue_command
from nemo_rl_lora.types import Completion, CompletionGroup
from tests.driver import adapter, same, without_seconds

ROOT = Path(__file__).parents[2]
TRAIN_METRICS = [
    "loss",
    "grad_norm",
    "lr",
    "reward",
    "filtered_reward",
    "advantages/mean",
    "advantages/min",
    "advantages/max",
    "mean_prompt_length",
    "mean_completion_length",
    "total_num_tokens",
    "tokens_per_second_per_gpu",
    "model_tflops_per_second_per_gpu",
    "global_valid_toks",
    "global_valid_seqs",
    "num_valid_samples",
    "token_mult_prob_error",
    "gen_kl_error",
    "policy_kl_error",
    "js_divergence_error",
    "probs_ratio",
    "probs_ratio_min",
    "probs_ratio_max",
    "probs_ratio_clamped",
    "sampling_importance_ratio",
    "approx_entropy",
    "timing/total_step_time",
    "timing/generation",
    "timing/weight_sync",
    "timing/policy_training",
    "timing/policy_and_reference_logprobs",
    "timing/advantage_calculation",
    "timing/data_processing",
]
VALIDATION_METRICS = ["accuracy", "avg_length", "pass@1", "timing/total_validation_time"]


def test_a_run_leaves_metrics_curves_rollouts_and_an_adapter_with_the_models_tokenizer(tiny_run, tiny_llama):
    ended = tiny_run(
        "grpo.val_at_start=true",
        "grpo.val_period=1",
        "logger.plot.enabled=true",
        "logger.tensorboard_enabled=true",
    )

    assert ended.code == 0, ended.err
    logs, policy = tiny_run.logs / "exp_001", tiny_run.checkpoints / "step_2" / "policy"
    assert not set(TRAIN_METRICS) - tiny_run.metrics()[0].keys()
    assert [line["step"] for line in tiny_run.metrics("validation")] == [0, 1, 2]
    assert not set(VALIDATION_METRICS) - tiny_run.metrics("validation")[0].keys()
    assert (logs / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "What is" in (logs / "rollouts.md").read_text()
    assert any((logs / "tensorboard").iterdir())
    assert yaml.safe_load((logs / "config.yaml").read_text())["policy"]["model_name"] == str(tiny_llama)
    assert any(float(t.abs().max()) > 0 for name, t in adapter(policy.parent).items() if "lora_B" in name)
    from transformers import AutoTokenizer

    saved, original = AutoTokenizer.from_pretrained(policy / "tokenizer"), AutoTokenizer.from_pretrained(tiny_llama)
    message = [{"role": "user", "content": "What is 3 + 4?"}]
    assert saved.apply_chat_template(message) == original.apply_chat_template(message)
    assert "completed: step 2 of 2" in ended.out
    assert f"Checkpoint:      {tiny_run.checkpoints / 'step_2'}\n" in ended.out


def test_a_resumed_run_is_the_run_that_was_interrupted(tiny_run, tmp_path):
    settings = [
        "policy.dtensor_cfg.lora_cfg.dropout=0.3",
        "policy.train_global_batch_size=8",
        "policy.scheduler={name: cosine, warmup_steps: 2, total_steps: 8}",
        "loss_fn.reference_policy_kl_penalty=0.05",
        "data.train.num_rows=12",  # so that an epoch ends within the run
    ]
    assert tiny_run(*settings, "grpo.max_num_steps=4", f"checkpointing.checkpoint_dir={tmp_path}/whole").code == 0
    assert tiny_run(*settings, "grpo.max_num_steps=2").code == 0
    assert tiny_run(*settings, "grpo.max_num_steps=4").code == 0

    whole, resumed = tmp_path / "whole" / "step_4", tiny_run.checkpoints / "step_4"
    assert same(adapter(whole), adapter(resumed))
    moments = "policy/optimizer/adapter.safetensors"
    assert same(load_file(whole / moments), load_file(resumed / moments))
    assert without_seconds(tiny_run.metrics()[2:]) == without_seconds(tiny_run.metrics(experiment=3))
    assert [line["step"] for line in tiny_run.metrics(experiment=3)] == [3, 4]
    of_whole, of_resumed = (json.loads((step / "training_info.json").read_text()) for step in (whole, resumed))
    for key in ("step", "epoch", "data_position", "counters"):
        assert of_whole[key] == of_resumed[key], key


def test_a_finished_run_says_so_and_does_nothing(tiny_run, monkeypatch):
    assert tiny_run().code == 0
    monkeypatch.setattr("nemo_rl_lora.run.start.build_run", refuse_to_build)

    again = tiny_run()

    assert again.code == 0
    assert "is finished: 2 steps. For more steps raise grpo.max_num_steps" in again.out
    assert not (tiny_run.logs / "exp_002").exists()


def refuse_to_build(*_):
    raise AssertionError("weights were to be loaded")


def test_load_path_none_starts_over_and_sets_the_old_steps_aside(tiny_run):
    assert tiny_run().code == 0
    before = adapter(tiny_run.checkpoints / "step_2")

    assert tiny_run("checkpointing.load_path=none").code == 0

    assert [line["step"] for line in tiny_run.metrics(experiment=2)] == [1, 2]
    assert same(before, adapter(tiny_run.checkpoints / "step_2"))
    assert (tiny_run.checkpoints / "set_aside_001" / "step_2").is_dir()


def test_load_path_of_another_run_continues_it_in_the_new_directory(tiny_run, tmp_path):
    assert tiny_run().code == 0

    arguments = ["grpo.max_num_steps=3", f"checkpointing.checkpoint_dir={tmp_path}/other"]
    ended = tiny_run(*arguments, f"checkpointing.load_path={tiny_run.checkpoints}")

    assert ended.code == 0, ended.err
    assert [line["step"] for line in tiny_run.metrics(experiment=2)] == [3]
    assert tiny_run.steps() == ["step_2"]
    assert (tmp_path / "other" / "step_3").is_dir()


def test_save_epochs_saves_at_the_end_of_each_epoch(tiny_run):
    ended = tiny_run(
        "grpo.max_num_steps=5",
        "data.train.num_rows=8",  # two steps of four prompts
        "checkpointing.save_period=0",
        "checkpointing.save_epochs=true",
        "checkpointing.keep_top_k=null",
    )

    assert ended.code == 0, ended.err
    assert tiny_run.steps() == ["step_2", "step_4", "step_5"]


def test_the_run_stops_where_the_validation_metric_reaches_its_threshold(tiny_run):
    ended = tiny_run(
        "grpo.max_num_steps=4",
        "grpo.val_period=2",
        "grpo.stop_at_validation_metric=accuracy",
        "grpo.stop_at_validation_threshold=0.0",
    )

    assert ended.code == 0, ended.err
    assert "completed: accuracy reached its threshold" in ended.out
    assert len(tiny_run.metrics()) == 2
    assert tiny_run.steps() == ["step_2"]
    again = tiny_run(
        "grpo.max_num_steps=4",
        "grpo.val_period=2",
        "grpo.stop_at_validation_metric=accuracy",
        "grpo.stop_at_validation_threshold=0.0",
    )
    assert (again.code, "is finished" in again.out) == (0, True)


def test_a_step_without_validation_does_not_rank_by_an_earlier_one(tiny_run):
    ended = tiny_run(
        "grpo.max_num_steps=3",
        "grpo.val_period=2",
        "checkpointing.save_period=1",
        "checkpointing.keep_top_k=1",
        "checkpointing.metric_name=val:accuracy",
    )

    assert ended.code == 0, ended.err
    assert tiny_run.steps() == ["step_2", "step_3"]  # the best, and the newest to continue from


def test_validation_counts_add_up_over_batches_of_different_environments(tiny_run):
    ended = tiny_run(
        "grpo.max_num_steps=1",
        "grpo.val_at_start=true",
        "grpo.val_batch_size=4",
        "data.train.env_name=math",
        "data.train.split_validation_size=0.125",  # 4 prompts for math, then 6 for the other
    )

    assert ended.code == 0, ended.err
    assert tiny_run.metrics("validation")[0]["math_verify_timeouts"] == 0


def test_a_run_that_uses_up_its_prompts_says_so(tiny_run):
    reward = f"env.tiny.reward_function={tiny_run.root}/rewards.py:reward_of_odd"

    ended = tiny_run(reward, "grpo.use_dynamic_sampling=true", "grpo.max_num_epochs=1", "grpo.max_num_steps=100")

    assert ended.code == 0, ended.err
    assert "completed: no rows are left" in ended.out


def test_the_command_to_continue_does_not_start_over():
    command = continue_command(["examples/run_grpo.py", "a.b=1", "++checkpointing.load_path=none"])

    assert command == "uv run examples/run_grpo.py a.b=1 checkpointing.load_path=auto"
    assert continue_command(["examples/run_grpo.py", "a.b=1"]) == "uv run examples/run_grpo.py a.b=1"
    of_a_file = continue_command(["examples/run_grpo.py", "--config", "a.yaml"], "results/step_3")
    assert of_a_file == "uv run examples/run_grpo.py --config a.yaml checkpointing.load_path=auto"


def test_dynamic_sampling_keeps_only_groups_whose_rewards_differ(tiny_run):
    reward = f"env.tiny.reward_function={tiny_run.root}/rewards.py:reward_of_odd"

    ended = tiny_run(reward, "grpo.use_dynamic_sampling=true", "grpo.batch_multiplier=1.5")

    assert ended.code == 0, ended.err
    for line in tiny_run.metrics():
        assert line["global_valid_seqs"] == 16
        assert line["filtered_reward"] < line["reward"]  # groups of even summands earn 1.0 throughout
        assert line["num_discarded_groups"] == 6 * line["num_gen_batches"] - 4 > 0


def test_dynamic_sampling_gives_up_after_so_many_rollouts(tiny_run):
    reward = f"env.tiny.reward_function={tiny_run.root}/rewards.py:the_same"

    ended = tiny_run(reward, "grpo.use_dynamic_sampling=true", "grpo.dynamic_sampling_max_gen_batches=2")

    assert ended.code == 1
    assert "grpo.dynamic_sampling_max_gen_batches=2: so many rollouts gave 0 groups" in ended.err
    assert "Traceback" not in ended.err


def test_several_optimizer_steps_per_rollout_move_the_ratios(tiny_run):
    assert tiny_run("policy.train_global_batch_size=4", "grpo.max_num_steps=1").code == 0

    (line,) = tiny_run.metrics()
    assert line["probs_ratio_min"] < 1 < line["probs_ratio_max"]
    from safetensors import safe_open

    with safe_open(tiny_run.checkpoints / "step_1/policy/optimizer/adapter.safetensors", "pt") as moments:
        assert moments.metadata()["step"] == "4"


@pytest.mark.parametrize("mode", ["merged", "adapter"])
def test_the_engine_samples_from_the_adapter_that_is_trained(tiny_run, mode):
    assert tiny_run(f"policy.generation.lora_sync={mode}", "grpo.max_num_steps=3").code == 0

    first, *later = tiny_run.metrics()
    # with fp32 weights both ways of serving an adapter agree with the trainer up to rounding
    assert all(line["gen_kl_error"] < 1e-9 for line in (first, *later))
    assert all(abs(line["token_mult_prob_error"] - 1) < 1e-4 for line in (first, *later))


def test_an_engine_that_goes_back_to_the_base_after_its_proof_shows_in_gen_kl_error(tiny_run, monkeypatch):
    class LeftBehind(engine.InProcessGeneration):
        def sync_weights(self, ref):
            receipt = super().sync_weights(ref)
            self._decoder.set_weights({})
            return receipt

    monkeypatch.setattr(engine, "InProcessGeneration", LeftBehind)

    assert tiny_run().code == 0

    assert tiny_run.metrics()[1]["gen_kl_error"] > 1e-4


def test_kl_penalty_is_zero_at_the_base_and_grows_from_it(tiny_run):
    assert tiny_run("loss_fn.reference_policy_kl_penalty=0.1", "grpo.max_num_steps=3").code == 0

    penalties = [line["kl_penalty"] for line in tiny_run.metrics()]
    assert penalties[0] == pytest.approx(0, abs=1e-9)
    assert min(penalties[1:]) > 1e-5


def test_without_lora_all_weights_are_trained(tiny_run, tiny_llama):
    from transformers import AutoModelForCausalLM

    ended = tiny_run("policy.dtensor_cfg.lora_cfg.enabled=false", "loss_fn.reference_policy_kl_penalty=0.1")

    assert ended.code == 0, ended.err
    assert tiny_run.metrics()[1]["kl_penalty"] > 0
    trained = AutoModelForCausalLM.from_pretrained(tiny_run.checkpoints / "step_2/policy/weights").state_dict()
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    assert trained.keys() == base.keys()
    assert not any(torch.equal(trained[name], base[name]) for name in base)


def test_replayed_rollouts_train_as_the_recorded_run(tiny_run, monkeypatch, tmp_path):
    recorded: list[CompletionGroup] = []

    class Recording(engine.InProcessGeneration):
        def collect(self, tickets):
            groups = super().collect(tickets)
            recorded.extend(groups)
            return groups

    with monkeypatch.context() as patch:
        patch.setattr(engine, "InProcessGeneration", Recording)
        assert tiny_run().code == 0
    write_replay(tmp_path / "rollouts.jsonl", recorded)
    replay = ["policy.generation.backend=replay", f"policy.generation.replay_path={tmp_path}/rollouts.jsonl"]

    for name in ("once", "twice"):
        ended = tiny_run(*replay, f"checkpointing.checkpoint_dir={tmp_path}/{name}")
        assert ended.code == 0, ended.err

    original, once, twice = (without_seconds(tiny_run.metrics(experiment=i)) for i in (1, 2, 3))
    for line in original:
        assert line["sync_bytes"] > 0
        line.pop("sync_confirmed")  # nor do they prove any
    for line in (*original, *once, *twice):
        line.pop("sync_bytes")  # recorded rollouts need no weights
    assert original == once == twice
    assert same(adapter(tmp_path / "once/step_2"), adapter(tiny_run.checkpoints / "step_2"))


def test_a_rollout_of_stale_weights_stops_the_run(tiny_run, monkeypatch):
    class Stale(engine.InProcessGeneration):
        def collect(self, tickets):
            return [
                CompletionGroup(prompt=group.prompt, completions=tuple(map(one_version_back, group.completions)))
                for group in super().collect(tickets)
            ]

    monkeypatch.setattr(engine, "InProcessGeneration", Stale)

    ended = tiny_run()

    assert ended.code == 1
    assert "came from weights version [-1], but version 0 was to be sampled. The rollout was not used." in ended.err
    assert "Traceback" not in ended.err
    assert "Traceback" in (tiny_run.logs / "exp_001" / "run.log").read_text()
    assert tiny_run.metrics() == []
    assert tiny_run.steps() == []


def test_a_run_whose_engine_is_lost_for_good_leaves_a_checkpoint(tiny_run, monkeypatch):
    class Lost(engine.InProcessGeneration):
        def collect(self, tickets):
            if self._version == 2:
                raise GenerationFailed("policy.generation.max_generation_failures=1: the engine ended, twice in a row.")
            return super().collect(tickets)

    monkeypatch.setattr(engine, "InProcessGeneration", Lost)

    ended = tiny_run("grpo.max_num_steps=4", "checkpointing.save_period=100")

    assert ended.code == 1
    assert "policy.generation.max_generation_failures=1: the engine ended" in ended.err
    assert tiny_run.steps() == ["step_2"]


def one_version_back(completion: Completion) -> Completion:
    from dataclasses import replace

    return replace(completion, versions=tuple((n, version - 1) for n, version in completion.versions))


def test_an_engine_that_confirms_other_weights_stops_the_run(tiny_run, monkeypatch):
    from dataclasses import replace

    class Confused(engine.InProcessGeneration):
        def sync_weights(self, ref):
            return replace(super().sync_weights(ref), digest="0" * 64)

    monkeypatch.setattr(engine, "InProcessGeneration", Confused)

    ended = tiny_run()

    assert ended.code == 1
    assert "policy.generation.lora_sync='merged': the engine confirmed version 0 (000000000000)" in ended.err
    assert tiny_run.metrics() == []


def test_one_of_several_engines_that_confirms_another_version_stops_the_run(tiny_run, monkeypatch):
    from dataclasses import replace

    from nemo_rl_lora.types import EngineReceipt

    class Behind(engine.InProcessGeneration):
        def sync_weights(self, ref):
            receipt = super().sync_weights(ref)
            of_one = {"where": "there", "num_ranks": 1, "verdict": "confirmed", "seconds": 0.1, "proof_seconds": 0.1}
            engines = [
                EngineReceipt(index=index, version=version, digest=receipt.digest, **of_one)
                for index, version in enumerate((ref.version, ref.version - 1))
            ]
            return replace(receipt, engines=tuple(engines))

    monkeypatch.setattr(engine, "InProcessGeneration", Behind)

    ended = tiny_run()

    assert ended.code == 1
    assert "policy.generation.lora_sync='merged': engine 1 confirmed version -1 (" in ended.err
    assert tiny_run.metrics() == []


def test_a_terminated_run_saves_and_says_how_to_continue(tiny_run):
    arguments = tiny_run.arguments("grpo.max_num_steps=100000", "checkpointing.save_period=0")
    process = subprocess.Popen(
        [sys.executable, "examples/run_grpo.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tiny_run.logs / "exp_001" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.is_file() and metrics.read_text()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)

    assert process.returncode == 128 + signal.SIGTERM, err
    assert "SIGTERM: finishing this step, then saving and stopping" in err
    (step,) = tiny_run.steps()
    last = tiny_run.metrics()[-1]["step"]
    assert step == f"step_{last}"
    assert "stopped by SIGTERM" in out
    (command,) = [line for line in out.splitlines() if line.startswith("Continue with:")]
    assert shlex.split(command)[2:] == ["uv", "run", "examples/run_grpo.py", *arguments]
    assert tiny_run(f"grpo.max_num_steps={last + 1}", "checkpointing.save_period=0").code == 0
    assert [line["step"] for line in tiny_run.metrics(experiment=2)] == [last + 1]
