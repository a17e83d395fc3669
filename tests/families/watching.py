"""What tests of families watch: attention's inputs, a block's branches, calls under hooks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from diffusers.hooks import ModelHook
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class AttentionInputs(TorchFunctionMode):
    """Records what reaches PyTorch's attention: q and k, normed and rotated."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            given = [*args, *(kwargs or {}).values()]
            self.seen += [t.detach().clone() for t in given[:2]]
        return func(*args, **(kwargs or {}))


class BackwardResults(TorchDispatchMode):
    """Records the shapes of what the ops' backwards compute; what nobody asks for is empty."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "sora_kernels" and func.name().endswith("_bwd"):
            self.seen += [tuple(t.shape) for t in results if t.numel()]
        return results


@contextmanager
def branch_values(
    block: nn.Module, names: tuple[str, ...], forced: list[Any] | None = None
) -> Iterator[dict[str, list[Any]]]:
    """Records inputs and outputs of a block's branches, or puts recorded ones in their place.

    With ``forced`` every site computes from upstream's own numbers, so that it is seen alone.
    """
    record: dict[str, list[Any]] = {"in": [], "out": []}

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        record["in"].append((args, dict(kwargs)))
        return None if forced is None else forced["in"][len(record["in"]) - 1]  # type: ignore[call-overload]

    def after(module: Any, args: Any, output: Any) -> Any:
        record["out"].append(output)
        return None if forced is None else forced["out"][len(record["out"]) - 1]  # type: ignore[call-overload]

    with ExitStack() as stack:
        for name in names:
            module = block.get_submodule(name)
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield record


class Counting(ModelHook):  # type: ignore[misc]
    """A hook of diffusers that counts the calls of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs
