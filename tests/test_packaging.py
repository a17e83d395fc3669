"""What the wheel and the source archive hold, and how the build modes behave."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads, plus folders that must stay out of the wheel."""
    folder = tmp_path_factory.mktemp("source")
    junk = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("sora_kernels", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=junk)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("model", "benchmarks", "tests"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


def run(command: list[str], cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps",
               "--no-index", "-w", str(out), str(source)]  # fmt: skip
    result = run(command, source, SORA_KERNELS_BUILD="none")
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_sora_kernels_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"sora_kernels"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    expected = {str(p.relative_to(ROOT)) for p in (ROOT / "sora_kernels").rglob("*.py")}
    assert expected <= set(names)
    tables = {str(p.relative_to(ROOT)) for p in (ROOT / "sora_kernels").rglob("configs/*.json")}
    assert tables <= set(names)


def test_metadata_never_pins_torch(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    path = next(name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = archive.read(path).decode()
    needs = re.findall(r"^Requires-Dist: (.+)$", metadata, re.MULTILINE)
    assert "torch>=2.11" in needs
    assert not any("==" in need.split(";")[0] for need in needs)
    assert "Requires-Python: >=3.10" in metadata


def test_pure_python_wheel_works_and_says_what_is_missing(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = (
        # An editable install of the checkout would supply the parts that this wheel leaves out.
        "import sys\n"
        "editable = [f for f in sys.meta_path if '__editable__' in getattr(f, '__module__', '')]\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if f not in editable]\n"
        "import json, torch, sora_kernels, sora_kernels.info as info\n"
        "x = torch.randn(3, 8)\n"
        "y = sora_kernels.norm_modulate(x)\n"
        "torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,), eps=1e-6))\n"
        "print(json.dumps([sora_kernels.__file__, info.collect()]))\n"
    )
    result = run([sys.executable, "-W", "ignore", "-c", script], tmp_path, PYTHONPATH=str(site))
    assert result.returncode == 0, result.stderr
    path, facts = json.loads(result.stdout)
    assert Path(path).is_relative_to(site)
    assert not any(part["loaded"] for part in facts["compiled"].values())
    assert facts["ops"]["norm_modulate"]["cpu"]["backend"] == "reference"
    assert any("was not built" in sentence for sentence in facts["missing"])


def test_source_archive_can_be_built(source: Path, tmp_path: Path) -> None:
    script = f"import setuptools.build_meta as b; print(b.build_sdist({str(tmp_path)!r}))"
    result = run([sys.executable, "-c", script], source, SORA_KERNELS_BUILD="none")
    assert result.returncode == 0, result.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.[ch]*") if p.is_file()}
    assert sources and sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names


def test_unknown_build_mode_fails_loudly(source: Path) -> None:
    result = run([sys.executable, "setup.py", "--version"], source, SORA_KERNELS_BUILD="everything")
    assert result.returncode != 0
    assert "expected auto, cpu, cuda or none, got 'everything'" in result.stderr


def test_cuda_without_nvcc_fails_only_where_it_was_asked_for(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--version"]
    absent = {"CUDA_HOME": str(tmp_path), "CUDA_PATH": ""}
    asked = run(command, source, SORA_KERNELS_BUILD="cuda", **absent)
    assert asked.returncode != 0
    assert "SORA_KERNELS_BUILD=cuda: nvcc was not found" in asked.stderr
    auto = run(command, source, SORA_KERNELS_BUILD="auto", **absent)
    assert auto.returncode == 0 and "building without CUDA: " in auto.stdout


def test_no_compiler_fails_only_where_a_build_was_asked_for(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "--version"]
    asked = run(command, source, SORA_KERNELS_BUILD="cpu", PATH=str(tmp_path), CXX="")
    assert asked.returncode != 0 and "C++ compiler" in asked.stderr
    auto = run(command, source, SORA_KERNELS_BUILD="auto", PATH=str(tmp_path), CXX="")
    assert auto.returncode == 0 and "no C++ compiler found" in auto.stdout


def test_development_requirements_are_pinned() -> None:
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    needs = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"^[\w-]+==[\w.]+(;|$)", need) for need in needs)
    assert [need for need in needs if need.startswith("torch==")] == ["torch==2.13.0"]


def test_importing_the_package_imports_no_compiler() -> None:
    """torch._dynamo alone takes longer than torch and this package together."""
    code = (
        "import sys, torch, sora_kernels; "
        "print([m for m in ('torch._dynamo', 'triton', 'sympy', 'diffusers') if m in sys.modules])"
    )
    result = run([sys.executable, "-c", code], ROOT)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_importing_the_package_starts_no_cuda_driver() -> None:
    """Processes that are forked afterwards, such as data loaders, could not use it."""
    code = """if True:
        import torch
        def ask(*_):
            raise SystemExit("asked for devices")
        torch.cuda.is_available = torch.cuda.device_count = torch._C._cuda_getDeviceCount = ask
        import sora_kernels
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_mark_of_a_constant_result_is_that_of_torch() -> None:
    import torch

    from sora_kernels.ops.packed_attention.config import _capability

    def marked() -> None: ...

    torch.compiler.assume_constant_result(marked)
    assert vars(marked) == vars(_capability)
