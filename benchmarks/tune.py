"""Finds launch configurations by measuring: `python -m benchmarks.tune --op OP [--budget MINUTES]`.

An op's cases are run once while its lookups are recorded (`sora_kernels.ops._tables`). Around the
configuration in use, candidates are listed, compiled and timed against it, round by round in one
process. A candidate is adopted only if even the lower end of its paired speedup exceeds 1.02; what
is adopted is written to `sora_kernels/ops/<op>/configs/sm_XY.json` and used from then on, by pure
lookup. A candidate whose result differs from the one in use is refused.

`--dry-run` needs no GPU: it lists the candidates of the cross-compiled production shapes, and with
`--compile` drops those that spill or lose their wide accesses.

`--libraries F.json` writes the rules by which `packed_attention` hands dense calls to a library,
from a benchmark report of this chip.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sora_kernels.ops import _tables
from sora_kernels.ops._tables import Lookup, forced, recorded

from .tune_libraries import library_rules

ADOPT = 1.02  # the lower end of the interval must exceed it
WARPS = (1, 2, 4, 8, 16, 32)
STAGES = (1, 2, 4)
# Fields whose product is what one program works on at a time.
BLOCKS = ("block_d", "block_rows", "block_row", "block_l", "block_c", "block_w", "block_f",
          "tokens", "heads", "pairs")  # fmt: skip
FACTORS = (1, 2, 4, 8, 16)  # quarters of the block in use
PER_THREAD = (4, 64)  # numbers of a tile: fewer loads less than 16 bytes, more spills
MOST = 48  # candidates of a lookup


class NotHere(Exception):
    """The command asks for something that this machine or project does not have."""


def settings(lookup: Lookup) -> dict[str, int]:
    return dict(zip(lookup.names, lookup.default, strict=True))


def candidates(lookup: Lookup) -> list[dict[str, int]]:
    """Changes to the configuration in use, nearest first: a pure function.

    Blocks up to four times larger or smaller, any number of warps and stages, such that a thread
    holds between 4 and 64 numbers of the tile.
    """
    now = settings(lookup)
    fixed = {"num_warps": WARPS, "num_stages": STAGES}
    choices = [
        fixed.get(name) or sorted({max(1, now[name] * f // 4) for f in FACTORS})
        for name in lookup.fields
    ]
    found = []
    for values in itertools.product(*choices):
        config = now | dict(zip(lookup.fields, values, strict=True))
        tile = 1
        for name in BLOCKS:
            tile *= config.get(name, 1) * (2 if name == "pairs" and name in config else 1)
        per_thread = tile / (32 * config["num_warps"])
        if PER_THREAD[0] <= per_thread <= PER_THREAD[1] and config != now:
            found.append({name: config[name] for name in lookup.fields})

    def distance(config: Mapping[str, int]) -> int:
        """Doublings away from what is in use; ties by the numbers, so that the order is fixed."""
        return sum(abs(v.bit_length() - now[name].bit_length()) for name, v in config.items())

    return sorted(found, key=lambda config: (distance(config), tuple(config.values())))[:MOST]


def unique(lookups: Iterable[Lookup]) -> list[Lookup]:
    """One of each kernel and shape, in order; the default may differ in what follows from N."""
    return list({lookup[:3]: lookup for lookup in lookups}.values())


def name_of(lookup: Lookup) -> str:
    shape = " ".join(f"{name}={int(value)}" for name, value in lookup.shape)
    return f"{lookup.op} {lookup.kernel} {shape}"


def changed(lookup: Lookup, config: Mapping[str, int]) -> str:
    now = settings(lookup)
    parts = [f"{n} {now[n]} -> {v}" for n, v in config.items() if v != now[n]]
    return ", ".join(parts)


def matches(lookup: Lookup, pattern: str | None) -> bool:
    return pattern is None or fnmatch(name_of(lookup), pattern)


# --- without a GPU ------------------------------------------------------------------------------


def compiled_lookups(op: str) -> list[Lookup]:
    """What the cross-compiled production cases of an op ask for."""
    try:
        module = importlib.import_module(f"sora_kernels.ops.{op}.kernels")
    except ModuleNotFoundError as error:
        raise NotHere(f"--op: {op} has no Triton kernels here ({error})") from None
    with recorded() as found:
        module.aot_cases()
    return unique(found)


def why_not(lookup: Lookup, config: Mapping[str, int], arch: int) -> str | None:
    """What the cross-compiler has against a candidate: the cases that it changes, compiled."""
    from sora_kernels.aot.checking import check
    from sora_kernels.aot.compiling import cache_path, compile_case, load, save

    module = importlib.import_module(f"sora_kernels.ops.{lookup.op}.kernels")
    before = {case.name: case.config for case in module.aot_cases()}
    with forced(lookup, config):
        cases = [case for case in module.aot_cases() if case.config != before[case.name]]
    for case in cases:
        if arch not in case.archs:
            continue
        compiled = load(cache_path(case, arch))
        if compiled is None:
            try:
                compiled = compile_case(case, arch)
            except OSError:
                raise
            except Exception as error:  # Triton has no common base class for what its passes raise
                return f"{case.name} does not compile: {type(error).__name__}"
            save(cache_path(case, arch), compiled)
        problems = check(case, arch, compiled)["problems"]
        if problems:
            return f"{case.name}: {'; '.join(problems)}"
    return None


def check_tables(folder: Path = _tables.OPS) -> tuple[int, list[str]]:
    """Compiles every entry of every table for its chip: (how many, what is wrong with them)."""
    checked, problems = 0, []
    for path in sorted(folder.glob("*/configs/sm_*.json")):
        op, arch = path.parents[1].name, int(path.stem.removeprefix("sm_"))
        asked = {lookup[1:3]: lookup for lookup in compiled_lookups(op)}
        for key, config in _tables.read_table(path).items():
            checked += 1
            if key not in asked:
                problems.append(f"{path}: no production case asks for {key}")
            elif reason := why_not(asked[key], config, arch):
                problems.append(f"{path}: {key}: {reason}")
    return checked, problems


def dry_run(op: str, pattern: str | None, arch: int | None, seconds: float) -> int:
    """Lists the candidates, compiled for `arch` where it is given; returns how many are left."""
    end = time.monotonic() + seconds
    left = 0
    for lookup in compiled_lookups(op):
        if not matches(lookup, pattern):
            continue
        print(f"{name_of(lookup)}: {settings(lookup)}")
        for config in candidates(lookup):
            reason = None
            if arch is not None:
                if time.monotonic() > end:
                    print("  out of budget: the rest was not compiled")
                    return left
                reason = why_not(lookup, config, arch)
            left += reason is None
            print(f"  {changed(lookup, config)}" + (f": refused, {reason}" if reason else ""))
    return left


# --- on a GPU -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A candidate that is faster beyond doubt."""

    lookup: Lookup
    config: Mapping[str, int]
    faster: Any  # Interval: time in use / time of the candidate

    def entry(self) -> dict[str, Any]:
        interval = [round(self.faster.low, 4), round(self.faster.high, 4)]
        shape = {name: int(value) for name, value in self.lookup.shape}
        return {
            "kernel": self.lookup.kernel, **shape, "config": dict(self.config),
            "faster": round(self.faster.median, 4), "interval": interval,
        }  # fmt: skip


