"""Rope: positions, accuracy of the tables, context extension."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from sora_kernels.packing import Grid, PackedLayout, Rope, Text


def mixed() -> PackedLayout:
    segments = [
        [Text(7), Grid(3, 10, 13)],
        [Grid(1, 20, 22, origin=(0.5, 0, 0), scale=(1, 0.5, 2))],
        [Grid(4, 6, 8, origin=(1, 0, 0)), Text(5)],
    ]
    return PackedLayout(segments, order="tile", device="cpu")


def exact_tables(positions, frequencies):
    """cos and sin in 80-bit arithmetic; `positions` [N], `frequencies` [F]."""
    angle = np.outer(np.asarray(positions, np.longdouble), np.asarray(frequencies, np.longdouble))
    return np.cos(angle), np.sin(angle)


def worst(rope: Rope, cos, sin) -> float:
    dense = [x.numpy().astype(np.longdouble) for x in rope.dense()]
    return float(max(np.abs(dense[0] - cos).max(), np.abs(dense[1] - sin).max()))


HALF_ULP = 2.0**-25  # of fp32 values in [0.5, 1)


@pytest.mark.parametrize("origin", [0.0, 100_000.0, 1_000_000.25])
def test_rope_is_exact_to_fp32_rounding_far_out(origin):
    layout = PackedLayout([[Grid(9, 1, 1, origin=(origin, 0, 0))]], device="cpu")
    theta = np.longdouble(10000)
    frequencies = theta ** (-np.arange(0, 64, 2, dtype=np.longdouble) / 64)
    cos, sin = exact_tables(origin + np.arange(9.0), frequencies)
    assert worst(layout.rope((64, 0, 0)), cos, sin) <= HALF_ULP * 1.01
    single = np.cos(
        (np.float32(origin) + np.arange(9, dtype=np.float32))[:, None]
        * frequencies.astype(np.float32)
    )
    if origin >= 100_000:
        assert np.abs(single - cos).max() > 1e-3  # what fp32 angles would cost


def test_rope_with_given_frequencies_as_ltx_video_uses_them():
    # Positions in [-1, 1], frequencies from pi/2 to 10000 * pi/2: angles up to 15,708.
    steps = 16
    layout = PackedLayout(
        [[Grid(20, 4, 6, origin=(-1, -1, -1), scale=(2 / 20, 2 / 2048, 2 / 2048))]], device="cpu"
    )
    frequencies = [np.pi / 2 * 10000 ** np.linspace(0, 1, steps) for _ in range(3)]
    rope = layout.rope((32, 32, 32), frequencies=frequencies)
    t, h, w = layout.coordinates().numpy().T.astype(np.float64)
    tables = [
        exact_tables(position, frequencies[0])
        for position in (-1 + 2 / 20 * t, -1 + 2 / 2048 * h, -1 + 2 / 2048 * w)
    ]
    cos, sin = (np.concatenate([table[i] for table in tables], axis=1) for i in (0, 1))
    assert worst(rope, cos, sin) <= HALF_ULP * 1.01
    assert rope is layout.rope((32, 32, 32), frequencies=frequencies)


def test_rope_positions_axes_and_text():
    layout = mixed()
    axes = (4, 6, 8)
    rope = layout.rope(axes, theta=(256.0, 10000.0, 10000.0))
    assert rope.axes == axes and rope.rotary_dim == 18 and rope.num_tokens == layout.num_tokens
    assert rope.axis_of_pair == (0, 0, 1, 1, 1, 2, 2, 2, 2)
    assert rope.cos.dtype == torch.float32 and rope.position_index.dtype == torch.int32
    cos, sin = rope.dense()
    coordinates = layout.coordinates().double()
    part_of = layout.part_of_token.tolist()
    for n in range(0, layout.num_tokens, 7):
        part = layout.parts[part_of[n]]
        if isinstance(part, Text):
            assert cos[n].tolist() == [1.0] * 9 and sin[n].tolist() == [0.0] * 9
            continue
        for j, a in enumerate(rope.axis_of_pair):
            i = j - rope.axis_of_pair.index(a)
            position = part.origin[a] + part.scale[a] * coordinates[n, a].item()
            angle = position * (256.0 if a == 0 else 10000.0) ** (-2 * i / axes[a])
            assert cos[n, j].item() == pytest.approx(math.cos(angle), abs=1e-7)
            assert sin[n, j].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_rope_scaling():
    layout = PackedLayout([[Grid(8, 1, 1)]], device="cpu")
    halved = PackedLayout([[Grid(8, 1, 1, scale=(0.5, 1, 1))]], device="cpu")
    stretched = layout.rope((16, 0, 0), interpolation=2.0)
    torch.testing.assert_close(
        stretched.dense(), halved.rope((16, 0, 0)).dense(), rtol=0, atol=1e-7
    )
    # NTK-aware scaling leaves the highest frequency and divides the lowest by the factor.
    plain, ntk = (layout.rope((16, 0, 0), ntk=factor).sin[1].double() for factor in (1.0, 8.0))
    assert ntk[0] == plain[0]
    assert torch.asin(ntk[-1]).item() == pytest.approx(torch.asin(plain[-1]).item() / 8, rel=1e-6)
    assert layout.rope((16, 0, 0)) is layout.rope((16, 0, 0))
    assert layout.rope((16, 0, 0), [100.0, 1.0, 1.0]) is layout.rope((16, 0, 0), (100.0, 1.0, 1.0))


def test_rope_from_tables():
    cos, sin = torch.rand(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    rope = Rope.from_tables(cos, sin)
    assert rope.axes == (8,) and rope.position_index.tolist() == [[i] for i in range(5)]
    assert torch.equal(rope.dense()[0], cos.float()) and torch.equal(rope.dense()[1], sin.float())
    part = rope.slice(2, 4)
    assert torch.equal(part.dense()[0], cos[2:4].float())
    with pytest.raises(ValueError, match=r"cos, sin: expected one shape"):
        Rope.from_tables(cos, sin[:3])
    with pytest.raises(TypeError, match="sin: expected a floating tensor"):
        Rope.from_tables(cos, sin.long())


def test_rope_from_tables_of_a_batch_and_per_head():
    cos, sin = torch.rand(2, 5, 3, 4), torch.rand(2, 5, 3, 4)
    rope = Rope.from_tables(cos, sin, per_head=True)
    assert rope.num_tokens == 10 and rope.rotary_dim == 8
    assert torch.equal(rope.dense()[0], cos.flatten(0, 1))
    samples = Rope.from_tables(cos[..., 0, :], sin[..., 0, :])
    assert torch.equal(samples.dense()[1], sin[..., 0, :].flatten(0, 1))
    with pytest.raises(ValueError, match=r"cos, sin: expected one shape \[N, H, r/2\]"):
        Rope.from_tables(cos[0, :, 0], sin[0, :, 0], per_head=True)


def test_rope_padded_with_tokens_that_do_not_turn():
    rope = PackedLayout([[Grid(2, 1, 3)]], device="cpu").rope((4, 6, 8))
    padded = rope.padded(before=2, after=1)
    for mine, theirs, still in zip(padded.dense(), rope.dense(), (1.0, 0.0), strict=True):
        assert torch.equal(mine[2:-1], theirs)
        assert (mine[[0, 1, -1]] == still).all()
    with pytest.raises(ValueError, match="before: expected an integer >= 0"):
        rope.padded(before=-1)
