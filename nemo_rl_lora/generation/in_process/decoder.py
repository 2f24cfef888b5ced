"""The fast decoder of the in-process engine: one token for many sequences, prompts computed once for their group.

Contract: a Llama-shaped causal language model (models/families.py has the list) is read from a
Hugging Face model whose parameters are shared and never written. Keys and values of a prompt are stored once for its
group; those of completions in preallocated slots. `admit` prefills prompts and opens their rows, `step` computes one
token for every open row, `retire` closes rows and keeps the others dense.
Not here: sampling, stopping, scheduling, and what a weight sync may contain.

Axes: N open rows, P open prompts, L prompt positions, T completion positions, K key-value heads, R query heads for
each of them, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from nemo_rl_lora.generation.in_process.key_values import KeyValueStore, fill_holes
from nemo_rl_lora.generation.in_process.projections import Projection, in_place
from nemo_rl_lora.lora.adapter_tensors import AdapterTensors, side_of
from nemo_rl_lora.lora.files import module_of
from nemo_rl_lora.models.families import families_for, rope_types_for, shortening_window

PREFILL_TOKENS = 4096  # padded tokens in one prefill pass: bounds its activations
FIRST_COMPLETION_CAPACITY = 64  # slots grow by doubling from here, so short completions cost little memory
FIRST_ROPE_POSITIONS = 256  # the table of cosines and sines grows by doubling from here
# All but cuDNN's, which builds a graph for every new length.
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Decoder(Protocol):
    """What the engine needs of a model. Rows are numbered 0..N-1 in the order of the tokens given to `step`."""

    late_admission: bool  # whether rows may be opened while others are open

    def admit(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> Tensor:
        """Prefill prompts and append `counts[p]` rows for each. Returns the next token's logits [P, V]."""
        ...

    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token to every row. Returns the next token's logits [N, V]."""
        ...

    def retire(self, rows: Sequence[int]) -> list[int]:
        """Close rows. Returns, for each row that is left, the number it had before."""
        ...

    def reset(self) -> None:
        """Close all rows and free their cache."""
        ...

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Use these tensors, by parameter name, instead of the shared ones; all others are shared again."""
        ...

    def set_adapters(self, adapters: Mapping[str, AdapterTensors]) -> None:
        """Use these adapters, by module name, and no others."""
        ...

    def held(self, name: str) -> Tensor | None:
        """What the next step reads under a parameter's name, or A and B's: unpacked. None where no adapter is used."""
        ...

    def multiply(self, name: str, x: Tensor) -> Tensor | None:
        """Rows x times what stands under that name, as the next step multiplies: without bias, B with its scale. None
        where no step multiplies by it (a norm, a bias, an embedding), or no adapter is used."""
        ...


def unsupported_reason(model: PreTrainedModel) -> str | None:
    """Why this decoder cannot serve a model, or None."""
    name, config = type(model).__name__, model.config
    known = [family.architecture for family in families_for("decoder").values()]
    if name not in known:
        return f"{name} is not one of {', '.join(known)}"
    window = shortening_window(config, config.max_position_embeddings)
    if window is not None:
        return f"attention sees a sliding window of {window} of {config.max_position_embeddings} positions"
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in rope_types_for("decoder"):  # a table of its cosines would not stay valid
        return f"rope type {rope_type!r} changes with the length of the sequence"
    return None


@dataclass(slots=True, kw_only=True)
class Layer:
    """The weights of one decoder layer."""

    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    gate: Projection
    up: Projection
    down: Projection


_PLACES = {
    "input_layernorm": "input_norm",
    "post_attention_layernorm": "post_norm",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
"""Where a Layer has the weights of its modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """Where the tokens of one step stand. Groups form a rectangle [P, width] so that a prompt's keys meet the
    queries of all its completions in one product; None for the two indices means rows already stand like that."""

    num_rows: int
    num_prompts: int
    prompt_length: int  # longest open prompt, or more
    completion_length: int  # longest completion, with this token, or more
    slots: Tensor | None  # [N] 0, 1, ..; None where every row writes at completion_length - 1
    written: Tensor  # [N] where a row writes
    positions: Tensor  # [N]
    mask: Tensor | None  # [N, 1, 1, prompt_length + completion_length], added to the scores
    width: int
    rectangle_rows: Tensor | None  # [P * width]: the row that stands there
    row_places: Tensor | None  # [N]: where in the rectangle a row stands