def runs_of(op: str, device: str) -> Iterator[tuple[Any, Any]]:
    """(case, call of ours) for the bf16 cases of an op; other ops' benchmarks may use it too."""
    import torch

    from .registry import Context, load
    from .runner import OURS

    for case in load(["ops"], Context(device=device)):
        if case.op.removesuffix("_rows") in (op, f"un{op}") and case.dtype == "bf16":
            torch.manual_seed(0)
            yield case, case.providers[OURS](case.inputs(torch.device(device)))


def measure_lookup(lookup: Lookup, run: Any, timer: Any, end: float) -> Found | None:
    """The best candidate for one lookup of a call, if it is better than what is in use."""
    from sora_kernels.bench import paired_ratio

    from .registry import TOLERANCE
    from .runner import relative_error

    expected = run()
    best: Found | None = None
    for config in candidates(lookup):
        if time.monotonic() > end:
            print("  out of budget")
            break

        def candidate(config: Mapping[str, int] = config) -> object:
            with forced(lookup, config):
                return run()

        try:
            error = relative_error(candidate(), expected)
        except Exception as problem:  # does not compile, or asks for more than the chip has
            print(f"  {changed(lookup, config)}: refused, {type(problem).__name__}")
            continue
        if not error <= TOLERANCE["bf16"]:
            print(f"  {changed(lookup, config)}: refused, differs by {error:.1e}")
            continue
        # The one in use pays for the same context manager.
        samples = timer({"now": lambda: _with(nullcontext(), run), "candidate": candidate})
        faster = paired_ratio(samples["now"], samples["candidate"])
        interval = f"{faster.median:.3f} [{faster.low:.3f}, {faster.high:.3f}]"
        print(f"  {changed(lookup, config)}: {interval}")
        if faster.low > ADOPT and (best is None or faster.median > best.faster.median):
            best = Found(lookup, config, faster)
    return best


def _with(context: Any, run: Any) -> object:
    with context:
        return run()


