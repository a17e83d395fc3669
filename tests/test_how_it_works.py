"""docs/how-it-works.md: every line runs and prints what the page says."""

from __future__ import annotations

import doctest
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "how-it-works.md"


def test_the_page() -> None:
    result = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.FAIL_FAST)
    assert result.attempted > 25 and result.failed == 0
