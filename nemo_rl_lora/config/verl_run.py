"""A verl file as a run: its SFT trainer's as SFT, `actor_rollout_ref` with a group-relative advantage as GRPO.

Read after verl's SFT trainers (`model.partial_pretrain`, then `model.path`) and its PPO trainer. Of a file that Hydra
composes, what stands in it is read; what it does not write has verl's default. GRPO's rewards are the file's
`custom_reward_function`; verl's own, which go by `data_source`, have no counterpart and are left to the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_rl_lora.config.run_draft import (
    OPEN,
    Draft,
    NoSuchRunError,
    RunTranslation,
    adapter_of,
    set_adapter,
    set_length,
    set_precision,
    set_schedule,
    set_validation,
)
from nemo_rl_lora.config.their_keys import Theirs
from nemo_rl_lora.lora.dialects import parse_dtype

TOOL = "verl"
_HARMLESS_EVERYWHERE: dict[str, tuple[Any, ...] | None] = {
    "_target_": None,
    "*._target_": None,
    "defaults": None,
    "hydra.*": None,
    **dict.fromkeys(
        f"trainer.{key}"
        for key in (
            *("balance_batch", "device", "use_legacy_worker_impl", "ray_wait_register_center_timeout"),
            *("project_name", "experiment_name", "default_hdfs_dir", "del_local_ckpt_after_load"),
            *("max_actor_ckpt_to_keep", "max_critic_ckpt_to_keep", "max_ckpt_to_keep", "remove_previous_ckpt_in_save"),
            *("log_val_generations", "val_generations_to_log_to_wandb", "rollout_data_dir", "validation_data_dir"),
            *("esi_redundant_time", "seed", "val_before_train", "strategy"),
            *(
                "profile_steps",
                "profile_interval",
                "npu_profile.*",
                "worker_nsight_options.*",
                "controller_nsight_options.*",
            ),
        )
    ),
    "trainer.*": (False,),  # what is off, of any version
    "trainer.resume_mode": ("auto", "disable"),
    "trainer.critic_warmup": (0,),  # steps in which the policy is not trained, without a critic too
    "data.*num_workers": None,
    "data.*_workers": None,
    "data.use_shm": None,
    "data.pad_mode": None,
    "data.balance_dp_token": None,
    "data.ignore_input_ids_mismatch": None,
    "data.return_*": None,
    "data.trust_remote_code": (False,),
    "data.shuffle": (True,),
    "data.*_max_samples": (-1,),
    "*.fsdp_config.*": None,
    "*.fsdp.*": None,
    "*.megatron.*": None,
    "*.profiler.*": None,
    "*.strategy": None,
    "*.use_shm": None,
    "*.use_liger": None,
    "*.use_remove_padding": None,
    "use_remove_padding": None,
    "*.use_fused_kernels": None,
    "*.fused_kernel_options.*": None,
    "*.use_torch_compile": None,
    "*.enable_activation_offload": None,
    "*.trust_remote_code": (False,),
    "*ulysses_sequence_parallel_size": None,
    "engine.*": None,
    "checkpoint.*": None,
    "*.checkpoint.*": None,
    "*num_cycles": (0.5,),
    "*optimizer": ("AdamW",),
    "*optimizer_impl": ("torch.optim",),
    "*optim.total_training_steps": None,
    "*zero_indexed_step": None,
    "*min_lr_ratio": (0, 0.0),
}
# Where verl has had what belongs to rewards, and what of it changes no reward.
_REWARDS = ("reward_model", "reward", "reward.reward_model")
_HARMLESS_OF_REWARDS: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(
        (
            *("enable_resource_pool", "n_gpus_per_node", "nnodes", "num_workers", "nccl_timeout"),
            *("launch_reward_fn_async", "use_reward_loop", "use_dynamic_bsz", "sandbox_fusion.*"),
            *("model.*", "model_path", "rollout.*"),  # of a model that scores, which is not here
            *("micro_batch_size", "micro_batch_size_per_gpu", "max_length", "forward_max_token_len_per_gpu"),
            *("overlong_buffer.log", "reward_kwargs.overlong_buffer_cfg.log"),
        )
    ),
    "*": (False,),
    "reward_loop_source": ("register",),
    "reward_manager": ("naive", "dapo", "prime"),  # which call a function of the file's own alike
    "reward_manager.name": ("naive", "dapo", "prime"),
    "reward_manager.source": ("register",),
    "reward_manager.module.name": ("custom_reward_manager",),  # without a path
}
# What of `actor_rollout_ref.rollout` is about the engine, and not about what is sampled.
_ENGINE = (
    *("name", "mode", "prompt_length", "gpu_memory_utilization", "enforce_eager", "cudagraph_capture_sizes"),
    *("free_cache_engine", "*_parallel_size", "max_num_batched_tokens", "max_model_len", "max_num_seqs", "seed"),
    *("log_prob_*", "disable_log_stats", "multi_stage_wake_up", "calculate_log_probs", "checkpoint_engine.*"),
    *("agent.num_workers", "update_weights_bucket_megabytes", "trace.*", "skip_dump_dir", "skip_tokenizer_init"),
    *("enable_chunked_prefill", "enable_prefix_caching", "load_format", "layered_summon", "micro_batch_size"),
    *("multi_turn.*", "val_kwargs.do_sample", "engine_kwargs.*.swap_space", "engine_kwargs.*.attention_backend"),
    *("engine_kwargs.*.disable_mm_preprocessor_cache", "prometheus.*", "scheduling_policy", "logprobs_mode"),
    *("nnodes", "n_gpus_per_node", "server.*"),
)
_HARMLESS_IN_GRPO = _HARMLESS_EVERYWHERE | {
    "critic.*": None,
    **{f"{place}.{key}": values for place in _REWARDS for key, values in _HARMLESS_OF_REWARDS.items()},
    "ray_kwargs.*": None,
    "ray_init.*": None,
    "global_profiler.*": None,
    "transfer_queue.*": None,
    "actor_rollout_ref.hybrid_engine": None,
    "actor_rollout_ref.nccl_timeout": None,
    "actor_rollout_ref.ref.log_prob_*": None,
    "actor_rollout_ref.ref.entropy_*ing": None,
    "actor_rollout_ref.ref.rollout_n": None,
    "actor_rollout_ref.ref.router_replay.mode": ("disabled",),
    "actor_rollout_ref.actor.ppo_micro_batch_size*": None,
    "actor_rollout_ref.actor.shuffle": (False,),
    "actor_rollout_ref.actor.data_loader_seed": None,
    "actor_rollout_ref.actor.rollout_n": None,
    "actor_rollout_ref.actor.freeze_vision_tower": None,
    "actor_rollout_ref.actor.tau_*": None,
    "actor_rollout_ref.actor.tis_imp_ratio_cap": (-1,),
    "actor_rollout_ref.actor.calculate_*": None,
    "actor_rollout_ref.actor.router_replay.mode": ("disabled",),
    "actor_rollout_ref.actor.entropy_coeff": (0, 0.0),
    "actor_rollout_ref.actor.entropy_*ing": None,
    "actor_rollout_ref.actor.policy_loss.*": None,
    **{f"actor_rollout_ref.rollout.{key}": None for key in _ENGINE},
    "actor_rollout_ref.rollout.agent.default_agent_loop": ("single_turn_agent",),
    "actor_rollout_ref.rollout.over_sample_rate": (0,),
    "actor_rollout_ref.rollout.*": (False,),
    "actor_rollout_ref.rollout.repetition_penalty": (1,),
    "actor_rollout_ref.rollout.presence_penalty": (0,),
    "actor_rollout_ref.rollout.frequency_penalty": (0,),
    "actor_rollout_ref.rollout.min_p": (0,),
    "actor_rollout_ref.rollout.logprobs": (0, 1),
    "algorithm.gamma": None,
    "algorithm.lam": None,
    "algorithm.kl_*": None,
    "algorithm.pf_ppo.*": None,
    "algorithm.use_pf_ppo": (False,),
    "algorithm.rollout_correction.rollout_*_*": None,  # of weights that are null, or are listed themselves
    "algorithm.rollout_correction.bypass_mode": (False,),
    "algorithm.rollout_correction.loss_type": ("ppo_clip",),
    "data.reward_fn_key": None,
    "data.image_*": None,
    "data.video_key": None,
    "data.val_batch_size": None,
    "data.validation_shuffle": None,
}
# What of `actor_rollout_ref.rollout` changes what is sampled, with the values that mean what is done here.
_FULL_SAMPLING = {
    "top_p": (1, 1.0),
    "top_k": (-1,),
    "do_sample": (True,),
    "ignore_eos": (False,),
    "multi_turn.enable": (False,),
}
_NOT_TRAINED = ("critic.", "reward", "actor_rollout_ref.ref.", "actor_rollout_ref.rollout.")
_KL_TYPES = {"low_var_kl": "k3", "k3": "k3", "mse": "k2", "k2": "k2"}


def is_verl(document: Mapping[str, Any]) -> bool:
    """Whether a document is a whole file of verl."""
    is_sft = all(isinstance(document.get(section), Mapping) for section in ("model", "data", "trainer"))
    return is_sft or all(isinstance(document.get(section), Mapping) for section in ("actor_rollout_ref", "data"))


def verl_run(theirs: Theirs) -> RunTranslation:
    """The run of the file. ValueError for an algorithm, or an adapter, without a counterpart."""
    draft = Draft(theirs)
    if _is_grpo(theirs):
        _grpo(draft)
        return draft.finish(TOOL, _HARMLESS_IN_GRPO, own_switches=_REWARDS)
    _sft(draft)
    return draft.finish(TOOL, _HARMLESS_EVERYWHERE)


def _is_grpo(theirs: Theirs) -> bool:
    return isinstance(theirs.document.get("actor_rollout_ref"), Mapping)


def _sft(draft: Draft) -> None:
    theirs = draft.theirs
    _set_model(draft, "model", path_keys=("model.path", "model.partial_pretrain"))
    _set_sft_rows(draft)
    _say_what_is_cut(draft)
    draft.set("policy.max_total_sequence_length", theirs.take_count("data.max_length", default=1024, least=2))
    draft.set("policy.train_global_batch_size", theirs.take_count("data.train_batch_size", default=256))
    micro = theirs.take_count("data.micro_batch_size_per_gpu", "data.micro_batch_size", default=4)
    tokens = theirs.take_count("data.max_token_len_per_gpu", default=8192)
    if theirs.take_switch("data.use_dynamic_bsz", default=False):
        draft.set("policy.sequence_packing", {"enabled": True, "train_mb_tokens": tokens})
    else:
        draft.set("policy.train_micro_batch_size", micro)
    draft.set("sft.seed", theirs.take_count("trainer.seed", default=1, least=0))
    _set_optimizer(draft, "optim", lr=1e-5 if theirs.has("model.partial_pretrain") else 1e-3)
    _set_run(draft, "sft", epochs=4, steps_of_a_pass="rows of data.train_files / data.train_batch_size")


def _set_sft_rows(draft: Draft) -> None:
    """Chats under `messages_key`, or, in verl's first SFT trainer, a question and its answer."""
    theirs = draft.theirs
    is_first = theirs.has("data.prompt_key") or theirs.has("data.response_key")
    chats = theirs.take_switch("data.multiturn.enable", default=not is_first)
    messages = theirs.take_text("data.messages_key", "data.multiturn.messages_key", default="messages")
    prompt, answer = (
        theirs.take_text("data.prompt_key", default="question"),
        theirs.take_text("data.response_key", default="answer"),
    )
    inner = [theirs.take_texts(f"data.{side}_dict_keys") for side in ("prompt", "response")]
    if chats:
        dataset = {"dataset_name": "openai_format", "chat_key": messages}
        dataset["tool_key"] = theirs.take_text("data.tools_key", "data.multiturn.tools_key", default="tools")
        theirs.mark("data.enable_thinking_key")
    else:
        dataset = {"dataset_name": "ResponseDataset", "input_key": prompt, "output_key": answer}
        draft.differs("The chat template ends an answer here; there the tokenizer's end-of-sequence token does.")
    if theirs.has("model.partial_pretrain"):
        draft.differs("The loss is the mean over the batch's tokens here; there it is the mean of microbatches' means.")
    _set_rows(draft, "train", "data.train_files", dataset)
    _set_rows(draft, "validation", "data.val_files", dataset)
    if not chats and any(inner):
        draft.leave_open(
            "data.train.input_key",
            f"the row's key of the question. There it is {inner[0]} within {prompt!r}, and the answer {inner[1]} "
            f"within {answer!r} (data.train.output_key): write rows in which both stand at the top",
        )
    if kwargs := theirs.take_mapping("data.apply_chat_template_kwargs"):
        draft.set("policy.tokenizer.chat_template_kwargs", kwargs)
    if template := theirs.take_text("data.chat_template"):
        draft.set("policy.tokenizer.chat_template", template)


