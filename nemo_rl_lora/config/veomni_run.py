"""A VeOmni file (`model`, `data`, `train`) as a run of SFT or, with `data_type: dpo`, of DPO.

Read after VeOmni's arguments, in which the optimizer stood below `train` before it stood below `model`, and its fields
below `train` alone before that. A step of VeOmni with `dyn_bsz`, its default, is filled by tokens and not by rows,
which has no counterpart: such a file is translated, and its batch is left to the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from nemo_rl_lora.config.dpo import DpoConfig
from nemo_rl_lora.config.run_draft import (
    Draft,
    NoSuchRunError,
    RunTranslation,
    adapter_of,
    set_adapter,
    set_length,
    set_precision,
    set_schedule,
    set_validation,
    steps_of,
)
from nemo_rl_lora.config.their_keys import Theirs

TOOL = "VeOmni"
# VeOmni's own templates, which learn the header of the assistant's turn as well.
_TEMPLATES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "default": "{% for message in messages %}{{ message['role'].title() + ': ' + message['content'] | trim + "
    "eos_token + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}",
}
_HARMLESS: dict[str, tuple[Any, ...] | None] = {
    "model.ops_implementation.*": None,
    "model.basic_modules": None,
    "model.broadcast_model_weights_from_rank0": None,
    "model.ep_sharded_stream_load": None,
    "model.safetensor_idx_path": None,
    "*.accelerator.*": None,
    "train.accelerator": None,
    "*.gradient_checkpointing.*": None,
    "train.init_device": None,
    "train.broadcast_model_weights_from_rank0": None,
    "train.ulysses_parallel_size": None,
    "train.*_parallel_size": None,
    "train.data_parallel_mode": None,
    "train.enable_*": None,
    "train.rmpad*": None,
    "train.dyn_bsz_*": None,
    "train.pad_to_length": None,
    "train.bsz_warmup_ratio": (0, 0.0),
    "train.bsz_warmup_init_mbtoken": None,
    "train.empty_cache_steps": None,
    "train.gc_steps": None,
    "train.sync_each_train_step": None,
    "train.moe_load_balance_monitor_interval": None,
    "train.profile.*": None,
    "train.channel_loss.*": None,
    "train.wandb.*": None,
    "train.use_wandb": None,
    "train.wandb_*": None,
    **{f"train.checkpoint.{key}": None for key in ("manager", "save_async", "save_hf_weights", "stage_dir")},
    "train.checkpoint.hf_*": None,
    "train.checkpoint.dcp_*": None,
    "train.checkpoint.load_path": ("auto", ""),
    "train.load_checkpoint_path": ("auto", ""),
    "train.save_async": None,
    "train.ckpt_manager": None,
    "train.save_hf_weights": None,
    "train.output_dir": None,
    "train.eval_epochs": None,
    "data.dataloader.*": None,
    "data.num_workers": None,
    "data.prefetch_factor": None,
    "data.drop_last": (True,),
    "data.pin_memory": None,
    "data.dyn_bsz_buffer_size": None,
    "data.silent_exception": None,
    "data.datasets_type": None,
    "data.dataset_repeat": None,
    "data.source_name": None,
    "data.train_sample": None,
    "*.optimizer.muon_*": None,
    "*.optimizer.swap_*": None,
    "*.optimizer.grad_clip_scope": None,
    "*.optimizer.lr_start": (0, 0.0),
    "*.optimizer.lr_decay_ratio": (1, 1.0),
    "train.lr_start": (0, 0.0),
    "train.lr_decay_ratio": (1, 1.0),
    "dpo_config.reference_free": (False,),
    "dpo_config.refer_model_precision": None,
}


def is_veomni(document: Mapping[str, Any]) -> bool:
    """Whether a document is a whole file of VeOmni."""
    return all(isinstance(document.get(section), Mapping) for section in ("model", "data", "train"))


def veomni_run(theirs: Theirs) -> RunTranslation:
    """The run of the file. ValueError for what is no text, or an adapter without a counterpart."""
    draft = Draft(theirs)
    data_type = theirs.take_text("data.data_type", default="conversation")
    if data_type not in ("conversation", "dpo", "plaintext"):
        raise NoSuchRunError(f"data.data_type={data_type!r}: only text is trained here. There is no such run.")
    algorithm = "dpo" if data_type == "dpo" else "sft"
    _set_model(draft, algorithm)
    _set_data(draft, data_type)
    _set_batches_and_length(draft, algorithm)
    _set_optimizer(draft)
    period = theirs.take_count("train.eval_steps", default=0, least=-1)
    set_validation(draft, algorithm, has_rows=theirs.has("data.eval_path"), period=period)
    _set_surroundings(draft)
    draft.carry(f"{algorithm}.seed", theirs.take_count("train.seed", least=0))
    if algorithm == "dpo":
        draft.set("dpo.reference_policy_kl_penalty", theirs.take_number("dpo_config.beta", default=0.1, above=0))
        draft.carry("dpo.label_smoothing", theirs.take_number("dpo_config.label_smoothing", least=0, below=0.5))
        loss = theirs.take_text("dpo_config.loss_type", default="sigmoid")
        if loss in get_args(DpoConfig.model_fields["loss_type"].annotation):
            draft.set("dpo.loss_type", loss)
        else:
            draft.leave_open("dpo.loss_type", f"a loss of docs/configuration.md in place of {loss!r}")
    return draft.finish(TOOL, _HARMLESS)


def _set_model(draft: Draft, algorithm: str) -> None:
    theirs = draft.theirs
    model = theirs.take_text("model.model_path")
    if draft.carry("policy.model_name", model) is None:
        draft.leave_open("policy.model_name", "a local directory or a Hugging Face name; there the model starts anew")
    draft.carry("policy.tokenizer.name", theirs.take_text("model.tokenizer_path"))
    if theirs.take_text("model.config_path") not in (None, model):
        draft.differs("model.config_path: the model's own config.json is taken here.")
    theirs.take_mapping("model.lora_config")
    set_adapter(draft, adapter_of(theirs, "model.lora_config", is_on=theirs.has("model.lora_config")))
    if algorithm == "dpo" and "adapter" in draft.tree["policy"]:
        draft.set("policy.adapter.reference", "base")
    places = ("model.accelerator.", "train.accelerator.", "train.")
    again = (*(f"{place}gradient_checkpointing.enable" for place in places), "train.enable_gradient_checkpointing")
    if theirs.take_switch(*again) is True:
        draft.set("policy.dtensor_cfg.activation_checkpointing", True)
    mixed = [f"{place}fsdp_config.mixed_precision" for place in places]
    if theirs.take_switch(*(f"{place}.enable" for place in mixed), "train.enable_mixed_precision") is False:
        draft.set("policy.precision", "float32")
        return
    set_precision(draft, {key: theirs.take_text(key) for place in mixed for key in theirs.keys(f"{place}.param_dtype")})


def _set_data(draft: Draft, data_type: str) -> None:
    theirs = draft.theirs
    text_key = theirs.take_text("data.text_keys")
    if data_type == "dpo":
        dataset = {"dataset_name": "BinaryPreferenceDataset", "chosen_key": text_key or "chosen"}
        draft.differs("Rows: `prompt`, `chosen` and `rejected`; give data.train.prompt_key where it is another.")
    else:
        has_chats = data_type == "conversation" and text_key is not None
        dataset = {"dataset_name": "openai_format", "chat_key": text_key if has_chats else "messages"}
    for ours, key in (("train", "data.train_path"), ("validation", "data.eval_path")):
        path = theirs.take(key)
        if path is None and ours == "validation":
            continue
        draft.set(f"data.{ours}", dataset)
        if data_type == "plaintext":
            draft.leave_open(
                f"data.{ours}.data_path", f"a file of chats; {path!r} is plain text, and SFT learns answers"
            )
        elif not isinstance(path, str) or path.endswith((".yaml", ".yml")) or "," in path:
            draft.leave_open(f"data.{ours}.data_path", f"a file, a directory or a hub dataset in place of {path!r}")
        else:
            draft.set(f"data.{ours}.data_path", path)
    template = theirs.take_text("model.chat_template", "data.chat_template")
    if template in _TEMPLATES and data_type != "dpo":
        draft.set("policy.tokenizer.chat_template", _TEMPLATES[template])
        draft.set("data.add_generation_prompt", False)
    elif template is not None:
        draft.differs(f"Chat template: the tokenizer's own, in place of VeOmni's {template!r}.")
    draft.set("policy.max_total_sequence_length", _length(theirs))
    draft.differs("A longer row keeps its beginning here, and its end there.")


def _set_batches_and_length(draft: Draft, algorithm: str) -> None:
    theirs = draft.theirs
    rows, micro = theirs.take_count("train.global_batch_size"), theirs.take_count("train.micro_batch_size", default=1)
    length = _length(theirs)
    packs = [theirs.take_switch(f"train.{key}") for key in ("rmpad", "rmpad_with_pos_ids")]  # before there was dyn_bsz
    fills_tokens = theirs.take_switch("train.dyn_bsz", default=packs != [False, False])
    train_tokens = theirs.take_number("data.train_size", default=10_000_000, least=1)
    epochs = theirs.take_count("train.num_train_epochs", default=1)
    limit = theirs.take_count("train.max_steps")
    if rows is None:
        draft.leave_open("policy.train_global_batch_size", "rows of a step; there micro_batch_size x processes")
    elif fills_tokens:
        draft.leave_open(
            "policy.train_global_batch_size",
            f"rows of a step. There a step is filled up to {rows * length:,} tokens (train.dyn_bsz): {rows} rows if "
            f"each has {length}, more of shorter ones",
            value=rows,
        )
    else:
        draft.set("policy.train_global_batch_size", rows)
    if fills_tokens:
        draft.set("policy.sequence_packing", {"enabled": True, "train_mb_tokens": micro * length})
    else:
        draft.set("policy.train_micro_batch_size", micro)
    of_tokens = None if rows is None or not fills_tokens else steps_of(train_tokens, rows * length)
    a_pass = min((each for each in (of_tokens, limit) if each is not None), default=None)
    steps = None if a_pass is None else a_pass * epochs
    set_length(draft, algorithm, steps=steps, epochs=None if of_tokens is not None else epochs)
    if limit is not None and epochs > 1:
        draft.differs("train.max_steps ends each epoch there; here the run goes on through the rows.")
    _set_schedule(draft, steps)


def _set_schedule(draft: Draft, steps: int | None) -> None:
    theirs = draft.theirs
    name = theirs.take_text(*_optimizer_keys("lr_decay_style"), default="constant")
    peak = theirs.take_number(*_optimizer_keys("lr"), default=5e-5, least=0)
    lowest = theirs.take_number(*_optimizer_keys("lr_min"), least=0)
    warmup = theirs.take_number(*_optimizer_keys("lr_warmup_ratio"), default=0, least=0, most=1)
    if lowest is not None and lowest > peak:
        key = theirs.written(*_optimizer_keys("lr_min"))
        raise ValueError(f"{key}={lowest}: is above the learning rate, {peak}. Correct one of them.")
    if name not in ("constant", "linear", "cosine"):
        draft.leave_open("policy.scheduler", f"a schedule of docs/configuration.md in place of {name!r}")
        return
    set_schedule(
        draft,
        name,
        warmup=warmup,
        total=steps,
        min_lr_ratio=0.0 if name == "constant" or not peak else min((1e-7 if lowest is None else lowest) / peak, 1.0),
        why_open="There it is the rows of data.train_path / train.global_batch_size, for each epoch",
    )


def _set_optimizer(draft: Draft) -> None:
    theirs = draft.theirs
    first = theirs.take("train.optimizer") if isinstance(theirs.document["train"].get("optimizer"), str) else "adamw"
    kind = theirs.take_text(*_optimizer_keys("type"), "train.optimizer_type", default=first)
    lr = theirs.take_number(*_optimizer_keys("lr"), default=5e-5, least=0)
    if kind not in ("adamw", "anyprecision_adamw", "adamw_swap"):
        draft.leave_open(
            "policy.optimizer.kwargs.lr", f"a learning rate of AdamW, which trains here in place of {kind}"
        )
    else:
        draft.set("policy.optimizer.kwargs.lr", lr)
    decay = theirs.take_number(*_optimizer_keys("weight_decay"), default=0, least=0)
    draft.set("policy.optimizer.kwargs.weight_decay", decay)
    draft.set("policy.optimizer.kwargs.betas", theirs.take_betas(*_optimizer_keys("betas"), default=(0.9, 0.95)))
    clip = theirs.take_number(*_optimizer_keys("max_grad_norm"), default=1.0, above=0)
    draft.set("policy.max_grad_norm", clip)


def _set_surroundings(draft: Draft) -> None:
    """Where checkpoints and metrics go."""
    theirs = draft.theirs
    draft.carry("checkpointing.checkpoint_dir", theirs.take_text("train.checkpoint.output_dir", "train.output_dir"))
    steps = theirs.take_count("train.checkpoint.save_steps", "train.save_steps", default=0, least=-1)
    draft.set("checkpointing.save_period", max(steps, 0))
    epochs = theirs.take_count("train.checkpoint.save_epochs", "train.save_epochs", default=1, least=-1)
    if epochs > 0:
        draft.set("checkpointing.save_epochs", epochs)
    if theirs.take_switch("train.wandb.enable", "train.use_wandb") is True:
        draft.set("logger.wandb_enabled", True)
        project = theirs.take_text("train.wandb.project", "train.wandb_project", default="VeOmni")
        draft.set("logger.wandb.project", project)
        draft.carry("logger.wandb.name", theirs.take_text("train.wandb.name", "train.wandb_name"))


def _length(theirs: Theirs) -> int:
    return theirs.take_count("data.max_seq_len", default=2048, least=2)


def _optimizer_keys(name: str) -> tuple[str, ...]:
    """Where VeOmni's versions have had a field of the optimizer, the newest first."""
    return f"model.optimizer.{name}", f"train.optimizer.{name}", f"train.{name}"
