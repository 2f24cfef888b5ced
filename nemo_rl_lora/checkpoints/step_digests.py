"""What a step left, as digests: enough to say of two runs whether they are the same one, and where they part.

Contract: every tensor that a checkpoint of this step would hold (adapter, moments, a copied reference), bit for bit,
and the token ids that the step drew. Two runs of the same command on the same machine write the same lines.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from nemo_rl_lora.tensors import file_tensors, tensors_digest

DIGESTS_FILE = "digests.jsonl"
_DIGITS = 16


def token_digest(rows: Iterable[Sequence[int]]) -> str:
    """Of token ids, row by row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{list(row)}\n".encode())
    return digest.hexdigest()[:_DIGITS]


def tensor_digests(write: Callable[[Path], None], parent: Path) -> dict[str, str]:
    """`<file>: <tensor>` -> digest, of what `write` writes into a directory, which is then removed."""
    with tempfile.TemporaryDirectory(dir=parent, prefix="tmp_digests_") as name:
        write(Path(name))
        return stored_digests(Path(name))


def stored_digests(directory: Path) -> dict[str, str]:
    """The same of what lies in a directory, such as `step_N/policy`."""
    found: dict[str, str] = {}
    for path in sorted(directory.rglob("*.safetensors")):
        for name, tensor in file_tensors(path).items():
            digest = tensors_digest({name: tensor}, whole=True)
            found[f"{path.relative_to(directory)}: {name}"] = digest[:_DIGITS]
    return found
