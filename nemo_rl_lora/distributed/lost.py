"""What a run says whose training processes are gone or do not answer. Without Ray, so that a driver may catch it."""

from __future__ import annotations


class ProcessesLost(RuntimeError):  # noqa: N818
    """A training process died, its node was lost, or it did not answer in time; the others were ended.

    Its text is complete: which rank, on which node, in which verb.
    """
