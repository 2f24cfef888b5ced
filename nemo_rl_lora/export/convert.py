"""A checkpoint's adapter, or those of a whole run, to Hugging Face directories: merged models or PEFT adapters.

Contract: everything that can be refused is refused before anything is written. An output is made beside its place as
`tmp_export_<name>`, read back, flushed and renamed, so that it is whole or absent. Its export_report.json says what it
was made from, by which a finished one is known again. The same inputs and options give the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nemo_rl_lora.checkpoints.durable_files import (
    file_names,
    flush,
    flush_tree,
    is_unfinished,
    keep_what_others_wrote,
    make_unfinished,
    probe_directory,
    put_in_place,
    remove_unfinished,
)
from nemo_rl_lora.checkpoints.record import package_versions
from nemo_rl_lora.checkpoints.steps import STEP_PREFIX, step_directories
from nemo_rl_lora.export.inputs import (
    ADAPTER_FLAG,
    AdapterInput,
    Base,
    check_alone,
    find_adapter,
    fit_to_base,
    open_base,
)
from nemo_rl_lora.export.logits import compare_logits
from nemo_rl_lora.export.merged import (
    TMP_PREFIX,
    Adapter,
    Export,
    ExportError,
    PlannedTensor,
    Work,
    planned_shards,
    write_merged,
)
from nemo_rl_lora.export.surroundings import BASE_FILES, CODE, copy_files, known_files, write_config
from nemo_rl_lora.export.verify import READS_BACK_OTHERWISE, verify_merged
from nemo_rl_lora.lora.files import ADAPTER_CONFIG_FILE, ADAPTER_FILE, read_adapter, write_adapter
from nemo_rl_lora.tensors import DTYPES, INDEX_FILE, MAX_SHARD_BYTES, Shard, write_index

logger = logging.getLogger(__name__)

OUTPUT_FLAG = "--hf-ckpt-path"
REPORT_FILE = "export_report.json"
_OLD_PREFIX = f"{TMP_PREFIX}old_"  # of an earlier export's name, while the new one gets it
_SPARE_BYTES = 1 << 20  # configurations, index, report

Verification = Literal["none", "sampled", "full"]
Shards = Sequence[Shard[PlannedTensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """What a command line asks for."""

    adapter: Path
    output: Path
    model_name: str | None = None
    base_directory: Path | None = None
    adapter_only: bool = False
    all_steps: bool = False
    overwrite: bool = False
    dtype: str | None = None  # of tensors.COMPUTE_DTYPES; None: as the base stores each tensor
    max_shard_bytes: int = MAX_SHARD_BYTES
    verification: Verification = "sampled"
    verify_logits: bool = False


def export(request: ExportRequest) -> list[Export]:
    """Make every output that is asked for.

    ValueError, before anything is written, for a wrong input. With `all_steps` a step that cannot be exported fails by
    itself, and the others are made.
    """
    exports = _planned(request)
    works, base = _check(request, exports)
    if all(item.status == "failed" for item in exports):
        raise ValueError(exports[0].problem)
    if not works:
        return exports
    if base is not None and request.verify_logits:
        _refuse_logits_without_means(base, works)
    shards = () if base is None else planned_shards(base.tensors, request.dtype, request.max_shard_bytes)
    num_bytes = sum(shard.num_bytes for shard in shards) + _SPARE_BYTES if shards else 0
    probe_directory(works[0].export.output.parent, OUTPUT_FLAG, required_bytes=num_bytes * len(works))
    with contextlib.ExitStack() as leftovers:
        for work in works:
            leftovers.callback(remove_unfinished, work.export.temporary)
        if base is not None:
            _merge(request, base, shards, works)
        else:
            for work in works:
                _guarded(work, lambda work=work: _copy_adapter(work, request))
    return exports


def _planned(request: ExportRequest) -> list[Export]:
    if not request.all_steps:
        return [Export(source=request.adapter, output=request.output)]
    steps = step_directories(request.adapter)
    if not steps:
        raise ValueError(
            f"{ADAPTER_FLAG}={str(request.adapter)!r}: holds no {STEP_PREFIX}N directory, and --all converts every "
            "one of them. Name the directory of a run (checkpointing.checkpoint_dir), or drop --all."
        )
    return [Export(source=path, output=request.output / path.name) for _, path in steps]


def _check(request: ExportRequest, exports: Sequence[Export]) -> tuple[list[Work], Base | None]:
    """What can be made, and the base it needs. What cannot is noted."""
    base: Base | None = None
    works: list[Work] = []
    for item in exports:
        try:
            _refuse_place(request, item.output, item.temporary)
            adapter = find_adapter(item.source)
            if base is None and not request.adapter_only:
                base = open_base(request.model_name, request.base_directory, adapter)
            work = _check_one(request, item, adapter, base)
        except ValueError as error:
            item.status, item.problem = "failed", str(error)
        else:
            works += [work] if work is not None else []
    return works, base


def _check_one(request: ExportRequest, item: Export, adapter: AdapterInput, base: Base | None) -> Work | None:
    """None where the output is there already, made from the same inputs in the same way."""
    flag = f"{OUTPUT_FLAG}={str(item.output)!r}"
    inputs = [adapter.directory, *([base.directory] if base is not None else [])]
    if inside := [path for path in inputs if path.resolve().is_relative_to(item.output.resolve())]:
        raise ValueError(f"{flag}: holds {inside[0]}, which is read. Name another directory.")
    settings = {
        "mode": "adapter" if base is None else "merged",
        "adapter_sha256": adapter.sha256,
        "base_name": request.model_name if base is None else base.name,
        "base_digest": adapter.base_digest if base is None else base.digest,
        "dtype": None if request.dtype is None else DTYPES[request.dtype].stored,
        "max_shard_bytes": None if base is None else request.max_shard_bytes,
        "hf_config_overrides": dict(adapter.config_overrides),
        "verification": None if base is None else request.verification,
        "verify_logits": request.verify_logits,
    }
    if request.all_steps and not request.overwrite and item.output.is_dir():
        item.report = _finished_report(item.output, settings)
        item.status = "finished before"
        return None
    if base is None:
        check_alone(adapter)
        fitted = Adapter(modules={}, tensors={})
    else:
        fitted = Adapter.on_disk(adapter.weights_file, fit_to_base(adapter, base))
    return Work(export=item, adapter=adapter, fitted=fitted, settings=settings)


def _refuse_place(request: ExportRequest, output: Path, temporary: Path) -> None:
    try:
        exists, _ = (path.exists() for path in (output, output.with_name(f"{_OLD_PREFIX}{output.name}")))
    except OSError as error:
        raise ValueError(
            f"{OUTPUT_FLAG}={str(output)!r}: cannot be made ({error.strerror}). Name another directory."
        ) from error
    if os.path.lexists(temporary) and not is_unfinished(temporary):
        raise ValueError(
            f"{OUTPUT_FLAG}={str(output)!r}: is made in {temporary}, which is there and was not left by an export. "
            f"Move that away, or name another directory."
        )
    if not exists:
        return
    if not output.is_dir() or (request.overwrite and output.is_symlink()):
        problem = "is a file or a link. Name a directory that does not exist yet."
    elif not (request.overwrite or request.all_steps):
        problem = "exists already. Name another directory, or replace this one with --overwrite."
    elif any(output.iterdir()) and not (output / REPORT_FILE).is_file():
        problem = (
            f"exists already and has no {REPORT_FILE}, so it is no export and is not replaced. Remove it "
            "yourself, or name another directory."
        )
    else:
        return
    raise ValueError(f"{OUTPUT_FLAG}={str(output)!r}: {problem}")


def _finished_report(output: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The report of an output that is whole and was made like this. ValueError for any other."""
    report: dict[str, Any] = {}
    try:
        report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
        found = report["settings"]
        whole = all((output / file["name"]).stat().st_size == file["num_bytes"] for file in report["files"])
    except (OSError, ValueError, KeyError, TypeError):
        found, whole = {}, False
    different = [key for key in settings if found.get(key) != settings[key]]
    if different or not whole:
        why = f"was made with another {different[0]}" if whole else "is not whole"
        raise ValueError(f"{OUTPUT_FLAG}={str(output)!r}: exists already and {why}. Replace it with --overwrite.")
    return report


