"""Checks that the processes of a training agree; tests/test_data_parallel.py has those of whole trainings."""

import pytest

from sb3_clipvf.guards.agreement import check_same


def test_equal_descriptions_are_accepted() -> None:
    check_same([{"a": 1}, {"a": 1}])
    with pytest.raises(ValueError, match="Processes 0 and 1 must have the same a, b, got a: 1 and 2; b: None and 3"):
        check_same([{"a": 1}, {"a": 2, "b": 3}])
