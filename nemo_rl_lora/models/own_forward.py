"""What a model's own forward pass does around its layers, found by running its own code rather than from its name.

Contract: `read_head` tells how logits come from the last hidden states, by the model's own forward pass around a
stand-in for its body, so it reads no weight and works on the meta device. `compared_attention` tells whether an
attention function computes what the model's own eager one does, from one pass over a few tokens. Neither compares
numbers that a model happens to give: the stand-ins are large enough that a soft cap, a scale or a sink shows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

logger = logging.getLogger(__name__)

_LARGEST_LOGIT = 6e4  # of the stand-ins, within float16: any soft cap is reached
_LARGEST_SCORE = 20.0  # of the stand-ins, as a factor on normal deviates: an attention's soft cap bends it
_EXACT = 1e-4  # relative: rounding of the probabilities to fp32 is 1e-6
# What models hand to an attention function besides tensors that does not change what it computes. A window is in the
# mask, or hides nothing (families.shortening_window).
_WITHOUT_EFFECT = frozenset(
    {"attention_plan", "cache_position", "dropout", "is_causal", "logits_to_keep", "output_attentions"}
    | {"output_hidden_states", "output_router_logits", "position_ids", "return_dict", "scaling", "sliding_window"}
    | {"use_cache"}
)

Attention = Callable[..., tuple[Tensor, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """logits = z, or soft_cap * tanh(z / soft_cap), with z = scale * (hidden @ weight^T)."""

    scale: float = 1.0
    soft_cap: float | None = None


def body_of(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model that gives hidden states: all but its head. ValueError where it has none."""
    for body in (model.base_model, getattr(model, "model", model)):
        if body is not model:
            return body
    raise ValueError("has no body apart from its head")


def refusal(model_name: str, reason: str) -> ValueError:
    """Why a model is not trained; the reason speaks of what it does."""
    return ValueError(
        f"policy.model_name={model_name!r}: {reason}, which this version does not compute, and it would train another "
        f"model than this one. Choose a causal language model with a plain linear head, such as Llama, Qwen, Mistral, "
        f"Gemma, Granite, Cohere or OLMo."
    )


def _bodies(model: PreTrainedModel) -> list[nn.Module]:
    """What may be called for hidden states: the body, or the decoder in a body that is nothing else."""
    body = body_of(model)
    return [part for part in (body, getattr(body, "decoder", None)) if isinstance(part, nn.Module)]


