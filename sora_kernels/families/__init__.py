"""``accelerate(model)``: our ops inside the blocks of known models, reversibly.

Nothing of upstream is imported to find out whether a model is known: classes are recognised by
module path and name (``_data.py``). A block takes and returns exactly what upstream's does, with
upstream's roundings; parameters and ``state_dict`` are untouched.

How a family is added: (1) a row in ``_data.py``; (2) two functions in the file of its skeleton
(``forward`` and ``survey``); (3) if q and k are normed or rotated, a subclass of its processor in
``processors/``; (4) fingerprints from ``python -m sora_kernels.families.sources``; (5) a row in
``docs/families.md`` and ``tests/families/test_<family>.py``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from ..laws import Law, Point, resolve
from ._data import ABSENT, BY_PATH, Block, Processor, Site
from ._fingerprint import resolve as _resolve_path
from ._fingerprint import unknown_source
from ._patch import class_path, find_slot, is_link, link, slots, unlink, upstream_class
from ._report import Entry, Report

__all__ = ["Entry", "Report", "accelerate", "restore"]

_LAW = "sora_law"  # attribute of our processors


def accelerate(
    model: nn.Module, *, law: Law | None = None, dry_run: bool = False, strict: bool = False
) -> Report:
    """Lets the blocks of ``model`` run fused ops, and says where and where not.

    Works on the instance: no class and no global is changed, so other models stay as they are.
    Call it before or after LoRA, hooks, caches, ``torch.compile`` or sharding; :func:`restore`
    takes it back. The same numbers come out: every family has upstream's own rounding law per
    site. A model without a known block goes through unchanged, and the report says so.

    Args:
        model: a model of diffusers (or anything that holds one: a wrapper, a list of blocks).
        law: a rounding law for all sites instead of the model's own, see
            :mod:`sora_kernels.laws`, e.g. ``"fp32_once"``.
        dry_run: report only.
        strict: raise if nothing is found or anything is left alone, before anything is changed.

    Returns:
        A :class:`Report`; ``str(report)`` is readable.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: an unknown law.
        RuntimeError: ``strict`` and something is left alone.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected a torch.nn.Module (of a pipeline: pipe.transformer), "
            f"got {type(model).__name__}"
        )
    mask = None if law is None else resolve(law)
    report = Report(upstream_class(model).__name__, dry_run=dry_run)
    if mask is not None:
        report.law = _law_name(mask)
    actions: list[Callable[[], None]] = []
    for name, module, block in _blocks(model):
        if isinstance(block, str):
            report.entries.append(Entry(name, "", reason=block))
            continue
        _visit(name, module, block, mask, report, actions)
    if strict and (report.left or not report.entries):
        raise RuntimeError(f"strict: expected every site to be fused, got\n{report}")
    if not dry_run:
        for act in actions:
            act()
    return report


def restore(model: nn.Module) -> int:
    """Takes back what :func:`accelerate` put into ``model``, and nothing else.

    Returns:
        How many links (block forwards and attention processors) were undone.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    undone = 0
    for module in model.modules():
        undone += unlink(module)
        processor = getattr(module, "processor", None)
        if _is_ours(processor):
            _set_processor(module, type(processor).__mro__[1], None)
            undone += 1
    return undone


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module, Block | str]]:
    """Every module of a known block class, or why it is not one after all."""
    for name, module in model.named_modules():
        cls = upstream_class(module)
        rows = BY_PATH.get(class_path(cls))
        if rows is not None:
            yield name or "(itself)", module, _row(cls, module, rows)
            continue
        for base in cls.__mro__[1:]:
            if class_path(base) in BY_PATH:
                reason = f"{cls.__name__} is a subclass of {base.__name__}"
                yield name or "(itself)", module, reason
                break


def _row(cls: type, module: nn.Module, rows: tuple[Block, ...]) -> Block | str:
    for row in rows:
        if all(getattr(module, name, None) == value for name, value in row.when.items()):
            return row
    return f"an unknown variant of {cls.__name__}"


def _visit(
    name: str,
    module: nn.Module,
    block: Block,
    mask: int | None,
    report: Report,
    actions: list[Callable[[], None]],
) -> None:
    """Adds the entries of one block and what there is to do."""
    whole = unknown_source(block.sources)
    if whole is None:
        slot = find_slot(module)
        whole = slot if isinstance(slot, str) else None
    left: dict[str, str] = {}
    if whole is None:
        skeleton = importlib.import_module(f"{__name__}.{block.skeleton}")
        left = getattr(skeleton, block.survey)(module)
        whole = left.get("")
    laws = {site.name: _mask(site, mask) for site in block.sites}
    for site in block.sites:
        reason = whole or left.get(site.name)
        if reason != ABSENT:
            report.entries.append(_entry(name, block, site, mask, reason))
    if whole is None:
        forward = getattr(skeleton, block.forward)
        actions.append(lambda: link(module, forward, laws))
    for processor in block.processors:
        _visit_processor(name, module, block, processor, mask, report, actions)


def _visit_processor(
    name: str,
    module: nn.Module,
    block: Block,
    processor: Processor,
    mask: int | None,
    report: Report,
    actions: list[Callable[[], None]],
) -> None:
    attention: Any = module.get_submodule(processor.attention)
    found = attention.processor
    reason: str | None
    path = class_path(type(found))
    if path != processor.upstream and not _is_ours(found):
        reason = f"the processor is {type(found).__name__}"
    else:
        reason = unknown_source(processor.sources)
    if reason is None:
        ours = _resolve_path(f"{__name__}.processors.{processor.ours}")
        survey = importlib.import_module(ours.__module__).why_left
        reason = survey(attention)
        if reason is None:
            law = _mask(processor.site, mask)
            actions.append(lambda: _set_processor(attention, ours, law))
    if reason != ABSENT:
        report.entries.append(_entry(name, block, processor.site, mask, reason))


def _entry(name: str, block: Block, site: Site, mask: int | None, reason: str | None) -> Entry:
    law = _law_name(_mask(site, mask))
    return Entry(name, block.family, site.name, site.op, law, reason)


def _mask(site: Site, mask: int | None) -> int:
    return resolve(site.law) if mask is None else mask


def _law_name(mask: int) -> str:
    names = [str(p.name).lower() for p in Point if p & mask]
    return "+".join(names) or "fp32_once"


def _is_ours(processor: Any) -> bool:
    return type(processor).__module__.startswith(f"{__name__}.processors.")


def _set_processor(attention: Any, cls: Any, law: int | None) -> None:
    """A processor of ``cls`` with the attributes of the one that is there."""
    made = cls.__new__(cls)
    made.__dict__.update({k: v for k, v in vars(attention.processor).items() if k != _LAW})
    if law is not None:
        made.__dict__[_LAW] = law
    attention.processor = made


def is_accelerated(module: nn.Module) -> bool:
    """True if this very block runs our forward."""
    return any(is_link(slot.get()) for slot in slots(module))
