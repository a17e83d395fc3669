"""patchify and unpatchify: exact copies, so every comparison is bitwise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sora_kernels import backend
from sora_kernels.ops.patchify import patchify, unpatchify
from sora_kernels.ops.patchify.config import choose_config
from sora_kernels.packing import Grid, PackedLayout, Text
from tests.helpers import poisoned, randn

BACKENDS = ["reference", "native", "triton"]
GRIDS = [(1, 1, 1), (3, 5, 7), (1, 9, 6), (2, 4, 33)]
PATCHES = [(1, 2, 2), (2, 1, 3), (1, 1, 1), (1, 4, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def pack(patch: tuple[int, int, int], order: Any, grids: Any = GRIDS) -> PackedLayout:
    segments = [[Text(i), Grid(*grid)] for i, grid in enumerate(grids)]
    tile = (2, 2, 3) if order == "tile" else None
    return PackedLayout(segments, patch=patch, order=order, tile=tile)


def make_videos(
    layout: PackedLayout, channels: int = 3, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    grids = [part for part in layout.parts if isinstance(part, Grid)]
    pt, ph, pw = layout.patch
    return [randn(channels, g.t * pt, g.h * ph, g.w * pw, dtype=dtype, seed=9) for g in grids]


def expected_tokens(videos: list[Tensor], layout: PackedLayout) -> Tensor:
    """Token by token, from the layout's own coordinates."""
    at = layout.coordinates()[layout.grid_tokens].tolist()
    pt, ph, pw = layout.patch
    rows = []
    for x in videos:
        count = x[0].numel() // (pt * ph * pw)
        for t, h, w in at[:count]:
            block = x[:, t * pt : (t + 1) * pt, h * ph : (h + 1) * ph, w * pw : (w + 1) * pw]
            rows.append(block.flatten())
        at = at[count:]
    return torch.stack(rows)


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("order", ["raster", "tile"])
@pytest.mark.parametrize(
    ("patch", "dtype"), list(zip(PATCHES, [*DTYPES, torch.bfloat16], strict=True))
)
def test_both_directions_are_exact(chosen: str, order: str, patch: Any, dtype: torch.dtype) -> None:
    layout = pack(patch, order)
    videos = make_videos(layout, dtype=dtype)
    with backend.use_backend(chosen), poisoned():
        tokens = patchify(videos, layout)
        back = unpatchify(tokens, layout, 3)
    assert tokens.dtype == dtype
    assert torch.equal(tokens, expected_tokens(videos, layout))
    for video, again in zip(videos, back, strict=True):
        assert torch.equal(video, again)


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("order", ["raster", "tile"])
def test_gradients_are_the_other_direction(chosen: str, order: str) -> None:
    layout = pack((1, 2, 2), order, [(2, 3, 4), (1, 2, 5)])
    videos = [x.requires_grad_() for x in make_videos(layout)]
    dtokens = randn(sum(x[0].numel() // 4 for x in videos), 12, seed=1)
    with backend.use_backend(chosen):
        patchify(videos, layout).backward(dtokens)
        for video, want in zip(videos, unpatchify(dtokens, layout, 3), strict=True):
            assert torch.equal(video.grad, want)
        tokens = dtokens.clone().requires_grad_()
        first, second = unpatchify(tokens, layout, 3)
        (first * videos[0].detach()).sum().backward()  # the second video is not used
        kept = [videos[0].detach(), torch.zeros_like(second)]
        assert torch.equal(tokens.grad, patchify(kept, layout))


@pytest.mark.parametrize("chosen", BACKENDS)
def test_strided_videos_tokens_and_gradients(chosen: str) -> None:
    layout = pack((1, 2, 2), "raster", [(2, 3, 4)])
    video = randn(2, 6, 8, 3).permute(3, 0, 1, 2)  # channels last
    wide = randn(24, 20)
    with backend.use_backend(chosen):
        tokens = patchify([video], layout)
        assert torch.equal(tokens, expected_tokens([video], layout))
        [got] = unpatchify(wide[:, 3:15], layout, 3)
        [want] = unpatchify(wide[:, 3:15].contiguous(), layout, 3)
        assert torch.equal(got, want)
        leaf = video.detach().clone().requires_grad_()
        patchify([leaf], layout).sum().backward()  # an expanded gradient
        assert torch.equal(leaf.grad, torch.ones_like(leaf))
        leaf = tokens.detach().clone().requires_grad_()
        unpatchify(leaf, layout, 3)[0].sum().backward()
        assert torch.equal(leaf.grad, torch.ones_like(leaf))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    grids=st.lists(st.tuples(*[st.integers(1, 6)] * 3), min_size=1, max_size=3),
    patch=st.tuples(*[st.integers(1, 4)] * 3),
    tile=st.one_of(st.none(), st.tuples(*[st.integers(1, 4)] * 3)),
    channels=st.integers(1, 5),
    half=st.booleans(),
)
def test_any_shape(grids: Any, patch: Any, tile: Any, channels: int, half: bool) -> None:
    layout = PackedLayout(
        [[Grid(*g)] for g in grids], patch=patch, order="tile" if tile else "raster", tile=tile
    )
    videos = make_videos(layout, channels, torch.bfloat16 if half else torch.float32)
    tokens = patchify(videos, layout)
    assert torch.equal(tokens, expected_tokens(videos, layout))
    back = unpatchify(tokens, layout, channels)
    assert all(torch.equal(a, b) for a, b in zip(back, videos, strict=True))


def test_configs_cover_rows_and_stay_small() -> None:
    for grid_w in (1, 13, 52, 80, 1000):
        for features in (1, 12, 64, 100, 768):
            block_w, block_f, _ = choose_config(grid_w, features)
            assert block_w * block_f <= 4096
            assert block_f >= min(features, 256)
            assert block_w & (block_w - 1) == block_f & (block_f - 1) == 0


def test_opcheck() -> None:
    layout = pack((1, 2, 2), "tile", [(2, 3, 4), (1, 2, 5)])
    videos = make_videos(layout)
    sizes = ([2, 3, 4, 1, 2, 5], [2, 2, 3, 1, 2, 3], [1, 2, 2])
    ops = torch.ops.sora_kernels
    torch.library.opcheck(ops.patchify_fwd.default, (videos, *sizes))
    torch.library.opcheck(ops.patchify_bwd.default, (randn(34, 12), *sizes, 3))
    with pytest.raises(RuntimeError, match="patchify_fwd has no gradient"):
        ops.patchify_fwd([x.requires_grad_() for x in videos], *sizes)


def test_compiles_without_a_graph_break() -> None:
    def roundtrip(videos: list[Tensor], layout: PackedLayout) -> list[Tensor]:
        return unpatchify(patchify(videos, layout) * 2, layout, 3)

    torch._dynamo.reset()
    compiled = torch.compile(roundtrip, fullgraph=True, backend="aot_eager", dynamic=True)
    for grids in ([(2, 3, 4), (1, 2, 5)], [(1, 7, 2), (3, 2, 2)]):
        layout = pack((1, 2, 2), "raster", grids)
        videos = [x.requires_grad_() for x in make_videos(layout)]
        got = compiled(videos, layout)
        for a, b in zip(got, videos, strict=True):
            assert torch.equal(a, b * 2)
        sum(x.sum() for x in got).backward()
        assert torch.equal(videos[0].grad, torch.full_like(videos[0], 2.0))


LAYOUT = pack((1, 2, 2), "raster", [(1, 2, 3)])
VIDEO = torch.zeros(3, 1, 4, 6)
TOKENS = torch.zeros(6, 12)


@pytest.mark.parametrize(
    ("error", "match", "videos"),
    [
        (ValueError, "videos: expected 1 of them", []),
        (ValueError, "videos: expected 1 of them", [VIDEO, VIDEO]),
        (ValueError, r"videos\[0\]: expected \[C, 1, 4, 6\]", [VIDEO[..., :5]]),
        (ValueError, r"videos\[0\]: expected \[C, 1, 4, 6\]", [VIDEO[0]]),
        (TypeError, r"videos\[0\]: expected an fp32", [VIDEO.to(torch.uint8)]),
        (TypeError, r"videos\[0\]: expected an fp32", [None]),
    ],
)
def test_bad_videos_are_named(error: type[Exception], match: str, videos: Any) -> None:
    with pytest.raises(error, match=match):
        patchify(videos, LAYOUT)


def test_videos_that_differ_are_named() -> None:
    layout = pack((1, 2, 2), "raster", [(1, 2, 3)] * 2)
    for other in (VIDEO.half(), VIDEO[:2], VIDEO.to("meta")):
        with pytest.raises(ValueError, match=r"videos\[1\]: expected 3 channels"):
            patchify([VIDEO, other], layout)


@pytest.mark.parametrize(
    ("error", "match", "tokens", "channels"),
    [
        (ValueError, r"tokens: expected \[6, 12\]", TOKENS[:5], 3),
        (ValueError, r"tokens: expected \[6, 16\]", TOKENS, 4),
        (ValueError, "tokens: expected stride 1", torch.zeros(12, 6).mT, 3),
        (ValueError, "channels: expected at least 1", TOKENS, 0),
        (TypeError, "tokens: expected an fp32", TOKENS.int(), 3),
    ],
)
def test_bad_tokens_are_named(
    error: type[Exception], match: str, tokens: Tensor, channels: int
) -> None:
    with pytest.raises(error, match=match):
        unpatchify(tokens, LAYOUT, channels)


SIZES = [(3, 5, 8), (2, 4, 6), (1, 7, 3)]  # patches of (2, 2, 3): all, one and two axes are odd


@pytest.mark.parametrize("chosen", BACKENDS)
@pytest.mark.parametrize("pad", ["zeros", "replicate"])
def test_odd_sizes_are_padded_at_the_end(chosen: str, pad: str) -> None:
    layout = PackedLayout.from_grids(SIZES, patch=(2, 2, 3), order="tile", pad=True)
    videos = [randn(2, *size, seed=i).requires_grad_() for i, size in enumerate(SIZES)]
    filled = []
    for x in videos:
        for axis, p in zip((1, 2, 3), layout.patch, strict=True):
            missing = -x.shape[axis] % p
            last = x.narrow(axis, x.shape[axis] - 1, 1)
            more = last if pad == "replicate" else torch.zeros_like(last)
            x = torch.cat([x, *[more] * missing], dim=axis)
        filled.append(x)
    expected = expected_tokens(filled, layout)
    upstream = randn(*expected.shape, seed=5)
    with backend.use_backend(chosen):
        tokens = patchify(videos, layout, pad=pad)
        found = torch.autograd.grad(tokens, videos, upstream)
        back = unpatchify(tokens, layout, 2, sizes=SIZES)
    assert torch.equal(tokens, expected)
    for mine, exact in zip(found, torch.autograd.grad(expected, videos, upstream), strict=True):
        torch.testing.assert_close(mine, exact)
    assert all(torch.equal(x, y) for x, y in zip(back, videos, strict=True))


@pytest.mark.parametrize(
    ("match", "call"),
    [
        ("pad: expected one of", lambda x, lay: patchify([x], lay, pad="mirror")),
        (r"videos\[0\]: expected", lambda x, lay: patchify([x], lay)),
        (r"videos\[0\]: expected", lambda x, lay: patchify([x[..., :2]], lay, pad="zeros")),
        (r"sizes\[0\]: expected less", lambda x, lay: unpatchify(
            patchify([x], lay, pad="zeros"), lay, 1, sizes=[(1, 3, 7)])),
        ("sizes: expected 1", lambda x, lay: unpatchify(
            patchify([x], lay, pad="zeros"), lay, 1, sizes=[])),
    ],
)  # fmt: skip
def test_bad_padding_is_named(match: str, call: Any) -> None:
    layout = PackedLayout.from_grids([(1, 3, 5)], patch=(1, 2, 2), pad=True)
    with pytest.raises(ValueError, match=match):
        call(randn(1, 1, 3, 5), layout)
