"""What an action holds at a time, in bytes of tensors."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(before: Callable[[], Any], action: Callable[[], Any]) -> int:
    """How far the bytes of live tensors rise in an action above what was live, by torch's allocator. It knows of what
    is let go only if it saw it come: `before` makes what the action replaces."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        before()
        gc.collect()
        begun = time.time_ns()
        action()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    start = live = sum(event.nbytes() for event in events if event.start_ns() < begun)
    peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.start_ns() >= begun:
            live += event.nbytes()
            peak = max(peak, live - start)
    return peak