def _refuse_logits_without_means(base: Base, works: Sequence[Work]) -> None:
    if find_spec("peft") is None:
        raise ValueError("--verify-logits=True: needs the Python package peft. Install it (it is in the group dev).")
    for work in works:
        directory = work.adapter.tokenizer or base.directory
        if not (directory / "tokenizer_config.json").is_file():
            raise ValueError(
                f"--verify-logits=True: {directory} has no tokenizer to write prompts with. Drop the flag, or add the "
                "tokenizer's files."
            )


def _merge(request: ExportRequest, base: Base, shards: Shards, works: Sequence[Work]) -> None:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    base_bytes = sum(tensor.num_bytes for tensor in base.tensors.values())
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bar:

        def stage(name: str, num_bytes: int | None = base_bytes) -> Callable[[int], None]:
            for task in bar.task_ids:
                bar.remove_task(task)
            return partial(bar.advance, bar.add_task(name, total=num_bytes))

        try:
            for work in works:
                _make_temporary(work.export)
                _copy_surroundings(work, base, request, shards)
            write_merged(shards, works, stage("merging"))
        except OSError as error:  # a full disk, a base that went away: it concerns every output
            for work in works:
                work.export.problem = str(error)
        for work in works:
            _guarded(work, lambda work=work: _finish(request, base, shards, work, stage))


