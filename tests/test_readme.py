"""The tables of the documents are those of the committed result files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.readme import DOCUMENTS, TABLES, fill, main

README = Path(__file__).parents[1] / "README.md"


def test_tables_match_the_result_files() -> None:
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        found += re.findall(r"<!-- table (\w+) -->", text)
        assert fill(text) == text, "run python -m benchmarks.readme"
    assert set(found) == set(TABLES)  # one may stand in two documents
    assert main(["--check"]) == 0


def test_an_edited_number_is_found() -> None:
    text = README.read_text()
    marker = "<!-- table ops -->\n"
    edited = text.replace(marker, marker + "| made up | 1 |\n")
    assert fill(edited) == text != edited


def test_unknown_table() -> None:
    with pytest.raises(ValueError, match="table: expected one of"):
        fill("<!-- table nothing -->\n<!-- end -->")


def test_local_links_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists(), target
