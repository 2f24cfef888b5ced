"""A theseus file with phases (`training/pre_lora_tokens`, `training/post_lora_tokens`) as a run of SFT in phases.

theseus trains all weights on the pre-LoRA stages, then freezes them and trains adapters on the post-LoRA stages. Its
learning rate (theseus/training/schedules/wsd.py) rises over a share of the tokens, stays, and falls over another share,
and begins anew with the adapters, whose optimizer is a new one. There the shares are of the tokens of both parts, so
that neither part gets to the end of its schedule; here each part has the whole schedule, as shares of its own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemo_rl_lora.config.run_draft import (
    OPEN,
    Draft,
    NoSuchRunError,
    RunTranslation,
    set_adapter,
    set_precision,
    steps_of,
)
from nemo_rl_lora.config.their_keys import Theirs, number, wrong
from nemo_rl_lora.data.catalog import DATASETS
from nemo_rl_lora.lora.other_tools import Translation, spec_from_theseus

TOOL = "theseus"
_ADAPTER = "optimization.lora"
_HARMLESS: dict[str, tuple[Any, ...] | None] = {
    "job": None,
    "request.*": None,
    "logging.*": None,
    "eval.*": None,
    "plots.*": None,
    "tokenizer.*": None,
    "training.evaluate": None,
    "training.validation*": None,
    "training.skip_first_dataset_validation": None,
    "architecture.vram_calib_factor": None,
    "architecture.backbone.implementation": None,
    "architecture.dtype.*": None,
    "optimization.constant_pct": None,
}
_OF_A_DATASET = ("name", "rate", "suffix", "style")
_FINEWEB = [[{"name": "fineweb", "rate": 1, "style": "PMD"}]]
# theseus's datasets that are here, by their rows; its others have no counterpart.
_DATASETS: dict[str, dict[str, Any]] = {
    "squad": {"dataset_name": "squad"},
    "alpaca": {"dataset_name": "alpaca", "data_path": "tatsu-lab/alpaca"},
    "smoltalk": {"dataset_name": "openai_format", "data_path": "HuggingFaceTB/smoltalk", "subset": "all"},
}
_PARTS = {"pre": "1e9", "post": "1e8"}  # and theseus's default tokens
assert {block["dataset_name"] for block in _DATASETS.values()} <= DATASETS.keys()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stage:
    """What theseus trains at once, before or after the adapters come (`pre` or `post`)."""

    part: str
    tokens: float
    mixture: Any
    key: str  # of its datasets in the file


def is_theseus(document: Mapping[str, Any]) -> bool:
    """Whether a document is a whole file of theseus."""
    training, others = document.get("training"), ("architecture", "optimization")
    return isinstance(training, Mapping) and any(isinstance(document.get(section), Mapping) for section in others)


def theseus_run(theirs: Theirs) -> RunTranslation:
    """The run of the file. ValueError where its stages, or its adapter, have no counterpart."""
    draft = Draft(theirs)
    if not {"pre_lora_tokens", "post_lora_tokens"} & set(theirs.document["training"]):
        raise NoSuchRunError(
            "training.pre_lora_tokens=<absent>: what trains adapters is written in this job's code. Write "
            "training.pre_lora_tokens and training.post_lora_tokens, lists with the tokens of each stage, and "
            "training.pre_lora_dataset and training.post_lora_dataset."
        )
    before, after = _stages(draft, "pre"), _stages(draft, "post")
    stages = [*before, *after]
    if not stages:
        raise ValueError(
            "training.pre_lora_tokens=[]: training.post_lora_tokens is empty as well, so that nothing is trained. Give "
            "one of them a number of tokens."
        )
    _set_model(draft, has_adapters=bool(after))
    rows, length = _set_batches(draft)
    _set_optimizer(draft)
    shares = _shares(draft)
    draft.set("sft.phases", [*_phases(draft, before, shares), *_phases(draft, after, shares, len(before))])
    num_steps = [str(steps_of(stage.tokens, rows * length)) for stage in stages]
    draft.differs(
        f"Tokens are those of the rows here. theseus counts {rows} x {length} a step, padding too: "
        f"{', '.join(num_steps)} steps (write `steps` in place of `tokens` for so many)."
    )
    draft.differs(
        "theseus takes the shares of warm-up and decay from the tokens of both parts, and its learning rate goes from "
        "and to a hundredth of `lr`; here they are shares of each part's own tokens, from and to 0."
    )
    draft.differs("Learned are the tokens of answers; theseus learns every token of a row.")
    if after:
        draft.differs(
            "theseus's adapters have an Adam without weight decay or clipping in some versions; here the phases share "
            "policy.optimizer."
        )
    _set_evaluations_and_checkpoints(draft)
    draft.set("data", {"train": "${sft.phases.0.data}", "validation": None})
    draft.set("sft.val_period", 0)
    draft.set("sft.val_at_start", False)
    return draft.finish(TOOL, _HARMLESS)


def _set_evaluations_and_checkpoints(draft: Draft) -> None:
    theirs = draft.theirs
    names = theirs.take_texts("eval.evaluations")
    if names and theirs.take_switch("training.evaluate", default=True):
        draft.to_decide.append(
            f"evaluate: theseus's evaluations, {', '.join(names)}, as a list of name and data each (docs/eval.md); to "
            f"train without them, set training.evaluate: false in theseus's file"
        )
    interval = theirs.take_count("logging.checkpoint_interval", "training.checkpoint_interval", default=1024, least=-1)
    draft.set("checkpointing.save_period", max(interval, 0))


def _stages(draft: Draft, part: str) -> list[_Stage]:
    """The stages of a part. One that the file does not write has theseus's default, and is said to have it."""
    theirs, key, of_data = draft.theirs, f"training.{part}_lora_tokens", f"training.{part}_lora_dataset"
    written, datasets = theirs.take(key), theirs.take(of_data)
    if written is None:
        what = f"{_PARTS[part]} tokens" + (" of fineweb" if datasets is None else "")
        draft.to_decide.append(f"{key}: the file does not set it, and theseus then trains {what}. Write [] for none")
        written = float(_PARTS[part])
    tokens = [
        number(f"{key}.{n}" if isinstance(written, list) else key, each, least=1)
        for n, each in enumerate(written if isinstance(written, list) else [written])
    ]
    datasets = _FINEWEB * len(tokens) if datasets is None else datasets
    if not isinstance(datasets, list) or len(datasets) != len(tokens):
        raise ValueError(
            f"{of_data}={datasets!r}: needs a list for each of the {len(tokens)} numbers of {key}. Correct one of them."
        )
    return [
        _Stage(part=part, tokens=each, mixture=mixture, key=f"{of_data}.{n}")
        for n, (each, mixture) in enumerate(zip(tokens, datasets, strict=True))
    ]


