"""No accepted key is ignored: each is read by a run, changes what is computed, or is refused by name.

Three kinds of evidence, and a table of the keys that have none because their values mean the same:
- a value other than the usual one is refused, when the configuration is loaded or when a run starts;
- product code reads the key while the driver plans or trains, in at least one of the runs below;
- for keys of which an effect can be computed at once (loss, advantages, learning rate, microbatches, sampling,
  adapter), it changes.
"""

import contextlib
import functools
import importlib.machinery
import json
import re
import sys
import time
import types

import pytest
import torch
import yaml

from nemo_rl_lora.algorithms.advantages import advantages_from_config, shaped_rewards
from nemo_rl_lora.algorithms.losses.policy import count_denominators, make_policy_loss
from nemo_rl_lora.config import load as loader
from nemo_rl_lora.config.load import CONFIG_DIR, ConfigError, load_config, resolved_tree
from nemo_rl_lora.config.lora import lora_spec_from_policy
from nemo_rl_lora.config.master import GrpoMaster
from nemo_rl_lora.config.optimizer import lr_factor
from nemo_rl_lora.config.optimizer_settings import adam_settings, megatron_adam_settings
from nemo_rl_lora.config.schema import leaves
from nemo_rl_lora.config.support import check_runnable
from nemo_rl_lora.config.tree import flatten
from nemo_rl_lora.policy.microbatches import plan_from_config
from nemo_rl_lora.run.metrics import read_metrics
from nemo_rl_lora.run.preflight import ALGORITHMS
from nemo_rl_lora.types import LossInputs
from tests.config.schema_walk import flippable_leaves
from tests.config.traced_run import Reads, traced_run
from tests.tiny_models import make_character_llama

# Keys whose accepted values mean the same here, and why that is no silence.
SAME_MEANING = {
    "policy.dtensor_cfg._v2": "NeMo RL's choice between two workers; there is one, and false is refused with LoRA",
    "cluster.segment_size": "one node is a group of its own; of several, tests/distributed/test_placement.py chooses",
    "grpo.skip_reference_policy_logprobs_calculation": "asserts what the KL coefficient decides; refused against it",
}
LORA = "policy.dtensor_cfg.lora_cfg.enabled=true"


# Evidence from runs


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    make_character_llama(path)
    return path


