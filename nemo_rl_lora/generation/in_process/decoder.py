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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

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


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can hold linear weights in its own layout here (about a quarter off the products' time)."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Projection:
    """A linear layer: a shared weight, or an own one in oneDNN's layout, with an adapter beside it."""

    __slots__ = ("adapter", "bias", "packed", "shared_bias", "shared_weight", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.shared_weight, self.shared_bias = weight, bias
        self.reset()
        self.adapter: AdapterTensors | None = None

    def reset(self) -> None:
        self.weight: Tensor | None = self.shared_weight
        self.packed: Tensor | None = None
        self.bias = self.shared_bias

    def own(self, weight: Tensor, batch_rows: int) -> None:
        """Hold a weight of our own, packed where that works; the plain tensor is let go then."""
        if can_pack(weight.device, weight.dtype):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch_rows)
            self.weight = None
        else:
            self.packed, self.weight = None, weight

    def held(self) -> Tensor:
        """The weight as a plain tensor."""
        held = self.weight if self.packed is None else self.packed.to_dense()
        assert held is not None
        return held

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, bias, "none", [], "")
        assert self.weight is not None
        return F.linear(x, self.weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.multiply(x, self.bias)
        if self.adapter is None:
            return y
        return y + self.adapter.update(x).to(y.dtype)


class KeyValueStore:
    """Keys [layers, slots, K, D, capacity] (transposed: the faster product) and values [.., K, capacity, D]."""

    def __init__(self, num_layers: int, num_heads: int, head_dim: int, like: Tensor) -> None:
        self.keys = like.new_empty((num_layers, 0, num_heads, head_dim, 0))
        self.values = like.new_empty((num_layers, 0, num_heads, 0, head_dim))

    def reserve(self, num_slots: int, length: int) -> None:
        """Make room for this many slots of this length; what is stored stays."""
        layers, slots, heads, head_dim, capacity = self.keys.shape
        if num_slots <= slots and length <= capacity:
            return
        new_slots = max(slots, num_slots)
        new_capacity = capacity if length <= capacity else max(length, 2 * capacity)
        # Zeros, not garbage: a masked position still enters a product, where NaN would survive its zero weight.
        keys = self.keys.new_zeros((layers, new_slots, heads, head_dim, new_capacity))
        values = self.values.new_zeros((layers, new_slots, heads, new_capacity, head_dim))
        keys[:, :slots, :, :, :capacity] = self.keys
        values[:, :slots, :, :capacity] = self.values
        self.keys, self.values = keys, values

    def move(self, sources: Sequence[int], targets: Sequence[int], length: int) -> None:
        if not sources:
            return
        source, target = torch.tensor(sources), torch.tensor(targets)
        self.keys[:, target, :, :, :length] = self.keys[:, source, :, :, :length]
        self.values[:, target, :, :length] = self.values[:, source, :, :length]


def fill_holes(num_rows: int, retired: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """Close rows by moving the last ones into the gaps. Returns (order, sources, targets); order[new] = old."""
    gone = set(retired)
    num_left = num_rows - len(gone)
    targets = [row for row in sorted(gone) if row < num_left]
    sources = [row for row in range(num_left, num_rows) if row not in gone]
    order = list(range(num_left))
    for source, target in zip(sources, targets, strict=True):
        order[target] = source
    return order, sources, targets


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
    prompt_length: int  # longest open prompt
    completion_length: int  # longest completion, with this token
    uniform: bool  # every row writes at completion_length - 1
    write_index: Tensor  # [N]
    positions: Tensor  # [N]
    mask: Tensor | None  # [N, 1, 1, prompt_length + completion_length], added to the scores
    width: int
    rectangle_rows: Tensor | None  # [P * width]: the row that stands there
    row_places: Tensor | None  # [N]: where in the rectangle a row stands


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
        self.reset()

    def reset(self) -> None:
        layers, heads = len(self.layers), self.num_kv_heads
        self.prompt_store = KeyValueStore(layers, heads, self.head_dim, self.embedding)
        self.completion_store = KeyValueStore(layers, heads, self.head_dim, self.embedding)
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
        self.weights = {**self.shared}
        for projection in self.projections.values():
            projection.reset()
        for name, tensor in weights.items():
            module, _, kind = name.rpartition(".")
            projection = self.projections.get(module)
            if projection is None:
                self.weights[name] = tensor
            elif kind == "bias":
                projection.bias = tensor
            else:
                projection.own(tensor, self.batch_rows)
        self.layers = [self._read_layer(f"model.layers.{i}.") for i in range(len(self.layers))]
        self._read_outer()

    def set_adapters(self, adapters: Mapping[str, AdapterTensors]) -> None:
        for name, projection in self.projections.items():
            projection.adapter = adapters.get(name)

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
        cos, sin = self._rope(torch.arange(L, device=self.embedding.device).repeat(P), L)
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
        self.completion_store.reserve(plan.num_rows, plan.completion_length)
        cos, sin = self._rope(plan.positions, plan.prompt_length + plan.completion_length)

        def attend(layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self._attend_step(plan, layer_index, q, k, v)

        x = self._body(F.embedding(token_ids, self.embedding), cos, sin, attend)
        self.row_length = [length + 1 for length in self.row_length]
        return self._logits(x)

    def retire(self, rows: Sequence[int]) -> list[int]:
        order, sources, targets = fill_holes(len(self.row_prompt), rows)
        if not order:
            self.reset()
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
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.norm_eps)
        return weight * wide.to(x.dtype)

    def _rope(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, 1, D]; the first half of the sines is negated, which turns rotate-half into a roll."""
        if self.cos.shape[0] < length:
            table = torch.arange(max(length, 2 * self.cos.shape[0], FIRST_ROPE_POSITIONS), device=positions.device)[
                None
            ]
            cos, sin = self.rotary(self.embedding, table)
            sign = torch.ones_like(sin[0, 0])
            sign[: self.head_dim // 2] = -1
            self.cos, self.sin = cos[0], sin[0] * sign
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)

    def _plan(self) -> StepPlan:
        device = self.embedding.device
        prompt_lengths = torch.tensor(self.prompt_lengths)
        row_prompt, written = torch.tensor(self.row_prompt), torch.tensor(self.row_length)
        L, T = int(prompt_lengths.max()), int(written.max()) + 1
        row_lengths = prompt_lengths[row_prompt]
        uniform = int(written.min()) + 1 == T
        mask = None
        if not uniform or int(row_lengths.min()) < L:
            hidden = torch.cat((torch.arange(L) >= row_lengths[:, None], torch.arange(T) > written[:, None]), dim=1)
            mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None].to(device)
        width, rectangle_rows, row_places = self._group_rectangle()
        return StepPlan(
            num_rows=len(self.row_prompt),
            num_prompts=len(self.prompt_lengths),
            prompt_length=L,
            completion_length=T,
            uniform=uniform,
            write_index=written.to(device),
            positions=(row_lengths + written).to(device),
            mask=mask,
            width=width,
            rectangle_rows=rectangle_rows,
            row_places=row_places,
        )

    def _group_rectangle(self) -> tuple[int, Tensor | None, Tensor | None]:
        if self._rectangle is None:
            members: list[list[int]] = [[] for _ in self.prompt_lengths]
            for row, slot in enumerate(self.row_prompt):
                members[slot].append(row)
            width = max(len(rows) for rows in members)
            rectangle = [row for rows in members for row in rows + rows[:1] * (width - len(rows))]
            if rectangle == list(range(len(self.row_prompt))):
                self._rectangle = (width, None, None)
            else:
                places = [0] * len(self.row_prompt)
                for slot, rows in enumerate(members):
                    for column, row in enumerate(rows):
                        places[row] = slot * width + column
                device = self.embedding.device
                rows_there, places_of = torch.tensor(rectangle), torch.tensor(places)
                self._rectangle = (width, rows_there.to(device), places_of.to(device))
        return self._rectangle

    def _attend_step(self, plan: StepPlan, layer_index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One query for each row against its prompt (shared) and its own completion, under one softmax."""
        N, T, L = plan.num_rows, plan.completion_length, plan.prompt_length
        keys, values = self.completion_store.keys[layer_index], self.completion_store.values[layer_index]
        if plan.uniform:
            keys[:N, :, :, T - 1] = k
            values[:N, :, T - 1] = v
        else:
            rows = torch.arange(N, device=q.device)
            keys[rows, :, :, plan.write_index] = k
            values[rows, :, plan.write_index] = v
        q = q.reshape(N, self.num_kv_heads, self.repeats, self.head_dim)
        prompt_keys = self.prompt_store.keys[layer_index][: plan.num_prompts, ..., :L]
        prompt_values = self.prompt_store.values[layer_index][: plan.num_prompts, :, :L]
        own_scores = torch.matmul(q, keys[:N, ..., :T])
        shared_scores = self._to_rows(plan, torch.matmul(self._to_rectangle(plan, q), prompt_keys))
        scores = torch.cat((shared_scores, own_scores), dim=-1).float() * self.scaling
        if plan.mask is not None:
            scores += plan.mask
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