def _guarded(work: Work, make: Callable[[], None]) -> None:
    """A failure of one output is its own."""
    try:
        make()
        work.export.status = "written"
    except (ExportError, OSError, ValueError) as error:
        work.export.status, work.export.problem = "failed", str(error)


def _finish(
    request: ExportRequest, base: Base, shards: Shards, work: Work, stage: Callable[..., Callable[[int], None]]
) -> None:
    """Read an output back, report on it, and give it its name. `stage` shows what is done: a name, bytes to come."""
    directory, modules = work.export.temporary, work.fitted.modules
    if work.export.problem is not None:
        raise ExportError(work.export.problem)
    report: dict[str, Any] = {"settings": dict(work.settings), "base_source": base.description}
    report["merged_modules"] = len(modules)
    adapted_elements = sum(module.in_features * module.out_features for module in modules.values())
    if work.survival.whole:
        report["surviving_share"] = work.survival.share
        report["relative_rounding_error"] = work.survival.relative_error
    report["merged_dtypes"] = sorted({t.dtype for shard in shards for t in shard.tensors if t.name in modules})
    report["changed_fraction"] = sum(work.num_changed.values()) / adapted_elements
    if request.verification != "none":
        on_bytes = stage(f"verifying {work.export.output.name}")
        accuracy = verify_merged(work, shards, every_row=request.verification == "full", on_bytes=on_bytes)
        report["accuracy"] = {"rows": request.verification, **asdict(accuracy)}
    if request.verify_logits:
        stage("comparing logits", None)
        found = compare_logits(base.directory, work.adapter.directory, directory, work.adapter.config_overrides)
        report["logits"] = asdict(found)
        if not found.is_closer_than_base:
            raise ExportError(
                f"the merged model is as far from base + adapter (mean |logit difference| {found.mean_abs_error:.2g}) "
                f"as the base itself is ({found.adapter_effect:.2g}): rounding lost the adapter. Use --dtype float32."
            )
    report["warnings"] = _warnings(work, base)
    report["files"] = [asdict(file) for file in work.files]
    _publish(work.export, report)


def _warnings(work: Work, base: Base) -> list[str]:
    modules, warnings = work.fitted.modules, _left_out(work.adapter, base)
    unchanged = sorted(name for name in modules if work.num_changed.get(name, 0) == 0)
    if len(unchanged) == len(modules):
        warnings.append(
            "the merge changes nothing: every weight is the base's, because the adapter's B is zero or its update is "
            "smaller than what the dtype resolves. Take a later step, or a wider --dtype."
        )
    elif unchanged:
        warnings.append(f"the merge changes nothing in {len(unchanged)} of its modules, {unchanged[0]} among them.")
    if work.adapter.base_digest is None:
        warnings.append("the adapter does not record its base, so the base was checked by its names and shapes alone.")
        if work.adapter.base_name not in (None, base.name):
            warnings.append(f"by its adapter_config.json the adapter was made for {work.adapter.base_name}.")
    return warnings