def _grpo(draft: Draft) -> None:
    theirs = draft.theirs
    _set_advantages(draft)
    _set_model(draft, "actor_rollout_ref.model", path_keys=("actor_rollout_ref.model.path",))
    prompts = theirs.take_count("data.train_batch_size", default=1024)
    group = theirs.take_count("actor_rollout_ref.rollout.n", default=1)
    slice_of = theirs.take_count("actor_rollout_ref.actor.ppo_mini_batch_size", default=256)
    if group < 2:
        raise ValueError(
            f"actor_rollout_ref.rollout.n={group}: advantages are those of a group of completions. Set it to at least "
            f"2."
        )
    if prompts % slice_of:
        raise ValueError(
            f"actor_rollout_ref.actor.ppo_mini_batch_size={slice_of}: must divide data.train_batch_size={prompts}. "
            f"Correct one of them."
        )
    draft.set("grpo.num_prompts_per_step", prompts)
    draft.set("grpo.num_generations_per_prompt", group)
    draft.set("policy.train_global_batch_size", slice_of * group)
    if theirs.take_count("actor_rollout_ref.actor.ppo_epochs", default=1) != 1:
        draft.leave_open(
            "grpo.num_prompts_per_step", "each is trained once here, and actor.ppo_epochs times there", value=prompts
        )
    tokens = theirs.take_count("actor_rollout_ref.actor.ppo_max_token_len_per_gpu", default=16384)
    if theirs.take_switch("actor_rollout_ref.actor.use_dynamic_bsz", default=False):
        draft.set("policy.sequence_packing", {"enabled": True, "train_mb_tokens": tokens, "logprob_mb_tokens": tokens})
    else:
        micro = theirs.take_count("actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu")
        draft.carry("policy.train_micro_batch_size", micro)
    _set_lengths(draft)
    _set_questions(draft)
    _set_reward_model(draft)
    _set_loss(draft)
    _set_optimizer(draft, "actor_rollout_ref.actor.optim", lr=1e-6)
    clip = theirs.take_number("actor_rollout_ref.actor.grad_clip", default=1.0, above=0)
    draft.set("policy.max_grad_norm", clip)
    _set_sampling(draft)
    at_start = theirs.take_switch("trainer.val_before_train", default=True)
    _set_run(
        draft,
        "grpo",
        epochs=30,
        steps_of_a_pass="prompts of data.train_files / data.train_batch_size",
        at_start=at_start,
    )


