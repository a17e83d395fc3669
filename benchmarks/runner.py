"""Runs one case: inputs, providers, agreement, memory, times, rows."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sora_kernels.bench.ceilings import Ceilings, copy_probe
from sora_kernels.bench.memory import peak_mem_mb
from sora_kernels.bench.schema import OURS, make_row

from .registry import TOLERANCE, Case, Inputs, Provider, Run, Unavailable, tensors_of

Timer = Callable[[Mapping[str, Run]], Mapping[str, list[float]]]

# A probe that copies as many bytes as the case must move is timed round by round beside the
# providers. It gives the share of the copy rate *at this size and this moment*; its times make no
# row, only an interval in ours.
PROBE = "copy"
PROBE_MIN_BYTES = 1 << 20


class Disagreement(Exception):
    """A provider computed something else, so its time means nothing."""


@dataclass
class Results:
    """What a run has gathered so far."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)


def relative_error(result: object, reference: object) -> float:
    """The largest relative L2 distance over the tensors of two results; inf where they differ in
    number or shape, nan where one holds nan."""
    ours, theirs = tensors_of(result), tensors_of(reference)
    if len(ours) != len(theirs):
        return float("inf")
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return float("inf")
        a64, b64 = a.detach().double(), b.detach().double()
        error = float((a64 - b64).norm() / b64.norm().clamp_min(1e-30))
        if math.isnan(error):
            return error
        worst = max(worst, error)
    return worst


def _build(case: Case, inputs: Inputs, skip: set[str], results: Results) -> dict[str, Run]:
    """The runs that are possible here and agree with the reference provider.

    A peer that fails or disagrees is noted as an error and left out; ours and the reference end
    the case.
    """
    reference: object = None
    runs: dict[str, Run] = {}
    first = "plain" if "plain" in case.providers else next(p for p in case.providers if p != OURS)
    order = [first, *(name for name in case.providers if name != first)]
    tolerance = TOLERANCE[case.dtype] if case.tolerance is None else case.tolerance
    for name in order:
        if name in skip:
            continue
        try:
            result = _first_call(name, case.providers[name], inputs, case, results)
            if result is None:
                continue
            run, value = result
            if name == first:
                reference = value
            elif reference is not None and tolerance != float("inf"):
                error = relative_error(value, reference)
                if not error <= tolerance:
                    raise Disagreement(
                        f"{name} differs from {first} by {error:.2e} (relative L2), "
                        f"allowed is {tolerance:.0e}"
                    )
        except Exception as error:
            if name in (first, OURS):
                raise
            results.errors.append({"case": f"{case.name}, {name}", "error": _line(error)})
        else:
            runs[name] = run
    return {name: runs[name] for name in case.providers if name in runs}


def _line(error: Exception) -> str:
    """Type and first line: some carry whole reports of a compiler."""
    lines = str(error).strip().splitlines() or traceback.format_exc(limit=1).splitlines()
    return f"{type(error).__name__}: {lines[0]}"


def _first_call(
    name: str, provider: Provider, inputs: Inputs, case: Case, results: Results
) -> tuple[Run, object] | None:
    """Builds a provider and calls it once; None, with the reason noted, if it cannot run here."""
    try:
        run = provider(inputs)
        return run, run()
    except Unavailable as reason:
        results.skipped.append({"case": case.name, "provider": name, "reason": str(reason)})
    except Exception as error:
        # A machine without a C++ compiler has no torch.compile; that must not cost the other rows.
        if name != "compile":
            raise
        results.skipped.append({"case": case.name, "provider": name, "reason": _line(error)})
    return None


def run_case(
    case: Case,
    *,
    device: str,
    timer: Timer,
    ceilings: Ceilings,
    skip: set[str],
    results: Results,
) -> None:
    """Measures one case and appends its rows; a failure is noted in ``results.errors``."""
    with _on_its_own(case, device, results):
        results.rows.extend(_measure(case, device, timer, ceilings, skip, results))


def check_case(case: Case, *, device: str, skip: set[str], results: Results) -> None:
    """Calls every provider once and compares; nothing is timed. What they compile stays in the
    caches on disk."""
    with _on_its_own(case, device, results):
        _build(case, case.inputs(torch.device(device)), skip, results)


@contextmanager
def _on_its_own(case: Case, device: str, results: Results) -> Iterator[None]:
    torch.manual_seed(0)
    try:
        yield
    except Exception as error:
        results.errors.append({"case": case.name, "error": _line(error)})
    finally:
        # Dynamo counts recompilations per function and falls back to eager at its limit; every
        # case starts from nothing. Compiled code is still found in Inductor's cache on disk.
        torch.compiler.reset()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _measure(
    case: Case,
    device: str,
    timer: Timer,
    ceilings: Ceilings,
    skip: set[str],
    results: Results,
) -> list[dict[str, Any]]:
    inputs = case.inputs(torch.device(device))
    runs = _build(case, inputs, skip, results)
    memory = {name: peak_mem_mb(run, device) for name, run in runs.items()}
    timed = dict(runs)
    moved = 0
    memory_bound = ceilings.floor_ms(case.bytes, 0, case.dtype) >= ceilings.floor_ms(
        0, case.flops, case.dtype
    )
    if memory_bound and case.bytes >= PROBE_MIN_BYTES:
        timed[PROBE], moved = copy_probe(case.bytes, device)
    samples = dict(timer(timed))
    probe = samples.pop(PROBE, None)
    if probe is not None:
        probe = [t * case.bytes / moved for t in probe]

    def row(provider: str, times: list[float], extra: Mapping[str, Any]) -> dict[str, Any]:
        others = {}
        if provider == OURS:
            others = {name: other for name, other in samples.items() if name != OURS}
            if probe is not None:
                others[PROBE] = probe
        made = make_row(
            suite=case.suite,
            op=case.op,
            mode=case.mode,
            case=case.case,
            dtype=case.dtype,
            provider=provider,
            samples_ms=times,
            bytes=case.bytes,
            flops=case.flops,
            ceilings=ceilings,
            peak_mem_mb=memory[extra.get("variant", provider)],
            paired_with=others,
            extra={**case.extra, **extra},
        )
        for unit, count in case.units.items():
            made[f"{unit}_per_s"] = count / made["p50_ms"] * 1e3
        return made

    variants = [name for name in case.plain_variants if name in samples]
    if variants:
        best = min(variants, key=lambda name: sorted(samples[name])[len(samples[name]) // 2])
        samples["plain"] = samples[best]
        order = [OURS, "plain", *(n for n in samples if n not in (OURS, "plain"))]
        samples = {name: samples[name] for name in order if name in samples}
        return [row(n, t, {"variant": best} if n == "plain" else {}) for n, t in samples.items()]
    return [row(name, times, {}) for name, times in samples.items()]
