"""A theseus file with phases (`training/pre_lora_tokens`, `training/post_lora_tokens`) as a run of SFT in phases.

theseus trains all weights on the pre-LoRA stages, then freezes them and trains adapters on the post-LoRA stages. Its
learning rate (theseus/training/schedules/wsd.py) rises over a share of the tokens, stays, and falls over another share,
and begins anew with the adapters, whose optimizer is a new one. There the shares are of the tokens of both parts, so
that neither part gets to the end of its schedule; here each part has the whole schedule, as shares of its own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl_lora.config.run_draft import OPEN, Draft, RunTranslation, Theirs, adapter_of, set_adapter, steps_of
from nemo_rl_lora.data.catalog import DATASETS

TOOL = "theseus"
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
    "training.checkpoint_interval": None,
    "architecture.vram_calib_factor": None,
    "architecture.backbone.implementation": None,
    "architecture.dtype.*": None,
    "optimization.constant_pct": None,
}
_FINEWEB = [[{"name": "fineweb", "rate": 1, "style": "PMD"}]]
# theseus's datasets that are here, by their rows; its others have no counterpart.
_DATASETS: dict[str, dict[str, Any]] = {
    "squad": {"dataset_name": "squad"},
    "alpaca": {"dataset_name": "alpaca", "data_path": "tatsu-lab/alpaca"},
    "smoltalk": {"dataset_name": "openai_format", "data_path": "HuggingFaceTB/smoltalk", "subset": "all"},
}
assert {block["dataset_name"] for block in _DATASETS.values()} <= DATASETS.keys()


def is_theseus(document: Mapping[str, Any]) -> bool:
    """Whether a document is a whole file of theseus, whose keys may be written with slashes."""
    nested = Theirs(document).document
    training, others = nested.get("training"), ("architecture", "optimization")
    return isinstance(training, Mapping) and any(isinstance(nested.get(section), Mapping) for section in others)


def theseus_run(document: Mapping[str, Any]) -> RunTranslation:
    """The run of the file. ValueError where its stages, or its adapter, have no counterpart."""
    theirs = Theirs(document)
    draft = Draft(theirs)
    stages = [("full", *stage) for stage in _stages(theirs, "pre")]
    adapters = [("lora", *stage) for stage in _stages(theirs, "post")]
    if not stages and not adapters:
        raise ValueError(
            "training.pre_lora_tokens=[]: training.post_lora_tokens is empty as well, so that nothing is trained. Give "
            "one of them a number of tokens."
        )
    _set_model(draft, has_adapters=bool(adapters))
    rows, length = _set_batches(draft)
    _set_optimizer(draft)
    shares = _shares(draft)
    draft.set("sft.phases", [*_phases(draft, stages, shares), *_phases(draft, adapters, shares, len(stages))])
    num_steps = [str(steps_of(tokens, rows * length)) for _, tokens, _ in (*stages, *adapters)]
    draft.differs(
        f"Tokens are those of the rows here. theseus counts {rows} x {length} a step, padding too: "
        f"{', '.join(num_steps)} steps (write `steps` in place of `tokens` for so many)."
    )
    draft.differs(
        "theseus takes the shares of warm-up and decay from the tokens of both parts, and its learning rate goes from "
        "and to a hundredth of `lr`; here they are shares of each part's own tokens, from and to 0."
    )
    draft.differs("Learned are the tokens of answers; theseus learns every token of a row.")
    if adapters:
        draft.differs(
            "theseus's adapters have an Adam without weight decay or clipping in some versions; here the phases share "
            "policy.optimizer."
        )
    draft.set("data", {"train": "${sft.phases.0.data}", "validation": None})
    draft.set("sft.val_period", 0)
    draft.set("sft.val_at_start", False)
    return draft.finish(TOOL, _HARMLESS)


def _stages(theirs: Theirs, part: str) -> list[tuple[float, Any]]:
    """Tokens and datasets of each stage before or after the adapters come (`pre` or `post`)."""
    default = [1_000_000_000] if part == "pre" else [100_000_000]
    if not {"pre_lora_tokens", "post_lora_tokens"} & set(theirs.document["training"]):
        raise ValueError(
            "training.pre_lora_tokens=<absent>: what trains adapters is written in this job's code. Write "
            "training.pre_lora_tokens and training.post_lora_tokens, lists with the tokens of each stage, and "
            "training.pre_lora_dataset and training.post_lora_dataset."
        )
    key = f"training.{part}_lora_tokens"
    tokens = theirs.take(key, default=default)
    tokens = tokens if isinstance(tokens, list) else [tokens]
    if any(isinstance(each, bool) or not isinstance(each, int | float) or each <= 0 for each in tokens):
        raise ValueError(f"{key}={tokens!r}: must be a list of numbers above 0. Correct it.")
    datasets = theirs.take(f"training.{part}_lora_dataset", default=_FINEWEB * len(tokens))
    if not isinstance(datasets, list) or len(datasets) != len(tokens):
        raise ValueError(
            f"training.{part}_lora_dataset={datasets!r}: needs a list for each of the {len(tokens)} numbers of {key}. "
            f"Correct one of them."
        )
    return list(zip(tokens, datasets, strict=True))


def _phases(
    draft: Draft, stages: Sequence[tuple[str, float, Any]], shares: tuple[float, float], before: int = 0
) -> list[dict[str, Any]]:
    """The phases of one part. Its schedule begins with the first, whose shares are of the length of all."""
    warmup, decay = shares
    phases = list[dict[str, Any]]()
    for number, (train, tokens, mixture) in enumerate(stages):
        name = f"{'pre' if train == 'full' else 'post'}_lora_{number + 1}"
        schedule = {"schedule": "continue"} if number else {"warmup_pct": warmup, "decay_pct": decay}
        data = _mixture(draft, mixture, f"sft.phases.{before + number}")
        phases.append({"name": name, "train": train, "tokens": int(tokens), **schedule, "data": data})
    return phases


def _mixture(draft: Draft, mixture: Any, place: str) -> list[dict[str, Any]]:
    """A stage's datasets, whose rates add up to 1."""
    mixture = mixture if isinstance(mixture, list) else [mixture]
    datasets = []
    for number, sampling in enumerate(mixture):
        if not isinstance(sampling, Mapping) or "name" not in sampling:
            raise ValueError(f"{place}.data.{number}={sampling!r}: must be a mapping with name and rate. Correct it.")
        name, suffix = str(sampling["name"]), sampling.get("suffix")
        known = _DATASETS.get(name) if not suffix else None
        block = known or {"dataset_name": "openai_format", "data_path": OPEN}
        if known is None:
            draft.to_decide.append(
                f"{place}.data.{number}.data_path: a file of chats in place of theseus's dataset {name!r}"
                f"{f' ({suffix})' if suffix else ''}; or another dataset_name of docs/data.md"
            )
        datasets.append({**block, "rate": float(sampling.get("rate", 1))})
    return datasets


