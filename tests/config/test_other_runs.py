"""What becomes of the keys of VeOmni's, verl's and theseus's files, one by one."""

import pytest
import yaml

from nemo_rl_lora.config import other_runs
from nemo_rl_lora.config.load import load_config
from nemo_rl_lora.config.their_keys import Theirs, nested
from nemo_rl_lora.config.tree import flatten, merged, with_value
from tests.config.other_files import FILES, write_file


def run_of(document):
    """The translation of a whole file with these keys."""
    return other_runs.run_of(Theirs(document))


@pytest.fixture
def run(tmp_path):
    """The translation of a tool's file with some keys changed; dotted keys, None takes one out."""

    def of(tool, **changes):
        document = yaml.safe_load(write_file(tmp_path, tool).read_text())
        for key, value in changes.items():
            document = with_value(document, key.split("__"), value)
        return run_of(document)

    return of


def at(run, key):
    return flatten(run.tree)[key]


@pytest.mark.parametrize("tool", FILES)
def test_every_key_is_carried_or_named(tool, run):
    known = run(tool)
    assert known.left_out == {}
    changed = run(tool, unheard__of=3, data__unheard=[1])
    assert changed.left_out == {"unheard.of": 3, "data.unheard": [1]}
    assert changed.tree == known.tree


def test_what_is_switched_off_there_has_no_effect(run):
    off = run("verl_grpo", actor_rollout_ref__model__mtp={"enable": False, "num_layers": 4})
    assert "actor_rollout_ref.model.mtp.num_layers" in off.without_effect
    assert off.is_whole
    on = run("verl_grpo", actor_rollout_ref__model__mtp={"enable": True, "num_layers": 4})
    assert set(on.left_out) == {"actor_rollout_ref.model.mtp.enable", "actor_rollout_ref.model.mtp.num_layers"}


def test_what_is_not_another_tools_run_is_left_alone():
    assert run_of({"policy": {"model_name": "x"}, "data": {}, "model": {}, "train": {}}) is None
    assert run_of({"model": {"lora_config": {"lora_modules": ["q_proj"]}}, "train": {}}) is None
    assert run_of({"sft": {}, "training": {}, "architecture": {}}) is None


def test_veomnis_newest_and_older_places_of_the_optimizer_mean_the_same(run, tmp_path):
    newest = run("veomni")
    document = yaml.safe_load(write_file(tmp_path, "veomni").read_text())
    optimizer = document["model"].pop("optimizer")
    below_train = run_of(merged(document, {"train": {"optimizer": optimizer}}))
    flat = run_of(
        merged(document, {"train": {("optimizer_type" if k == "type" else k): v for k, v in optimizer.items()}})
    )
    assert newest.tree == below_train.tree == flat.tree
    named = {k: v for k, v in optimizer.items() if k != "type"}
    oldest = run_of(merged(document, {"train": {**named, "optimizer": "adamw", "dyn_bsz": None, "rmpad": False}}))
    assert oldest.to_decide  # rmpad_with_pos_ids is on where it is not written
    rows = run_of(merged(document, {"train": {"dyn_bsz": None, "rmpad": False, "rmpad_with_pos_ids": False}}))
    assert (oldest.left_out, rows.to_decide) == ({}, ())
    muon = run_of(merged(document, {"train": {**named, "optimizer": "muon"}}))
    assert [line.split(":")[0] for line in muon.to_decide] == ["policy.optimizer.kwargs.lr"]
    assert (at(newest, "policy.optimizer.kwargs.lr"), at(newest, "policy.optimizer.kwargs.weight_decay")) == (1e-3, 0)
    scheduler = newest.tree["policy"]["scheduler"]
    assert scheduler == {"name": "cosine", "warmup_steps": 1, "total_steps": 2, "min_lr_ratio": 0.1}


