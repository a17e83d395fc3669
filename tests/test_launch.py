"""What launches share: the device of the tensors, sizes of grids, strides, remembered configs."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch

from sora_kernels.ops import _tables
from sora_kernels.ops._config import column_slice
from sora_kernels.ops._launch import cdiv, launch, per_batch, token_strides


class Kernel:
    """Notes how it is launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **meta: self.launches.append((grid, CURRENT[-1], args, meta))


CURRENT = [0]


class Device:
    """In place of torch.cuda.device."""

    def __init__(self, device: torch.device) -> None:
        self.index = device.index

    def __enter__(self) -> None:
        CURRENT.append(self.index)

    def __exit__(self, *_: object) -> None:
        CURRENT.pop()


@pytest.mark.parametrize("index", [0, 1])
def test_the_device_of_the_tensors_is_current(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CURRENT[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    kernel = Kernel()
    launch(kernel, (2, 3), torch.device("cuda", index), "x", num_warps=4)
    assert kernel.launches == [((2, 3), index, ("x",), {"num_warps": 4})]
    assert CURRENT == [0]


def test_an_empty_grid_launches_nothing() -> None:
    kernel = Kernel()
    launch(kernel, (3, 0), torch.device("cpu"))
    launch(kernel, (3, 1), torch.device("cpu"))
    assert [grid for grid, *_ in kernel.launches] == [(3, 1)]


def test_cdiv() -> None:
    assert [cdiv(n, 4) for n in range(10)] == [math.ceil(n / 4) for n in range(10)]
    assert cdiv(2**62 + 1, 2) == 2**61 + 1


def test_strides_of_tokens() -> None:
    x = torch.empty(3, 5, 8)
    assert token_strides(x) == (40, 8) and token_strides(None) == (0, 0)
    assert token_strides(x[:1]) == (0, 8), "of a batch of one the stride says nothing"
    flat = [(x,), (x[:1, :4],), (x, None, x[..., :4])]
    assert [per_batch(*tensors) for tensors in flat] == [None, None, None]
    others = [(x[:, :4],), (x, x[::2]), (x[:, :1].expand(3, 5, 8),)]
    assert [per_batch(*tensors) for tensors in others] == [4, 5, 5]
    n = torch.arange(15)
    for view in (x, x[..., 2:6]):
        offsets = (n // 5) * view.stride(0) + n % 5 * view.stride(1)
        assert torch.equal(n * view.stride(1), offsets)


def test_slices_of_columns_are_hardly_empty() -> None:
    for width in (1, 100, 1152, 1536, 3072, 4608, 6240, 8960, 40000):
        size = column_slice(width)
        padded = cdiv(width, size) * size
        assert size in (256, 512, 1024) and padded < width + 256 + width // 15
    assert (column_slice(1536), column_slice(4608), column_slice(12288)) == (512, 512, 1024)


class Tile(NamedTuple):
    width: int
    num_warps: int


def test_a_config_is_computed_once_unless_it_is_recorded_or_forced() -> None:
    asked = []

    @_tables.remembered
    def choose(width: int, chip: _tables.Chip | None = None) -> Tile:
        asked.append(width)
        return _tables.tuned("op", "k", Tile(width, 4), ("num_warps",), chip, width=width)

    assert choose(7) == choose(7) == Tile(7, 4) and asked == [7]
    with _tables.recorded() as found:
        choose(7)
    assert len(found) == 1
    with _tables.forced(found[0], {"num_warps": 8}):
        assert choose(7) == Tile(7, 8)
    assert choose(7) == Tile(7, 4) and asked == [7, 7, 7]