def _shares(draft: Draft) -> tuple[float, float]:
    """Warm-up and decay as shares of all tokens: what the schedule reads, else what the trainer declares."""
    name = draft.theirs.take("optimization.schedule", default="wsd")
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
    return found[0], found[1]


def _set_model(draft: Draft, *, has_adapters: bool) -> None:
    theirs = draft.theirs
    if draft.carry("policy.model_name", "architecture.backbone.weights", "architecture.huggingface.model") is None:
        draft.leave_open(
            "policy.model_name",
            "a local directory or a Hugging Face name; theseus builds the model of `architecture` anew, and training "
            "from nothing is not here",
        )
        theirs.mark("architecture")
    found = adapter_of(theirs, "optimization.lora", is_on=has_adapters) if theirs.has("optimization.lora") else None
    if found is None and has_adapters:
        raise ValueError("optimization.lora=<absent>: the post-LoRA stages train an adapter. Write its rank.")
    set_adapter(draft, found)


def _set_batches(draft: Draft) -> tuple[int, int]:
    """Rows of a step, and the longest row."""
    theirs = draft.theirs
    rows = theirs.take_number("training.batch_size", default=512)
    length = theirs.take_number("architecture.block_size", default=512)
    draft.set("policy.train_global_batch_size", rows)
    draft.set("policy.max_total_sequence_length", length)
    per_device = theirs.take_number("training.per_device_batch_size", default=-1)
    if per_device < 0:
        draft.set("policy.sequence_packing", {"enabled": True, "train_mb_tokens": "auto"})
    else:
        draft.set("policy.train_micro_batch_size", per_device)
    return rows, length


def _set_optimizer(draft: Draft) -> None:
    """theseus's AdamW, which clips the gradient's norm at 1."""
    draft.carry("policy.optimizer.kwargs.lr", "optimization.lr", default=3e-4)
    draft.carry("policy.optimizer.kwargs.weight_decay", "optimization.weight_decay", default=0.1)
    betas = [draft.theirs.take_number(f"optimization.beta{n}", default=default) for n, default in ((1, 0.9), (2, 0.95))]
    draft.set("policy.optimizer.kwargs.betas", betas)
    draft.set("policy.max_grad_norm", 1.0)
