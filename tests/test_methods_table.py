"""The table of what is verified per method: it has every method, and says what is found now."""

from __future__ import annotations

import pytest

from tests import methods_table
from tests.methods_table import CHECKS, rows

#: Compiling takes seconds: one method for each way of computing the output.
FORWARDS = ("lora", "dora", "sorsa")


def test_table_has_a_row_for_every_method_and_a_column_for_every_check() -> None:
    written = methods_table.written()
    assert written[0] == methods_table.header()
    names = [line[0] for line in written[1:]]
    expected = ["`lora`, `scaling: rslora`" if row == "rslora" else f"`{row}`" for row in rows()]
    assert names == expected, "run python -m tests.methods_table"
    origin = methods_table.sources()
    assert [line[1] for line in written[1:]] == [origin[row] for row in rows()]


@pytest.mark.parametrize("row", rows())
def test_table_says_what_is_found(row: str) -> None:
    cells = methods_table.written()[1 + rows().index(row)]
    for column, check in CHECKS.items():
        if column == "compiled" and row not in FORWARDS:
            continue
        assert cells[methods_table.header().index(column)] == check(row), column
