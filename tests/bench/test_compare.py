"""The gate: fails on what is slower beyond doubt, and on nothing else."""

from __future__ import annotations

import pytest

from sora_kernels.bench.compare import compare

from .reports import report


def test_equal_reports_do_not_fail() -> None:
    (change,) = compare(report(2.0, 5.0), report(2.0, 5.0)).changes
    assert change.slowdown == pytest.approx(1.0)
    assert change.low <= 1.0 <= change.high
    assert not change.regressed(0)


def test_a_slower_machine_is_not_a_regression() -> None:
    (change,) = compare(report(2.0, 5.0), report(6.0, 15.0, cpu="slower")).changes
    assert change.slowdown == pytest.approx(1.0, rel=0.02)
    assert change.basis == "paired with plain"
    assert not change.regressed(5)


def test_slower_against_the_control_fails() -> None:
    (change,) = compare(report(2.0, 5.0), report(2.6, 5.0)).changes
    assert change.slowdown == pytest.approx(1.3, rel=0.02)
    assert change.regressed(5)
    assert not change.regressed(35)


def test_doubt_does_not_fail() -> None:
    # 6% slower, but each report's ratio is only known to about 2%: the lower end is under 5%.
    (change,) = compare(report(2.0, 5.0), report(2.12, 5.0)).changes
    assert change.slowdown > 1.05
    assert change.low < 1.05
    assert not change.regressed(5)


def test_faster_never_fails() -> None:
    (change,) = compare(report(2.0, 5.0), report(1.0, 5.0)).changes
    assert change.high < 1
    assert not change.regressed(0)


def test_without_a_control_absolute_times_need_the_same_machine() -> None:
    (change,) = compare(report(2.0, None), report(3.0, None)).changes
    assert change.basis == "absolute"
    assert change.regressed(5)
    other = compare(report(2.0, None), report(3.0, None, cores=64))
    assert other.changes == []
    assert len(other.not_comparable) == 1


def test_rows_of_one_side_are_listed() -> None:
    base, head = report(2.0, 5.0), report(2.0, 5.0)
    base["rows"] += report(2.0, 5.0, op="gone")["rows"]
    head["rows"] += report(2.0, 5.0, op="new")["rows"]
    result = compare(base, head)
    assert [key[1] for key in result.only_base] == ["gone"]
    assert [key[1] for key in result.only_head] == ["new"]
    assert len(result.changes) == 1


def test_nothing_in_common_is_bad_input() -> None:
    with pytest.raises(ValueError, match="no sora_kernels row in common"):
        compare(report(2.0, 5.0), report(2.0, 5.0, op="other"))