def attention_mask(prompt_lengths: Tensor, written: Tensor, prompt_length: int, completion_length: int) -> Tensor:
    """StepPlan's, for rows [N] with prompts of these lengths."""
    places = torch.arange(max(prompt_length, completion_length), device=written.device)
    is_no_prompt = places[:prompt_length] >= prompt_lengths[:, None]
    hidden = torch.cat((is_no_prompt, places[:completion_length] > written[:, None]), dim=1)
    mask = torch.zeros(hidden.shape, device=written.device).masked_fill_(hidden, float("-inf"))
    return mask[:, None, None]


class CausalDecoder:
    """See the module's contract. Everything runs in the compute dtype, softmax and norms in fp32, as in
    transformers; `batch_rows` is the usual number of rows, a hint for oneDNN."""

    late_admission = True

    def __init__(self, model: PreTrainedModel, compute_dtype: torch.dtype, batch_rows: int) -> None:
        reason = unsupported_reason(model)
        assert reason is None, reason
        config: Any = model.config
        self.dtype, self.batch_rows = compute_dtype, batch_rows
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.repeats = self.num_heads // self.num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.norm_eps = config.rms_norm_eps
        self.activation = ACT2FN[config.hidden_act]
        self.rotary = model.get_submodule("model.rotary_emb")
        self._read_weights(model)
        self.cos, self.sin = self.embedding.new_empty(0), self.embedding.new_empty(0)
        self.kept_bytes = 0  # a cache up to this size stays where it is when the last row is closed
        self.reset()

    def reset(self) -> None:
        layers, heads = len(self.layers), self.num_kv_heads
        self.prompt_store = KeyValueStore(layers, heads, self.head_dim, self.embedding)
        self.completion_store = KeyValueStore(layers, heads, self.head_dim, self.embedding)
        self._close_rows()

    def _close_rows(self) -> None:
        self.row_prompt: list[int] = []  # the prompt slot of each row
        self.row_length: list[int] = []  # completion tokens stored for each row
        self.prompt_lengths: list[int] = []  # of each prompt slot
        self._rectangle: tuple[int, Tensor | None, Tensor | None] | None = None

    def _read_weights(self, model: PreTrainedModel) -> None:
        self.projections: dict[str, Projection] = {}
        self.shared = {name: p.detach().to(self.dtype) for name, p in model.named_parameters()}
        self.weights = dict(self.shared)
        self.tied = "lm_head.weight" not in self.shared
        self.layers = [self._read_layer(f"model.layers.{i}.") for i in range(model.config.num_hidden_layers)]
        self._read_outer()

    def _read_outer(self) -> None:
        self.embedding = self.weights["model.embed_tokens.weight"]
        self.final_norm = self.weights["model.norm.weight"]
        if self.tied:
            self.head = Projection(self.embedding, None)
        else:
            self.head = self._projection("lm_head")

    def _projection(self, name: str) -> Projection:
        if name not in self.projections:
            weight, bias = self.shared[f"{name}.weight"], self.shared.get(f"{name}.bias")
            self.projections[name] = Projection(weight, bias)
        return self.projections[name]

    def _read_layer(self, prefix: str) -> Layer:
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return Layer(
            input_norm=self.weights[prefix + "input_layernorm.weight"],
            post_norm=self.weights[prefix + "post_attention_layernorm.weight"],
            q_norm=self.weights.get(attention + "q_norm.weight"),
            k_norm=self.weights.get(attention + "k_norm.weight"),
            q=self._projection(attention + "q_proj"),
            k=self._projection(attention + "k_proj"),
            v=self._projection(attention + "v_proj"),
            o=self._projection(attention + "o_proj"),
            gate=self._projection(mlp + "gate_proj"),
            up=self._projection(mlp + "up_proj"),
            down=self._projection(mlp + "down_proj"),
        )

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        for name, projection in self.projections.items():
            projection.hold(weights.get(f"{name}.weight"), weights.get(f"{name}.bias"), self.batch_rows)
        for name, shared in self.shared.items():
            if name.rpartition(".")[0] not in self.projections:
                new = weights.get(name)
                self.weights[name] = shared if new is None else in_place(self.weights[name], new, shared)
        self.layers = [self._read_layer(f"model.layers.{i}.") for i in range(len(self.layers))]
        self._read_outer()

    def set_adapters(self, adapters: Mapping[str, AdapterTensors]) -> None:
        for name, projection in self.projections.items():
            projection.adapt(adapters.get(name))

    def held(self, name: str) -> Tensor | None:
        if (side := side_of(name)) is not None:
            adapter = self._adapter(module_of(name))
            return None if adapter is None else adapter.factor(side)
        module, _, kind = name.rpartition(".")
        used = self._used(module)
        if isinstance(used, Projection):
            return used.bias if kind == "bias" else used.held()
        return used

    def multiply(self, name: str, x: Tensor) -> Tensor | None:
        if (side := side_of(name)) is not None:
            adapter = self._adapter(module_of(name))
            return None if adapter is None else adapter.product(side, x)
        module, _, kind = name.rpartition(".")
        used = self._used(module)
        return used.multiply(x, None) if isinstance(used, Projection) and kind == "weight" else None

    def _adapter(self, module: str) -> AdapterTensors | None:
        used = self._used(module)
        return used.adapter if isinstance(used, Projection) else None

    def _used(self, module: str) -> Projection | Tensor | None:
        """What `_body` and `_logits` read of a module."""
        if module.startswith("model.layers."):
            index, _, place = module.removeprefix("model.layers.").partition(".")
            return getattr(self.layers[int(index)], _PLACES[place])
        return {"model.embed_tokens": self.embedding, "model.norm": self.final_norm, "lm_head": self.head}[module]

    def admit(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> Tensor:
        """[P, V] logits after each prompt. Prompts of one pass are right-padded, so close lengths go together."""
        first_slot = len(self.prompt_lengths)
        lengths = [len(prompt) for prompt in prompts]
        self.prompt_store.reserve(first_slot + len(prompts), max([*self.prompt_lengths, *lengths]))
        by_length = sorted(range(len(prompts)), key=lambda p: lengths[p])
        logits: list[Tensor | None] = [None] * len(prompts)
        while by_length:
            part = [by_length.pop()]  # the longest left
            while by_length and (len(part) + 1) * lengths[part[0]] <= PREFILL_TOKENS:
                part.append(by_length.pop())
            rows = self._prefill([prompts[p] for p in part], [first_slot + p for p in part])
            for row, p in enumerate(part):
                logits[p] = rows[row]
        for p, count in enumerate(counts):
            self.row_prompt += [first_slot + p] * count
            self.row_length += [0] * count
        self.prompt_lengths += lengths
        self.completion_store.reserve(len(self.row_prompt), FIRST_COMPLETION_CAPACITY)
        self._rectangle = None
        return torch.stack([row for row in logits if row is not None])

    def _prefill(self, prompts: Sequence[Sequence[int]], slots: Sequence[int]) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        P, L = len(prompts), int(lengths.max())
        padded = torch.zeros((P, L), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        slot_index = torch.tensor(slots)
        self._reserve_positions(L)
        cos, sin = self._rope(torch.arange(L, device=self.embedding.device).repeat(P))
        x = F.embedding(padded.to(self.embedding.device).view(-1), self.embedding)

        def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.view(P, L, -1, self.head_dim).transpose(1, 2) for t in (q, k, v))
            self.prompt_store.keys[layer_index][slot_index, :, :, :L] = k.transpose(2, 3)
            self.prompt_store.values[layer_index][slot_index, :, :L] = v
            k, v = (t.repeat_interleave(self.repeats, dim=1) for t in (k, v))
            with sdpa_kernel(_KERNELS):
                out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scaling)
            return out.transpose(1, 2).reshape(P * L, -1)

        x = self._body(x, cos, sin, attend)
        last = torch.arange(P) * L + lengths - 1
        return self._logits(x[last.to(x.device)])

    def step(self, token_ids: Tensor) -> Tensor:
        plan = self._plan()
        assert token_ids.shape == (plan.num_rows,), (token_ids.shape, plan.num_rows)
        self.reserve(
            num_rows=plan.num_rows,
            num_prompts=plan.num_prompts,
            prompt_length=plan.prompt_length,
            completion_length=plan.completion_length,
        )
        logits = self.compute(plan, token_ids)
        self.row_length = [length + 1 for length in self.row_length]
        return logits

    def reserve(self, *, num_rows: int, num_prompts: int, prompt_length: int, completion_length: int) -> None:
        """Make room for what a step of these sizes reads and writes."""
        self.prompt_store.reserve(num_prompts, prompt_length)
        self.completion_store.reserve(num_rows, completion_length)
        self._reserve_positions(prompt_length + completion_length)

    def tensors_of_a_step(self) -> Iterator[Tensor]:
        """All that `compute` reads and writes, but for its arguments."""
        for store in (self.prompt_store, self.completion_store):
            yield from (store.keys, store.values)
        yield from (self.cos, self.sin, *self.weights.values())
        for projection in (*self.projections.values(), self.head):
            yield from projection.tensors()

    def compute(self, plan: StepPlan, token_ids: Tensor) -> Tensor:
        """The logits after one more token in every row [N, V]. Of the plan's numbers on the device none is looked at:
        what is launched, and where it reads and writes, follows from the sizes alone."""

        def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attend_step(plan, layer_index, q, k, v)

        x = self._body(F.embedding(token_ids, self.embedding), *self._rope(plan.positions), attend)
        return self._logits(x)

    def retire(self, rows: Sequence[int]) -> list[int]:
        order, sources, targets = fill_holes(len(self.row_prompt), rows)
        if not order:
            if self.prompt_store.num_bytes + self.completion_store.num_bytes > self.kept_bytes:
                self.reset()
            self._close_rows()
            return order
        self.completion_store.move(sources, targets, max(self.row_length, default=0))
        self.row_prompt = [self.row_prompt[row] for row in order]
        self.row_length = [self.row_length[row] for row in order]
        open_prompts = set(self.row_prompt)
        closed = [slot for slot in range(len(self.prompt_lengths)) if slot not in open_prompts]
        slots, sources, targets = fill_holes(len(self.prompt_lengths), closed)
        self.prompt_store.move(sources, targets, max(self.prompt_lengths, default=0))
        self.prompt_lengths = [self.prompt_lengths[slot] for slot in slots]
        new_slot = {old: new for new, old in enumerate(slots)}
        self.row_prompt = [new_slot[slot] for slot in self.row_prompt]
        self._rectangle = None
        return order

    def _body(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Any) -> Tensor:
        """All layers over rows x [N, hidden]; `attend(layer, q, k, v)` stores k and v and returns [N, heads * D]."""
        split = [self.num_heads, self.num_kv_heads]
        for index, layer in enumerate(self.layers):
            hidden = self._norm(x, layer.input_norm)
            q = layer.q(hidden).view(-1, self.num_heads, self.head_dim)
            k = layer.k(hidden).view(-1, self.num_kv_heads, self.head_dim)
            v = layer.v(hidden).view(-1, self.num_kv_heads, self.head_dim)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = self._norm(q, layer.q_norm), self._norm(k, layer.k_norm)
            turned = torch.cat((q, k), dim=1)
            turned = turned * cos + turned.roll(self.head_dim // 2, dims=-1) * sin
            q, k = turned.split(split, dim=1)
            x = x + layer.o(attend(index, q, k, v))
            hidden = self._norm(x, layer.post_norm)
            x = x + layer.down(self.activation(layer.gate(hidden)) * layer.up(hidden))
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(self._norm(x, self.final_norm))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return weight * F.rms_norm(
            x, weight.shape, None, self.norm_eps
        )  # rounded before the weight, as transformers do

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, D]; the first half of the sines is negated, which turns rotate-half into a roll."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)

    def _reserve_positions(self, length: int) -> None:
        if self.cos.shape[0] >= length:
            return
        length = max(length, 2 * self.cos.shape[0], FIRST_ROPE_POSITIONS)
        cos, sin = self.rotary(self.embedding, torch.arange(length, device=self.embedding.device)[None])
        sign = torch.ones_like(sin[0, 0])
        sign[: self.head_dim // 2] = -1
        self.cos, self.sin = cos[0], sin[0] * sign

    def _plan(self) -> StepPlan:
        device = self.embedding.device
        prompt_lengths, written = self.lengths_of_rows()
        L, T = max(self.prompt_lengths), max(written) + 1
        is_uniform = min(written) + 1 == T
        is_masked = not is_uniform or min(prompt_lengths) < L
        lengths = torch.tensor([prompt_lengths, written]).to(device)
        width, rectangle_rows, row_places = self._group_rectangle()
        return StepPlan(
            num_rows=len(written),
            num_prompts=len(self.prompt_lengths),
            prompt_length=L,
            completion_length=T,
            slots=None if is_uniform else torch.arange(len(written), device=device),
            written=lengths[1],
            positions=lengths.sum(0),
            mask=attention_mask(lengths[0], lengths[1], L, T) if is_masked else None,
            width=width,
            rectangle_rows=rectangle_rows,
            row_places=row_places,
        )

    def lengths_of_rows(self) -> tuple[list[int], list[int]]:
        """Of each row's prompt, and how many tokens of its completion are stored."""
        return [self.prompt_lengths[slot] for slot in self.row_prompt], self.row_length

    def _group_rectangle(self) -> tuple[int, Tensor | None, Tensor | None]:
        if self._rectangle is None:
            width, rectangle, places = self.rectangle_of_rows()
            if rectangle == list(range(len(self.row_prompt))):
                self._rectangle = (width, None, None)
            else:
                indices, places_of = torch.tensor(rectangle), torch.tensor(places)
                self._rectangle = (width, indices.to(self.embedding.device), places_of.to(self.embedding.device))
        return self._rectangle

    def rectangle_of_rows(self, width: int = 0) -> tuple[int, list[int], list[int]]:
        """StepPlan's width, at least this one, and its two indices. A place that no row needs has the first of its
        prompt."""
        members: list[list[int]] = [[] for _ in self.prompt_lengths]
        for row, slot in enumerate(self.row_prompt):
            members[slot].append(row)
        width = max(width, *map(len, members))
        places = [0] * len(self.row_prompt)
        for slot, rows in enumerate(members):
            for column, row in enumerate(rows):
                places[row] = slot * width + column
        return width, [row for rows in members for row in rows + rows[:1] * (width - len(rows))], places

    def _attend_step(self, plan: StepPlan, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One query for each row against its prompt (shared) and its own completion, under one softmax."""
        N, T, L = plan.num_rows, plan.completion_length, plan.prompt_length
        keys, values = self.completion_store.keys[layer_index], self.completion_store.values[layer_index]
        if plan.slots is None:
            keys[:N, :, :, T - 1] = k
            values[:N, :, T - 1] = v
        else:
            keys[plan.slots, :, :, plan.written] = k
            values[plan.slots, :, plan.written] = v
        q = q.reshape(N, self.num_kv_heads, self.repeats, self.head_dim)
        prompt_keys = self.prompt_store.keys[layer_index][: plan.num_prompts, ..., :L]
        prompt_values = self.prompt_store.values[layer_index][: plan.num_prompts, :, :L]
        own_scores = torch.matmul(q, keys[:N, ..., :T])
        shared_scores = self._to_rows(plan, torch.matmul(self._to_rectangle(plan, q), prompt_keys))
        scores = torch.cat((shared_scores, own_scores), dim=-1)
        if plan.mask is None:
            scores = scores.float() * self.scaling
        else:
            scores = torch.add(plan.mask, scores, alpha=self.scaling)  # in fp32, as the mask
        attention = scores.softmax(dim=-1).to(q.dtype)
        shared_attention = self._to_rectangle(plan, attention[..., :L])
        out = self._to_rows(plan, torch.matmul(shared_attention, prompt_values))
        out = out + torch.matmul(attention[..., L:], values[:N, :, :T])
        return out.reshape(N, -1)

    def _to_rectangle(self, plan: StepPlan, x: Tensor) -> Tensor:
        """[N, K, R, c] -> [P, K, width * R, c]"""
        if plan.rectangle_rows is not None:
            x = x.index_select(0, plan.rectangle_rows)
        x = x.view(plan.num_prompts, plan.width, self.num_kv_heads, self.repeats, -1).transpose(1, 2)
        return x.reshape(plan.num_prompts, self.num_kv_heads, plan.width * self.repeats, -1)

    def _to_rows(self, plan: StepPlan, x: Tensor) -> Tensor:
        """[P, K, width * R, c] -> [N, K, R, c]"""
        x = x.view(plan.num_prompts, self.num_kv_heads, plan.width, self.repeats, -1).transpose(1, 2)
        x = x.reshape(plan.num_prompts * plan.width, self.num_kv_heads, self.repeats, -1)
        return x if plan.row_places is None else x.index_select(0, plan.row_places)
