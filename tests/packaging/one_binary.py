"""One wheel for every Python and every torch from 2.11 on: build it once, load it elsewhere.

    python tests/packaging/one_binary.py --build DIR
    python tests/packaging/one_binary.py --load DIR [--python OTHER/bin/python ...] [--json F]

`--build` takes the compiled libraries as `setup.py build_ext --inplace` left them and packs them
without compiling again. Its tag is py3-none-PLATFORM: the ops libraries have no Python ABI,
and the host module, which has one, is left to NumPy where it does not fit. `--load` installs the
wheel into an empty folder with the pip of each Python, and there runs every op forward and backward
(`benchmarks/smallest.py`). It fails unless every op runs the C++ kernels.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")


class Failed(Exception):
    """A step that did not work, with what it printed."""


def run(command: list[str], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def build(out: Path, python: str = sys.executable) -> Path:
    """The wheel, with what is compiled now; replaces one of the same name in `out`."""
    libraries = sorted((ROOT / "sora_kernels").glob("*.so"))
    if not any(path.name == "_C_cpu.so" for path in libraries):
        raise Failed("sora_kernels/_C_cpu.so: build first, python setup.py build_ext --inplace")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source"
        junk = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / "sora_kernels", source / "sora_kernels", ignore=junk)
        for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
            shutil.copy(ROOT / file, source / file)
        run(
            [python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--no-index",
             "-w", str(folder / "pure"), str(source)], folder, SORA_KERNELS_BUILD="none",
        )  # fmt: skip
        (pure,) = (folder / "pure").glob("*.whl")
        run([python, "-m", "wheel", "unpack", "-d", str(folder / "open"), str(pure)], folder)
        (opened,) = (folder / "open").iterdir()
        for library in libraries:
            shutil.copy(library, opened / "sora_kernels" / library.name)
        _retag(next(opened.glob("*.dist-info/WHEEL")))
        run([python, "-m", "wheel", "pack", "-d", str(folder), str(opened)], folder)
        (wheel,) = folder.glob("*.whl")
        target = out / wheel.name
        shutil.move(wheel, target)
    return target


def _retag(metadata: Path) -> None:
    """Any Python, no Python ABI, this platform; `wheel pack` names the file after it."""
    lines = metadata.read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith(("Tag:", "Root-Is-Purelib:"))]
    lines += ["Root-Is-Purelib: false", f"Tag: py3-none-{PLATFORM}"]
    metadata.write_text("\n".join(lines) + "\n")


ASK = (
    "import json, platform, torch, sora_kernels, sora_kernels.info as info\n"
    "facts = info.collect()\n"
    "loaded = {name: part['loaded'] for name, part in facts['compiled'].items()}\n"
    "print(json.dumps([platform.python_version(), torch.__version__, loaded, facts['missing'],"
    " sora_kernels.__file__]))\n"
)


def load(wheel: Path, python: str) -> dict[str, Any]:
    """Installs the wheel with this Python, runs every op, and says what was found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        site = folder / "site"
        run(
            [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile",
             "--target", str(site), str(wheel)], folder,
        )  # fmt: skip
        shutil.copy(ROOT / "benchmarks" / "smallest.py", folder / "smallest.py")
        path = {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
        version, torch, loaded, missing, place = json.loads(
            run([python, "-W", "ignore", "-c", ASK], folder, **path).splitlines()[-1]
        )
        if not Path(place).is_relative_to(site):
            raise Failed(f"{python}: imported {place}, not the wheel")
        output = run([python, "-W", "ignore", "smallest.py", "--device", "cpu"], folder, **path)
    backends = dict(re.findall(r"^(\w+) on cpu: (\w+)", output, re.MULTILINE))
    return {
        "python": version, "torch": torch, "loaded": loaded, "missing": missing,
        "backends": backends, "calls": len(re.findall(r"^\w+ \w+: \(", output, re.MULTILINE)),
    }  # fmt: skip


def problems(found: dict[str, Any]) -> list[str]:
    """What does not hold that is promised."""
    wrong = [f"{op} runs {by}" for op, by in found["backends"].items() if by != "native"]
    if not found["loaded"].get("_C_cpu"):
        wrong.append("_C_cpu was not loaded")
    if len(found["backends"]) < 10 or found["calls"] < 20:
        wrong.append(f"only {found['calls']} calls of {len(found['backends'])} ops were seen")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, metavar="DIR")
    parser.add_argument("--load", type=Path, metavar="DIR")
    parser.add_argument("--python", action="append", metavar="P", help="default: this one")
    parser.add_argument("--json", type=Path, metavar="F", help="what was found")
    options = parser.parse_args(argv)
    if not (options.build or options.load):
        parser.error("one of --build and --load is needed")
    status, rows = 0, []
    try:
        if options.build:
            print(build(options.build))
        if options.load:
            (wheel,) = options.load.glob("sora_kernels-*.whl")
            for python in options.python or [sys.executable]:
                found = load(wheel, python)
                found["problems"] = problems(found)
                status |= bool(found["problems"])
                rows.append(found)
                verdict = "; ".join(found["problems"]) or "every op runs the C++ kernels"
                print(f"Python {found['python']}, torch {found['torch']}: {verdict}")
                for sentence in found["missing"]:
                    print(f"  {sentence}")
    except (Failed, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps({"wheel": wheel.name, "loads": rows}, indent=1) + "\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