def tune(op: str, pattern: str | None, device: str, timer: Any, seconds: float) -> list[Found]:
    """Every lookup of every case, each measured once, within the time."""
    end = time.monotonic() + seconds
    seen: set[Any] = set()
    found: list[Found] = []
    for case, run in runs_of(op, device):
        with recorded() as lookups:
            run()
        for lookup in unique(lookups):
            if lookup[:3] in seen or lookup.op != op or not matches(lookup, pattern):
                continue
            if time.monotonic() > end:
                return found
            seen.add(lookup[:3])
            print(f"{name_of(lookup)} in {case.mode} {case.case}: {settings(lookup)}")
            best = measure_lookup(lookup, run, timer, end)
            if best is not None:
                found.append(best)
    return found


# --- tables -------------------------------------------------------------------------------------


def write_table(path: Path, changes: Mapping[str, Any]) -> None:
    """Merges into the file of a chip: entries by kernel and shape, other keys replaced."""
    from sora_kernels.bench.schema import write_text

    old = json.loads(path.read_text()) if path.is_file() else {}
    if "launches" in changes:
        entries = {}
        for entry in [*old.get("launches", []), *changes["launches"]]:
            shape = {k: v for k, v in entry.items() if k not in ("config", "faster", "interval")}
            entries[json.dumps(shape, sort_keys=True)] = entry
        changes = {**changes, "launches": [entries[key] for key in sorted(entries)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**old, **changes}, indent=1) + "\n")
    _tables.read_table(path)  # what was written can be read


def chip_file(folder: Path, op: str, chip: str) -> Path:
    """`chip`: "9.0"."""
    return folder / op / "configs" / f"sm_{chip.replace('.', '')}.json"


def _libraries(report: Path, folder: Path) -> int:
    from sora_kernels.bench import read_report

    found = read_report(report)
    capability = found["env"].get("capability")
    if capability is None:
        raise NotHere(f"--libraries: {report} was not measured on a GPU")
    rules = library_rules(found)
    path = chip_file(folder, "packed_attention", capability)
    source = {name: found["env"].get(name) for name in ("gpu", "commit", "torch", "date")}
    write_table(path, {"rules": rules, "rules_measured": source})
    print(f"{len(rules)} rules in {path}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tune", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--op", metavar="OP")
    parser.add_argument("--shape", metavar="GLOB", help="of lookups, as --dry-run prints them")
    parser.add_argument("--budget", type=float, default=5.0, metavar="MINUTES")
    parser.add_argument("--dry-run", action="store_true", help="list candidates, measure nothing")
    parser.add_argument("--compile", type=int, metavar="CC", help="with --dry-run: for sm_CC")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the ops' own folders")
    parser.add_argument("--libraries", type=Path, metavar="F.json", help="write attention rules")
    options = parser.parse_args(argv)
    folder = options.out or _tables.OPS
    try:
        if not options.budget > 0:
            raise ValueError(f"--budget: expected minutes above 0, got {options.budget:g}")
        if options.libraries:
            return _libraries(options.libraries, folder)
        ops = sorted(path.parent.name for path in _tables.OPS.glob("*/kernels.py"))
        if options.op not in ops:
            raise ValueError(f"--op: expected one of {', '.join(ops)}, got {options.op}")
        if options.dry_run:
            dry_run(options.op, options.shape, options.compile, 60 * options.budget)
            return 0
        return _measure(options.op, options.shape, 60 * options.budget, folder)
    except (NotHere, OSError, ValueError) as error:
        print(f"benchmarks.tune: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _measure(op: str, pattern: str | None, seconds: float, folder: Path) -> int:
    import torch

    from sora_kernels.bench import measure_cuda
    from sora_kernels.bench.env import describe

    if not torch.cuda.is_available():
        raise NotHere("measuring needs an NVIDIA GPU; --dry-run does not")

    def timer(runs: Mapping[str, Any]) -> Mapping[str, list[float]]:
        return measure_cuda(runs, seconds=0.2)

    found = tune(op, pattern, "cuda", timer, seconds)
    for one in found:
        print(f"adopted: {name_of(one.lookup)}: {changed(one.lookup, one.config)}, "
              f"{one.faster.median:.3f} [{one.faster.low:.3f}, {one.faster.high:.3f}]")  # fmt: skip
    if not found:
        print("nothing is faster beyond doubt: the table stays as it is")
        return 0
    env = describe("cuda", quick=False)
    source = {name: env.get(name) for name in ("gpu", "commit", "torch", "triton", "date")}
    path = chip_file(folder, op, env["capability"])
    write_table(path, {"launches": [one.entry() for one in found], "launches_measured": source})
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
