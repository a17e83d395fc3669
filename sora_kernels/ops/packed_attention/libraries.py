"""Attention libraries that may run a dense call in place of our kernel, and which one does.

Dense attention is well served on GPUs, so a call goes to the fastest library that can run it, and
to our kernel where that is faster or the only one. Which is faster is data: one JSON file per chip
under ``configs/``, written from measurements, with rules such as ::

    {"min_seqlen": 4096, "head_dim": 128, "training": false, "prefer": ["flash_attn_4"]}

The first rule that a call meets names the libraries to try; a chip without a file, and a call
without a rule, runs our kernel. Rules for calls under a window say ``"windowed": true``. Whether a
library can run a call is a predicate with a reason, asked before the call: nothing is tried and
caught. Of the libraries only flash-attn 4 has windows of tiles, by its block sparsity.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ... import backend
from ..windowed_attention import flash_attn_4
from .config import chip_of

OWN = "own"
"""Our kernel, as rules and callers name it."""

_OP = "packed_attention"
_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """What decides about a call: host facts alone, so that nothing waits for the device.

    ``equal`` means that all segments have `max_seqlen` queries and keys each, so that they form a
    dense batch; ``chip`` is the compute capability, None away from a GPU.
    """

    chip: tuple[int, int] | None
    dtype: torch.dtype
    head_dim: int
    heads: int
    heads_k: int
    max_seqlen: int
    equal: bool
    causal: bool
    training: bool
    return_lse: bool
    deterministic: bool
    compiling: bool
    windowed: bool = False


class Arguments(NamedTuple):
    """The tensors and numbers of a call, as our raw op takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int
    scale: float
    causal: bool
    return_lse: bool
    deterministic: bool


def _no_windows(call: Call) -> str | None:
    return "it has no windows of tiles"


class Library(NamedTuple):
    """Why it cannot run a dense call, what runs one, and why it cannot run one under a window."""

    dense: Callable[[Call], str | None]
    run: Callable[[Arguments], Any]
    windowed: Callable[[Call], str | None] = _no_windows

    def why_not(self, call: Call) -> str | None:
        return self.windowed(call) if call.windowed else self.dense(call)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


_installed._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as config._capability


def _common(call: Call, *, least: tuple[int, int], widest: int) -> str | None:
    """What no library takes."""
    if call.chip is None:
        return "it needs an NVIDIA GPU"
    if call.chip < least:
        return f"it needs compute capability {least[0]}.{least[1]}, this is {call.chip}"
    if call.dtype not in _HALVES:
        return f"it needs bf16 or fp16, not {call.dtype}"
    if call.head_dim > widest or call.head_dim % 8:
        return f"head dim {call.head_dim} is not a multiple of 8 up to {widest}"
    if call.return_lse and call.training:
        return "its LSE has no gradient"
    return None


# --- PyTorch's scaled_dot_product_attention, the kernel forced by name ---------------------------


def _why_not_sdpa(call: Call) -> str | None:
    reason = _common(call, least=(8, 0), widest=256 if call.chip and call.chip[0] < 9 else 128)
    if reason is not None:
        return reason
    if not call.equal:
        return "the segments differ in length"
    if call.return_lse:
        return "it returns no LSE"
    if call.training and call.deterministic:
        return "its backward is not deterministic"
    return None


def _sdpa(kernel: SDPBackend, a: Arguments) -> Tensor:
    def batch(x: Tensor, longest: int) -> Tensor:
        return x.unflatten(0, (-1, longest)).transpose(1, 2)

    with sdpa_kernel(kernel):
        out = F.scaled_dot_product_attention(
            batch(a.q, a.max_q), batch(a.k, a.max_k), batch(a.v, a.max_k),
            is_causal=a.causal, scale=a.scale, enable_gqa=a.q.shape[1] != a.k.shape[1],
        )  # fmt: skip
    return out.transpose(1, 2).flatten(0, 1)


# --- torch.nn.attention.varlen ------------------------------------------------------------------


def _why_not_varlen(call: Call) -> str | None:
    reason = _common(call, least=(8, 0), widest=256)
    if reason is not None:
        return reason
    if not _installed("torch.nn.attention.varlen"):
        return "this torch has no torch.nn.attention.varlen"
    if call.heads != call.heads_k:
        return "grouped heads"
    if call.return_lse:
        return "its LSE has a layout of its own"
    if call.training and call.deterministic:
        return "its backward is not deterministic"
    return None


