"""`accelerate` and `restore` themselves, on models of any kind."""

from __future__ import annotations

import functools
import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import accelerate as hf_accelerate
import pytest
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

import sora_kernels
from sora_kernels import accelerate, laws, restore
from sora_kernels.families import _fingerprint, _sites, is_accelerated
from sora_kernels.families._data import BLOCKS, Block
from sora_kernels.families._fingerprint import fingerprint, unknown_source
from sora_kernels.families._patch import class_path
from sora_kernels.families.sources import known_sources, main
from sora_kernels.packing import Rope
from tests.families import test_wan
from tests.families.common import (
    FamilyTests,
    blocks,
    close,
    run,
)
from tests.families.documented import documented, documented_counts, documented_points
from tests.helpers import randn


@pytest.fixture()
def model() -> Any:
    return test_wan.model()


@pytest.fixture()
def given() -> dict[str, Any]:
    return test_wan.inputs(torch.float32)


def test_an_unknown_model_goes_through_unchanged() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    report = accelerate(model)
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
    assert not report.entries and not report.counts()
    assert (
        str(report) == "Sequential: nothing to accelerate (no block of a known family); unchanged"
    )
    with pytest.raises(RuntimeError, match="nothing to accelerate"):
        accelerate(model, strict=True)
    assert restore(model) == 0


def test_bad_input_is_named(model: Any) -> None:
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        accelerate(test_wan)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
        restore(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="law: expected one of"):
        accelerate(model, law="exact")
    assert not any(is_accelerated(b) for b in blocks(model))


def test_the_report_can_be_read(model: Any) -> None:
    model.blocks[1].norm1.register_forward_hook(lambda *_: None)
    model.blocks[1].attn1.fuse_projections()
    report = accelerate(model)
    lines = str(report).splitlines()
    assert lines[0] == "WanTransformer3DModel (Wan): 8 of 10 sites fused"
    assert "  1 x blocks.0.norm1: norm_modulate, law fp32_once" in str(report)
    assert "  2 x blocks.*.ffn: gate_residual, law fp32_once" in str(report)
    assert "  1 x blocks.1.norm1: the norm has forward hooks" in str(report)
    assert "  1 x blocks.1.attn1.qk: fused projections" in str(report)
    assert lines.index("  left alone:") > lines.index("  fused:")


def test_strict_changes_nothing_before_it_raises(model: Any) -> None:
    model.blocks[1].norm1.register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="the norm has forward hooks"):
        accelerate(model, strict=True)
    assert not any(is_accelerated(b) for b in blocks(model))


def test_another_law_is_named_and_acts(model: Any) -> None:
    low = model.to(torch.bfloat16)
    inputs = test_wan.inputs(torch.bfloat16)
    own = run(low, inputs)
    report = accelerate(low, law="fp32_once")
    assert report.law == "fp32_once" and {e.law for e in report.fused} == {"fp32_once"}
    assert "rounding law: fp32_once everywhere, not the model's own" in str(report)
    assert not torch.equal(run(low, inputs), own)
    accelerate(low)  # again, with its own law: nothing has to be restored in between
    assert torch.equal(run(low, inputs), own)
    assert restore(low) == 2 * len(blocks(low))


def test_instances_only(model: Any, given: dict[str, Any]) -> None:
    other = test_wan.model()
    accelerate(model)
    assert not any(is_accelerated(b) for b in blocks(other))
    assert "sora" not in repr(WanTransformerBlock.forward) + repr(
        type(other.blocks[0].attn1.processor)
    )


def test_processors_keep_their_attributes(
    model: Any, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    active = _AttentionBackendRegistry._active_backend  # setting one for a model sets this too
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)
    model.blocks[0].attn1.processor._attention_backend = "native"
    model.blocks[0].attn1.processor.note = 1
    accelerate(model)
    processor = model.blocks[0].attn1.processor
    assert (processor._attention_backend, processor.note) == ("native", 1)
    model.set_attention_backend("_native_math")
    run(model, given)
    restore(model)
    processor = model.blocks[0].attn1.processor
    assert processor._attention_backend == "_native_math" and not hasattr(processor, "sora_law")


