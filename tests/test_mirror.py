"""Every op has all of its rooms: definition, kernels, configuration, test, benchmark."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS = sorted(p.parent.name for p in (ROOT / "sora_kernels" / "ops").glob("*/__init__.py"))


def test_there_are_ops() -> None:
    assert "norm_modulate" in OPS


@pytest.mark.parametrize("op", OPS)
def test_op_folder_is_complete(op: str) -> None:
    folder = Path("sora_kernels") / "ops" / op
    expected = [
        folder / name for name in ("__init__.py", "reference.py", "kernels.py", "config.py")
    ]
    expected += [Path("tests") / "ops" / f"test_{op}.py", Path("benchmarks") / f"bench_{op}.py"]
    missing = [str(path) for path in expected if not (ROOT / path).is_file()]
    assert not missing


@pytest.mark.parametrize("folder, pattern", [("tests/ops", "test_*.py"), ("csrc/cpu", "*.cpp")])
def test_nothing_mirrors_an_op_that_is_gone(folder: str, pattern: str) -> None:
    shared = {"isa"}
    for path in (ROOT / folder).glob(pattern):
        name = path.stem.removeprefix("test_").removesuffix("_kernels")
        assert name in shared or any(name.startswith(op) for op in OPS), path


@pytest.mark.parametrize("op", OPS)
def test_reference_shares_no_code_with_the_kernels(op: str) -> None:
    text = (ROOT / "sora_kernels" / "ops" / op / "reference.py").read_text()
    assert "kernels" not in text.replace("sora_kernels", "")
    assert "triton" not in text


def test_arrows_go_one_way() -> None:
    """Kernels know no model, and the package imports nothing from outside itself."""
    for path in (ROOT / "sora_kernels").rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] not in ("model", "benchmarks", "tests"), path
