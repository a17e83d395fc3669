"""The command line: one line and exit code 2 on bad input, a valid report on good input."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from benchmarks import registry
from benchmarks.__main__ import main
from benchmarks.pinned import PINNED, pin
from benchmarks.registry import Case, Context, Unavailable, op_cases
from benchmarks.runner import relative_error
from sora_kernels.bench import read_report, write_report
from sora_kernels.bench.plot import plot

from .reports import report


def _double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def _wrong(x: torch.Tensor) -> torch.Tensor:
    return x * 2.1


def _absent(x: torch.Tensor) -> torch.Tensor:
    raise Unavailable("needs a library that is not installed")


def _toy(context: Context) -> Iterable[Case]:
    for op, ours in (("toy", _double), ("toy_wrong", _wrong)):
        yield from op_cases(
            op,
            "64x32",
            "fp32",
            inputs=lambda device: {"x": torch.randn(64, 32, device=device)},
            ours=ours,
            plain=_double,
            bytes={"fwd": 2 << 20, "bwd": 2 << 20},
            flops={"fwd": 64, "bwd": 64},
            grads=("x",),
            peers={"peer": _absent},
            compile=False,
        )


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("toy_benchmark")
    module.cases = _toy  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_benchmark", module)
    monkeypatch.setattr(registry, "modules", lambda suite: ["toy_benchmark"])
    monkeypatch.setattr("benchmarks.__main__._measure_ceilings", _ceilings)


def _ceilings(device: str, *, quick: bool) -> object:
    from .reports import CEILINGS

    return CEILINGS


def test_a_run_writes_a_valid_report(
    toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.json"
    threads = ["--threads", str(torch.get_num_threads())]
    assert main(["--only", "toy", "--device", "cpu", "--quick", "--json", str(path), *threads]) == 0
    written = read_report(path)
    rows = written["rows"]
    assert [(r["mode"], r["provider"]) for r in rows] == [
        ("fwd", "sora_kernels"),
        ("fwd", "plain"),
        ("bwd", "sora_kernels"),
        ("bwd", "plain"),
    ]
    ours = rows[0]
    assert set(ours["paired"]) == {"plain", "copy"}
    assert len(ours["samples_ms"]) == ours["paired"]["plain"]["rounds"]
    assert ours["peak_mem_mb"] == pytest.approx(64 * 32 * 4 / 1e6, rel=0.05)
    assert written["env"]["skipped"] == [
        {"case": f"toy/{mode}/64x32/fp32", "provider": "peer", "reason": reason}
        for mode in ("fwd", "bwd")
        for reason in ["needs a library that is not installed"]
    ]
    assert "sora_kernels" in capsys.readouterr().out


def test_a_wrong_result_gets_no_row(
    toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "f.json"
    threads = ["--threads", str(torch.get_num_threads())]
    code = main(["--device", "cpu", "--quick", "--quiet", "--json", str(path), *threads])
    assert code == 1
    assert {row["op"] for row in read_report(path)["rows"]} == {"toy"}
    err = capsys.readouterr().err
    assert "toy_wrong/fwd/64x32/fp32: Disagreement: sora_kernels differs from plain by 5" in err


def test_check_compares_and_writes_nothing(toy: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--check", "--device", "cpu", "--quiet", "--threads", str(torch.get_num_threads())]
    assert main(options) == 1
    captured = capsys.readouterr()
    assert captured.out == "2 of 4 cases agree, 2 peers skipped\n"
    assert captured.err.count("toy_wrong/") == 2
    assert main([*options, "--only", "toy"]) == 0


def test_skip_leaves_a_provider_out(toy: None, tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    options = ["--only", "no|toy/fwd/*", "--device", "cpu", "--quick", "--quiet", "--skip", "plain"]
    assert main([*options, "--json", str(path), "--threads", str(torch.get_num_threads())]) == 0
    assert [row["provider"] for row in read_report(path)["rows"]] == ["sora_kernels"]


def _refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_bad_input(toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "good.json"
    write_report(good, report(2.0, 5.0))
    other = tmp_path / "other.json"
    write_report(other, report(2.0, 5.0, op="other"))
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema": 1}')
    missing = str(tmp_path / "missing.json")

    assert "--suite" in _refused(["--suite", "nonsense"], capsys)
    assert "ops are: toy, toy_wrong" in _refused(["--only", "no_such_op"], capsys)
    assert "no directory" in _refused(["--json", str(tmp_path / "no" / "f.json")], capsys)
    assert "cannot write" in _refused(["--json", str(tmp_path)], capsys)
    assert "got 0" in _refused(["--threads", "0"], capsys)
    assert "got -1.0" in _refused(["--seconds", "-1"], capsys)
    assert "HEAD.json" in _refused(["compare", str(good)], capsys)
    assert "cannot read" in _refused(["compare", str(good), missing], capsys)
    assert "env must be an object" in _refused(["compare", str(broken), str(good)], capsys)
    assert "in common" in _refused(["compare", str(good), str(other)], capsys)
    assert "negative" in _refused(["compare", str(good), str(good), "--fail-over", "-3"], capsys)
    assert "cannot read" in _refused(["plot", missing, "-o", str(tmp_path)], capsys)
    assert "File exists" in _refused(["plot", str(good), "-o", str(other)], capsys)
    if not torch.cuda.is_available():
        assert "no CUDA device" in _refused(["--device", "cuda"], capsys)


def test_compare_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, slower = tmp_path / "base.json", tmp_path / "slower.json"
    write_report(base, report(2.0, 5.0))
    write_report(slower, report(2.6, 5.0))
    assert main(["compare", str(base), str(base), "--fail-over", "5"]) == 0
    assert main(["compare", str(base), str(slower), "--fail-over", "50"]) == 0
    assert main(["compare", str(base), str(slower), "--fail-over", "5"]) == 1
    assert "SLOWER" in capsys.readouterr().out
    assert main(["compare", str(slower), str(base)]) == 0


def test_plots_come_from_the_report(tmp_path: Path) -> None:
    path = tmp_path / "f.json"
    write_report(path, report(2.0, 5.0))
    assert main(["plot", str(path), "-o", str(tmp_path / "plots")]) == 0
    written = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert written == ["f.png", "roofline_ops.png", "speedup_ops.png"]
    for name in written:
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_plot_without_plain_has_no_speedup(tmp_path: Path) -> None:
    assert [p.name for p in plot(report(2.0, None), tmp_path)] == ["roofline_ops.png"]


def test_relative_error_sees_nan_shape_and_number() -> None:
    x = torch.ones(4)
    assert relative_error(x, x) == 0
    assert relative_error((x, 2 * x), (x, x)) == pytest.approx(1.0)
    assert relative_error(x, (x, x)) == float("inf")
    assert relative_error(torch.ones(3), x) == float("inf")
    bad = x.clone()
    bad[0] = float("nan")
    assert not relative_error(bad, x) <= 1e9  # nan compares false
    assert not relative_error((x, bad, x), (x, x, x)) <= 1e9


def test_ctrl_c_writes_nothing(
    toy: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.pytest_cpu.run_case", interrupted)
    path = tmp_path / "f.json"
    options = ["--only", "toy", "--device", "cpu", "--quiet", "--json", str(path)]
    assert main([*options, "--threads", str(torch.get_num_threads())]) == 130
    assert capsys.readouterr().err == "benchmarks: interrupted, nothing written\n"
    assert list(tmp_path.iterdir()) == []


def test_the_environment_is_pinned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(
        "os.execve", lambda path, arguments, env: calls.append((arguments, dict(env)))
    )
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    pin(["--quick", "--only", "toy"])
    ((arguments, env),) = calls
    assert arguments[1:] == ["-m", "benchmarks", "--quick", "--only", "toy"]
    assert PINNED.items() <= env.items()
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    pin(["--quick"])
    assert len(calls) == 1