@pytest.fixture(scope="module")
def common(tiny, tmp_path_factory):
    """Overrides that make the quick start tiny."""
    return [
        f"policy.model_name={tiny}",
        f"logger.log_dir={tmp_path_factory.mktemp('logs')}",
        "policy.precision=float32",
        "policy.train_global_batch_size=8",
        "policy.max_total_sequence_length=96",
        "policy.dynamic_batching.train_mb_tokens=512",
        "policy.dynamic_batching.logprob_mb_tokens=512",
        "policy.generation.max_new_tokens=8",
        "grpo.num_prompts_per_step=2",
        "grpo.num_generations_per_prompt=4",
        "grpo.max_num_steps=1",
        "grpo.max_val_samples=4",
        "data.train.num_rows=16",
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> overrides: together they switch on every block that can be on in this version."""
    files = tmp_path_factory.mktemp("files")
    rows = files / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"ask": f"Say {i}" if i else "Say nothing", "want": str(i)}) + "\n" for i in range(8))
    )
    (files / "reward.py").write_text("def reward(prompt, completion, row):\n    return float(len(completion) % 5)\n")
    gsm8k = files / "gsm8k"
    gsm8k.mkdir()
    for split in ("train", "test"):
        text = json.dumps({"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}) + "\n"
        (gsm8k / f"{split}.jsonl").write_text(text * 4)
    own_rows = [
        f"data.train={{_override_: true, dataset_name: jsonl, data_path: '{rows}', input_key: ask, output_key: want}}",
        f"data.validation={{_override_: true, dataset_name: jsonl, data_path: '{rows}', input_key: ask, split: null}}",
        "data.default.env_name=words",
        f"++env.words.reward_function={files / 'reward.py'}:reward",
    ]
    gym = "{_override_: true, dataset_name: reasoning_gym, task: chain_sum, size: 4, env_name: reasoning_gym}"
    return {
        "adapter, two optimizer steps, reference": [
            LORA,
            "policy.train_global_batch_size=4",
            "loss_fn.reference_policy_kl_penalty=0.1",
            "grpo.val_period=1",
            "grpo.stop_at_validation_metric=accuracy",
            "grpo.stop_at_validation_threshold=2",
            "checkpointing.save_period=1",
            "checkpointing.metric_name=train:reward",
        ],
        "all weights, packed": [
            "policy.dynamic_batching.enabled=false",
            "policy.sequence_packing.enabled=true",
            "policy.train_global_batch_size=4",
            "policy.scheduler={name: wsd, warmup_steps: 1, decay_steps: 2, min_lr_ratio: 0.1, total_steps: 4}",
        ],
        "rows, torch's schedulers": [
            LORA,
            "policy.dynamic_batching.enabled=false",
            "policy.train_global_batch_size=4",
            "policy.scheduler=[{name: torch.optim.lr_scheduler.LinearLR},"
            "{name: torch.optim.lr_scheduler.ConstantLR},"
            "{name: torch.optim.lr_scheduler.CosineAnnealingLR, kwargs: {T_max: 4}},"
            "{milestones: [1, 2]}]",
            "grpo.max_num_steps=3",
        ],
        "own rows and reward": [
            "policy.lora.dim=4",
            *own_rows,
            "data.on_long_prompt=drop",
            "data.max_input_seq_length=10",
            "data.train.max_num_rows=8",
            "grpo.use_dynamic_sampling=true",
            "grpo.batch_multiplier=2",
            "grpo.reward_shaping.enabled=true",
            "grpo.reward_scaling.enabled=true",
        ],
        "rollouts ahead": [
            LORA,
            "grpo.async_grpo.enabled=true",
            "grpo.async_grpo.in_flight_weight_updates=true",
        ],
        "penalty for what was cut": [
            LORA,
            "grpo.reward_shaping.enabled=true",
            "grpo.reward_shaping.stop_properly_penalty_coef=0.5",
            "data.default.env_name=math",
        ],
        "a reasoning task": [LORA, f"data.train={gym}", f"data.validation={gym}"],
        "files by split": [
            LORA,
            f"data.train={{_override_: true, dataset_name: gsm8k, data_path: '{gsm8k}', split: train, env_name: math}}",
            f"data.validation={{_override_: true, dataset_name: gsm8k, data_path: '{gsm8k}', split: test,"
            "env_name: math}",
        ],
    }


@pytest.fixture(scope="module")
def reads(common, runs, tmp_path_factory):
    """What the plan and the runs read."""
    found = Reads()
    for number, (name, overrides) in enumerate(runs.items()):
        directory = f"checkpointing.checkpoint_dir={tmp_path_factory.mktemp(f'steps{number}')}"
        assert traced_run(found, [*common, directory, *overrides]) == 0, name
        if number == 0:
            assert traced_run(found, [*common, directory, *overrides], plan=True) == 0
    _read_by_sinks(found, common)
    return found


class _Recorder(types.ModuleType):
    """A stand-in for a package of metrics: it takes every call."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            return self

        return call


def _read_by_sinks(found, common) -> None:
    """The optional sinks and the GPU monitor, on stand-ins for their packages and for NVML."""
    from nemo_rl_lora.run import gpus, metrics

    sinks = ("wandb", "mlflow", "swanlab")
    config = load_config(None, [*common, *(f"logger.{name}_enabled=true" for name in sinks)], "grpo")
    quick = [*common, "logger.gpu_monitoring.collection_interval=0.01", "logger.gpu_monitoring.flush_interval=0.01"]
    monitored = load_config(None, quick, "grpo")
    found.watch(config)
    found.watch(monitored)
    with pytest.MonkeyPatch.context() as patch, found.recording():
        for name in sinks:
            patch.setitem(sys.modules, name, _Recorder(name))
        log = metrics.RunLog(config.logger, "a: 1\n")
        log.log(1, "train", {"reward": 1.0})
        log.close()
        for module in (metrics, gpus):
            patch.setattr(module, "sample_gpus", lambda: {"node.0.gpu.0.util": 1.0})
        log = metrics.RunLog(monitored.logger, "a: 1\n")
        deadline = time.monotonic() + 10
        while not metrics.read_metrics(log.directory) and time.monotonic() < deadline:
            time.sleep(0.01)
        log.close()
        assert metrics.read_metrics(log.directory)[0]["node.0.gpu.0.util"] == 1.0


BLOCKS = (
    ("policy.dtensor_cfg.lora_cfg.", (LORA,)),
    (
        "policy.dtensor_cfg.lora_cfg.",
        (LORA, "policy.dtensor_cfg.lora_cfg={match_all_linear: false, target_modules: [v_proj]}"),
    ),
    ("policy.lora.", ("policy.lora.use_triton=true",)),
)


@pytest.fixture(scope="module")
def adapter_evidence(reads):
    """Keys of the LoRA blocks that change a field of LoraSpec that a run reads, or are refused at another value."""
    shown = set()
    for block, overrides in BLOCKS:
        config = _loaded(overrides)
        spec, flips = lora_spec_from_policy(config.policy), dict(flippable_leaves(config))
        for key in _keys_under(block):
            if key not in flips:
                shown.add(key)
                continue
            changed = lora_spec_from_policy(_with_values(config, {key: flips[key]}).policy)
            if changed is None or _differing_fields(spec, changed) & reads.spec_fields:
                shown.add(key)
    return shown


def _keys_under(prefix):
    return [key for key in (".".join(path) for path, _ in leaves(GrpoMaster)) if key.startswith(prefix)]


def _with_values(config, values):
    """The configuration with these keys set, validated anew."""
    tree = config.model_dump(by_alias=True)
    for key, value in values.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node[part] = {} if node[part] is None else node[part]
            node = node[part]
        node[last] = value
    return type(config).model_validate(tree).with_layers(config.layers.with_layer("test", list(values)))


def _differing_fields(spec, other):
    return {name for name in spec.__dataclass_fields__ if getattr(spec, name) != getattr(other, name)}


def _refused(config, keys) -> set[str]:
    """Those of the keys that no other value loads for, or that are refused by name at the start."""
    flips = dict(flippable_leaves(config))
    at_loading = {key for key in keys if key not in flips and not _is_under_null(config, key)}
    return at_loading | {key for key in keys & flips.keys() if key in _named(config, key, flips[key])}


def _named(config, key, value) -> set[str]:
    """The words of what a start says about this value."""
    return set(re.split(r"[\s,:=()]+", "\n".join(check_runnable(_with_values(config, {key: value})))))


def _is_under_null(config, key) -> bool:
    """Whether a section above the key is null: then it cannot be flipped, which is no refusal of it."""
    node = config.model_dump(by_alias=True)
    for part in key.split(".")[:-1]:
        node = node[part]
        if node is None:
            return True
    return False


def test_every_accepted_key_is_read_or_refused(reads, adapter_evidence) -> None:
    keys = {".".join(path) for path, _ in leaves(GrpoMaster)}
    compared = {key for _, changes in LOSS_CHANGES + ADVANTAGE_CHANGES for key in changes}  # by the tests below
    merged_by_loading = set(_keys_under("data.default."))  # see the test of data.default
    left = keys - reads.keys - adapter_evidence - compared - merged_by_loading
    silent = sorted(left - _refused(_loaded((LORA,)), left) - SAME_MEANING.keys())
    assert not silent, f"nothing reads, computes with or refuses {', '.join(silent)}"


def test_keys_whose_values_mean_the_same_are_few_and_exist(reads) -> None:
    assert SAME_MEANING.keys() <= {".".join(path) for path, _ in leaves(GrpoMaster)}
    assert SAME_MEANING.keys() & reads.keys == set()
    with pytest.raises(ConfigError, match="_v2=False: LoRA needs"):
        load_config(None, [LORA, "policy.dtensor_cfg._v2=false"], "grpo")
    asserted = ["grpo.skip_reference_policy_logprobs_calculation=true", "loss_fn.reference_policy_kl_penalty=0.1"]
    with pytest.raises(ConfigError, match="the KL term needs the reference"):
        load_config(None, asserted, "grpo")


def test_data_default_reaches_both_datasets() -> None:
    overrides = ["data.default.env_name=math", "data.default.processor=x", "data.default.prompt_file=y"]
    data = load_config(None, [*overrides, "data.default.system_prompt_file=z"], "grpo").data
    for section in (data.train, data.validation):
        assert section is not None
        found = (section.env_name, section.processor, section.prompt_file, section.system_prompt_file)
        assert found == ("math", "x", "y", "z")


# Keys that are set to the value they have anyway


@pytest.mark.slow  # single keys: test_layers.py
@pytest.mark.timeout(1200)  # a configuration is loaded for each of some 400 keys
@pytest.mark.parametrize("backend", ["dtensor", pytest.param("megatron", marks=pytest.mark.long)])
def test_a_key_set_to_its_inherited_value_changes_nothing_or_is_honoured_or_refused(
    backend, common, tmp_path, monkeypatch
) -> None:
    """Every key by itself: AdamW and what a start says are the same, or Megatron's own value is in force, or the key is
    named. Then all of those that change nothing at once: the same reads, and the same metrics of a run."""
    monkeypatch.setattr(loader, "_read_tracked", functools.cache(loader._read_tracked))
    chosen = [*common, f"policy.backend={backend}", "policy.lora.dim=4", "checkpointing.enabled=false"]
    plain = load_config(None, chosen, "grpo")
    values = flatten(resolved_tree(plain))
    silent, changing = {}, set()
    for key in (".".join(path) for path, _ in leaves(GrpoMaster)):
        if key not in values or plain.is_set(key):
            continue
        config, problems = _checked(_file_that_sets(tmp_path / f"{key}.yaml", {key: values[key]}), chosen)
        if problems:
            assert key in problems
        elif config == plain and _adam_values(config) == _adam_values(plain):
            silent[key] = values[key]
        else:
            changing.add(key)
    own = "policy.megatron_cfg."
    assert {key for key in changing if not key.startswith(own)} <= {"policy.optimizer.kwargs.lr"}
    assert (backend == "megatron") == any(key.startswith(f"{own}optimizer.lr") for key in changing)
    assert len(silent) > 150
    traces = []
    for number, keys in enumerate(({}, silent)):
        found, logs = Reads(), tmp_path / f"logs{number}"
        file = _file_that_sets(tmp_path / f"all{number}.yaml", keys)
        assert traced_run(found, [*chosen, f"logger.log_dir={logs}"], file=file) == 0
        lines = read_metrics(logs / "exp_001")
        traces.append(
            (found.keys, [{k: v for k, v in line.items() if "tim" not in k and "_per_" not in k} for line in lines])
        )
    assert traces[0][0] ^ traces[1][0] == set(), "read by one of them alone"
    assert traces[0][1] == traces[1][1]


def _checked(file, overrides):
    """The configuration, and what a start says against it."""
    try:
        config = load_config(file, overrides, "grpo")
    except ConfigError as error:
        return None, str(error)
    return config, "\n".join(check_runnable(config))


def _file_that_sets(file, values):
    tree: dict = {"defaults": str(CONFIG_DIR / "quickstart" / "grpo.yaml")}
    for key, value in values.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    file.write_text(yaml.safe_dump(tree))
    return file


def _adam_values(config):
    of = megatron_adam_settings if config.policy.active_backend == "megatron" else None
    settings = of(config, lora=True) if of else adam_settings(config.policy, lora=True)
    rates = [settings.lr_at(step) for step in range(60)]
    return rates, settings.weight_decay_at(0), settings.betas, settings.eps, settings.max_grad_norm


# Effects that can be computed at once. Each change: a context, and the keys that are set beside it.

PENALTY = "loss_fn.reference_policy_kl_penalty=0.1"
WEIGHTS = "loss_fn.use_importance_sampling_correction=true"
BY_SEQUENCE = "loss_fn.token_level_loss=false"
LOSS_CHANGES = [
    ((PENALTY,), {"loss_fn.reference_policy_kl_penalty": 0.2}),
    ((PENALTY,), {"loss_fn.reference_policy_kl_type": "k2"}),
    ((PENALTY,), {"loss_fn.kl_input_clamp_value": 0.5}),
    ((PENALTY,), {"loss_fn.kl_output_clamp_value": 0.1}),
    ((PENALTY,), {"loss_fn.use_on_policy_kl_approximation": True}),
    ((PENALTY,), {"loss_fn.use_unbiased_kl_estimate": True}),
    ((PENALTY,), {"loss_fn.kl_gradient": "paper"}),
    ((), {"loss_fn.ratio_clip_min": 0.05}),
    ((), {"loss_fn.ratio_clip_max": 0.05}),
    ((), {"loss_fn.ratio_clip_c": 1.1}),
    ((), {"loss_fn.use_importance_sampling_correction": True}),
    (
        (WEIGHTS,),
        {"loss_fn.truncated_importance_sampling_type": "tis", "loss_fn.truncated_importance_sampling_ratio": 1.1},
    ),
    (
        (WEIGHTS,),
        {
            "loss_fn.truncated_importance_sampling_type": "icepop",
            "loss_fn.truncated_importance_sampling_ratio": 1.1,
            "loss_fn.truncated_importance_sampling_ratio_min": 0.9,
        },
    ),
    ((BY_SEQUENCE,), {"loss_fn.sequence_level_importance_ratios": True}),
    ((), {"loss_fn.token_level_loss": False}),
    ((), {"loss_fn.constant_length_normalizer": 7}),
    ((), {"loss_fn.force_on_policy_ratio": True}),
    ((), {"loss_fn.use_cispo": True}),
    ((), {"loss_fn.disable_ppo_ratio": True}),
    (("loss_fn.sapo.temperature_positive=1.0",), {"loss_fn.sapo.temperature_positive": 2.0}),
    (("loss_fn.sapo.temperature_positive=1.0",), {"loss_fn.sapo.temperature_negative": 2.0}),
    (("loss_fn.vespo.k_positive=2.0",), {"loss_fn.vespo.k_positive": 1.0}),
    (("loss_fn.vespo.k_positive=2.0",), {"loss_fn.vespo.lambda_positive": 1.0}),
    (("loss_fn.vespo.k_positive=2.0",), {"loss_fn.vespo.k_negative": 1.0}),
    (("loss_fn.vespo.k_positive=2.0",), {"loss_fn.vespo.lambda_negative": 1.0}),
]
SHAPED = "grpo.reward_shaping.enabled=true"
BUFFER = "grpo.reward_shaping.overlong_buffer_length=32"
SCALED = "grpo.reward_scaling.enabled=true"
PLAIN = ("grpo.normalize_rewards=false",)  # normalized advantages do not change with a linear map
NORMALIZED = {"grpo.normalize_rewards": False, "grpo.adv_estimator.normalize_rewards": False}
BASELINE = {"grpo.use_leave_one_out_baseline": False, "grpo.adv_estimator.use_leave_one_out_baseline": False}
ADVANTAGE_CHANGES = [
    ((), NORMALIZED),
    ((), BASELINE),
    ((), {"grpo.adv_estimator.std_epsilon": 0.1}),
    ((), {"grpo.advantage_clip_low": -0.1}),
    ((), {"grpo.advantage_clip_high": 0.1}),
    ((), {"grpo.reward_shaping.enabled": True}),
    ((SHAPED,), {"grpo.reward_shaping.overlong_buffer_length": 20}),
    ((SHAPED,), {"grpo.reward_shaping.overlong_buffer_penalty": 3.0}),
    ((SHAPED, BUFFER), {"grpo.reward_shaping.max_response_length": 100}),
    ((SHAPED,), {"grpo.reward_shaping.stop_properly_penalty_coef": 0.5}),
    ((*PLAIN, "grpo.reward_scaling.source_max=0.8"), {"grpo.reward_scaling.enabled": True}),
    ((*PLAIN, SCALED), {"grpo.reward_scaling.source_min": 0.3}),
    ((*PLAIN, SCALED), {"grpo.reward_scaling.source_max": 0.8}),
    ((*PLAIN, SCALED), {"grpo.reward_scaling.target_min": -1.0}),
    ((*PLAIN, SCALED), {"grpo.reward_scaling.target_max": 5.0}),
]


def _name_of_change(change) -> str:
    return ", ".join(change[1])


@functools.cache
def _loaded(overrides):
    return load_config(None, list(overrides), "grpo")


def _before_and_after(change):
    before = _loaded(change[0])
    return before, _with_values(before, change[1])


def _loss_and_gradient(config):
    """Of two groups of three rows, whose ratios, references and engine logprobs are far enough apart to be cut."""
    generator = torch.Generator().manual_seed(5)
    logprobs = (-2 * torch.rand(6, 12, generator=generator)).requires_grad_()
    noise = torch.randn(3, 6, 12, generator=generator)
    length = torch.tensor([12, 9, 7, 12, 5, 8])
    mask = torch.arange(12)[None] < length[:, None]
    inputs = LossInputs(
        logprobs=logprobs,
        old_logprobs=logprobs.detach() + 0.4 * noise[0],
        reference_logprobs=logprobs.detach() + noise[1],
        generation_logprobs=logprobs.detach() + 0.3 * noise[2],
        advantages=torch.tensor([1.0, -1.5, 0.5, -0.7, 2.0, -1.3]),
        loss_mask=mask,
        sequence_length=length,
        group_index=torch.tensor([0, 0, 0, 1, 1, 1]),
        denominators=count_denominators(mask),
    )
    loss, _ = make_policy_loss(config.loss_fn)(inputs)
    loss.backward()
    assert logprobs.grad is not None
    return torch.cat([loss.detach()[None], logprobs.grad.flatten()])


def _advantages(config):
    rewards = torch.tensor([0.0, 0.25, 0.5, 1.0, 0.1, 0.9])
    lengths = torch.tensor([10, 120, 60, 127, 30, 90])
    shaped = shaped_rewards(rewards, config.grpo, completion_lengths=lengths, is_truncated=lengths > 100)
    return advantages_from_config(shaped, torch.tensor([0, 0, 0, 1, 1, 1]), config.grpo)


@pytest.mark.parametrize("change", LOSS_CHANGES, ids=_name_of_change)
def test_loss_key_changes_loss_or_gradient(change) -> None:
    before, after = _before_and_after(change)
    assert not torch.allclose(_loss_and_gradient(before), _loss_and_gradient(after), rtol=1e-4, atol=1e-6)


def test_bound_of_the_importance_weight_changes_the_loss() -> None:
    kind = "loss_fn.truncated_importance_sampling_type=tis"
    bounds = [_loaded((WEIGHTS, kind, f"loss_fn.truncated_importance_sampling_ratio={bound}")) for bound in (1.1, 1.4)]
    assert not torch.allclose(*(_loss_and_gradient(config) for config in bounds), rtol=1e-4, atol=1e-6)


def test_every_open_loss_key_is_compared() -> None:
    assert {".".join(path) for path, _ in leaves(GrpoMaster) if path[0] == "loss_fn"} == {
        key for _, changes in LOSS_CHANGES for key in changes
    }


@pytest.mark.parametrize("change", ADVANTAGE_CHANGES, ids=_name_of_change)
def test_reward_key_changes_advantages(change) -> None:
    before, after = _before_and_after(change)
    assert not torch.allclose(_advantages(before), _advantages(after), rtol=1e-4, atol=1e-6)


LINEAR, CONSTANT, COSINE = (
    f"torch.optim.lr_scheduler.{name}" for name in ("LinearLR", "ConstantLR", "CosineAnnealingLR")
)
WSD = "{name: wsd, warmup_steps: 2, decay_steps: 3, min_lr_ratio: 0.1, total_steps: 9}"
SEQUENCE = f"{{name: {LINEAR}, kwargs: {{start_factor: 0.1, total_iters: 4}}}}, {{name: {CONSTANT}}}"


@pytest.mark.parametrize(
    ("scheduler", "other"),
    [
        (WSD, WSD.replace("warmup_steps: 2", "warmup_steps: 3")),
        (WSD, WSD.replace("decay_steps: 3", "decay_steps: 4")),
        (WSD, WSD.replace("min_lr_ratio: 0.1", "min_lr_ratio: 0.2")),
        (WSD, WSD.replace("total_steps: 9", "total_steps: 8")),
        ("{name: linear, total_steps: 9}", "{name: cosine, total_steps: 9}"),
        (f"{{name: {LINEAR}}}", f"{{name: {LINEAR}, kwargs: {{start_factor: 0.5}}}}"),
        (f"{{name: {LINEAR}}}", f"{{name: {LINEAR}, kwargs: {{end_factor: 0.5}}}}"),
        (f"{{name: {LINEAR}}}", f"{{name: {LINEAR}, kwargs: {{total_iters: 7}}}}"),
        (f"{{name: {CONSTANT}}}", f"{{name: {CONSTANT}, kwargs: {{factor: 0.5}}}}"),
        (f"{{name: {CONSTANT}}}", f"{{name: {CONSTANT}, kwargs: {{total_iters: 7}}}}"),
        (f"{{name: {COSINE}, kwargs: {{T_max: 9}}}}", f"{{name: {COSINE}, kwargs: {{T_max: 8}}}}"),
        (f"{{name: {COSINE}, kwargs: {{T_max: 9}}}}", f"{{name: {COSINE}, kwargs: {{T_max: 9, eta_min: 1.0e-4}}}}"),
        (f"[{SEQUENCE}, {{milestones: [3]}}]", f"[{SEQUENCE}, {{milestones: [5]}}]"),
    ],
)
def test_scheduler_key_changes_the_learning_rate(scheduler, other) -> None:
    configs = [_loaded(("policy.scheduler=null", f"policy.scheduler={text}")).policy for text in (scheduler, other)]
    first, second = (
        [lr_factor(policy.scheduler, step, lr=policy.optimizer.kwargs.lr) for step in range(12)] for policy in configs
    )
    assert first != second


ROWS = "policy.dynamic_batching.enabled=false"
PACKED = (ROWS, "policy.sequence_packing.enabled=true")
MICROBATCH_CHANGES = [
    ((), {"policy.dynamic_batching.train_mb_tokens": 256}, "train"),
    ((), {"policy.dynamic_batching.logprob_mb_tokens": 256}, "logprob"),
    ((), {"policy.dynamic_batching.sequence_length_round": 32}, "train"),
    ((), {"policy.dynamic_batching.enabled": False}, "train"),
    (PACKED, {"policy.sequence_packing.train_mb_tokens": 256}, "train"),
    (PACKED, {"policy.sequence_packing.logprob_mb_tokens": 256}, "logprob"),
    (PACKED, {"policy.sequence_packing.sequence_length_round": 32}, "train"),
    ((ROWS,), {"policy.sequence_packing.enabled": True}, "train"),
    ((ROWS,), {"policy.train_micro_batch_size": 2}, "train"),
    ((ROWS,), {"policy.logprob_batch_size": 2}, "logprob"),
    ((), {"policy.make_sequence_length_divisible_by": 3}, "train"),
    ((), {"policy.shared_prefix.enabled": False}, "train"),
    ((), {"policy.shared_prefix.max_row_tokens": 64}, "train"),
]


@pytest.mark.parametrize("change", MICROBATCH_CHANGES, ids=_name_of_change)
def test_batching_key_changes_how_microbatches_are_cut(change) -> None:
    kind = change[2]
    plans = []
    for config in _before_and_after(change):
        algorithm = ALGORITHMS[config.algorithm](config)
        max_rows = config.policy.train_micro_batch_size if kind == "train" else algorithm.logprob_rows
        plans.append(plan_from_config(config.policy, kind, max_rows=max_rows, flat=True))
    assert plans[0] != plans[1]


RUN_CHANGES = {
    "policy.generation.max_new_tokens": ("7", lambda run: run.algorithm.source.params.sampling.max_new_tokens),
    "policy.generation.temperature": ("0.5", lambda run: run.algorithm.source.params.sampling.temperature),
    "policy.generation.stop_token_ids": ("[7]", lambda run: run.algorithm.source.params.sampling.stop_token_ids),
    "policy.generation.stop_strings": ("['x']", lambda run: run.algorithm.source.params.sampling.stop_strings),
    "policy.generation.skip_special_tokens": (
        "false",
        lambda run: run.algorithm.source.params.sampling.skip_special_tokens,
    ),
    "policy.generation.val_temperature": ("0.3", lambda run: run.algorithm.validation_params.sampling.temperature),
    "policy.generation.val_top_p": ("0.5", lambda run: run.algorithm.validation_params.sampling.top_p),
    "policy.generation.val_top_k": ("5", lambda run: run.algorithm.validation_params.sampling.top_k),
    "policy.max_total_sequence_length": ("100", lambda run: run.algorithm.source.params.max_sequence_length),
    "grpo.num_generations_per_prompt": ("8", lambda run: run.algorithm.source.params.num_completions),
    "grpo.val_num_generations_per_prompt": ("3", lambda run: run.algorithm.validation_params.num_completions),
    "grpo.seed": ("7", lambda run: run.algorithm.source.params.seed),
    "grpo.max_num_steps": ("3", lambda run: run.num_steps),
    "policy.optimizer.kwargs.lr": ("0.5", lambda run: run.policy._optimizer.param_groups[0]["lr"]),
    "policy.optimizer.kwargs.weight_decay": ("0.5", lambda run: run.policy._optimizer.defaults["weight_decay"]),
    "policy.optimizer.kwargs.betas": ("[0.5, 0.6]", lambda run: run.policy._optimizer.defaults["betas"]),
    "policy.optimizer.kwargs.eps": ("0.5", lambda run: run.policy._optimizer.defaults["eps"]),
    "policy.optimizer.kwargs.foreach": ("true", lambda run: run.policy._optimizer.defaults["foreach"]),
    "policy.hf_config_overrides": ("{rms_norm_eps: 0.5}", lambda run: run.policy.base_model().config.rms_norm_eps),
    "policy.precision": ("bfloat16", lambda run: run.policy.base_model().dtype),
}


@pytest.fixture(scope="module")
def runs_before_and_after(common):
    """What build/ puts together, with none and with all of the changes above."""
    from nemo_rl_lora.run.preflight import check_start
    from nemo_rl_lora.run.start import build_run

    built = []
    for changes in ([], [f"{key}={value}" for key, (value, _) in RUN_CHANGES.items()]):
        overrides = [*common, LORA, "checkpointing.enabled=false", *changes]
        start = check_start(load_config(None, overrides, "grpo"))
        run = build_run(start, types.SimpleNamespace(), contextlib.ExitStack())  # type: ignore[arg-type]
        parts = {"policy": run.policy, "num_steps": run.num_steps, "algorithm": start.algorithm}
        built.append(types.SimpleNamespace(**parts))
    return built


@pytest.mark.parametrize("key", RUN_CHANGES)
def test_key_changes_its_part_of_a_run(key, runs_before_and_after) -> None:
    of = RUN_CHANGES[key][1]
    before, after = (of(run) for run in runs_before_and_after)
    assert before != after