def _set_advantages(draft: Draft) -> None:
    theirs = draft.theirs
    estimator = theirs.take_text("algorithm.adv_estimator", default="gae")
    if estimator not in ("grpo", "rloo"):
        raise NoSuchRunError(
            f"algorithm.adv_estimator={estimator!r}: the advantages here are those of a group of completions, 'grpo' "
            f"or 'rloo', and there is no critic. Set one of the two, or train with verl."
        )
    by_std = theirs.take_switch("algorithm.norm_adv_by_std_in_grpo", default=True)
    draft.set("grpo.normalize_rewards", by_std and estimator == "grpo")
    draft.set("grpo.use_leave_one_out_baseline", estimator == "rloo")
    if theirs.take_switch("algorithm.filter_groups.enable", default=False):
        draft.set("grpo.use_dynamic_sampling", True)
        if (batches := theirs.take_count("algorithm.filter_groups.max_num_gen_batches", default=0, least=-1)) > 0:
            draft.set("grpo.dynamic_sampling_max_gen_batches", batches)
    theirs.mark("algorithm.filter_groups")
    if theirs.take_switch("algorithm.use_kl_in_reward", default=False):
        draft.leave_open(
            "loss_fn.reference_policy_kl_penalty", "weight of the KL term of the loss; there it is in the reward"
        )