def test_an_unknown_processor_is_left_alone(model: Any) -> None:
    class Other(type(model.blocks[0].attn1.processor)):  # type: ignore[misc]
        pass

    model.blocks[0].attn1.processor = Other()
    report = accelerate(model)
    assert [(e.module, e.site, e.reason) for e in report.left] == [
        ("blocks.0", "attn1.qk", "the processor is Other")
    ]
    assert type(model.blocks[0].attn1.processor) is Other
    restore(model)
    assert type(model.blocks[0].attn1.processor) is Other


def _doubled(block: Any, *args: Any, **kwargs: Any) -> Any:
    return 2 * type(block).forward(block, *args, **kwargs)


def test_a_forward_of_somebody_elses_is_left_alone(model: Any) -> None:
    theirs = functools.partial(_doubled, model.blocks[0])
    model.blocks[0].forward = theirs
    report = accelerate(model)
    whole = {e.reason for e in report.left if e.module == "blocks.0"}
    assert whole == {"its forward is partial, not that of its class"}
    assert model.blocks[0].forward is theirs and is_accelerated(model.blocks[1])
    restore(model)
    assert model.blocks[0].forward is theirs


def test_a_subclass_of_a_known_block_is_left_alone() -> None:
    class Mine(WanTransformerBlock):
        pass

    report = accelerate(Mine(24, 32, 2))
    assert [e.reason for e in report.left] == ["Mine is a subclass of WanTransformerBlock"]


