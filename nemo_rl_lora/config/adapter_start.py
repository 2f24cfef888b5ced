"""`policy.adapter`: where the adapter starts from, whether it moves, and what it is held to. No file is touched."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nemo_rl_lora.config.base import Section


class AdapterStartConfig(Section):
    """The weights of the adapter; its description is in the LoRA block. No NeMo RL keys."""

    init_from: Annotated[str, Field(min_length=1)] | None = None
    """Start from this adapter: a step of a run (`step_N`), or any directory in PEFT's format. It must have the modules,
    ranks and scales of the LoRA block, and be one for this base. null: A is drawn and B is zero."""
    trainable: bool = True
    """false: the learning rate is 0 throughout, so that a run measures the adapter it starts from and moves nothing."""
    reference: Literal["base", "initial"] | None = None
    """What GRPO's KL term and DPO compare with, where init_from is set: the base without an adapter, or the adapter as
    it was at the start. It has no default, since the two are other objectives."""


def check_adapter_start(start: AdapterStartConfig, *, has_adapter: bool, needs_reference: bool) -> None:
    """Rules across `policy.adapter` and the rest of the configuration. Raises ValueError."""
    if start.init_from is None:
        if not start.trainable:
            raise ValueError(
                "policy.adapter.trainable=False: an adapter that starts at zero and does not move is the base. Set "
                "policy.adapter.init_from, or policy.adapter.trainable=true."
            )
        if start.reference is not None:
            raise ValueError(
                f"policy.adapter.reference={start.reference!r}: without policy.adapter.init_from the adapter starts at "
                "zero, so that the base is the initial adapter. Remove it, or set policy.adapter.init_from."
            )
        return
    if not has_adapter:
        raise ValueError(
            f"policy.adapter.init_from={start.init_from!r}: there is no adapter to start from it, since all weights "
            "are trained. Enable the LoRA block, or remove it."
        )
    if needs_reference and start.reference is None:
        raise ValueError(
            "policy.adapter.reference=None: this loss compares with a reference, and after a warm start there are two. "
            "Set it to base (the model without an adapter) or initial (the adapter of policy.adapter.init_from)."
        )
    if not needs_reference and start.reference is not None:
        raise ValueError(
            f"policy.adapter.reference={start.reference!r}: this loss compares with no reference. Remove it, or give "
            "the reference a weight (loss_fn.reference_policy_kl_penalty, dpo.preference_loss_weight)."
        )
