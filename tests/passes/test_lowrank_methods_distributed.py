"""Two gloo ranks under DDP train as one process does, and no parameter is left unused."""

from __future__ import annotations

import pytest

from tests import methods_table

#: One method for each way of computing the output and each kind of rule around the step; the
#: script that writes docs/methods.md runs them all.
ROWS = ["dora", "pissa", "sorsa", "reflora", "reflora-s", "scalora", "altlora"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # gloo and fork say what they think of CPUs
def test_two_ranks_train_as_one_process_does() -> None:
    assert methods_table.distributed(ROWS) == dict.fromkeys(ROWS, "2 ranks = 1")
    column = methods_table.header().index("DDP")
    assert {line[column] for line in methods_table.written()[1:]} == {"2 ranks = 1"}
