"""What base weights are, whichever files they stand in: a digest over names, shapes, dtypes and sampled bytes.

Contract: the digest is that of the tensors of a Hugging Face directory, sorted by name, so it does not depend on how
they are sharded, nor on where the directory is. Only headers and samples are read (tensors.py has the rule), without
torch. Checkpoints record the digest, so its rule stays.
"""

from __future__ import annotations

from pathlib import Path

from nemo_rl_lora.tensors import stored_tensors, tensors_digest


def base_digest(directory: Path) -> str | None:
    """SHA-256 of the weights of a Hugging Face directory; None where they are not in safetensors files."""
    tensors = stored_tensors(directory)
    return tensors_digest(tensors) if tensors else None
