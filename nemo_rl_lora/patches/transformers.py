"""What transformers 5 needs changed to checkpoint activations of a model in evaluation mode.

tests/patches/test_transformers.py shows that it is still needed.
"""

from __future__ import annotations

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Compute a layer's activations again in the backward pass. transformers does so only in layers in training mode,
    which would turn on dropout in the modules below: so the layers alone say that they are."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True  # train() would reach its children
