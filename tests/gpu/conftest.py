"""A test that kills its process's CUDA context must not take the tests after it along."""

from __future__ import annotations

import os
import time

import pytest
import torch


def context_is_dead() -> bool:
    """After an illegal access every later call of this process fails, whatever it does."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    if not context_is_dead():
        return
    if "PYTEST_XDIST_WORKER" in os.environ:
        time.sleep(1)  # the report of the test is on its way
        os._exit(1)  # xdist starts another process for the tests that are left
    pytest.exit(f"{nodeid} left a dead CUDA context: no later test of this process could pass")