def _phases(
    draft: Draft, stages: Sequence[_Stage], shares: tuple[float, float], before: int = 0
) -> list[dict[str, Any]]:
    """The phases of one part. Its schedule begins with the first, whose shares are of the length of all."""
    warmup, decay = shares
    phases = list[dict[str, Any]]()
    for n, stage in enumerate(stages):
        train = "full" if stage.part == "pre" else "lora"
        schedule = {"schedule": "continue"} if n else {"warmup_pct": warmup, "decay_pct": decay}
        data = _mixture(draft, stage, f"sft.phases.{before + n}")
        name = f"{stage.part}_lora_{n + 1}"
        phases.append({"name": name, "train": train, "tokens": int(stage.tokens), **schedule, "data": data})
    return phases


def _mixture(draft: Draft, stage: _Stage, place: str) -> list[dict[str, Any]]:
    """A stage's datasets, whose rates add up to 1."""
    if stage.mixture in ([], {}, None):
        raise ValueError(f"{stage.key}={stage.mixture!r}: a stage needs a dataset. List mappings with name and rate.")
    is_list = isinstance(stage.mixture, list)
    datasets = []
    for n, sampling in enumerate(stage.mixture if is_list else [stage.mixture]):
        key = f"{stage.key}.{n}" if is_list else stage.key
        if not isinstance(sampling, Mapping) or not isinstance(sampling.get("name"), str):
            raise wrong(key, sampling, "a mapping with name and rate")
        name, suffix, style = sampling["name"], sampling.get("suffix"), sampling.get("style")
        draft.left_out |= {f"{key}.{k}": value for k, value in sampling.items() if k not in _OF_A_DATASET}
        said = f"style={style}: how theseus lays rows out; here they are packed, or padded, as policy says for all."
        if style is not None and said not in draft.differences:
            draft.differs(said)
        known = _DATASETS.get(name) if not suffix else None
        block = known or {"dataset_name": "openai_format", "data_path": OPEN}
        if known is None:
            draft.to_decide.append(
                f"{place}.data.{n}.data_path: a file of chats in place of theseus's dataset {name!r}"
                f"{f' ({suffix})' if suffix else ''}; or another dataset_name of docs/data.md"
            )
        rate = sampling.get("rate")
        datasets.append({**block, "rate": float(number(f"{key}.rate", 1 if rate is None else rate, above=0))})
    return datasets


