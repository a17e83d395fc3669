"""The checks that every family passes.

How a family is added: write ``tests/families/test_<family>.py`` with a ``Case`` and a class::

    CASE = Case(
        model=model,              # () -> tiny model of the real class (call `randomised` on it)
        inputs=inputs,            # dtype -> keyword arguments of the model
        block=block,              # () -> one block at a production width
        block_inputs=...,         # dtype -> positional arguments of that block
        branches=("attn1", ...),  # children of a block that run between sites (no norms)
        fp32=("scale_shift_table", "norm"),   # parameters that stay fp32 in bf16, as upstream loads
    )

    class TestWan(FamilyTests):
        case = CASE

and a row per block class in ``docs/families.md``, whose counts ``test_counts`` checks. Everything
else is inherited. The widths are tiny; a whole family should take well under a minute.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, HookRegistry
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from sora_kernels import accelerate, restore, use_backend
from sora_kernels.families import is_accelerated
from sora_kernels.families._data import BY_PATH
from sora_kernels.families._patch import class_path, upstream_class
from tests.families.documented import documented_counts
from tests.families.watching import AttentionInputs, BackwardResults, Counting, branch_values
from tests.helpers import randn, ulp

Inputs = Callable[[torch.dtype], Any]


@dataclass(frozen=True)
class Case:
    """What a family's tests need; see the module's docstring."""

    model: Callable[[], nn.Module]
    inputs: Callable[[torch.dtype], dict[str, Any]]
    block: Callable[[], nn.Module]
    block_inputs: Callable[[torch.dtype], tuple[Any, ...]]
    branches: tuple[str, ...]
    fp32: tuple[str, ...] = ()
    lora: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    cache: bool = True  # whether the model works with a cache of diffusers' first block
    compile: bool | str = True  # or "restored"; False where another case has the same blocks


def randomised(model: nn.Module) -> nn.Module:
    """Random numbers for every parameter (some start at zero or one), the same ones every time."""
    for i, p in enumerate(model.parameters()):
        spread = 0.3 if p.ndim < 2 else min(0.5, p[0].numel() ** -0.5)
        shift = 1.0 if p.ndim < 2 and bool((p == 1).all()) else 0.0
        p.data = randn(*p.shape, seed=i) * spread + shift
    return model.eval()


def cast(module: nn.Module, dtype: torch.dtype, fp32: tuple[str, ...]) -> nn.Module:
    """Parameters and buffers in ``dtype``, except those that upstream keeps in fp32."""
    for name, p in (*module.named_parameters(), *module.named_buffers()):
        if p.is_floating_point() and not any(part in name.split(".") for part in fp32):
            p.data = p.data.to(dtype)
    return module


def blocks(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if class_path(upstream_class(m)) in BY_PATH]


def tensors(value: Any) -> list[Tensor]:
    """The floating tensors in nested tuples and dictionaries."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (list, tuple)) else []


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return tensors(model(**inputs, return_dict=False))[0]


def sample(inputs: dict[str, Any], number: int) -> dict[str, Any]:
    """The inputs of one sample; tensors without a dimension of samples stay as they are."""
    batch = max(v.shape[0] for v in inputs.values() if isinstance(v, Tensor) and v.ndim > 2)
    return {
        k: v[number : number + 1] if isinstance(v, Tensor) and v.ndim and v.shape[0] == batch else v
        for k, v in inputs.items()
    }