def test_hooks_of_accelerate(model: Any, given: dict[str, Any]) -> None:
    """They keep the forward below them in `_old_forward`."""
    want = run(model, given)
    calls: Counter[str] = Counter()

    class Counting(hf_accelerate.hooks.ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls["pre"] += 1
            return args, kwargs

    first, second = model.blocks
    hf_accelerate.hooks.add_hook_to_module(first, Counting())
    accelerate(model, strict=True)
    hf_accelerate.hooks.add_hook_to_module(second, Counting())
    assert is_accelerated(first) and is_accelerated(second)
    close({"": run(model, given)}, {"": want}, 2e-5)
    assert calls["pre"] == 2
    hf_accelerate.hooks.remove_hook_from_module(first)
    assert is_accelerated(first)
    assert restore(model) == 4
    assert torch.equal(run(model, given), want)
    assert calls["pre"] == 3
    hf_accelerate.hooks.remove_hook_from_module(second)
    assert torch.equal(run(model, given), want)


def test_unknown_source_leaves_the_block_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a change upstream: recognised by its source, not by a version."""
    path = f"{class_path(WanTransformerBlock)}.forward"

    def changed(self: Any, hidden_states: Tensor, *args: Any) -> Tensor:
        return hidden_states

    monkeypatch.setattr(WanTransformerBlock, "forward", changed)
    fingerprint.cache_clear()
    try:
        report = accelerate(model)
    finally:
        fingerprint.cache_clear()
    reasons = {e.reason for e in report.left}
    assert len(reasons) == 1 and f"source of {path} is unknown" in str(reasons)
    assert not any(is_accelerated(b) for b in blocks(model))


def test_fingerprints_ignore_what_does_not_compute() -> None:
    def text(source: str) -> str:
        return _fingerprint._text(_fingerprint.ast.parse(source))

    plain = text("def f(x, y=1):\n    z: int = x + y\n    return z")
    noted = text(
        'def f(x: int, y: int = 1) -> int:\n    """Doc."""\n    # why\n    z = (x +\n y)\n'
        "    return z"
    )
    assert plain == noted
    assert plain != text("def f(x, y=2):\n    z = x + y\n    return z")
    assert plain != text("def f(x, y=1):\n    z = x - y\n    return z")
    assert unknown_source({"torch.nn.no_such.thing": "0"}) is not None


def test_the_installed_upstream_is_the_one_that_was_restated(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Fails loudly when a new diffusers changes code that an adapter restates."""
    unknown = [p for p, known in known_sources().items() if fingerprint(p) not in known.split()]
    assert not unknown
    assert main([]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(known_sources())


def test_the_docs_list_every_family() -> None:
    assert set(documented()) == {block.family for block in BLOCKS}
    assert len({block.family for block in BLOCKS}) == len(BLOCKS)
    for block in BLOCKS:
        assert documented_counts(block.family).total() > 0
        assert f"`{block.path.rsplit('.', 1)[1]}`" in documented()[block.family]["block class"]
        sites = (*block.sites, *(p.site for p in block.processors))
        points = {point for site in sites for point in site.law}
        assert documented_points(block.family) == points, block.family
        assert set(documented_counts(block.family)) == {site.op for site in sites}
        for column in ("skeleton", "left alone"):
            assert documented()[block.family][column]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.family)
def test_rows_name_what_exists(block: Block) -> None:
    skeleton = importlib.import_module(f"sora_kernels.families.{block.skeleton}")
    assert callable(getattr(skeleton, block.forward))
    assert callable(getattr(skeleton, block.survey))
    names = [site.name for site in (*block.sites, *(p.site for p in block.processors))]
    assert len(set(names)) == len(names)
    for site in (*block.sites, *(p.site for p in block.processors)):
        laws.resolve(site.law)
        assert callable(getattr(sora_kernels, site.op))
    for processor in block.processors:
        ours = _fingerprint.resolve(f"sora_kernels.families.processors.{processor.ours}")
        upstream = _fingerprint.resolve(processor.upstream)
        assert ours.__mro__[1] is upstream
        for name in ("_attention_backend", "_parallel_config"):
            assert getattr(ours, name, "none") == getattr(upstream, name, "none")
        assert callable(importlib.import_module(ours.__module__).why_left)
        assert any(path.startswith(processor.upstream) for path in processor.sources)
    assert any(path.startswith(block.path) for path in block.sources)


def test_every_family_is_tested() -> None:
    tested = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        if path.stem == "test_fsdp":
            continue
        module = importlib.import_module(f"tests.families.{path.stem}")
        for value in vars(module).values():
            if (
                isinstance(value, type)
                and issubclass(value, FamilyTests)
                and hasattr(value, "case")
            ):
                tested |= set(accelerate(value.case.model(), dry_run=True).families)
    assert tested == {block.family for block in BLOCKS}


def test_nothing_of_upstream_is_imported_without_a_model() -> None:
    code = (
        "import sys, torch, sora_kernels; sora_kernels.accelerate(torch.nn.Linear(2, 2)); "
        "sys.exit('diffusers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_tables_are_kept_for_the_blocks_of_one_step() -> None:
    made = []

    def make(cos: Tensor, sin: Tensor, heads: int) -> Rope:
        made.append(heads)
        return Rope.from_tables(cos, sin)

    cos, sin = randn(3, 4, seed=1), randn(3, 4, seed=2)
    first = _sites.remembered_rope(cos, sin, 2, make)
    assert _sites.remembered_rope(cos, sin, 2, make) is first and len(made) == 1
    cos.mul_(2)  # the same tensor, other numbers
    second = _sites.remembered_rope(cos, sin, 2, make)
    assert torch.equal(second.cos, cos) and len(made) == 2
    assert _sites.remembered_rope(cos, sin, 4, make) is not second
    assert _sites.remembered_rope(cos.clone(), sin, 4, make) is not second
    learned = cos.clone().requires_grad_()
    assert _sites.remembered_rope(learned, sin, 4, make).cos.requires_grad
    del cos, learned, first, second
    _sites.remembered_rope(randn(3, 4, seed=3), sin, 2, make)
    assert not _sites._last_rope  # gone with its tables
