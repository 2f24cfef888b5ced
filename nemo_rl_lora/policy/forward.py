"""One forward pass: a microbatch in, log-probabilities of its loss tokens out.

Two layouts of the same rows. Flat: segments in one run of tokens, for models with full causal attention. Padded: one
row a sequence, with the model's own attention mask, for every other model (no packing and no shared prefix there).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nemo_rl_lora.models.families import families_for
from nemo_rl_lora.policy import attention
from nemo_rl_lora.policy.head import Head, target_logprobs
from nemo_rl_lora.policy.microbatches import Microbatch, Segment

DEFAULT_CHUNK_TOKENS = 256
_NUM_PROBE_TOKENS = 24
_FP32_BOUND = 1e-3  # rounding is 1e-5
_BF16_BOUND = 0.25  # rounding is a few hundredths, a wrong head or mask of the order of 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """The body and head of a causal language model, run on microbatches. `flat` chooses the layout."""

    model: PreTrainedModel
    flat: bool
    temperature: float
    chunk_tokens: int
    autocast_dtype: torch.dtype | None  # full fine-tuning: compute dtype of fp32 weights

    def prepare(self) -> None:
        """Choose the attention implementation that the layout needs."""
        self.model.set_attn_implementation(attention.NAME if self.flat else "sdpa")

    @torch.no_grad()
    def verify(self) -> None:
        """ValueError unless these log-probabilities are the model's own: a head with a bias or a soft cap, or an
        attention that is not plain, would otherwise train a different model, silently."""
        device = next(self.model.parameters()).device
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        token_ids = torch.arange(1, _NUM_PROBE_TOKENS + 1) * 37 % vocabulary
        self.model.set_attn_implementation("sdpa")
        logits = self.model(input_ids=token_ids[None].to(device), use_cache=False).logits[0, :-1].float()
        expected = torch.log_softmax(logits / self.temperature, -1).cpu()
        self.prepare()
        actual = self.logprobs(_probe(token_ids), _NUM_PROBE_TOKENS).cpu()[0, 1:]
        error = float((actual - expected.gather(1, token_ids[1:, None])[:, 0]).abs().mean())
        exact = self.autocast_dtype is None and self.model.dtype == torch.float32
        bound = _FP32_BOUND if exact else _BF16_BOUND
        if not error <= bound:
            raise ValueError(
                f"policy.model_name={self.model.config.name_or_path!r}: log-probabilities of {_NUM_PROBE_TOKENS} probe "
                f"tokens differ from the model's own by {error:.3g} on average (bound {bound:g}), so its head or "
                f"attention is not one that this version trains. Use a plain "
                f"{', '.join(families_for('segments'))} model."
            )

    def logprobs(self, micro: Microbatch, width: int) -> Tensor:
        """[b, width] fp32, in the order of the microbatch's rows; 0.0 where there is no loss token."""
        device = next(self.model.parameters()).device
        with torch.autocast(
            device.type, dtype=self.autocast_dtype or torch.bfloat16, enabled=self.autocast_dtype is not None
        ):
            hidden = self._hidden(micro, device).index_select(0, micro.predictor.to(device))
        if self.autocast_dtype is not None:
            hidden = hidden.to(self.autocast_dtype)
        output = self.model.get_output_embeddings()
        assert isinstance(output, torch.nn.Linear), type(output)
        head = Head(weight=output.weight, temperature=self.temperature, chunk_tokens=self.chunk_tokens)
        return logprob_rows(hidden, head, micro, width)

    def _hidden(self, micro: Microbatch, device: torch.device) -> Tensor:
        """[N, H] in the order of the flat layout."""
        body = self.model.base_model
        if self.flat:
            plan = attention.plan_attention(micro.segments).to(device)
            output = body(
                input_ids=micro.token_ids[None].to(device),
                position_ids=micro.position_ids[None].to(device),
                use_cache=False,
                attention_plan=plan,
            )
            return output.last_hidden_state[0]
        token_ids, mask = _padded(micro)
        output = body(input_ids=token_ids.to(device), attention_mask=mask.to(device), use_cache=False)
        return output.last_hidden_state[mask.bool().to(device)]


def logprob_rows(hidden: Tensor, head: Head, micro: Microbatch, width: int) -> Tensor:
    """[b, width] fp32 from the hidden states [M, H] that predict the loss tokens."""
    device = hidden.device
    values = target_logprobs(
        hidden,
        head.weight,
        micro.target.to(device),
        temperature=head.temperature,
        chunk_tokens=head.chunk_tokens,
        group=head.group,
    )
    rows = torch.zeros(len(micro.rows), width, dtype=torch.float32, device=device)
    return rows.index_put((micro.loss_row.to(device), micro.loss_column.to(device)), values)


def _probe(token_ids: Tensor) -> Microbatch:
    """One sequence whose every token but the first is a loss token."""
    places = torch.arange(1, len(token_ids))
    return Microbatch(
        rows=torch.zeros(1, dtype=torch.int64),
        token_ids=token_ids,
        position_ids=torch.arange(len(token_ids)),
        segments=(Segment(start=0, length=len(token_ids), parent=None),),
        predictor=places - 1,
        loss_row=torch.zeros_like(places),
        loss_column=places,
        target=token_ids[1:],
        num_padding_tokens=0,
    )


def _padded(micro: Microbatch) -> tuple[Tensor, Tensor]:
    """Right-padded rows and their mask [b, longest]; a plain microbatch has a segment a row, in flat order."""
    assert all(segment.parent is None for segment in micro.segments), "a shared prefix needs the flat layout"
    lengths = [segment.length for segment in micro.segments]
    token_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(token_ids)
    for row, segment in enumerate(micro.segments):
        token_ids[row, : segment.length] = _tokens_of(micro, segment)
        mask[row, : segment.length] = 1
    return token_ids, mask


def _tokens_of(micro: Microbatch, segment: Segment) -> Tensor:
    return micro.token_ids[segment.start : segment.start + segment.length]