def test_veomnis_steps_come_from_its_tokens_where_it_fills_by_tokens(run):
    filled = run(
        "veomni", train__dyn_bsz=True, data__train_size=10_000, train__max_steps=None, train__num_train_epochs=2
    )
    # ceil(10,000 / (2 rows x 128 tokens)) = 40 steps a pass
    assert (at(filled, "sft.max_num_steps"), at(filled, "policy.scheduler.total_steps")) == (80, 80)
    assert at(filled, "policy.sequence_packing.train_mb_tokens") == 128
    assert [line.split(":")[0] for line in filled.to_decide] == ["policy.train_global_batch_size"]
    assert not filled.is_whole
    by_rows = run("veomni", train__max_steps=None)
    assert at(by_rows, "policy.scheduler.total_steps") == "???"
    assert at(by_rows, "sft.max_num_epochs") == 1


def test_veomnis_preferences_are_dpo(run):
    found = run(
        "veomni", data__data_type="dpo", data__text_keys=None, dpo_config={"beta": 0.3, "reference_free": False}
    )
    assert (at(found, "dpo.reference_policy_kl_penalty"), at(found, "dpo.max_num_steps")) == (0.3, 2)
    assert at(found, "data.train.dataset_name") == "BinaryPreferenceDataset"
    assert found.left_out == {}
    assert (
        "dpo_config.reference_free"
        in run("veomni", data__data_type="dpo", dpo_config={"reference_free": True}).left_out
    )
    with pytest.raises(ValueError, match="data.data_type='diffusion': only text is trained here"):
        run("veomni", data__data_type="diffusion")
    plain = run("veomni", data__data_type="plaintext")
    assert plain.to_decide[0].startswith("data.train.data_path: a file of chats")


def test_without_an_adapter_all_weights_are_trained(run):
    for tool, off in (
        ("veomni", {"model__lora_config": None}),
        ("verl_sft", {"model__lora_rank": 0}),
        ("verl_grpo", {"actor_rollout_ref__model__lora_rank": 0}),
    ):
        assert "lora" not in run(tool, **off).tree["policy"]


def test_an_adapter_to_start_from_comes_along_with_what_is_its_reference(run, tmp_path):
    start = str(tmp_path / "step_9")
    assert at(run("veomni", model__lora_config__lora_adapter=start), "policy.adapter.init_from") == start
    rl = run("verl_grpo", actor_rollout_ref__model__lora_adapter_path=start)
    assert rl.tree["policy"]["adapter"] == {"init_from": start, "reference": "base"}
    with pytest.raises(ValueError, match="lora_rank=0 the adapter's own file says what it is"):
        run("verl_grpo", actor_rollout_ref__model__lora_adapter_path=start, actor_rollout_ref__model__lora_rank=0)


def test_verls_grpo_has_its_numbers_here(run, tmp_path):
    found = run("verl_grpo")
    expected = {
        "grpo.num_prompts_per_step": 2,
        "grpo.num_generations_per_prompt": 2,
        "policy.train_global_batch_size": 2,
        "grpo.use_leave_one_out_baseline": False,
        "grpo.normalize_rewards": True,
        "loss_fn.ratio_clip_min": 0.2,
        "loss_fn.ratio_clip_max": 0.28,
        "loss_fn.ratio_clip_c": 3.0,
        "loss_fn.token_level_loss": False,
        "loss_fn.reference_policy_kl_penalty": 0.002,
        "loss_fn.reference_policy_kl_type": "k3",
        "loss_fn.kl_gradient": "paper",
        "policy.max_total_sequence_length": 68,
        "policy.generation.max_new_tokens": 4,
        "policy.generation.temperature": 0.9,
        "policy.max_grad_norm": 0.5,
        "data.on_long_prompt": "drop",
        "env.custom.reward_function": f"{tmp_path}/reward.py:compute_score",
    }
    assert {key: at(found, key) for key in expected} == expected
    assert at(run("verl_grpo", algorithm__adv_estimator="rloo"), "grpo.use_leave_one_out_baseline") is True
    assert at(run("verl_grpo", actor_rollout_ref__actor__use_kl_loss=False), "loss_fn.reference_policy_kl_penalty") == 0
    dapo = run(
        "verl_grpo",
        algorithm__filter_groups={"enable": True, "metric": "acc", "max_num_gen_batches": 5},
        reward_model__overlong_buffer={"enable": True, "len": 2, "penalty_factor": 0.5},
    )
    assert (at(dapo, "grpo.use_dynamic_sampling"), at(dapo, "grpo.dynamic_sampling_max_gen_batches")) == (True, 5)
    assert at(dapo, "grpo.reward_shaping.overlong_buffer_penalty") == 0.5
    assert dapo.left_out == {}


