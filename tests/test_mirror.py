"""Every op has all of its rooms: definition, kernels, configuration, test, benchmark."""

import ast
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
    shared = {"isa", "conventions_adaln", "conventions_rope"}
    for path in (ROOT / folder).glob(pattern):
        name = path.stem.removeprefix("test_").removesuffix("_kernels")
        assert name in shared or any(name.startswith(op) for op in OPS), path


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, relative ones with their leading dots."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("op", OPS)
def test_reference_shares_no_code_with_the_kernels(op: str) -> None:
    names = imports(ROOT / "sora_kernels" / "ops" / op / "reference.py")
    parts = {part for name in names for part in name.split(".")}
    assert not parts & {"kernels", "kernels_bwd", "triton"}


def test_arrows_go_one_way() -> None:
    """Kernels know no model, and the package imports nothing from outside itself."""
    for path in (ROOT / "sora_kernels").rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} & {"model", "benchmarks", "tests"}
        assert not outside, path


def test_ops_know_no_family_and_only_families_know_upstream() -> None:
    package = ROOT / "sora_kernels"
    lazy = {"_data", "_fingerprint", "_patch", "_report", "_rows", "_sites", "sources", "__init__"}
    for path in package.rglob("*.py"):
        names = imports(path)
        inside = path.is_relative_to(package / "families")
        if path.is_relative_to(package / "ops"):
            assert not any("families" in name for name in names), path
        if not inside or path.stem in lazy:  # loaded before a model of upstream is there
            roots = {name.split(".")[0] for name in names}
            assert not roots & {"diffusers", "transformers", "peft", "accelerate"}, path
