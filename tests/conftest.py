"""Test setup that must happen before any Triton kernel is decorated, and the watch over skips."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from importlib.util import find_spec

import pytest

from tests.interpreter import remember_builtins

# CPU tests run Triton kernels in the interpreter, which is chosen when a kernel is decorated. The
# cross-compilation tests (tests/aot) and GPU tests need it off and run in a process of their own.
os.environ.setdefault("TRITON_INTERPRET", "1")


#: What numpy says inside the Triton interpreter when a test feeds it what it must survive: poison,
#: infinities, lanes that a mask discards; and a deprecation in the interpreter's own code.
INTERPRETER_WARNINGS = (
    "ignore:invalid value encountered in (add|subtract|matmul):RuntimeWarning",
    "ignore:overflow encountered in exp:RuntimeWarning",
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ["TRITON_INTERPRET"] == "1" and find_spec("triton") is not None:
        remember_builtins()
    for line in INTERPRETER_WARNINGS:
        config.addinivalue_line("filterwarnings", rf"{line}:triton\.runtime\.interpreter")


def expected_skips() -> set[str]:
    """Why a test may be skipped on this machine. Any other reason is a test that went missing."""
    import torch

    reasons = set()
    if torch.cuda.is_available():
        reasons |= {"there is a GPU, so the lane would run"}
    else:
        reasons |= {"needs an NVIDIA GPU"}
    if torch.cuda.device_count() < 2:
        reasons |= {"needs two GPUs"}
    from sora_kernels import _ext

    if not _ext.cuda_loaded:
        reasons |= {"the CUDA library is not built"}
    if shutil.which("nvcc") is None:
        reasons |= {"nvcc is not on PATH"}
    return reasons


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail if a test is skipped for a reason that this machine does not explain",
    )


def unexpected_skips(config: pytest.Config) -> Counter[str]:
    """Reasons of skipped tests that `expected_skips` does not name, counted."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    found: Counter[str] = Counter()
    for report in reporter.stats.get("skipped", []) if reporter else []:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found[reason.removeprefix("Skipped: ")] += 1
    for reason in expected_skips():
        found.pop(reason, None)
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    strict = session.config.getoption("--strict-skips") and not hasattr(
        session.config, "workerinput"
    )
    if strict and exitstatus == 0 and unexpected_skips(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.getoption("--strict-skips"):
        for reason, count in unexpected_skips(config).items():
            terminalreporter.write_line(f"{count} skipped without an expected reason: {reason}")