@pytest.mark.parametrize("place", ["reward_model", "reward"])
def test_dapos_penalty_of_length_is_read_below_a_reward_managers_arguments(run, place):
    found = run(
        "verl_grpo",
        **{
            f"{place}__reward_manager": "dapo",
            f"{place}__reward_kwargs": {
                "overlong_buffer_cfg": {"enable": True, "len": 2, "penalty_factor": 0.5, "log": False},
                "max_resp_len": 4,
            },
        },
        reward_model__enable=False,
        actor_rollout_ref__rollout__response_length=3,
    )
    assert found.tree["grpo"]["reward_shaping"] == {
        "enabled": True,
        "overlong_buffer_length": 2,
        "overlong_buffer_penalty": 0.5,
        "max_response_length": 4,
    }
    assert at(found, "policy.generation.max_new_tokens") == 3
    assert found.is_whole, (found.to_decide, found.left_out)


@pytest.mark.parametrize(
    ("tool", "changes", "harmless"),
    [
        ("verl_grpo", "reward__custom_reward_function__reward_kwargs__weight", {}),
        ("verl_grpo", "custom_reward_function__reward_kwargs__weight", {}),
        ("verl_grpo", "reward_model__reward_kwargs__weight", {"reward_model__enable": False}),
        ("verl_grpo", "reward_model__reward_manager", {"reward_model__reward_manager": "naive"}),
        ("verl_grpo", "reward__reward_manager__name", {"reward__reward_manager__name": "dapo"}),
        *(
            ("verl_grpo", f"actor_rollout_ref__rollout__{key}", {f"actor_rollout_ref__rollout__{key}": neutral})
            for key, neutral in (
                ("repetition_penalty", 1.0),
                ("min_p", 0.0),
                ("presence_penalty", 0),
                ("later", None),
                ("use_fire_sampling", False),
            )
        ),
        ("verl_grpo", "actor_rollout_ref__rollout__engine_kwargs__vllm__quantization", {}),
        ("verl_grpo", "actor_rollout_ref__rollout__agent__default_agent_loop", {}),
        ("verl_grpo", "actor_rollout_ref__ref__model__path", {}),
        ("verl_grpo", "reward_model__reward_loop_source", {"reward_model__reward_loop_source": "register"}),
        ("verl_grpo", "trainer__val_only", {"trainer__val_only": False}),
        ("verl_grpo", "trainer__critic_warmup", {"trainer__critic_warmup": 0}),
        *(
            (tool, f"trainer__{key}", {f"trainer__{key}": neutral})
            for tool in ("verl_sft", "verl_grpo")
            for key, neutral in (("resume_mode", "disable"), ("resume_from_path", None), ("later", None))
        ),
        ("veomni", "train__checkpoint__load_path", {"train__checkpoint__load_path": "auto"}),
        ("veomni", "train__checkpoint__load_path", {"train__checkpoint__load_path": ""}),
        ("veomni", "train__checkpoint__later", {}),
    ],
)
def test_what_changes_training_is_not_among_what_changes_nothing(run, tool, changes, harmless):
    key = changes.replace("__", ".")
    for value in (7, "resume_path"):
        assert run(tool, **harmless | {changes: value}).left_out == {key: value}
    known = run(tool, **harmless)
    assert (known.left_out, known.is_whole) == ({}, True)


