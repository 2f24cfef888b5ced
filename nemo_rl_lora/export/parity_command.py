"""The certificate of merging, from the command line: a checkpoint's adapter to JSON, a page and a picture."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_rl_lora.run.control import EXIT_OK

if TYPE_CHECKING:
    from nemo_rl_lora.export.parity import Certificate


def declare(parser: argparse.ArgumentParser) -> None:
    """The checkpoint, and where the certificate goes."""
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--model", default=None, help="the base; by default the one that adapter_config.json names")


def main(arguments: argparse.Namespace) -> int:
    """0, with the verdict printed; ValueError where the checkpoint holds no adapter of its base."""
    import torch

    from nemo_rl_lora.checkpoints.durable_files import probe_directory
    from nemo_rl_lora.export.parity import certify
    from nemo_rl_lora.lora.files import read_adapter
    from nemo_rl_lora.lora.fit import adapter_directory, fit_adapter, refuse_not_finite
    from nemo_rl_lora.models.load import load_model
    from nemo_rl_lora.models.shapes import read_model_shapes
    from nemo_rl_lora.models.source import load_tokenizer, resolve_model

    flag, output = f"--checkpoint={str(arguments.checkpoint)!r}", arguments.output or arguments.checkpoint / "parity"
    try:
        tensors, peft_config = read_adapter(adapter_directory(arguments.checkpoint))
        refuse_not_finite(tensors, "Take another checkpoint.")
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    name = arguments.model or peft_config.get("base_model_name_or_path") or ""
    source = resolve_model(name, "--model")
    shapes = read_model_shapes(source.path, {})
    try:
        _, adapted = fit_adapter(
            tensors, peft_config, shapes.linears, tied_head=shapes.has_tied_head, model_name=name, model_key="--model"
        )
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from error
    probe_directory(output, "--output")
    model = load_model(source.path, dtype=torch.float32, config_overrides={})
    certificate = certify(model, load_tokenizer(source, None, None), tensors, adapted)
    (output / "certificate.json").write_text(json.dumps(asdict(certificate), indent=1) + "\n")
    draw(certificate, output / "certificate.png")
    (output / "certificate.md").write_text(page(certificate, arguments.checkpoint, name))
    sys.stdout.write(f"{certificate.verdict}: {certificate.reason}\n{output / 'certificate.md'}\n")
    return EXIT_OK


def page(certificate: Certificate, checkpoint: Path, model: str) -> str:
    """The certificate to read."""
    lines = [
        f"# Parity of {checkpoint.name} on {model}",
        "",
        f"**{certificate.verdict}**: {certificate.reason}.",
        "",
        "![share of the update that survives, and errors of logprobs](certificate.png)",
        "",
        f"Distance from the model merged and computed in fp32, over {certificate.num_tokens} tokens of greedy answers:",
        "",
        "| computed as | mean KL | mean abs. logprob error | largest |",
        "|---|---|---|---|",
        *(
            f"| {name} | {d.mean_kl:.2e} | {d.mean_abs_logprob_error:.2e} | {d.max_abs_logprob_error:.2e} |"
            for name, d in certificate.distances.items()
        ),
        "",
        "Share of the update left in weights merged in bf16, by module: the least ten.",
        "",
        "| module | share left | relative error | elements changed |",
        "|---|---|---|---|",
        *(
            f"| {layer.module} | {layer.surviving_share:.1%} | {layer.relative_error:.2f} | {layer.changed_share:.1%} |"
            for layer in sorted(certificate.layers, key=lambda layer: layer.surviving_share)[:10]
        ),
    ]
    return "\n".join(lines) + "\n"


def draw(certificate: Certificate, path: Path) -> None:
    """Left: what survives of each module's update. Right: errors of the tokens' logprobs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    kinds: dict[str, list[float]] = {}
    for layer in certificate.layers:
        kinds.setdefault(layer.module.rpartition(".")[2], []).append(layer.surviving_share)
    for kind, shares in kinds.items():
        left.plot(range(len(shares)), shares, marker=".", label=kind)
    left.set(xlabel="layer", ylabel="share of the update left in bf16", ylim=(0, None))
    left.legend(fontsize=7)
    errors = {name: certificate.logprob_errors[name] for name in ("split_bf16", "merged_bf16")}
    right.hist(list(errors.values()), bins=40, label=list(errors))
    right.set(xlabel="logprob - logprob in fp32", ylabel="tokens")
    right.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