def _left_out(adapter: AdapterInput, base: Base | None) -> list[str]:
    warnings = list[str]()
    if names := adapter.not_of_a_tokenizer:
        warnings.append(f"{adapter.tokenizer} holds {', '.join(names)}, no files of a tokenizer, which are left out.")
    if base is not None and CODE in (dict(base.config) | dict(adapter.config_overrides)):
        warnings.append("the base's config.json names Python code of its own (auto_map), which is not exported.")
    return warnings


def _copy_surroundings(work: Work, base: Base, request: ExportRequest, shards: Shards) -> None:
    """Configuration, generation configuration and tokenizer: the base's, the tokenizer as the run used it."""
    target = work.export.temporary
    copy_files(base.directory, known_files(base.directory, *BASE_FILES), target)
    write_config(target, {**base.config, **work.adapter.config_overrides}, request.dtype)
    _copy_runs_tokenizer(work.adapter, target)
    write_index(target, shards)


def _copy_runs_tokenizer(adapter: AdapterInput, target: Path) -> None:
    if adapter.tokenizer is not None:
        copy_files(adapter.tokenizer, known_files(adapter.tokenizer), target)


def _copy_adapter(work: Work, request: ExportRequest) -> None:
    """The adapter's tensors, bit for bit, its configuration, and the run's tokenizer."""
    _make_temporary(work.export)
    target, adapter = work.export.temporary, work.adapter
    _copy_runs_tokenizer(adapter, target)
    config, base = dict(adapter.peft_config), adapter.base(request.model_name)
    if base is not None:
        config["base_model_name_or_path"] = base.name
    tensors, _ = read_adapter(adapter.directory)
    write_adapter(target, tensors, config, base)
    path = target / ADAPTER_FILE
    if adapter.weights_file.name == ADAPTER_FILE:  # in its own dtypes and bytes
        shutil.copyfile(adapter.weights_file, path)
    found, _ = read_adapter(target, expected=tensors.keys())
    if not all(torch.equal(found[name], tensor) for name, tensor in tensors.items()):
        raise ExportError(f"{path}: {READS_BACK_OTHERWISE}")
    modules = {name.rsplit(".lora_", 1)[0] for name in adapter.tensors}
    files = [{"name": ADAPTER_FILE, "num_bytes": path.stat().st_size}]
    _publish(
        work.export,
        {
            "settings": dict(work.settings),
            "modules": len(modules),
            "warnings": _left_out(adapter, None),
            "files": files,
        },
    )


def _make_temporary(export: Export) -> None:
    if export.temporary.exists():
        logger.warning(f"removing {export.temporary}, left by an export that was ended")
        remove_unfinished(export.temporary)
    make_unfinished(export.temporary)


def _publish(export: Export, report: dict[str, Any]) -> None:
    """Write the report, flush, and give the directory its name."""
    found = package_versions()
    versions = {name: found[name] for name in ("nemo-rl-lora", "torch", "safetensors")}
    written = [*file_names(export.temporary), REPORT_FILE]
    export.report = {"format_version": 1, **report, "written": written, "versions": versions}
    text = json.dumps(export.report, indent=2, allow_nan=False)
    (export.temporary / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    flush_tree(export.temporary)
    if export.output.is_dir():
        keep_what_others_wrote(export.output, _written(export.output))
    put_in_place(export.temporary, export.output, _OLD_PREFIX)
    flush(export.output.parent)


def _written(output: Path) -> list[str]:
    """The files that an earlier export wrote; where its report does not list them, those of known names."""
    report: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        report = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    known = known_files(output, *BASE_FILES, INDEX_FILE, ADAPTER_CONFIG_FILE)
    names = [
        *(path.relative_to(output).as_posix() for path in known),
        *(file["name"] for file in report.get("files", ())),
    ]
    return report.get("written", [*names, REPORT_FILE])
