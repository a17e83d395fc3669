"""The growth of windowed attention as committed, and the pictures that are made from data."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import draw_tiles, windows
from sora_kernels import Window
from sora_kernels.bench import read_report

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "cpu" / "windows.json"


def test_slope_on_logarithmic_axes() -> None:
    assert windows.exponent([100, 200, 400], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    assert windows.exponent([10, 1000], [5.0, 500.0]) == pytest.approx(1.0)


def test_a_window_grows_with_the_tokens_and_without_one_with_their_square() -> None:
    report = read_report(COMMITTED)
    for mode in ("fwd", "bwd"):
        found = windows.curves(report, mode)
        slope = {name: windows.exponent(*curve) for name, curve in found.items()}
        assert slope["sora_kernels"] < 1.25
        assert slope["dense"] > 1.6
        tokens, times = found["sora_kernels"]
        assert max(tokens) >= 16384
        assert times[-1] < found["dense"][1][-1] / 5


def test_every_size_has_the_same_window() -> None:
    """Else the curve would say nothing about length."""
    for grid in windows.GRIDS:
        layout = windows.layout_of(grid)
        assert layout.window_pairs(Window(windows.WINDOW)) == 864 * layout.num_tokens


def test_the_report_is_drawn_without_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "windows.png"
    arguments = ["--redraw", "--json", str(COMMITTED), "--plot", str(picture)]
    assert windows.main(arguments) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "fwd window" in capsys.readouterr().out


def test_tiles_are_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "tiles.png"
    assert draw_tiles.main(["--out", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda at: draw_tiles.main(["--out", f"{at}/no/x.png"]), "--out: cannot write"),
        (lambda at: windows.main(["--json", f"{at}/no/x.json"]), "--json: cannot write"),
        (lambda at: windows.main(["--json", f"{at}/x.json", "--plot", str(at)]), "--plot: cannot"),
        (lambda at: windows.main(["--redraw", "--json", f"{at}/x.json"]), "--json: "),
    ],
)
def test_bad_paths_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], call: object, message: str
) -> None:
    assert call(tmp_path) == 2  # type: ignore[operator]
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
