"""Memory and utilization of this machine's GPUs, sampled in the background.

Contract: a daemon thread asks NVIDIA's management library (NVML) every `collection_interval` seconds and hands the
means on every `flush_interval` seconds. Without a GPU nothing is started. A sample that fails is skipped. It needs no
CUDA context.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_rl_lora.config.logger import GpuMonitoringConfig

logger = logging.getLogger(__name__)

Sample = dict[str, float]
_CLOSE_SECONDS = 20


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
        self._thread.join(timeout=_CLOSE_SECONDS)

    def _run(self) -> None:
        samples: list[Sample] = []
        flushed = time.monotonic()
        while not self._stop.wait(self._config.collection_interval):
            if sample := self._sample():
                samples.append(sample)
            if samples and time.monotonic() - flushed >= self._config.flush_interval:
                self._record(mean_of(samples))
                samples, flushed = [], time.monotonic()
        if samples:
            self._record(mean_of(samples))


def sample_gpus() -> Sample:
    """`node.0.gpu.<index>.mem_gb` (GiB) and `.util` (percent) now; empty without a GPU, or where its driver fails."""
    import pynvml

    sample: Sample = {}
    try:
        pynvml.nvmlInit()
        for index in range(pynvml.nvmlDeviceGetCount()):
            gpu = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory: Any = pynvml.nvmlDeviceGetMemoryInfo(gpu, version=pynvml.nvmlMemory_v2)  # without what is reserved
            sample[f"node.0.gpu.{index}.mem_gb"] = memory.used / 1024**3
            sample[f"node.0.gpu.{index}.util"] = float(pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu)
        pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        logger.debug(f"no GPU sample: {error}")
        return {}
    return sample


def mean_of(samples: Sequence[Sample]) -> Sample:
    """The mean of each name over the samples that have it."""
    names = {name for sample in samples for name in sample}
    values = {name: [sample[name] for sample in samples if name in sample] for name in sorted(names)}
    return {name: sum(found) / len(found) for name, found in values.items()}
