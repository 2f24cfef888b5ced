"""Runs that start from an adapter: which one is taken, what it is held to, and what is refused before weights load."""

import json
import math
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from nemo_rl_lora.config.load import ConfigError, load_config
from nemo_rl_lora.config.translate import translate_file
from tests.driver import TinyRun, adapter, same, without_seconds
from tests.evaluation.evaluation_runs import save_peft_adapter
from tests.tiny_models import make_tiny_llama

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = "policy.dtensor_cfg.lora_cfg.enabled=true"
FILE = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def trained(tiny_llama, tmp_path_factory):
    """A step of an SFT run."""
    run = TinyRun(root=tmp_path_factory.mktemp("sft"), model=tiny_llama, algorithm="sft")
    ended = run("policy.optimizer.kwargs.lr=0.05")
    assert ended.code == 0, ended.err
    return run.checkpoints / "step_2"


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of the step, to be spoilt."""
    return shutil.copytree(trained, tmp_path / "copy")


@pytest.fixture
def no_weights(monkeypatch):
    def build(*_):
        raise AssertionError("weights were to be loaded")

    monkeypatch.setattr("nemo_rl_lora.run.start.build_run", build)


def starting_from(source, *, reference=None):
    return [f"policy.adapter.init_from={source}", *([f"policy.adapter.reference={reference}"] if reference else [])]


def peft_directory(base, directory, **changes):
    return save_peft_adapter(
        base, directory, 1, 0.05, **{"r": 4, "lora_alpha": 32, "target_modules": TARGETS, **changes}
    )


def test_sft_then_dpo_then_grpo_train_one_adapter(trained, tiny_dpo, tiny_llama, tmp_path):
    settings = ["policy.optimizer.kwargs.lr=0.01", "data.shuffle=false"]
    ended = tiny_dpo(*settings, *starting_from(trained, reference="initial"))
    assert ended.code == 0, ended.err
    first, second = tiny_dpo.metrics()
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)  # the policy is its reference
    assert abs(second["loss"] - math.log(2)) > 1e-4

    (tmp_path / "grpo").mkdir()
    grpo = TinyRun(root=tmp_path / "grpo", model=tiny_llama)
    penalty = "loss_fn.reference_policy_kl_penalty=0.1"
    ended = grpo(*settings[:1], *starting_from(tiny_dpo.checkpoints / "step_2", reference="initial"), penalty)
    assert ended.code == 0, ended.err
    first, second = grpo.metrics()
    assert first["kl_penalty"] == pytest.approx(0, abs=1e-9)
    assert second["kl_penalty"] > 1e-5
    info = json.loads((grpo.checkpoints / "step_2" / "training_info.json").read_text())
    assert info["initial_adapter"]["directory"] == str(tiny_dpo.checkpoints / "step_2" / "policy" / "adapter")
    assert info["spec"]["dim"] == 4
    assert info["seeds"]["grpo.seed"] == 42


def test_the_base_as_reference_is_the_model_without_the_adapter(trained, tiny_dpo):
    ended = tiny_dpo(*starting_from(trained, reference="base"), "dpo.max_num_steps=1")

    assert ended.code == 0, ended.err
    assert abs(tiny_dpo.metrics()[0]["loss"] - math.log(2)) > 1e-3
    assert not (tiny_dpo.checkpoints / "step_1" / "policy" / "reference_adapter").exists()


def test_an_adapter_that_is_not_trainable_stays_as_it_was(trained, tiny_sft):
    ended = tiny_sft(*starting_from(trained), "policy.adapter.trainable=false")

    assert ended.code == 0, ended.err
    assert same(adapter(tiny_sft.checkpoints / "step_2"), adapter(trained))
    assert [line["lr"] for line in tiny_sft.metrics()] == [0, 0]
    assert tiny_sft.metrics()[0]["grad_norm"] > 0


@pytest.mark.parametrize("backend", ["dtensor", "megatron"])
def test_a_resume_does_not_move_the_initial_reference(copy, tiny_run, tmp_path, backend):
    settings = [
        *starting_from(copy, reference="initial"),
        "loss_fn.reference_policy_kl_penalty=0.1",
        "policy.optimizer.kwargs.lr=0.01",
        "policy.dtensor_cfg.lora_cfg.enabled=false",
        "policy.lora={dim: 4, alpha: 32}",
        f"policy.backend={backend}",
    ]
    if backend == "megatron":
        settings.remove("policy.optimizer.kwargs.lr=0.01")
    whole = tiny_run(*settings, "grpo.max_num_steps=4", f"checkpointing.checkpoint_dir={tmp_path}/whole")
    assert whole.code == 0, whole.err
    assert tiny_run(*settings, "grpo.max_num_steps=2").code == 0
    initial = adapter(copy)
    shutil.rmtree(copy)  # a run goes on without what it started from
    ended = tiny_run(*settings, "grpo.max_num_steps=4")
    assert ended.code == 0, ended.err

    steps = tmp_path / "whole" / "step_4", tiny_run.checkpoints / "step_4"
    assert same(*(adapter(step) for step in steps))
    assert without_seconds(tiny_run.metrics()[2:]) == without_seconds(tiny_run.metrics(experiment=3))
    for step in steps:
        assert same(load_file(step / "policy" / "reference_adapter" / FILE), initial)
        assert not same(adapter(step), initial)
        assert json.loads((step / "training_info.json").read_text())["initial_adapter"]["digest"]


def test_both_backends_start_from_one_adapter_and_compare_with_it_alike(copy, tiny_dpo, tmp_path):
    losses = []
    for backend in ("dtensor", "megatron"):
        ended = tiny_dpo(
            *starting_from(copy, reference="initial"),
            "policy.dtensor_cfg.lora_cfg.enabled=false",
            "policy.lora={dim: 4, alpha: 32}",
            f"policy.backend={backend}",
            f"checkpointing.checkpoint_dir={tmp_path}/{backend}",
        )
        assert ended.code == 0, ended.err
        losses.append([line["loss"] for line in tiny_dpo.metrics(experiment=len(losses) + 1)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_directory_that_peft_wrote_starts_a_run(tiny_sft, tiny_llama, tmp_path, form):
    source = peft_directory(tiny_llama, tmp_path / "peft")
    tensors = load_file(source / FILE)
    if form == "bin":
        torch.save(tensors, source / "adapter_model.bin")
        (source / FILE).unlink()
    ended = tiny_sft(*starting_from(source), "policy.adapter.trainable=false")

    assert ended.code == 0, ended.err
    assert same(adapter(tiny_sft.checkpoints / "step_2"), tensors)


class Trap:
    """What a hostile pickle does when it is read."""

    def __reduce__(self):
        return exec, ("raise SystemExit('code of the file has run')",)


@pytest.mark.parametrize("content", [{"x": Trap()}, {"x": "text"}, [1]])
def test_a_pickle_that_is_not_tensors_alone_is_refused_unread(tiny_sft, tiny_llama, tmp_path, content, no_weights):
    source = peft_directory(tiny_llama, tmp_path / "peft")
    (source / FILE).unlink()
    torch.save(content, source / "adapter_model.bin")

    ended = tiny_sft(*starting_from(source))

    assert ended.code == 2
    assert "adapter_model.bin: holds something other than tensors" in ended.err


def rewrite(directory, change):
    path = directory / "policy" / "adapter" / FILE
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    (directory / "training_info.json").rename(directory / "elsewhere.json")  # no checkpoint of ours any more


def drop_a_module(tensors):
    for side in "AB":
        del tensors[f"base_model.model.model.layers.1.mlp.up_proj.lora_{side}.weight"]


def drop_a_factor(tensors):
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]


def spoil_a_value(tensors):
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][0, 0] = math.nan


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (drop_a_module, "the adapter has no tensors for model.layers.1.mlp.up_proj"),
        (drop_a_factor, "1 missing: base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"),
        (spoil_a_value, "model.layers.0.self_attn.q_proj.lora_B.weight holds values that are not finite"),
    ],
)
def test_a_partial_or_spoilt_adapter_is_refused(tiny_sft, copy, change, said, no_weights):
    rewrite(copy, change)

    ended = tiny_sft(*starting_from(copy))

    assert ended.code == 2
    assert f"policy.adapter.init_from='{copy}': " in ended.err
    assert said in ended.err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("policy.dtensor_cfg.lora_cfg.dim=8", "it has dim 4 for model.layers.0.self_attn.q_proj, and policy.dt"),
        ("policy.dtensor_cfg.lora_cfg.alpha=16", "it has scale 8 for model.layers.0.self_attn.q_proj"),
        (
            "policy.dtensor_cfg.lora_cfg={match_all_linear: false, target_modules: [q_proj]}",
            "it has 12 modules (down_proj, gate_proj, k_proj, o_proj, up_proj, v_proj; first model.layers.0.mlp",
        ),
    ],
)
def test_an_adapter_of_another_description_is_refused_with_the_block_that_fits(
    tiny_sft, trained, override, said, no_weights
):
    ended = tiny_sft(*starting_from(trained), override)

    assert ended.code == 2
    assert said in ended.err
    shown = yaml.safe_load(translate_file(trained / "policy" / "adapter" / "adapter_config.json"))
    assert (shown["policy"]["lora"]["dim"], shown["policy"]["lora"]["alpha"]) == (4, 32)


def test_an_adapter_with_fewer_modules_is_refused(tiny_sft, tiny_llama, tmp_path, no_weights):
    ended = tiny_sft(*starting_from(peft_directory(tiny_llama, tmp_path / "peft", target_modules=["q_proj"])))

    assert ended.code == 2
    assert "it lacks 12 modules" in ended.err


def test_a_base_that_differs_in_values_alone_is_refused(tiny_llama, tiny_sft, trained, tmp_path, no_weights):
    other = tmp_path / "other"
    make_tiny_llama(other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})

    ended = tiny_sft(*starting_from(trained), f"policy.model_name={other}")

    assert ended.code == 2
    assert "it was trained on other weights than those of policy.model_name=" in ended.err


def test_the_same_base_under_another_name_is_known_by_its_digest(tiny_llama, tiny_sft, trained, tmp_path):
    ended = tiny_sft(*starting_from(trained), f"policy.model_name={shutil.copytree(tiny_llama, tmp_path / 'moved')}")

    assert ended.code == 0, ended.err


def test_a_peft_adapter_of_another_base_is_refused_by_its_name(tiny_sft, tiny_llama, tmp_path, no_weights):
    source = peft_directory(tiny_llama, tmp_path / "peft")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/other-model"}))

    ended = tiny_sft(*starting_from(source))

    assert ended.code == 2
    assert "says that it was made for 'some/other-model', and policy.model_name=" in ended.err


def test_a_damaged_step_is_refused(tiny_sft, copy, no_weights):
    path = copy / "policy" / "adapter" / FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    ended = tiny_sft(*starting_from(copy))

    assert ended.code == 2
    assert f"{path} has other contents than when it was saved (sha256 differs): it is damaged." in ended.err


def test_separate_factors_do_not_start_a_shared_one(tiny_sft, trained, no_weights):
    ended = tiny_sft(
        *starting_from(trained),
        "policy.dtensor_cfg.lora_cfg.enabled=false",
        "policy.backend=megatron",
        "policy.lora={dim: 4, alpha: 32, target_modules: [linear_qkv, linear_proj, linear_fc1, linear_fc2]}",
    )

    assert ended.code == 2
    assert "it has an A each for model.layers.0.self_attn.q_proj and model.layers.0.self_attn.k_proj" in ended.err


@pytest.mark.parametrize(
    ("algorithm", "overrides", "said"),
    [
        ("dpo", [LORA, "policy.adapter.init_from=x"], "policy.adapter.reference=None: this loss compares"),
        (
            "grpo",
            [LORA, "policy.adapter.init_from=x", "loss_fn.reference_policy_kl_penalty=0.1"],
            "policy.adapter.reference=None: this loss compares",
        ),
        ("sft", [LORA, "policy.adapter={init_from: x, reference: base}"], "compares with no reference. Remove it"),
        ("dpo", [LORA, "policy.adapter.reference=initial"], "without policy.adapter.init_from the adapter starts"),
        ("sft", [LORA, "policy.adapter.trainable=false"], "an adapter that starts at zero and does not move"),
        ("sft", ["policy.adapter.init_from=x"], "there is no adapter to start from it"),
    ],
)
def test_settings_without_a_meaning_are_refused(algorithm, overrides, said):
    with pytest.raises(ConfigError) as caught:
        load_config(None, overrides, algorithm)
    assert said in str(caught.value)


def test_a_foreign_file_that_names_an_adapter_translates_with_it(tmp_path):
    file = tmp_path / "veomni.yaml"
    block = {"rank": 4, "alpha": 8, "lora_modules": ["q_proj"], "lora_adapter": "out/step_9"}
    file.write_text(yaml.safe_dump({"model": {"lora_config": block}}))

    assert yaml.safe_load(translate_file(file))["policy"]["adapter"] == {"init_from": "out/step_9"}


def test_the_plan_checks_the_adapter(tiny_sft, trained):
    ended = tiny_sft(*starting_from(trained), "--plan")
    assert ended.code == 0, ended.err
    assert "initial adapter: 14 modules of" in " ".join(ended.out.split())
    assert tiny_sft(*starting_from(trained / "nowhere"), "--plan").code == 2