@pytest.mark.parametrize(
    ("change", "decided"),
    [
        ({"actor_rollout_ref__actor__kl_loss_type": "abs"}, "loss_fn.reference_policy_kl_type"),
        ({"actor_rollout_ref__actor__loss_agg_mode": "seq-mean-token-sum"}, "loss_fn.token_level_loss"),
        ({"actor_rollout_ref__actor__policy_loss": {"loss_mode": "gspo"}}, "loss_fn.sequence_level_importance_ratios"),
        ({"actor_rollout_ref__rollout__top_p": 0.9}, "policy.generation.top_p"),
        ({"actor_rollout_ref__rollout__multi_turn": {"enable": True}}, "policy.generation.top_p"),
        ({"algorithm__use_kl_in_reward": True}, "loss_fn.reference_policy_kl_penalty"),
        ({"reward_model__enable": True}, "data.default.env_name"),
        ({"data__train_files": ["a.parquet", "b.parquet"]}, "data.train.data_path"),
        ({"actor_rollout_ref__actor__optim__warmup_style": "wsd"}, "policy.scheduler"),
    ],
)
def test_what_verl_has_otherwise_is_left_to_the_user(run, change, decided):
    assert [line.split(":")[0] for line in run("verl_grpo", **change).to_decide] == [decided]


def test_verls_critics_are_refused_by_name(run):
    with pytest.raises(ValueError, match=r"algorithm\.adv_estimator='gae': the advantages here are those of a group"):
        run("verl_grpo", algorithm__adv_estimator="gae")


def test_verls_newer_sft_trainer_reads_chats_and_fills_by_tokens(run):
    found = run(
        "verl_sft",
        data={"train_batch_size": 8, "train_files": "x.parquet", "messages_key": "chat", "use_dynamic_bsz": True},
        data__prompt_key=None,
        data__response_key=None,
        model={"partial_pretrain": None, "path": "org/m"},
    )
    assert found.tree["data"]["train"] == {
        "dataset_name": "openai_format",
        "chat_key": "chat",
        "tool_key": "tools",
        "data_path": "x.parquet",
    }
    assert found.tree["policy"]["sequence_packing"] == {"enabled": True, "train_mb_tokens": 8192}
    nested = run("verl_sft", data__prompt_key="extra_info", data__prompt_dict_keys=["question"])
    assert nested.to_decide[0].startswith("data.train.input_key: the row's key of the question")


def test_theseus_stages_are_phases_and_a_part_has_one_schedule(run):
    phases = run("theseus").tree["sft"]["phases"]
    assert [(phase["train"], phase["tokens"]) for phase in phases] == [("full", 100), ("full", 150), ("lora", 120)]
    assert [(phase.get("warmup_pct"), phase.get("decay_pct")) for phase in phases] == [
        (0.02, 0.2),
        (None, None),
        (0.02, 0.2),
    ]
    assert [phase.get("schedule") for phase in phases] == [None, "continue", None]
    assert phases[1]["data"][1] == {"dataset_name": "squad", "rate": 0.25}
    assert phases[0]["data"] == [{"dataset_name": "openai_format", "data_path": "???", "rate": 1.0}]


def test_theseus_numbers_are_carried(run):
    found = run("theseus")
    assert found.tree["policy"]["optimizer"] == {"kwargs": {"lr": 3e-4, "weight_decay": 0.1, "betas": [0.9, 0.95]}}
    assert (at(found, "policy.train_global_batch_size"), at(found, "policy.train_micro_batch_size")) == (2, 2)
    assert at(found, "policy.max_total_sequence_length") == 96
    assert (at(found, "policy.lora.dim"), at(found, "policy.lora.A_init")) == (4, "normal(0.25)")
    automatic = run("theseus", training__per_device_batch_size=-1)
    assert automatic.tree["policy"]["sequence_packing"] == {"enabled": True, "train_mb_tokens": "auto"}
    read_by_schedule = run("theseus", optimization__warmup_pct=0.5)
    assert read_by_schedule.tree["sft"]["phases"][0]["warmup_pct"] == 0.5
    anew = run("theseus", architecture={"n_layers": 2, "block_size": 96, "backbone": None})
    assert at(anew, "policy.model_name") == "???"