def _parameters(module: str, function: str) -> tuple[str, ...]:
    """Names of a function's parameters, which change from one release to the next."""
    return tuple(inspect.signature(getattr(importlib.import_module(module), function)).parameters)


_parameters._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as config._capability


def _varlen(a: Arguments) -> Any:
    from torch.nn.attention.varlen import varlen_attn as function

    known = _parameters("torch.nn.attention.varlen", "varlen_attn")
    options: dict[str, Any] = {"scale": a.scale}
    if a.causal and "is_causal" in known:
        options["is_causal"] = True
    elif a.causal:
        options["window_size"] = (-1, 0)
    if "scale" not in known:
        return function(
            a.q * (a.scale * a.q.shape[-1] ** 0.5), a.k, a.v, a.cu_q, a.cu_k, a.max_q, a.max_k,
            **{name: value for name, value in options.items() if name != "scale"},
        )  # fmt: skip
    return function(a.q, a.k, a.v, a.cu_q, a.cu_k, a.max_q, a.max_k, **options)


# --- flash-attn 2, 3 and 4 ----------------------------------------------------------------------


def _why_not_flash(module: str, least: tuple[int, int], widest: int, call: Call) -> str | None:
    reason = _common(call, least=least, widest=widest)
    if reason is not None:
        return reason
    if not _installed(module):
        return f"{module} is not installed"
    if call.compiling and module == "flash_attn.cute":
        return "it would break the graph"
    return None


def _why_not_flash_4_windowed(call: Call) -> str | None:
    """Its block sparsity is called by raw ops: no graph breaks, and the LSE has a gradient."""
    dense = replace(call, return_lse=False, compiling=False)
    reason = _why_not_flash("flash_attn.cute", (9, 0), 128, dense)
    if reason is not None:
        return reason
    assert call.chip is not None  # it has one
    return flash_attn_4.why_not(call.chip, call.training and call.deterministic)


def _flash(module: str, a: Arguments) -> Any:
    # Statements, because torch.compile follows them and no importlib.
    if module == "flash_attn.cute":
        from flash_attn.cute import (  # type: ignore[import-not-found]
            flash_attn_varlen_func as function,
        )
    elif module == "flash_attn_interface":
        from flash_attn_interface import (  # type: ignore[import-not-found]
            flash_attn_varlen_func as function,
        )
    else:
        from flash_attn.flash_attn_interface import (  # type: ignore[import-not-found]
            flash_attn_varlen_func as function,
        )
    known = _parameters(module, "flash_attn_varlen_func")
    lse = "return_lse" if "return_lse" in known else "return_attn_probs"
    result = function(
        a.q, a.k, a.v, cu_seqlens_q=a.cu_q, cu_seqlens_k=a.cu_k, max_seqlen_q=a.max_q,
        max_seqlen_k=a.max_k, softmax_scale=a.scale, causal=a.causal,
        deterministic=a.deterministic, **{lse: a.return_lse},
    )  # fmt: skip
    if not a.return_lse:
        return result[0] if isinstance(result, tuple) else result
    out, found = result[:2]
    # A query that sees no key: theirs is +inf, ours -inf, which is what a merge needs.
    return out, found.masked_fill(found == float("inf"), float("-inf"))


def _flash_library(module: str, least: tuple[int, int], widest: int) -> Library:
    return Library(
        functools.partial(_why_not_flash, module, least, widest), functools.partial(_flash, module)
    )


#: By name, in no order: the order is the measurements'.
LIBRARIES: dict[str, Library] = {
    "sdpa_cudnn": Library(_why_not_sdpa, functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION)),
    "sdpa_flash": Library(_why_not_sdpa, functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION)),
    "torch_varlen": Library(_why_not_varlen, _varlen),
    "flash_attn_2": _flash_library("flash_attn.flash_attn_interface", (8, 0), 256),
    "flash_attn_3": _flash_library("flash_attn_interface", (9, 0), 256),
    "flash_attn_4": _flash_library("flash_attn.cute", (9, 0), 128)._replace(
        windowed=_why_not_flash_4_windowed
    ),
}

