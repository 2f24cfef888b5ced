"""What is checked of a model and its tokenizer before a weight is loaded, for training and evaluation.

Contract: each raises ValueError by the key that the user set, or returns what is worth a warning, or what it found.
Models are those of the meta device (models/load.py); of files of weights headers alone are read.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from nemo_rl_lora.config.lora import lora_block_key
from nemo_rl_lora.config.policy import ModelConfig, PolicyConfig
from nemo_rl_lora.lora.spec import LoraSpec
from nemo_rl_lora.lora.targets import resolve_trained_targets
from nemo_rl_lora.models.families import has_tied_head
from nemo_rl_lora.models.load import dry_save_configs, linear_modules
from nemo_rl_lora.models.source import ModelSource, load_tokenizer, resolve_tokenizer
from nemo_rl_lora.models.stored import check_weights
from nemo_rl_lora.tensors import absent_tensors

_OFFSET = 2  # by which tables of learned positions may be longer than the positions
_PLACEHOLDERS = ("image_token", "audio_token", "video_token")  # which no text holds


def check_base(policy: ModelConfig, source: ModelSource, model: PreTrainedModel, *, partial: bool) -> str | None:
    """The tensors of the base's files are those of the model. `partial`: files that are not there are no fault."""
    num_tensors = check_weights(
        source.path, model, label=label_of(policy), overrides=policy.hf_config_overrides, partial=partial
    )
    return f"{num_tensors} tensors, with the names and shapes of the model" if num_tensors else None


def check_megatron_base(policy: PolicyConfig, source: ModelSource, model: PreTrainedModel, *, partial: bool) -> None:
    """The same by the names that the Megatron backend reads, where the plan does not say that it cannot hold it."""
    from nemo_rl_lora.policy.megatron.convert import check_checkpoint, open_checkpoint
    from nemo_rl_lora.policy.megatron.families import read_family

    if partial and absent_tensors(source.path):
        return
    try:
        family = read_family(model.config, policy.model_name, policy.max_total_sequence_length)
    except ValueError:
        return
    with open_checkpoint(source.path) as slices:
        check_checkpoint(family, {name: tuple(s.get_shape()) for name, s in slices.items()}, policy.model_name)


def check_slices(policy: PolicyConfig, source: ModelSource, model: PreTrainedModel, *, partial: bool) -> None:
    """The same where each process of the DTensor backend is to read its own part of the base."""
    if policy.dtensor_cfg.load == "all_ranks" and not (partial and absent_tensors(source.path)):
        from nemo_rl_lora.policy.dtensor.loading import sliceable

        sliceable(source.path, model)


def tokenizer_of(policy: ModelConfig, source: ModelSource, model: PreTrainedModel) -> Any:
    """The tokenizer that the policy's config names. ValueError where it gives tokens that the model does not have."""
    section = policy.tokenizer
    if policy.tokenizer_name != policy.model_name:
        source = resolve_tokenizer(policy.tokenizer_name, "policy.tokenizer.name")
    tokenizer = load_tokenizer(source, section.chat_template, section.chat_template_kwargs)
    placeholders = {getattr(tokenizer, name, None) for name in _PLACEHOLDERS}
    num_embeddings = int(model.config.get_text_config().vocab_size)
    ids: Mapping[str, int] = tokenizer.get_vocab()
    beyond = sorted((i, token) for token, i in ids.items() if i >= num_embeddings and token not in placeholders)
    if beyond:
        number, token = beyond[0]
        raise ValueError(
            f"policy.tokenizer.name={policy.tokenizer_name!r}: it gives token ids up to {beyond[-1][0]} "
            f"({len(beyond)} beyond the embedding; the first is {token!r}, {number}), and {policy.model_name} has "
            f"{num_embeddings} embeddings (vocab_size). Use the model's own tokenizer, or give the model as many "
            f"(resize_token_embeddings({beyond[-1][0] + 1}) of transformers) and save it."
        )
    return tokenizer


def positions_warning(policy: PolicyConfig, model: PreTrainedModel) -> str | None:
    """Where sequences may be longer than the model was made for. ValueError where it has no positions there."""
    length, config = policy.max_total_sequence_length, model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or length <= positions:
        return None
    has = (
        f"policy.max_total_sequence_length={length}: {policy.model_name} has {positions} positions "
        "(max_position_embeddings)"
    )
    words = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not words]
    if any(positions <= size <= positions + _OFFSET for size in tables):
        raise ValueError(f"{has}, each with an embedding, and none beyond. Set it to {positions} or less.")
    engine = "" if policy.generation is None else f" Engines end completions at {positions} tokens."
    return f"{has}. They go on beyond that, but it was not trained there.{engine} Set it to {positions} or less."


def rank_warning(policy: PolicyConfig, spec: LoraSpec, model: PreTrainedModel) -> str | None:
    """Where the adapter's rank is above that of the matrices which it changes."""
    key = lora_block_key(policy)
    adapted = resolve_trained_targets(
        spec,
        linear_modules(model),
        tied_head=has_tied_head(model.config),
        model_label=policy.model_name,
        config_key=key,
    )
    over = [module for module in adapted if module.dim > min(module.in_features, module.out_features)]
    if not over:
        return None
    module = max(over, key=lambda each: each.dim / min(each.in_features, each.out_features))
    return (
        f"{key}.dim={module.dim}: {len(over)} of {len(adapted)} adapted matrices are smaller ({module.name} is "
        f"{module.out_features} x {module.in_features}). There a dim of {min(module.in_features, module.out_features)} "
        "can change as much, with fewer parameters."
    )


def check_saved_files(
    policy: PolicyConfig, spec: LoraSpec | None, source: ModelSource, model: Any, tokenizer: Any
) -> None:
    """What checkpoints hold beside tensors can be written: the tokenizer, and configurations of a whole model."""
    with tempfile.TemporaryDirectory(prefix="nrl-dry-save-") as directory:
        if spec is None:
            dry_save_configs(source.path, model, Path(directory), label_of(policy))
        try:
            tokenizer.save_pretrained(directory)
        except Exception as error:
            raise ValueError(
                f"policy.tokenizer.name={policy.tokenizer_name!r}: a checkpoint cannot hold this tokenizer "
                f"({type(error).__name__}: {error}). Use one that transformers saves."
            ) from error


def label_of(policy: ModelConfig) -> str:
    """How a message names the base."""
    return f"policy.model_name={policy.model_name!r}"
