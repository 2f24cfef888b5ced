"""The nouns that every layer shares. No logic, and no import of a backend.

Axes: B rows of a batch (one row per completion), T token positions, P prompts, G completions of a prompt.
A log-probability of a token stands at the token's own position: `logprobs[b, t] = log p(token[b, t] | token[b, :t])`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SyncMode = Literal["merged", "adapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A dataset row made ready to be asked. `index` is its position in the dataset, the item of every draw."""

    index: int
    token_ids: tuple[int, ...]
    text: str  # what the user said, before the chat template
    row: Mapping[str, Any]  # the row as the environment scores it
    environment: str  # name of the environment that scores it
    place: str = ""  # where the row stands, such as "line 3 of rows.jsonl"

    @property
    def named(self) -> str:
        """The row as an error names it."""
        return self.place or f"row {self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How completions are drawn. `top_p=1.0` and `top_k=None` mean the full distribution."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 means greedy
    top_p: float = 1.0
    top_k: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    skip_special_tokens: bool = True  # in a completion's text


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """Ask for `num_completions` of one prompt; `seeds` holds one seed per completion."""

    prompt: Prompt
    num_completions: int
    seeds: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What was sampled. `logprobs` are those of the sampled tokens, after temperature and truncation."""

    token_ids: tuple[int, ...]  # with the stop token, where one ended it
    logprobs: tuple[float, ...]
    versions: tuple[tuple[int, int], ...]  # run-length: (number of tokens, weights version)
    text: str  # decoded, without special tokens where they are skipped, without stop token, cut before a stop string
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionGroup:
    """The completions of one prompt."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutGroup:
    """A group with its rewards, one for each completion, before any shaping."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A conversation made ready to be learned: one row of an SFT batch."""

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]  # true on the tokens that are learned
    source: str  # the dataset it came from, for metrics
    num_cut_tokens: int  # left out at the end, to keep the length limit


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferencePair:
    """Two answers to one prompt, tokenised: two rows of a DPO batch, which are a group."""

    index: int  # position in its dataset
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    source: str  # the dataset, or the part of it, that it came from, for metrics
    cluster: str  # pairs of one cluster (a question) are not independent of each other


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """What losses divide by: counted once over the whole optimizer batch, the same on every rank."""

    num_loss_tokens: int
    num_sequences: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A LOGICAL batch: one row per completion, prompt first, right-padded. Rows of a group stand together.

    `loss_mask[b, t]` is true where token t is a loss token (sampled, or a target). Log-probabilities are fp32 and
    0.0 outside the mask. `advantages` is [B] or [B, T]. With `whole_groups` the rows of a group always meet in one
    call of the loss, in their order: a DPO pair, whose first row is the chosen one.
    """

    token_ids: Tensor  # [B, T] int64
    loss_mask: Tensor  # [B, T] bool
    sequence_length: Tensor  # [B] int64, prompt + completion, without padding
    prompt_length: Tensor  # [B] int64
    group_index: Tensor  # [B] int64; rows of equal index share their prompt
    denominators: Denominators
    whole_groups: bool = False
    old_logprobs: Tensor | None = None  # [B, T] fp32
    reference_logprobs: Tensor | None = None  # [B, T] fp32, or [B], summed over a row's loss tokens
    generation_logprobs: Tensor | None = None  # [B, T] fp32
    advantages: Tensor | None = None  # [B] or [B, T] fp32
    lr: float | None = None  # of its optimizer step, in place of what the optimizer's own schedule says

    def of_rows(self, rows: Tensor | slice) -> Batch:
        """These rows of every tensor, with the denominators as they are."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value[rows] for name, value in values.items() if hasattr(value, "index_select")})


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What a loss sees of a microbatch: whole rows, never logits. Shapes as in Batch; b rows of B."""

    logprobs: Tensor  # [b, T] fp32, with gradient
    old_logprobs: Tensor  # [b, T] fp32; the detached `logprobs` where the policy has not moved since the rollout
    reference_logprobs: Tensor | None
    generation_logprobs: Tensor | None
    advantages: Tensor | None
    loss_mask: Tensor  # [b, T] bool
    sequence_length: Tensor  # [b]
    group_index: Tensor  # [b]
    denominators: Denominators


# (inputs) -> (loss: a scalar with gradient, metrics). Both are this microbatch's share: a sum divided by the
# global denominators, so that adding microbatches and ranks gives the value of the batch. A metric whose name ends
# in "_min" or "_max" is reduced by min or max instead.
LossFn = Callable[[LossInputs], "tuple[Tensor, dict[str, Tensor]]"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one optimizer step did. `grad_norm` is the global L2 norm before clipping."""

    loss: float
    grad_norm: float
    lr: float
    metrics: Mapping[str, float]
    num_forward_tokens: int  # tokens that went through the model, shared prompts counted once
    num_padding_tokens: int
    num_loss_tokens: int
    num_attention_scores: int  # of one head: pairs of a token and one that it sees, without padding
    peak_gpu_gib: float | None = None  # since the step before, on the device that had the most; None without GPUs


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """A tensor that a sync moves, by its Hugging Face (merged) or PEFT (adapter) name."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsRef:
    """Where the weights of one version are. `tensors` is a handle within this process, `path` a file for others.

    Every value of `tensors` may be computed when it is asked for (a merge), so a reader asks for each once. `digest`
    names the version: it is that of the trained tensors. `handed` is what a receipt is compared with: the digest of
    each tensor as it was handed to its reader, which the policy's side keeps.
    """

    version: int
    mode: SyncMode
    manifest: tuple[TensorInfo, ...]
    digest: str
    num_bytes: int
    tensors: Mapping[str, Tensor] | None = None
    path: Path | None = None
    handed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReceipt:
    """What one of several engines says of a sync. Its fields mean what those of SyncReceipt do."""

    index: int  # from 0
    where: str  # its process, and its node where that is another one
    num_ranks: int  # that share its weights; each of them confirmed
    version: int
    digest: str
    verdict: Literal["confirmed", "undecided"]
    seconds: float
    proof_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReceipt:
    """What a generation engine says of a sync it finished.

    `digest` is combined (tensors.py) from those of the bytes that the engine received or holds, so it is that of the
    ref's `handed` only where every tensor arrived; None where nothing is served, as in a replay.
    `verdict`: whether the engine's kernels show this version; `undecided` where it shows the same numbers as the one
    before it or the base, so that the bytes alone decide; None where no engine was probed.
    """

    version: int
    mode: SyncMode
    digest: str | None
    num_tensors: int
    num_bytes: int
    seconds: float
    verdict: Literal["confirmed", "undecided"] | None = None
    proof_seconds: float = 0.0  # of `seconds`, what comparing and probing took
    engines: tuple[EngineReceipt, ...] = ()  # one for each that was probed; the verdict is that of all of them
