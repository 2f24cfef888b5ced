"""Memory and utilization of this machine's GPUs, sampled in the background.

Contract: a daemon thread asks `nvidia-smi` every `collection_interval` seconds and hands the means on every
`flush_interval` seconds. Without a GPU nothing is started. A sample that fails is skipped. It needs no CUDA
context and no package.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from nemo_rl_lora.config.logger import GpuMonitoringConfig

logger = logging.getLogger(__name__)

Sample = dict[str, float]
_QUERY_SECONDS = 10


class GpuMonitor:
    """The sampling thread. `record` is called from that thread."""

    def __init__(
        self,
        config: GpuMonitoringConfig,
        record: Callable[[Mapping[str, float]], None],
        sample: Callable[[], Sample] | None = None,
    ) -> None:
        self._config = config
        self._record = record
        self._sample = sample or sample_gpus
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop sampling; what was sampled since the last record is recorded."""
        self._stop.set()
        self._thread.join(timeout=2 * _QUERY_SECONDS)

    def _run(self) -> None:
        samples: list[Sample] = []
        flushed = time.monotonic()
        while not self._stop.wait(self._config.collection_interval):
            try:
                samples.append(self._sample())
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                logger.debug(f"no GPU sample: {error}")
            if samples and time.monotonic() - flushed >= self._config.flush_interval:
                self._record(mean_of(samples))
                samples, flushed = [], time.monotonic()
        if samples:
            self._record(mean_of(samples))


def has_gpus() -> bool:
    """Whether `nvidia-smi` is here and lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    try:
        return bool(sample_gpus())
    except (OSError, ValueError, subprocess.SubprocessError):
        return False


def sample_gpus() -> Sample:
    """`node.0.gpu.<index>.mem_gb` and `.util` (percent) now."""
    query = ["nvidia-smi", "--query-gpu=index,memory.used,utilization.gpu", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=_QUERY_SECONDS)
    return parse_query(answer.stdout)


def parse_query(text: str) -> Sample:
    """Lines of `index, MiB used, percent busy`."""
    sample: Sample = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        index, mebibytes, percent = (part.strip() for part in line.split(","))
        sample[f"node.0.gpu.{index}.mem_gb"] = float(mebibytes) / 1024
        sample[f"node.0.gpu.{index}.util"] = float(percent)
    return sample


def mean_of(samples: Sequence[Sample]) -> Sample:
    """The mean of each name over the samples that have it."""
    names = {name for sample in samples for name in sample}
    values = {name: [sample[name] for sample in samples if name in sample] for name in sorted(names)}
    return {name: sum(found) / len(found) for name, found in values.items()}
