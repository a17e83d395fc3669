"""How much memory one call needs beyond what was there before it."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import Run


def peak_mem_mb(run: Run, device: str) -> float:
    """The peak of what torch's allocator handed out during one call of ``run``, in MB (1e6 bytes).

    Memory that was live before the call does not count, so inputs are not in it and outputs are.
    On a CPU the allocator's own events are summed: the process's resident size would say more
    about malloc's caching than about the call.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        run()
    results = trace.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 1e6