def _set_lengths(draft: Draft) -> None:
    theirs = draft.theirs
    asked = theirs.take_count("data.max_prompt_length", default=512)
    answered = theirs.take_count("actor_rollout_ref.rollout.response_length", "data.max_response_length", default=512)
    draft.set("policy.max_total_sequence_length", asked + answered)
    draft.set("policy.generation.max_new_tokens", answered)
    draft.set("data.max_input_seq_length", asked)
    drops = theirs.take_switch("data.filter_overlong_prompts", default=False)
    draft.set("data.on_long_prompt", "drop" if drops else "error")
    _say_what_is_cut(draft)


def _say_what_is_cut(draft: Draft) -> None:
    cut = draft.theirs.take_text("data.truncation", default="error")
    if cut == "error":
        return
    is_sft = not _is_grpo(draft.theirs)
    if not is_sft or cut != "right":
        where = "is cut at its end" if is_sft else "is an error or left out (data.on_long_prompt)"
        draft.differs(f"data.truncation={cut}: a row that is too long {where} here.")


def _set_questions(draft: Draft) -> None:
    """Prompts as verl stores them, and what scores completions."""
    theirs = draft.theirs
    dataset = {"dataset_name": "verl", "prompt_key": theirs.take_text("data.prompt_key", default="prompt")}
    _set_rows(draft, "train", "data.train_files", dataset)
    _set_rows(draft, "validation", "data.val_files", dataset)
    path = theirs.take_text("custom_reward_function.path", "reward.custom_reward_function.path")
    name = theirs.take_text(
        "custom_reward_function.name", "reward.custom_reward_function.name", default="compute_score"
    )
    if path is None:
        draft.leave_open(
            "data.default.env_name",
            "what scores completions: math, last_number, or env.NAME.reward_function of your own. There it is chosen "
            "by each row's data_source",
        )
        return
    draft.set("env.custom.reward_function", f"{path}:{name}")
    draft.set("data.default.env_name", "custom")