@contextmanager
def last_hidden_states(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """What a model's body gives in the passes meanwhile."""
    found: list[Tensor] = []
    with ExitStack() as hooks:
        for part in _bodies(model):
            handle = part.register_forward_hook(lambda _module, _inputs, output: found.append(output[0]))
            hooks.callback(handle.remove)
        yield found


@contextmanager
def reached_linears(model: nn.Module) -> Iterator[set[str]]:
    """The names of the linear modules that the passes meanwhile run."""
    reached: set[str] = set()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                handle = module.register_forward_hook(lambda *_, name=name: reached.add(name))
                hooks.callback(handle.remove)
        yield reached


@torch.no_grad()
def read_head(model: PreTrainedModel) -> HeadForm:
    """How a model's logits come from the last hidden states of its body. ValueError says what else it does there."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise ValueError(f"has a {type(head).__name__} for its output head")
    if head.bias is not None:
        raise ValueError("has an output head with a bias")
    # in bfloat16's values, so that a model that casts them leaves them as they are
    hidden = torch.linspace(-4, 4, 2 * head.in_features).view(1, 2, -1).bfloat16().float()
    raw = torch.linspace(-1, 1, head.out_features) * torch.tensor([[[1.0], [_LARGEST_LOGIT]]])
    raw = raw.bfloat16().double()
    fed: list[Tensor] = []

    def stand_in(states: Tensor) -> Tensor:
        fed.append(states)
        return raw

    with ExitStack() as stand_ins:
        for part in _bodies(model):
            stand_ins.enter_context(_forward_as(part, lambda *_, **__: _BodyOutput((hidden,))))
        stand_ins.enter_context(_forward_as(head, stand_in))
        try:
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False).logits
        except Exception as error:  # whatever its code does with a body's output that is not there
            raise ValueError(
                f"computes its logits from more than the last hidden states of its body ({error})"
            ) from None
    before = _factor(hidden, fed[0]) if len(fed) == 1 and fed[0].shape == hidden.shape else None
    if before is None:
        raise ValueError("applies its output head to something other than the last hidden states of its body")
    return _form_of(raw, logits, before)


def _form_of(raw: Tensor, logits: Tensor, before: float) -> HeadForm:
    """The form whose logits these are, of what the head gave; `before`: the factor on the hidden states."""
    if logits.shape == raw.shape:
        logits = logits.double()
        if (scale := _factor(raw, logits)) is not None:
            return HeadForm(scale=scale * before)
        cap = float(logits.abs().max())
        slope = float(cap * torch.atanh(logits[0, 0, -1] / cap) / raw[0, 0, -1])
        for scale in (1.0, slope):
            if torch.allclose(logits, cap * torch.tanh(scale * raw / cap), rtol=1e-5, atol=1e-6 * cap):
                return HeadForm(scale=scale * before, soft_cap=cap)
    raise ValueError("changes the output of its head by something that is neither a factor nor a soft cap")


def _factor(x: Tensor, y: Tensor) -> float | None:
    """c with y = c * x; None where there is none."""
    if y.is_meta:
        return None
    if torch.equal(y, x):
        return 1.0
    factor = float((x.double() * y.double()).sum() / x.double().square().sum())
    return factor if torch.allclose(y.double(), factor * x.double(), rtol=1e-5, atol=0) else None


class _BodyOutput(tuple):  # noqa: SLOT001
    """A body's output that holds its last hidden states alone, by index and by name."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """This function in the place of a module's forward."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


@dataclass(slots=True)
class AttentionCalls:
    """What a model asked of its attention functions in one pass, and in what a candidate differs from its own."""

    number: int = 0
    unserved: str | None = None  # the first thing that the candidate does not compute as the model does

    @property
    def are_served(self) -> bool:
        return self.number > 0 and self.unserved is None


def fastest_of(model: PreTrainedModel, calls: AttentionCalls) -> Literal["sdpa", "eager"]:
    """torch's fused attention where it served every call that a model made, else the model's own."""
    if calls.are_served and model._supports_sdpa:
        return "sdpa"
    if calls.number:  # others have no attention, or one that no setting changes
        logger.warning("attention: %s's own, which holds all scores at once: %s", type(model).__name__, calls.unserved)
    return "eager"


@contextmanager
def compared_attention(candidate: Attention, **settings: Any) -> Iterator[AttentionCalls]:
    """Passes of models with eager attention meanwhile compare it, call by call, with a candidate in fp64,
    which no setting of a GPU's products rounds.

    `settings` are handed to the candidate in place of what the model hands over under these names, its mask included.
    The queries, keys and values that are compared are normal deviates, small and large.
    """
    calls = AttentionCalls()

    def interface(attn_implementation: str, default: Attention) -> Attention:
        def attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.number += 1
            if calls.unserved is None:
                calls.unserved = _difference(default, candidate, settings, module, (q, k, v), args, kwargs)
            return default(module, q, k, v, *args, **kwargs)

        return attention

    ALL_ATTENTION_FUNCTIONS.get_interface = interface
    try:
        yield calls
    finally:
        del ALL_ATTENTION_FUNCTIONS.get_interface


def unserved_argument(kwargs: dict[str, Any]) -> str | None:
    """The first argument of an attention call that says something which plain attention does not know."""
    return next((name for name, value in kwargs.items() if value is not None and name not in _WITHOUT_EFFECT), None)


def _difference(
    own: Attention,
    candidate: Attention,
    settings: dict[str, Any],
    module: nn.Module,
    states: tuple[Tensor, Tensor, Tensor],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> str | None:
    mask = args[0] if args else kwargs.get("attention_mask")
    kwargs = {name: value for name, value in kwargs.items() if name != "attention_mask"}
    if (name := unserved_argument(kwargs)) is not None:
        return f"{type(module).__name__} asks for {name}"
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device) for x in states)
    q *= torch.linspace(0.2, _LARGEST_SCORE, q.shape[-2], device=q.device)[:, None]
    mask = mask.to(q.dtype) if isinstance(mask, Tensor) and mask.is_floating_point() else mask
    try:
        expected = own(module, q, k, v, mask, **kwargs)[0]
        actual = candidate(module, q, k, v, **({"attention_mask": mask} | kwargs | settings))[0]
    except (RuntimeError, TypeError, ValueError) as error:
        return f"{type(module).__name__}: {error}"
    error = float((actual - expected).norm() / expected.norm())
    return None if error <= _EXACT else f"{type(module).__name__} differs from its own by {error:.3g}"
