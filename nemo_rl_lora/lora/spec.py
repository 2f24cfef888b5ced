"""LoraSpec: the one description of an adapter that everything downstream reads.

Contract: a LoraSpec that exists is valid (its own fields; whether its targets exist is lora/targets.py's question). The
update of a module is `scale * B @ A` with A [dim, in_features], B [out_features, dim] and `scale = alpha / dim`, or
`alpha / sqrt(dim)` with rank-stabilised scaling (Kalajdzievski 2023, eq. 4). It holds no tensor and draws no number:
`init_distribution` says from which distribution A is drawn.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from nemo_rl_lora.lora.names import hf_targets, names_fused_layer, names_fused_part
from nemo_rl_lora.lora.targets import ALL_LINEAR, module_matches
from nemo_rl_lora.tensors import COMPUTE_DTYPES

_NORMAL = re.compile(r"normal\(\s*([0-9.eE+-]+)\s*\)")
_INIT_RULE = "must be 'xavier', 'uniform', 'kaiming' or 'normal(STD)' with STD > 0"


class LoraFieldError(ValueError):
    """A field of LoraSpec holds a value that it cannot hold. `field` lets a dialect name its own key instead."""

    def __init__(self, field: str, value: Any, rule: str) -> None:
        super().__init__(f"lora.{field}={value!r}: {rule}")
        self.field = field
        self.value = value
        self.rule = rule

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.rule)


def _is(value: Any, *kinds: type) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def _one_of(*choices: Any) -> tuple[Callable[[Any], bool], str]:
    names = ", ".join(repr(choice) for choice in choices)
    return lambda value: value in choices, f"must be one of {names}. Choose one of them."


# What a field may hold on its own: a test of its value, and what to say where it fails.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dim": (lambda x: _is(x, int) and x > 0, "must be a whole number of at least 1. Typical values are 8 to 128."),
    "alpha": (
        lambda x: _is(x, int, float) and 0 < x < math.inf,
        "must be greater than 0 and finite. Typical values are 16 to 128.",
    ),
    "dropout": (lambda x: _is(x, int, float) and 0 <= x < 1, "must lie in [0, 1). Use 0.0 for no dropout."),
    "dropout_position": _one_of("pre", "post"),
    "B_init": _one_of("zero"),
    "fused": _one_of("canonical", "shared"),
    "kernels": _one_of(True, False, "automodel"),
    "dtype": _one_of(*COMPUTE_DTYPES, None),
    "use_rslora": (lambda x: isinstance(x, bool), "must be true or false. Correct it."),
    "a2a": (lambda x: isinstance(x, bool), "must be true or false. Correct it."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """An adapter, whichever block or file it was described in."""

    dim: int  # the rank
    alpha: float
    dropout: float = 0.0
    dropout_position: Literal["pre", "post"] = "post"  # before A, or after B
    targets: tuple[str, ...] | Literal["all-linear"] = ALL_LINEAR
    excludes: tuple[str, ...] = ()
    A_init: str = "xavier"
    B_init: Literal["zero"] = "zero"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None  # None: fp32 masters, cast to the compute dtype
    kernels: Literal["automodel"] | bool = True  # Triton kernels where they run: our own, or nemo-automodel's
    a2a: bool = False  # Megatron's all-to-all on row-parallel layers
    fused: Literal["canonical", "shared"] = "canonical"  # one A per Hugging Face module, or per fused Megatron layer
    rank_pattern: Mapping[str, int] = field(default_factory=dict, hash=False)  # the first match wins
    alpha_pattern: Mapping[str, float] = field(default_factory=dict, hash=False)
    use_rslora: bool = False

    def __post_init__(self) -> None:
        for name in _RULES:
            _check(name, getattr(self, name))
        parse_init(self.A_init)
        _check_targets(self)
        for pattern, dim in self.rank_pattern.items():
            _check("dim", dim, f"rank_pattern.{pattern}")
        for pattern, alpha in self.alpha_pattern.items():
            _check("alpha", alpha, f"alpha_pattern.{pattern}")

    def dim_of(self, name: str) -> int:
        """The rank of the module of this full Hugging Face name: the first match in `rank_pattern`, or `dim`."""
        return next((dim for pattern, dim in self.rank_pattern.items() if module_matches(pattern, name)), self.dim)

    def alpha_of(self, name: str) -> float:
        """The alpha of the module of this full Hugging Face name."""
        return next((a for pattern, a in self.alpha_pattern.items() if module_matches(pattern, name)), self.alpha)

    def scale_of(self, name: str) -> float:
        """What multiplies B @ A in the module of this full Hugging Face name."""
        dim = self.dim_of(name)
        return self.alpha_of(name) / (math.sqrt(dim) if self.use_rslora else dim)


def parse_init(A_init: str) -> tuple[str, float | None]:
    """Split an init into its name and, for `normal(STD)`, its standard deviation. Raises LoraFieldError."""
    if A_init in ("xavier", "uniform", "kaiming"):
        return A_init, None
    if A_init == "normal":
        raise LoraFieldError("A_init", A_init, "needs its standard deviation. Write, for example, 'normal(0.02)'.")
    match = _NORMAL.fullmatch(str(A_init))
    if match is None:
        raise LoraFieldError("A_init", A_init, f"{_INIT_RULE}. Choose one of them.")
    with contextlib.suppress(ValueError):  # `1e` is no number
        if 0 < (std := float(match[1])) < math.inf:
            return "normal", std
    raise LoraFieldError("A_init", A_init, f"{_INIT_RULE}. Write, for example, 'normal(0.02)'.")


def init_distribution(A_init: str, in_features: int, dim: int) -> tuple[Literal["normal", "uniform"], float]:
    """The distribution of A's entries: ("normal", std) with mean 0, or ("uniform", bound) over [-bound, bound].

    xavier: std = sqrt(2 / (in_features + dim)) (Glorot and Bengio 2010, the normal form).
    uniform, kaiming: bound = 1 / sqrt(in_features), Kaiming's uniform form at a = sqrt(5).
    """
    name, std = parse_init(A_init)
    if name == "xavier":
        return "normal", math.sqrt(2 / (in_features + dim))
    return ("uniform", 1 / math.sqrt(in_features)) if std is None else ("normal", std)


def require_adapter_dtype(spec: LoraSpec, quantization: str | None, dtype_key: str) -> None:
    """Refuse a quantized base (`quantization` names its method) without an adapter dtype.

    `dtype_key` is the dotted key that sets the dtype.
    """
    if quantization is not None and spec.dtype is None:
        raise ValueError(
            f"{dtype_key}=None: the base is quantized ({quantization}), so the adapter cannot follow its dtype. "
            f"Set it to one of {', '.join(COMPUTE_DTYPES)}."
        )


def _check(rule: str, value: Any, name: str | None = None) -> None:
    holds, words = _RULES[rule]
    if not holds(value):
        raise LoraFieldError(name or rule, value, words)


def _check_targets(spec: LoraSpec) -> None:
    targets = spec.targets
    if isinstance(targets, str) and targets != ALL_LINEAR:
        raise LoraFieldError("targets", targets, f"must be {ALL_LINEAR!r} or a list of names. Write a list.")
    if not targets:
        raise LoraFieldError("targets", [], f"names no module. Write {ALL_LINEAR!r} for every linear module.")
    names = () if isinstance(targets, str) else targets
    _check_names("targets", names)
    _check_names("excludes", spec.excludes)
    if not names and spec.fused == "shared":
        raise LoraFieldError("fused", "shared", "needs targets that name linear_qkv or linear_fc1. Name them.")
    fused = [t for t in names if names_fused_layer(t)]
    parts = [t for t in names if names_fused_part(t)]
    if fused and parts:
        instead = ", ".join(repr(n) for n in hf_targets(fused[0]))
        raise LoraFieldError(
            "targets",
            list(names),
            f"{fused[0]!r} asks for one A shared by a fused layer, {parts[0]!r} for one A per module. Use {instead} "
            f"instead of {fused[0]!r}, or fused names only.",
        )
    if bool(fused) != (spec.fused == "shared"):
        rule = "must be 'shared' exactly when a target names a fused layer. Drop it."
        raise LoraFieldError("fused", spec.fused, rule)


def _check_names(name: str, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.strip():
            rule = "every entry must be a module name or glob. Remove the empty one."
            raise LoraFieldError(name, list(patterns), rule)
        if pattern == ALL_LINEAR:
            raise LoraFieldError(name, list(patterns), f"{ALL_LINEAR!r} stands alone, not in a list. Write it bare.")