def _set_reward_model(draft: Draft) -> None:
    """What verl adds to a reward: DAPO's penalty of length, and a model that scores, which is not here."""
    theirs = draft.theirs
    if theirs.take_switch("reward_model.enable", "reward.reward_model.enable", default=False):
        draft.leave_open("data.default.env_name", "what scores completions: there is no reward model here")
    of_managers = [f"{place}.reward_kwargs" for place in _REWARDS[:2]]
    limit = theirs.take_count(*(f"{place}.max_resp_len" for place in of_managers))
    for overlong in ("reward_model.overlong_buffer", *(f"{place}.overlong_buffer_cfg" for place in of_managers)):
        if theirs.take_switch(f"{overlong}.enable", default=False):
            draft.set("grpo.reward_shaping.enabled", True)
            draft.carry("grpo.reward_shaping.overlong_buffer_length", theirs.take_count(f"{overlong}.len"))
            penalty = theirs.take_number(f"{overlong}.penalty_factor", least=0)
            draft.carry("grpo.reward_shaping.overlong_buffer_penalty", penalty)
            longest = limit or draft.tree["policy"]["generation"]["max_new_tokens"]
            draft.set("grpo.reward_shaping.max_response_length", longest)


def _set_loss(draft: Draft) -> None:
    theirs, actor = draft.theirs, "actor_rollout_ref.actor"
    clip = theirs.take_number(f"{actor}.clip_ratio", default=0.2, least=0)
    draft.set("loss_fn.ratio_clip_min", theirs.take_number(f"{actor}.clip_ratio_low", default=clip, least=0))
    draft.set("loss_fn.ratio_clip_max", theirs.take_number(f"{actor}.clip_ratio_high", default=clip, least=0))
    draft.set("loss_fn.ratio_clip_c", theirs.take_number(f"{actor}.clip_ratio_c", default=3.0, above=1))
    aggregated = theirs.take_text(f"{actor}.loss_agg_mode", default="token-mean")
    if aggregated in ("token-mean", "seq-mean-token-mean"):
        draft.set("loss_fn.token_level_loss", aggregated == "token-mean")
    else:
        draft.leave_open("loss_fn.token_level_loss", f"true or false, in place of {aggregated!r} (docs/grpo_losses.md)")
    if (mode := theirs.take_text(f"{actor}.policy_loss.loss_mode", default="vanilla")) != "vanilla":
        draft.leave_open("loss_fn.sequence_level_importance_ratios", f"true or false, in place of loss_mode={mode!r}")
    uses_kl = theirs.take_switch(f"{actor}.use_kl_loss", default=False)
    weight = theirs.take_number(f"{actor}.kl_loss_coef", default=0.001, least=0)
    kind = theirs.take_text(f"{actor}.kl_loss_type", default="low_var_kl")
    if draft.tree.get("loss_fn", {}).get("reference_policy_kl_penalty") == OPEN:
        return
    draft.set("loss_fn.reference_policy_kl_penalty", weight if uses_kl else 0)
    if uses_kl and kind in _KL_TYPES:
        draft.set("loss_fn.reference_policy_kl_type", _KL_TYPES[kind])
        draft.set("loss_fn.kl_gradient", "paper")
    elif uses_kl:
        draft.leave_open(
            "loss_fn.reference_policy_kl_type", f"k1, k2 or k3, in place of {kind!r} (docs/grpo_losses.md)"
        )


