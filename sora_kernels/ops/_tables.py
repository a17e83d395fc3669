"""Launch configurations that were measured: one JSON file per op and chip, read as data.

`configs/sm_XY.json` beside an op's kernels, written by `python -m benchmarks.tune`::

    {"launches": [{"kernel": "forward", "width": 1152, "config": {"num_warps": 8}, "faster": 1.07}]}

An entry replaces fields of the formula's configuration for one kernel at one shape. Without a file,
without an entry and in the interpreter the formula stands. Nothing is measured at run time.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Chip = tuple[int, int]
Config = TypeVar("Config", bound=tuple[Any, ...])  # a NamedTuple of integers
Shape = tuple[tuple[str, int], ...]

_NOT_SHAPE = ("kernel", "config", "faster", "interval")
OPS = Path(__file__).parent


class Lookup(NamedTuple):
    """A question that an op asked: which kernel, at which shape, and what a table may answer."""

    op: str
    kernel: str
    shape: Shape
    default: tuple[int, ...]
    names: tuple[str, ...]  # of the default's fields
    fields: tuple[str, ...]  # of these, what may be changed


@functools.cache
def _capability(index: int) -> Chip:
    return torch.cuda.get_device_capability(index)


def chip_of(x: Tensor) -> Chip | None:
    """Compute capability of the chip that ``x`` lies on; None = the interpreter."""
    return _capability(x.device.index) if x.is_cuda else None


def _entry(where: str, entry: Any) -> tuple[tuple[str, Shape], dict[str, int]]:
    """Checked: a wrong table must fail when it is read, not launch something else."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kernel"), str):
        raise ValueError(f"{where}: expected an object with a kernel, got {entry!r}")
    config = entry.get("config")
    if not isinstance(config, dict) or not config:
        raise ValueError(f"{where}.config: expected fields and their values, got {config!r}")
    for name, value in config.items():
        if type(value) is not int or value < 1 or value & (value - 1):
            raise ValueError(f"{where}.config.{name}: expected a power of two, got {value!r}")
    if config.get("num_warps", 1) > 32:
        raise ValueError(f"{where}.config.num_warps: expected up to 32, got {config['num_warps']}")
    shape = {name: value for name, value in entry.items() if name not in _NOT_SHAPE}
    for name, value in shape.items():
        if type(value) not in (int, bool):
            raise ValueError(f"{where}.{name}: expected an integer, got {value!r}")
    return (entry["kernel"], tuple(sorted(shape.items()))), config


def read_table(path: Path) -> dict[tuple[str, Shape], dict[str, int]]:
    """Entries by kernel and shape, none if there is no file; ValueError names the place."""
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text()).get("launches", [])
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected a JSON object, got {error}") from None
    table: dict[tuple[str, Shape], dict[str, int]] = {}
    for number, entry in enumerate(entries):
        key, config = _entry(f"{path}: launches[{number}]", entry)
        if key in table:
            raise ValueError(f"{path}: launches[{number}] repeats an entry: {key}")
        table[key] = config
    return table


@functools.cache
def _table(op: str, chip: Chip) -> dict[tuple[str, Shape], dict[str, int]]:
    return read_table(OPS / op / "configs" / f"sm_{chip[0]}{chip[1]}.json")


_forced: dict[tuple[str, str, Shape], Mapping[str, int]] = {}
_lookups: list[Lookup] | None = None


def tuned(
    op: str,
    kernel: str,
    default: Config,
    fields: tuple[str, ...],
    chip: Chip | None,
    **shape: int,
) -> Config:
    """``default`` with what a table has measured to be faster for this kernel, shape and chip.

    Args:
        fields: what a table may change. The others decide about correctness, e.g. whether a
            program sees a whole row.

    Raises:
        ValueError: the table changes another field.
    """
    if chip is None and not _forced and _lookups is None:
        return default
    key = tuple(sorted(shape.items()))
    if _lookups is not None:
        names = default._fields  # type: ignore[attr-defined]
        _lookups.append(Lookup(op, kernel, key, default, names, fields))
    changes = _forced.get((op, kernel, key))
    if changes is None:
        changes = _table(op, chip).get((kernel, key)) if chip is not None else None
    if not changes:
        return default
    if unknown := [name for name in changes if name not in fields]:
        raise ValueError(
            f"table of {op}, {kernel}: expected fields of {fields}, got {', '.join(unknown)}"
        )
    return default._replace(**changes)  # type: ignore[attr-defined]


def remembered(choose: Callable[..., Config]) -> Callable[..., Config]:
    """``choose``, whose answer for the same shape and chip is computed once.

    Not while lookups are recorded or forced: those ask :func:`tuned` anew.
    """

    @functools.lru_cache(maxsize=4096)
    def cached(tables: Path, *shape: Any, **named: Any) -> Config:
        return choose(*shape, **named)

    @functools.wraps(choose)
    def answer(*shape: Any, **named: Any) -> Config:
        if _forced or _lookups is not None:
            return choose(*shape, **named)
        return cached(OPS, *shape, **named)

    return answer


@contextmanager
def forced(lookup: Lookup, changes: Mapping[str, int]) -> Iterator[None]:
    """Launches with ``changes`` in place of the table, for the tuner and for tests."""
    key = lookup[:3]
    _forced[key] = changes
    try:
        yield
    finally:
        del _forced[key]


@contextmanager
def recorded() -> Iterator[list[Lookup]]:
    """The lookups that ops make meanwhile."""
    global _lookups
    before, found = _lookups, []  # type: ignore[var-annotated]
    _lookups = found
    try:
        yield found
    finally:
        _lookups = before