def _shares(draft: Draft) -> tuple[float, float]:
    """Warm-up and decay as shares of all tokens: what the schedule reads, else what the trainer declares."""
    name = draft.theirs.take_text("optimization.schedule", default="wsd")
    if name != "wsd":
        draft.differs(
            f"optimization.schedule={name}: the phases have warm-up, a constant part and a linear decay here."
        )
    found = []
    for key, default in (("warmup_pct", 0.01), ("decay_pct", 0.1)):
        share = draft.theirs.take_number(f"optimization.{key}", f"training.{key}", default=default)
        if not 0 <= share <= 1:
            raise ValueError(
                f"{draft.theirs.written(f'optimization.{key}', f'training.{key}')}={share}: must lie in [0, 1]."
            )
        found.append(share)
    if sum(found) > 1:
        key = draft.theirs.written("optimization.warmup_pct", "training.warmup_pct")
        raise ValueError(
            f"{key}={found[0]}: warm-up and decay_pct={found[1]} are together longer than the run. Lower one of them."
        )
    return found[0], found[1]


def _set_model(draft: Draft, *, has_adapters: bool) -> None:
    theirs = draft.theirs
    model = theirs.take_text("architecture.backbone.weights", "architecture.huggingface.model")
    if draft.carry("policy.model_name", model) is None:
        draft.leave_open(
            "policy.model_name",
            "a local directory or a Hugging Face name; theseus builds the model of `architecture` anew, and training "
            "from nothing is not here",
        )
        theirs.mark("architecture")
    activation = "architecture.dtype.activation"
    set_precision(draft, {activation: theirs.take_text(activation, default="bfloat16")})
    block = theirs.take_mapping(_ADAPTER) or {}
    spec = spec_from_theseus(block, _ADAPTER) if has_adapters else None
    set_adapter(draft, None if spec is None else Translation(dialect=TOOL, key=_ADAPTER, spec=spec))


def _set_batches(draft: Draft) -> tuple[int, int]:
    """Rows of a step, and the longest row."""
    theirs = draft.theirs
    rows = theirs.take_count("training.batch_size", default=512)
    length = theirs.take_count("architecture.block_size", default=512, least=2)
    draft.set("policy.train_global_batch_size", rows)
    draft.set("policy.max_total_sequence_length", length)
    per_device = theirs.take_count("training.per_device_batch_size", default=-1, least=-1)
    if per_device == 0:
        raise ValueError("training.per_device_batch_size=0: must be at least 1, or -1 for automatic. Correct it.")
    if per_device < 0:
        draft.set("policy.sequence_packing", {"enabled": True, "train_mb_tokens": "auto"})
    else:
        draft.set("policy.train_micro_batch_size", per_device)
    return rows, length


def _set_optimizer(draft: Draft) -> None:
    """theseus's AdamW, which clips the gradient's norm at 1."""
    theirs = draft.theirs
    betas = [theirs.take_number(f"optimization.beta{n}", default=b, least=0, below=1) for n, b in ((1, 0.9), (2, 0.95))]
    decay = theirs.take_number("optimization.weight_decay", default=0.1, least=0)
    draft.set("policy.optimizer.kwargs.lr", theirs.take_number("optimization.lr", default=3e-4, least=0))
    draft.set("policy.optimizer.kwargs.weight_decay", decay)
    draft.set("policy.optimizer.kwargs.betas", betas)
    draft.set("policy.max_grad_norm", 1.0)