def _set_sampling(draft: Draft) -> None:
    theirs, rollout = draft.theirs, "actor_rollout_ref.rollout"
    temperature = theirs.take_number(f"{rollout}.temperature", default=1.0, above=0)
    draft.set("policy.generation.temperature", temperature)
    draft.set("policy.generation.backend", "auto")
    for name, full in _FULL_SAMPLING.items():
        if (value := theirs.take(f"{rollout}.{name}", default=full[0])) not in full:
            draft.leave_open(
                "policy.generation.top_p",
                f"completions of one turn are sampled from the full distribution; there rollout.{name}={value!r}",
                value=1.0,
            )
    dtype = theirs.take_text(f"{rollout}.dtype", default="bfloat16")
    if parse_dtype(dtype) != "bfloat16" and dtype != "auto":
        draft.differs(f"{rollout}.dtype={dtype}: completions are sampled in policy.precision here.")
    val_temperature = theirs.take_number(f"{rollout}.val_kwargs.temperature", default=0, least=0)
    draft.set("policy.generation.val_temperature", val_temperature)
    top_p = theirs.take_number(f"{rollout}.val_kwargs.top_p", above=0, most=1)
    draft.carry("policy.generation.val_top_p", top_p)
    if (top_k := theirs.take_count(f"{rollout}.val_kwargs.top_k", default=-1, least=-1)) > 0:
        draft.set("policy.generation.val_top_k", top_k)
    draft.carry("grpo.val_num_generations_per_prompt", theirs.take_count(f"{rollout}.val_kwargs.n"))
    draft.set("grpo.max_val_samples", None)


def _set_model(draft: Draft, place: str, path_keys: tuple[str, ...]) -> None:
    """The model and its adapter, which is on where one of the two ranks, or an adapter to start from, says so."""
    theirs = draft.theirs
    if draft.carry("policy.model_name", theirs.take_text(*path_keys)) is None:
        draft.leave_open("policy.model_name", "a local directory or a Hugging Face name")
    draft.carry("policy.tokenizer.name", theirs.take_text(f"{place}.tokenizer_path"))
    draft.carry("policy.tokenizer.chat_template", theirs.take_text(f"{place}.custom_chat_template"))
    if overrides := theirs.take_mapping(f"{place}.override_config"):
        draft.set("policy.hf_config_overrides", overrides)
    if theirs.take_switch(f"{place}.enable_gradient_checkpointing", default=False):
        draft.set("policy.dtensor_cfg.activation_checkpointing", True)
    _set_precision(draft)
    theirs.take_mapping(f"{place}.lora")
    ranks = [theirs.take_count(f"{place}.{key}", default=0, least=0) for key in ("lora_rank", "lora.rank")]
    is_on = any(ranks)
    start = theirs.take_text(f"{place}.lora_adapter_path", f"{place}.lora.adapter_path")
    if start is not None and not is_on:
        raise ValueError(
            f"{place}.lora_adapter_path={start!r}: with {place}.lora_rank=0 the adapter's own file says what it is. "
            f"Set the rank, alpha and modules that {start}/adapter_config.json has, or translate that file."
        )
    names = ("lora_rank", "lora_alpha", "target_modules", "exclude_modules", "lora_adapter_path", "lora")
    set_adapter(draft, adapter_of(theirs, *(f"{place}.{name}" for name in names), is_on=is_on))
    if theirs.take_text("actor_rollout_ref.actor.strategy", "trainer.strategy") == "megatron":
        draft.set("policy.backend", "megatron")
    if "adapter" in draft.tree["policy"] and theirs.take_switch("actor_rollout_ref.actor.use_kl_loss"):
        draft.set("policy.adapter.reference", "base")