def test_theseus_evaluations_checkpoints_and_keys_of_a_dataset_are_in_one_of_the_lists(run):
    plain = run("theseus")
    assert at(plain, "checkpointing.save_period") == 95
    assert at(run("theseus", logging__checkpoint_interval=None), "checkpointing.save_period") == 1024
    assert [line.split(":")[0] for line in plain.differences if line.startswith("style")] == [
        "style=PMD",
        "style=PADDED",
    ]
    evaluated = run("theseus", eval={"evaluations": ["gsm8k", "squad"]})
    (line,) = set(evaluated.to_decide) - set(plain.to_decide)
    assert line.startswith("evaluate: theseus's evaluations, gsm8k, squad, as a list of name and data each")
    assert run("theseus", eval={"evaluations": ["gsm8k"]}, training__evaluate=False).to_decide == plain.to_decide
    dataset = {"name": "squad", "rate": 1.0, "split": "train", "weight": 2}
    more = run("theseus", training__post_lora_dataset=[[dataset]])
    key = "training.post_lora_dataset.0.0"
    assert more.left_out == {f"{key}.split": "train", f"{key}.weight": 2}


def test_theseus_keys_may_be_written_with_slashes(run, tmp_path):
    document = yaml.safe_load(write_file(tmp_path, "theseus").read_text())
    slashes = {key.replace(".", "/"): value for key, value in flatten(document).items()}
    assert run_of(nested(slashes)).tree == run("theseus").tree


def test_theseus_with_one_part_alone(run):
    lora = run("theseus", training__pre_lora_tokens=[], training__pre_lora_dataset=[])
    assert [phase["train"] for phase in lora.tree["sft"]["phases"]] == ["lora"]
    full = run("theseus", training__post_lora_tokens=[], training__post_lora_dataset=[])
    assert [phase["train"] for phase in full.tree["sft"]["phases"]] == ["full", "full"]
    assert "lora" not in full.tree["policy"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training__pre_lora_tokens": [100]}, r"training\.pre_lora_dataset=.*needs a list for each of the 1 numbers"),
        ({"training__post_lora_tokens": [0]}, r"training\.post_lora_tokens\.0=0: must be a number of at least 1"),
        ({"training__warmup_pct": 2}, r"training\.warmup_pct=2: must lie in \[0, 1\]"),
        ({"training__warmup_pct": "some"}, r"training\.warmup_pct='some': must be a number"),
        ({"optimization__lora__target_modules": ["embedding"]}, "no linear layer"),
        ({"optimization__lora__dropout": 0.1}, r"optimization\.lora\.dropout=0\.1: is no key known here"),
        (
            {"training__post_lora_dataset": [["squad"]]},
            r"training\.post_lora_dataset\.0\.0='squad': must be a mapping with name",
        ),
    ],
)
def test_wrong_theseus_files_are_refused_by_name(run, change, said):
    with pytest.raises(ValueError, match=said):
        run("theseus", **change)


def test_a_theseus_job_whose_stages_are_in_its_code_is_refused(tmp_path):
    document = yaml.safe_load(write_file(tmp_path, "theseus").read_text())
    del document["training"]["pre_lora_tokens"], document["training"]["post_lora_tokens"]
    document["training"]["tokens"] = [100, 200]
    with pytest.raises(ValueError, match="what trains adapters is written in this job's code"):
        run_of(document)


def test_an_own_file_may_inherit_another_tools(tmp_path):
    file = write_file(tmp_path, "verl_sft")
    own = tmp_path / "own.yaml"
    own.write_text(f"defaults: {file.name}\npolicy: {{lora: {{dim: 2}}}}\n")
    config = load_config(own, [], "sft")
    assert (config.policy.lora.dim, config.policy.lora.alpha, config.sft.max_num_steps) == (2, 8, 2)
    assert config.is_set("policy.train_global_batch_size")
