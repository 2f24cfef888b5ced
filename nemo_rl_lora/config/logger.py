"""`logger`: the log directory and where metrics are shown beside it. No package is imported here.

Loading accepts every sink; whether its package is installed is found out when the run starts (run/metrics.py).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from nemo_rl_lora.config.base import NOT_BLANK, Section, matching


class WandbConfig(Section):
    """`logger.wandb`: used where `logger.wandb_enabled`."""

    project: str | None = None
    """The project that the run appears in."""

    name: str | None = None
    """The run's name."""

    entity: str | None = None
    """The user or team that owns the project; null is the account's own."""


class SwanlabConfig(Section):
    """`logger.swanlab`: used where `logger.swanlab_enabled`."""

    project: str | None = None
    """The project that the run appears in."""

    name: str | None = None
    """The run's name."""


class TensorboardConfig(Section):
    """`logger.tensorboard`: used where `logger.tensorboard_enabled`."""

    log_dir: str | None = None
    """Where event files go, relative to the run's log directory; null is `tensorboard`."""


class MlflowConfig(Section):
    """`logger.mlflow`: used where `logger.mlflow_enabled`."""

    experiment_name: str | None = None
    """The experiment that the run appears in."""

    run_name: str | None = None
    """The run's name."""

    tracking_uri: str | None = None
    """Address of the tracking server; null is MLflow's own default."""


class GpuMonitoringConfig(Section):
    """`logger.gpu_monitoring`: used where `logger.monitor_gpus` and there are GPUs."""

    collection_interval: Annotated[float, Field(gt=0)] = 10
    """Seconds between two samples of memory and utilization."""

    flush_interval: Annotated[float, Field(gt=0)] = 10
    """Seconds between two records of their mean."""


class PlotConfig(Section):
    """`logger.plot`: curves.png in the log directory."""

    enabled: bool = True
    """Draw the curves of the run."""

    period: Annotated[int, Field(ge=0)] = 10
    """Draw again after every this many steps, and at the end; 0 draws only at the end."""


class RolloutSamplesConfig(Section):
    """`logger.rollout_samples`: rollouts.md in the log directory, some completions to read."""

    num_per_step: Annotated[int, Field(ge=0)] = 2
    """Completions written for a step; 0 writes none."""

    period: Annotated[int, Field(ge=1)] = 1
    """Write in every this many steps."""

    max_megabytes: Annotated[float, Field(gt=0)] = 5.0
    """When the file has this size, no more is written."""


class LoggerConfig(Section):
    log_dir: Annotated[str, matching(NOT_BLANK, "is empty. Name a directory.")] = "logs"
    """Runs log into `log_dir/exp_NNN`, the next free number."""

    tensorboard_enabled: bool = False
    """Write tensorboard event files."""

    wandb_enabled: bool = False
    """Log to Weights & Biases (needs the extra `wandb`)."""

    mlflow_enabled: bool = False
    """Log to MLflow (needs the package `mlflow`)."""

    swanlab_enabled: bool = False
    """Log to SwanLab (needs the package `swanlab`)."""

    monitor_gpus: bool = True
    """Record memory and utilization of the GPUs of this machine. Without a GPU there is nothing to record."""

    peak_tflops: float | None = Field(default=None, gt=0)
    """What a training device computes at most, in TFLOP/s, of which the metric `mfu` is the share; null: as its maker
    publishes it for `policy.precision`, where the GPU is known. No NeMo RL key."""

    record_digests: bool = False
    """Write digests.jsonl: after every step, the digest of each tensor that a checkpoint would hold and of the token
    ids, for `tools/verify_resume.py`. It takes about as long as a save without its flush to disk. No NeMo RL key."""

    num_val_samples_to_print: Annotated[int, Field(ge=0)] = 0
    """Completions of each validation that the console shows."""

    tensorboard: TensorboardConfig = TensorboardConfig()
    wandb: WandbConfig = WandbConfig()
    mlflow: MlflowConfig = MlflowConfig()
    swanlab: SwanlabConfig = SwanlabConfig()
    gpu_monitoring: GpuMonitoringConfig = GpuMonitoringConfig()
    plot: PlotConfig = PlotConfig()
    rollout_samples: RolloutSamplesConfig = RolloutSamplesConfig()