def _set_precision(draft: Draft) -> None:
    """Of the engine that trains: what autocast computes in, and what parameters are gathered in; bfloat16 both."""
    engines = ("engine", "*.engine", "*.fsdp_config", "*.fsdp", "*.megatron")
    written = {}
    for name in ("dtype", "mixed_precision.param_dtype"):
        keys = [key for key in draft.theirs.keys(*(f"{e}.{name}" for e in engines)) if not key.startswith(_NOT_TRAINED)]
        for key in keys or [f"engine.{name}"]:
            written[key] = draft.theirs.take_text(key, default="bfloat16")
    set_precision(draft, written)


def _set_rows(draft: Draft, part: str, key: str, dataset: Mapping[str, Any]) -> None:
    files = draft.theirs.take(key)
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    if files is None and part == "validation":
        return
    draft.set(f"data.{part}", dict(dataset))
    if isinstance(files, str) and files:
        draft.set(f"data.{part}.data_path", files)
    else:
        draft.leave_open(f"data.{part}.data_path", f"a file, a directory or a hub dataset in place of {files!r}")


def _set_optimizer(draft: Draft, place: str, *, lr: float) -> None:
    theirs = draft.theirs
    is_first = theirs.has("model.partial_pretrain")
    draft.set("policy.optimizer.kwargs.lr", theirs.take_number(f"{place}.lr", default=lr, least=0))
    decay = theirs.take_number(f"{place}.weight_decay", default=0.01, least=0)
    draft.set("policy.optimizer.kwargs.weight_decay", decay)
    betas = theirs.take_betas(f"{place}.betas", default=(0.9, 0.95) if is_first else (0.9, 0.999))
    draft.set("policy.optimizer.kwargs.betas", betas)
    draft.set("policy.max_grad_norm", theirs.take_number(f"{place}.clip_grad", default=1.0, above=0))
    steps = theirs.take_count(f"{place}.lr_warmup_steps", default=-1, least=-1)
    shares = (f"{place}.lr_warmup_steps_ratio", f"{place}.warmup_steps_ratio")
    share = theirs.take_number(*shares, default=0.0, least=0, most=1)
    if steps == 0 and share:
        draft.differs(
            f"{place}.lr_warmup_steps=0: {theirs.written(*shares)}={share} counts here, as in verl's newer engine; in "
            f"the older trainer 0 is no warm-up."
        )
    names = (f"{place}.lr_scheduler_type", f"{place}.lr_scheduler", f"{place}.warmup_style")
    name = theirs.take_text(*names, default="cosine" if is_first else "constant")
    if name not in ("constant", "cosine"):
        draft.leave_open("policy.scheduler", f"a schedule of docs/configuration.md in place of {name!r}")
        return
    lowest = theirs.take_number(f"{place}.min_lr_ratio", default=0.0, least=0, most=1)
    set_schedule(
        draft,
        name,
        warmup=steps if steps > 0 else share,
        total=theirs.take_count("trainer.total_training_steps"),
        min_lr_ratio=lowest if name == "cosine" else 0.0,
        why_open="There it is trainer.total_epochs times the batches of the training rows",
    )


def _set_run(draft: Draft, algorithm: str, *, epochs: int, steps_of_a_pass: str, at_start: bool = False) -> None:
    """Length, validation, checkpoints, metrics and machines: verl's `trainer`."""
    theirs = draft.theirs
    set_length(
        draft,
        algorithm,
        steps=theirs.take_count("trainer.total_training_steps"),
        epochs=theirs.take_count("trainer.total_epochs", default=epochs),
    )
    has_rows = theirs.has("data.val_files")
    period = theirs.take_count("trainer.test_freq", default=-1, least=-1)
    set_validation(draft, algorithm, has_rows=has_rows, period=period, at_start=at_start)
    draft.carry("checkpointing.checkpoint_dir", theirs.take_text("trainer.default_local_dir"))
    save = theirs.take_count("trainer.save_freq", default=-1, least=-1)
    draft.set("checkpointing.save_period", max(save, 0))
    sinks = theirs.take_texts("trainer.logger")
    for sink in ("wandb", "tensorboard", "mlflow", "swanlab"):
        if any(sink in each for each in sinks):
            draft.set(f"logger.{sink}_enabled", True)
            if sink == "wandb":
                draft.carry("logger.wandb.project", theirs.take_text("trainer.project_name"))
                draft.carry("logger.wandb.name", theirs.take_text("trainer.experiment_name"))
    draft.carry("cluster.gpus_per_node", theirs.take_count("trainer.n_gpus_per_node"))
    draft.carry("cluster.num_nodes", theirs.take_count("trainer.nnodes"))
