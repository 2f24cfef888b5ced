"""The training processes as the driver sees them: asked all at once, waited for within a limit, ended together.

Contract: a process that fails ends the wait with its own error; the others, which may be waiting for it, are ended.
One that died, whose node is lost or that does not answer in time is `ProcessesLost`.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from torch.distributed import DistError

from nemo_rl_lora.config.cluster import ClusterConfig
from nemo_rl_lora.distributed.lost import ProcessesLost

_COLOURS = re.compile(r"\x1b\[[\d;]*m")
_SAID_CHARACTERS = 300
_GRACE_SECONDS = 10  # after the first error: which process began?


@dataclass(kw_only=True)
class Members:
    """The actors in the order of their ranks, and the addresses of their nodes."""

    cluster: ClusterConfig
    actors: list[Any]
    addresses: list[str] = field(default_factory=list)

    def results(self, verb: str, pending: list[Any], *, starting: bool = False) -> list[Any]:
        """What the processes return from a verb, in the order of their ranks."""
        key = "start_timeout_seconds" if starting else "step_timeout_seconds"
        seconds = getattr(self.cluster, key)
        deadline, left = time.monotonic() + seconds, list(pending)
        while left:
            done, left = ray.wait(left, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                self.end()
                late = ", ".join(self._name(pending.index(one)) for one in left)
                raise ProcessesLost(
                    f"cluster.{key}={seconds:g}: {late} of {len(pending)} did not end {verb!r} in this time, and all "
                    f"were ended. Look at that node, or raise it where the work takes longer."
                )
            if _failure_of(done[0]) is not None:
                raise self._failure(verb, pending, done[0], left)
        return ray.get(pending)

    def end(self) -> None:
        for actor in self.actors:
            ray.kill(actor)

    def _name(self, rank: int) -> str:
        node = f" (node {self.addresses[rank]})" if self.addresses else ""
        return f"training process {rank}{node}"

    def _failure(self, verb: str, pending: list[Any], first: Any, left: list[Any]) -> Exception:
        """What to raise: a process that is gone comes before those that lost it. Ends those that wait for another."""
        waiting = ray.wait(left, num_returns=len(left), timeout=_GRACE_SECONDS)[1] if left else []
        failures = [(rank, _failure_of(one)) for rank, one in enumerate(pending) if one not in waiting]
        if waiting:
            self.end()
        lost = [(rank, error) for rank, error in failures if error is not None and not isinstance(error, RayTaskError)]
        if lost:
            self.end()
            names = ", ".join(self._name(rank) for rank, _ in lost)
            return ProcessesLost(
                f"{names} of {len(pending)} {'was' if len(lost) == 1 else 'were'} lost in {verb!r}; all were ended. "
                f"Ray says: {_first_words(lost[0][1])}"
            )
        causes = [(rank, _cause_of(error)) for rank, error in failures if isinstance(error, RayTaskError)]
        rank, cause = min(causes, key=lambda found: (_is_broken_connection(found[1]), found[0] != pending.index(first)))
        if not _is_broken_connection(cause):
            return cause
        self.end()
        return ProcessesLost(
            f"{self._name(rank)} of {len(pending)} lost another one in {verb!r}, and all were ended: "
            f"{' '.join(str(cause).split())}"
        )


def _first_words(error: RayError) -> str:
    """The first sentences of what Ray says, without its ids, its colours and its list of possible causes."""
    lines = [line for line in _COLOURS.sub("", str(error)).splitlines() if not line.startswith("\t")]
    text = " ".join(" ".join(lines).split())
    return f"{text[:_SAID_CHARACTERS].rpartition('. ')[0]}." if len(text) > _SAID_CHARACTERS else text


def _cause_of(error: RayTaskError) -> Exception:
    return error.cause if isinstance(error.cause, Exception) else error


def _is_broken_connection(error: Exception) -> bool:
    """Whether a collective operation broke off; gloo's errors have no class of their own."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _failure_of(result: Any) -> RayError | None:
    """Why a result that is there is no result; None where it is one."""
    try:
        ray.get(result)
    except RayError as error:
        return error
    return None