def gradients(outputs: list[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of all leaves that the outputs depend on, for random upstream gradients."""
    upstream = [randn(*o.shape, seed=i).to(o.dtype) for i, o in enumerate(outputs)]
    found = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def close(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Errors relative to the largest element, with a floor: some gradients are zero."""
    assert got.keys() == want.keys()
    largest = max(w.abs().max().item() for w in want.values())
    for name, w in want.items():
        error = (got[name] - w).abs().max().item()
        scale = max(w.abs().max().item(), 1e-3 * largest)
        assert error <= tolerance * scale, f"{name}: {error:.2e} of {scale:.2e}"


def two_x(got: Tensor, exact: Tensor, lowp: Tensor, factor: float, floor: float, name: str) -> None:
    """At most ``factor`` times upstream's own error, with an absolute floor."""
    error = (got.double() - exact.double()).abs().max().item()
    allowed = factor * (lowp.double() - exact.double()).abs().max().item() + floor
    assert error <= allowed, f"{name}: {error:.2e} > {allowed:.2e}"


class FamilyTests:
    """Inherit, and set ``case``."""

    case: Case

    @pytest.fixture(autouse=True)
    def _seed(self) -> None:
        torch.manual_seed(0)

    @pytest.fixture()
    def model(self) -> nn.Module:
        return self.case.model()

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        return self.case.inputs(dtype)

    def test_counts(self, model: nn.Module) -> None:
        """Exactly the sites that the docs list, in every block."""
        report = accelerate(model, dry_run=True)
        assert not any(is_accelerated(b) for b in blocks(model))
        assert accelerate(model).fused == report.fused
        rows = {e.module: e.family for e in report.entries}
        assert len(rows) == len(blocks(model)) > 0
        for module, family in rows.items():
            found = Counter(e.op for e in report.fused if e.module == module)
            assert found == documented_counts(family), module
        assert all(is_accelerated(b) for b in blocks(model))

    def test_fp32(self, model: nn.Module) -> None:
        inputs = self.inputs()
        want = run(model, inputs)
        expected = gradients([want], parameters(model))
        accelerate(model)
        got = run(model, inputs)
        close({"output": got}, {"output": want}, 2e-5)
        close(gradients([got], parameters(model)), expected, 1e-4)

    def test_triton(self, model: nn.Module) -> None:
        """One sample through the Triton kernels in their interpreter: a block of each kind."""
        inputs = sample(self.inputs(), 0)
        want = run(model, inputs)
        expected = gradients([want], parameters(model))
        first = {e.family: e.module for e in reversed(accelerate(model).entries)}
        for name, module in model.named_modules():
            if is_accelerated(module) and name not in first.values():
                restore(module)
        with use_backend("triton"):
            got = run(model, inputs)
            grads = gradients([got], parameters(model))
        close({"output": got}, {"output": want}, 2e-5)
        close(grads, expected, 1e-4)

    def test_bf16(self, model: nn.Module) -> None:
        """The 2x rule end to end: an error against fp32 like upstream's own."""
        low = cast(copy.deepcopy(model), torch.bfloat16, self.case.fp32)
        for wide, p in zip(model.parameters(), low.parameters(), strict=True):
            wide.data = p.data.float()  # both start from the same numbers
        results = []
        for module, dtype, patched in (
            (model, torch.float32, False),
            (low, torch.bfloat16, False),
            (low, torch.bfloat16, True),
        ):
            if patched:
                accelerate(module)
            given = {
                k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
                for k, v in self.inputs(torch.bfloat16).items()
            }
            out = run(module, given)
            results.append((out, gradients([out], parameters(module))))
        (exact, exact_grads), (lowp, low_grads), (got, grads) = results
        two_x(got, exact, lowp, 2, 2 * ulp(exact.abs().max(), torch.bfloat16).item(), "output")
        largest = max(g.abs().max().item() for g in exact_grads.values())
        for name, grad in grads.items():
            assert grad.dtype == low_grads[name].dtype
            two_x(grad, exact_grads[name], low_grads[name], 3, 2**-8 * largest, name)

    def test_law(self) -> None:
        """At a production width, every site alone: at least 99.9% of its bf16 outputs are equal."""
        block = cast(self.case.block(), torch.bfloat16, self.case.fp32)
        given = self.case.block_inputs(torch.bfloat16)
        seen: list[list[Tensor]] = []
        recorded: Any = None
        with torch.no_grad():
            for patched in (False, True):
                if patched:
                    accelerate(block, strict=True)
                with (
                    branch_values(block, self.case.branches, recorded) as record,
                    AttentionInputs() as a,
                ):
                    output = block(*given)
                recorded = recorded or record
                seen.append([*tensors(record["in"]), *tensors(output), *a.seen])
        assert len(seen[0]) == len(seen[1]) > len(self.case.branches)
        largest = max(t.abs().max().item() for t in seen[0])
        for i, (want, got) in enumerate(zip(*seen, strict=True)):
            assert want.dtype == got.dtype and want.shape == got.shape, i
            same = (want == got).float().mean().item()
            assert same >= 0.999, f"value {i} {tuple(got.shape)}: {same:.3%} bit-equal"
            worst = (want.double() - got.double()).abs().max().item()
            assert worst <= ulp(torch.tensor(largest), torch.bfloat16).item(), f"value {i}"

    def test_block_at_production_width(self) -> None:
        block = self.case.block()
        given = self.case.block_inputs(torch.float32)
        want = tensors(block(*given))
        expected = gradients(want, parameters(block))
        accelerate(block, strict=True)
        got = tensors(block(*given))
        close(dict(enumerate(got)), dict(enumerate(want)), 2e-5)  # type: ignore[arg-type]
        close(gradients(got, parameters(block)), expected, 1e-4)

    def test_deepcopy_runs_the_copy(self, model: nn.Module) -> None:
        accelerate(model)
        want = run(model, self.inputs())
        other = copy.deepcopy(model)
        assert torch.equal(run(other, self.inputs()), want)
        for block in blocks(other):
            for p in block.parameters():
                p.data = p.data * 0.5
        assert not torch.allclose(run(other, self.inputs()), want)
        assert torch.equal(run(model, self.inputs()), want)
        calls: list[str] = []
        for name, m in (("model", model), ("copy", other)):
            for block in blocks(m):
                child = block.get_submodule(self.case.branches[0])
                child.register_forward_hook(lambda *_, n=name: calls.append(n))  # type: ignore[misc]
        run(other, self.inputs())
        assert calls == ["copy"] * len(blocks(other))

    def test_pickle(self, model: nn.Module) -> None:
        accelerate(model)
        loaded = pickle.loads(pickle.dumps(model))
        assert all(is_accelerated(b) for b in blocks(loaded))
        assert torch.equal(run(loaded, self.inputs()), run(model, self.inputs()))

    def test_restore(self, model: nn.Module) -> None:
        before = run(model, self.inputs())
        keys = list(model.state_dict())
        held = [dict(m.__dict__) for m in model.modules()]
        classes = [type(getattr(m, "processor", None)) for m in model.modules()]
        accelerate(model)
        assert list(model.state_dict()) == keys
        assert restore(model) > 0
        assert [dict(m.__dict__).keys() for m in model.modules()] == [h.keys() for h in held]
        assert [type(getattr(m, "processor", None)) for m in model.modules()] == classes
        assert torch.equal(run(model, self.inputs()), before)
        assert restore(model) == 0

    def test_gradient_checkpointing(self, model: nn.Module) -> None:
        accelerate(model)
        model.train()
        want = gradients([run(model, self.inputs())], parameters(model))
        model.enable_gradient_checkpointing()  # type: ignore[operator]
        got = gradients([run(model, self.inputs())], parameters(model))
        close(got, want, 1e-6)

    def test_hooks_before_and_after(self, model: nn.Module) -> None:
        """Ours is innermost, whoever came first; hooks are removed and restored in any order."""
        want = run(model, self.inputs())
        early, late = ([Counting() for _ in blocks(model)] for _ in range(2))
        for block, hook in zip(blocks(model), early, strict=True):
            HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "early")
        assert not accelerate(model).left
        for block, hook in zip(blocks(model), late, strict=True):
            HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, "late")
        close({"": run(model, self.inputs())}, {"": want}, 2e-5)
        assert [h.calls for h in (*early, *late)] == [1] * 2 * len(early)
        for block in blocks(model):
            block._diffusers_hook.remove_hook("early")  # type: ignore[union-attr, operator]
            assert is_accelerated(block)
        assert restore(model) > 0
        run(model, self.inputs())
        assert [h.calls for h in (*early, *late)] == [1] * len(early) + [2] * len(late)
        for block in blocks(model):
            block._diffusers_hook.remove_hook("late")  # type: ignore[union-attr, operator]
            assert block.forward.__func__ is type(block).forward
        assert torch.equal(run(model, self.inputs()), want)

    @pytest.mark.parametrize("first", ["cache", "ours"])
    def test_cache(self, model: Any, first: str) -> None:
        """A cache of diffusers before or after ours gives what it gives alone."""
        if not self.case.cache:  # then not without us either
            with pytest.raises((AttributeError, RuntimeError, ValueError)), torch.no_grad():
                model.enable_cache(FirstBlockCacheConfig(threshold=1.0))
                with model.cache_context("cond"):
                    run(model, self.inputs())
            return
        want = run(model, self.inputs())
        steps = [lambda: model.enable_cache(FirstBlockCacheConfig(threshold=1e6)),
                 lambda: accelerate(model)]  # fmt: skip
        for step in steps if first == "cache" else steps[::-1]:
            step()
        with torch.no_grad(), model.cache_context("cond"):
            close({"": run(model, self.inputs())}, {"": want}, 2e-5)
            calls = Counter[str]()
            last = blocks(model)[-1].get_submodule(self.case.branches[-1])
            last.register_forward_hook(lambda *_: calls.update(["last"]))  # type: ignore[func-returns-value]
            close({"": run(model, self.inputs())}, {"": want}, 2e-5)
            assert not calls  # the second step takes it from the cache
        model.disable_cache()
        assert all(is_accelerated(b) for b in blocks(model))
        close({"": run(model, self.inputs())}, {"": want}, 2e-5)

    @pytest.mark.parametrize("first", ["lora", "ours"])
    def test_lora(self, model: Any, first: str) -> None:
        config = LoraConfig(
            r=2, target_modules=list(self.case.lora), init_lora_weights=False, lora_dropout=0.0
        )
        plain = copy.deepcopy(model)
        outputs = []
        for m, patched in ((plain, False), (model, True)):
            steps = [lambda m=m: inject_adapter_in_model(config, m)]
            if patched:
                steps.insert(first == "lora", lambda m=m: accelerate(m))
            for step in steps:
                step()
            for i, (_, p) in enumerate(parameters(m).items()):
                p.data = randn(*p.shape, seed=i) * 0.1
            out = run(m, self.inputs())
            with BackwardResults() as computed:
                grads = gradients([out], parameters(m))
            outputs.append((out, grads))
        # weights, tables and modulations are frozen: streams and heads alone have gradients
        assert computed.seen and all(len(s) > 2 and s[1] > 1 for s in computed.seen)
        assert outputs[0][1] and all("lora" in name for name in outputs[0][1])
        close({"": outputs[1][0]}, {"": outputs[0][0]}, 2e-5)
        close(outputs[1][1], outputs[0][1], 1e-4)

    @pytest.mark.parametrize("first", ["offload", "ours"])
    def test_group_offload(self, model: Any, first: str) -> None:
        """In memory; norms then have hooks of their own, which decides their sites at the call."""
        if not model._supports_group_offloading:
            return
        want = run(model, self.inputs())
        cpu = torch.device("cpu")
        steps = [lambda: model.enable_group_offload(cpu, cpu, offload_type="leaf_level"),
                 lambda: accelerate(model)]  # fmt: skip
        for step in steps if first == "offload" else steps[::-1]:
            step()
        assert all(is_accelerated(b) for b in blocks(model))
        with torch.no_grad():
            close({"": run(model, self.inputs())}, {"": want}, 2e-5)
        restore(model)
        with torch.no_grad():
            close({"": run(model, self.inputs())}, {"": want}, 2e-5)

    def test_a_hooked_norm_runs_upstreams_code(self, model: nn.Module) -> None:
        """Hooks put on any module after patching are called as often as without us."""
        counts = []
        for patched in (False, True):
            if patched:
                accelerate(model)
            calls = Counter[str]()
            handles = [
                m.register_forward_hook(
                    lambda *_, n=name, c=calls: c.update([n])  # type: ignore[misc]
                )
                for name, m in model.named_modules()
            ]
            out = run(model, self.inputs())
            for handle in handles:
                handle.remove()
            counts.append((calls, out))
        assert counts[0][0] == counts[1][0]
        close({"": counts[1][1]}, {"": counts[0][1]}, 2e-5)

    def test_compile(self, model: Any) -> None:
        """Repeated blocks without a graph break; for one family with upstream's in between."""
        if not self.case.compile:
            return
        want = run(model, self.inputs())
        accelerate(model)
        if model._repeated_blocks:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        else:
            for block in blocks(model):
                block.compile(fullgraph=True, backend="aot_eager")
        close({"": run(model, self.inputs())}, {"": want}, 2e-5)
        if self.case.compile == "restored":
            restore(model)
            close({"": run(model, self.inputs())}, {"": want}, 2e-5)
            accelerate(model)
            close({"": run(model, self.inputs())}, {"": want}, 2e-5)
        torch.compiler.reset()
