"""The arithmetic of a training step, in FLOP, as model FLOP utilisation counts it (PaLM, arXiv:2204.02311, appendix B).

Contract: a multiplication and the addition after it are two FLOP. For each token

- a weight costs 2 forward and 2 for the gradient of its input; one that is trained 2 more, for its own gradient. So a
  frozen base costs 4, A and B of its adapter 6, and a model whose weights are all trained 6;
- of a mixture of experts, those experts that a token is sent to count, and the router;
- the head counts at loss tokens, the only ones that have logits;
- attention costs 4 forward for each score and channel of its head (q k^T and p v), and twice that backward. Scores
  that causal attention masks are none: n tokens have n (n + 1) / 2, and beside these every token of a completion that
  shares its prompt has one for each token of the prompt.

Not counted: embeddings, norms, biases and activations; what is computed a second time (activation checkpointing, the
probabilities of attention); padding; passes without a gradient. Counted although nothing computes it: the gradient of
the first layer's input, which a frozen embedding does not need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from nemo_rl_lora.lora.names import last_component
from nemo_rl_lora.lora.targets import AdaptedModule
from nemo_rl_lora.models.families import FAMILIES, shortening_window
from nemo_rl_lora.models.load import linear_modules
from nemo_rl_lora.models.shapes import adapted_types
from nemo_rl_lora.types import StepOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopRates:
    """FLOP of training, by what a step counts."""

    per_token: float  # all layers but the head, without attention scores
    per_loss_token: float  # the head
    per_score: float  # attention of all layers and heads

    def of_step(self, output: StepOutput) -> float:
        """FLOP of an optimizer step, over all processes; ranks that compute the same are counted once."""
        num_tokens = output.num_forward_tokens - output.num_padding_tokens
        return (
            self.per_token * num_tokens
            + self.per_loss_token * output.num_loss_tokens
            + self.per_score * output.num_attention_scores
        )


def why_not_counted(config: Any, max_length: int) -> str | None:
    """Why the arithmetic of a transformers config is not known for sequences up to `max_length`; None where it is."""
    if config.model_type not in FAMILIES:
        return f"the arithmetic of {config.model_type} is not known here, but that of {', '.join(FAMILIES)}"
    if (window := shortening_window(config, max_length)) is not None:
        return f"scores within a sliding window (of {window} tokens) are not counted"
    return None


def flop_rates(model: PreTrainedModel, adapted: Sequence[AdaptedModule] | None, *, shared_a: bool = False) -> FlopRates:
    """The rates of a model, on the meta device or not, whose arithmetic is known.

    `adapted`: the modules with an adapter; None where all weights are trained. `shared_a`: modules of a fused layer
    have one A.
    """
    config, output = model.config, model.get_output_embeddings()
    assert output is not None, "a model without a head is refused"
    head, embeddings = output.weight, model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim > 1 and p is not head and p is not embeddings]
    body = float(sum(p.numel() for p in matrices if p.ndim == 2))
    if experts := sum(p.numel() for p in matrices if p.ndim == 3):
        body += experts * config.num_experts_per_tok / config.num_experts
    num_adapter = sum(kind.num_trainable_params for kind in adapted_types(adapted or (), shared_a))
    per_weight = 6.0 if adapted is None else 4.0
    query_channels = sum(m.out_features for m in linear_modules(model) if last_component(m.name) == "q_proj")
    return FlopRates(
        per_token=per_weight * body + 6.0 * num_adapter,
        per_loss_token=per_weight * head.numel(),
        per_score=12.0 * query_channels,
    )
