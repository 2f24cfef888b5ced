"""How well a step uses its devices: tokens, arithmetic and memory, by training process.

Contract: a process trains on one device, and on a CPU a process counts as one; GPUs that only sample do not count.
Model FLOP utilisation (MFU) is the arithmetic of training (models/flops.py) over the seconds of training alone, as a
share of the device's peak: what a step spends on sampling, rewards and log-probabilities is in neither.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nemo_rl_lora.models.flops import FlopRates
from nemo_rl_lora.types import StepOutput

# TFLOP/s as NVIDIA publishes them, without sparsity: bf16 with sums in fp32, and fp32 (not TF32). The first pattern
# that a name holds counts; variants with other clocks (laptops', 4090 D) are none of these. Sources, some of which give
# bf16 with sparsity, which is twice as much: the data sheets of the H100 (SXM 1,979, PCIe 1,513, NVL 1,671) and of the
# H200 (SXM 1,979, NVL 1,671); of GB200 NVL72 (72 GPUs: 360 PFLOP/s bf16, 5,760 TFLOP/s fp32) and HGX B200 (8 GPUs: 36
# PFLOP/s, 600 TFLOP/s); those of A100, A30, A10, L40S, L40 and L4; of GeForce cards, the appendices of the white papers
# on the Ada and the RTX Blackwell architecture (bf16 with fp32 accumulate).
_PEAKS = (
    (r"\bH100 PCIe\b", 756.5, 51.2),
    (r"\bH[12]00 NVL\b", 835.5, 60.0),
    (r"\b(H100|H200|GH200)\b", 989.5, 67.0),
    (r"\bGB200\b", 2500.0, 80.0),
    (r"\bB200\b", 2250.0, 75.0),
    (r"\bA100\b", 312.0, 19.5),
    (r"\bA30\b", 165.0, 10.3),
    (r"\bA10\b", 125.0, 31.2),
    (r"\bL40S\b", 362.0, 91.6),
    (r"\bL40\b", 181.0, 90.5),
    (r"\bL4\b", 121.0, 30.3),
    (r"RTX 4090$", 165.2, 82.6),
    (r"RTX 5090$", 209.5, 104.8),
)


def published_peak(gpu_name: str | None, precision: str) -> float | None:
    """The dense TFLOP/s of a GPU in a `policy.precision`, by torch's name of it; None where that is not known."""
    if gpu_name is None or " MIG " in gpu_name:  # a part of a GPU has a part of its peak
        return None
    for pattern, bfloat16, float32 in _PEAKS:
        if re.search(pattern, gpu_name):
            return {"bfloat16": bfloat16, "float32": float32}[precision]
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Utilization:
    """What the metrics of a run's steps are measured by."""

    num_processes: int  # that train
    rates: FlopRates | None  # None: the model's arithmetic is not known
    peak_tflops: float | None  # of a device; None: not known

    def metrics(
        self, outputs: Sequence[StepOutput], *, num_tokens: float, step_seconds: float, training_seconds: float
    ) -> dict[str, float]:
        """Of a step that drew `num_tokens`, and whose optimizer steps took `training_seconds` of its time."""
        found = {"tokens_per_second_per_gpu": num_tokens / step_seconds / self.num_processes}
        if self.rates is not None:
            tflop = sum(map(self.rates.of_step, outputs)) / 1e12
            found["model_tflops_per_second_per_gpu"] = tflop / training_seconds / self.num_processes
            if self.peak_tflops is not None:
                found["mfu"] = found["model_tflops_per_second_per_gpu"] / self.peak_tflops
        peaks = [output.peak_gpu_gib for output in outputs if output.peak_gpu_gib is not None]
        return found | ({"peak_gpu_gib": max(peaks)} if peaks else {})
