"""Where a file is read by another process of this machine without a disk in between."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_PATH = Path("/dev/shm")


def shared_memory(num_bytes: int = 0) -> Path | None:
    """The directory whose files lie in memory, where it has so much room; None: the usual one for temporary files."""
    if not os.access(_PATH, os.W_OK) or shutil.disk_usage(_PATH).free < num_bytes:
        return None
    return _PATH
