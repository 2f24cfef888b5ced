"""Starting a run again that lost a training process, a node or its engine: `cluster.max_restarts` times.

Contract: the next attempt goes on from the newest step that the run saved, as if its command had been given again;
where it saved none, from where the run began. Each attempt has a log directory of its own, as every start has. A loss
while the first attempt is still being put together ends the run.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from nemo_rl_lora.config.errors import ConfigError
from nemo_rl_lora.config.master import MasterConfig
from nemo_rl_lora.distributed.lost import ProcessesLost
from nemo_rl_lora.generation.protocol import GenerationFailed
from nemo_rl_lora.run.control import RunFailedError, RunLostError, StopRequest
from nemo_rl_lora.run.metrics import RUN_LOG_FILE, RunLog
from nemo_rl_lora.run.preflight import Start, check_start

logger = logging.getLogger(__name__)

LOSSES = (ProcessesLost, GenerationFailed, ConfigError)


class Restarts:
    """The restarts of a run so far, and what its next attempt starts from."""

    def __init__(self, config: MasterConfig, command: str | None, started: float | None = None) -> None:
        """`command` continues the run from its newest checkpoint. `started`: when the run's process did; None: now."""
        self.config, self._command = config, command
        self.started = time.monotonic() if started is None else started
        self.lines: list[str] = []  # one for each restart
        self._max = config.cluster.max_restarts
        self._saved: Path | None = None
        self._log_path: Path | None = None

    def start(self) -> Start:
        """Everything that can be known of the next attempt without weights, as for any start."""
        try:
            return check_start(self.config)
        except ValueError as error:
            if not self.lines:
                raise
            raise RunFailedError(self._cannot(error), self._log_path) from error

    def lost(self, error: Exception, start: Start, num_steps: int | None, stop: StopRequest) -> RunLostError | None:
        """What ends this attempt after this error; None: the error itself. `num_steps`: complete ones; None: the
        attempt was still being put together."""
        if num_steps is None and not self.lines:
            return None
        if isinstance(error, ConfigError):  # the cluster has not what it had at the first start
            return RunLostError(self._cannot(error), starts_again=False)
        self._remember(start.checkpointer.saved)
        reason = " ".join(str(error).split())
        if num_steps is not None:
            of_all = "" if start.phase is not None else f" of {start.num_steps}"
            reason = f"{reason} {num_steps}{of_all} steps were complete."
        if stop.requested or len(self.lines) == self._max:
            return RunLostError(f"{reason} {self._why_no_restart(stop)} {self._way_on(start)}", starts_again=False)
        line = f"{len(self.lines) + 1} of {self._max}, {self._place(start)}"
        logger.warning(f"{reason} The run starts again (cluster.max_restarts: {line}).")
        self.lines.append(f"{line}: {reason}")
        return RunLostError(reason, starts_again=True)

    def record(self, log: RunLog, start: Start) -> None:
        """Tell a new attempt's log directory which restart it is, after which step, and why."""
        self._log_path = log.directory / RUN_LOG_FILE
        if not self.lines:
            return
        logger.info(f"restart {self.lines[-1]}")
        step = 0 if start.resume is None else start.resume.step
        log.log(step, "restart", {"num_restarts": len(self.lines), "num_left": self._max - len(self.lines)})

    def _remember(self, saved: Path | None) -> None:
        """Go on from this run's own steps, once there are any: its first save has set those of other runs aside."""
        if saved is None:
            return
        self._saved = saved
        checkpointing = self.config.checkpointing.model_copy(update={"load_path": "auto"})
        self.config = self.config.model_copy(update={"checkpointing": checkpointing})

    def _cannot(self, error: Exception) -> str:
        return f"restart {self.lines[-1]} It cannot start again: {error}"

    def _place(self, start: Start) -> str:
        """Where the next attempt starts."""
        if self._saved is not None:
            return f"from {self._saved}"
        if start.resume is not None:
            return f"from {start.resume.path}, where it began: it has saved nothing since"
        return "from the beginning: it has saved no checkpoint"

    def _why_no_restart(self, stop: StopRequest) -> str:
        if stop.requested:
            return f"It is not started again, since {stop.signal_name} had asked it to stop."
        if self._max:
            return f"cluster.max_restarts={self._max}: no restart is left."
        return "cluster.max_restarts=0: it is not started again."

    def _way_on(self, start: Start) -> str:
        """How the user continues."""
        if self._saved is None:
            return f"The same command starts it again, {self._place(start)}."
        command = f"Continue with: {self._command}" if self._command else "Its load_path=auto continues there."
        return f"The newest checkpoint is {self._saved}. {command}"