# --- choice -------------------------------------------------------------------------------------

Rules = tuple[Mapping[str, Any], ...]


@functools.cache
def _read_rules(chip: tuple[int, int]) -> Rules:
    name = f"sm_{chip[0]}{chip[1]}.json"
    file = resources.files(__package__).joinpath("configs", name)
    return tuple(json.loads(file.read_text())["rules"]) if file.is_file() else ()


def rules_of(chip: tuple[int, int]) -> Rules:
    """The measured rules of a chip, empty if nothing was measured there."""
    return _read_rules(chip)


rules_of._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as config._capability


def choose(call: Call, rules: Rules) -> tuple[str, dict[str, str]]:
    """The library that runs a call, and why those measured to be faster do not."""
    refused: dict[str, str] = {}
    for rule in rules:
        if call.max_seqlen < rule.get("min_seqlen", 0):
            continue
        if call.windowed != rule.get("windowed", False):
            continue
        if any(
            name in rule and rule[name] != getattr(call, name)
            for name in ("head_dim", "training", "causal", "equal")
        ):
            continue
        for name in rule["prefer"]:
            reason = None if name == OWN else LIBRARIES[name].why_not(call)
            if reason is None:
                return name, refused
            refused[name] = reason
        break
    return OWN, refused


def run_by_library(a: Arguments, library: str | None, training: bool) -> tuple[bool, Any]:
    """(True, result) if a library runs the call, (False, None) if it is our kernel's.

    ``library`` names one, or our kernel; None leaves it to the measurements of this chip.

    Raises:
        ValueError: an unknown library, or one that cannot run this call, with the reason.
    """
    segments = a.cu_q.shape[0] - 1
    # Equal causal segments of unequal sides would be aligned top-left.
    equal = (
        a.max_q * segments == a.q.shape[0]
        and a.max_k * segments == a.k.shape[0]
        and (not a.causal or a.max_q == a.max_k)
    )
    name = _settle(
        _OP, a.q, a.k, library, max_seqlen=max(a.max_q, a.max_k), equal=equal, causal=a.causal,
        training=training, return_lse=a.return_lse, deterministic=a.deterministic,
    )  # fmt: skip
    return (False, None) if name == OWN else (True, LIBRARIES[name].run(a))


def windowed_library(
    q: Tensor, k: Tensor, max_seqlen: int, library: str | None, *, training: bool,
    return_lse: bool, deterministic: bool,
) -> str:  # fmt: skip
    """What runs a call under a window: a library, or our kernel. Raises as `run_by_library`."""
    return _settle(
        "windowed_attention", q, k, library, max_seqlen=max_seqlen, equal=False, causal=False,
        training=training, return_lse=return_lse, deterministic=deterministic, windowed=True,
    )  # fmt: skip


def may_run_windows(library: str, asked: str | None, chip: tuple[int, int] | None) -> bool:
    """Whether some call under a window runs by ``library``, asked for or by the measurements."""
    if asked is not None or chip is None:
        return asked == library
    return any(rule.get("windowed") and library in rule["prefer"] for rule in rules_of(chip))


def _settle(op: str, q: Tensor, k: Tensor, library: str | None, **facts: Any) -> str:
    """The name of what runs a call, recorded for `explain` where the measurements decide."""
    if library == OWN or (library is None and backend.forced() is not None):
        return OWN
    if library is not None and library not in LIBRARIES:
        raise ValueError(f"library: expected one of {[OWN, *LIBRARIES]} or None, got {library!r}")
    chip = chip_of(q)
    rules = () if chip is None else rules_of(chip)
    if library is None and not rules:
        return OWN
    call = Call(
        chip=chip, dtype=q.dtype, head_dim=q.shape[2], heads=q.shape[1], heads_k=k.shape[1],
        compiling=torch.compiler.is_compiling(), **facts,
    )  # fmt: skip
    refused: dict[str, str] = {}
    if library is None:
        name, refused = choose(call, rules)
    else:
        name, reason = library, LIBRARIES[library].why_not(call)
        if reason is not None:
            raise ValueError(f"library: {library} cannot run this call: {reason}")
    if not call.compiling:
        reasons = "; ".join(f"{other}: {reason}" for other, reason in refused.items())
        backend.record(op, q.device.type, name, reasons)
    return name
