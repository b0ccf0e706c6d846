"""The edit log is data: it goes through JSON unchanged and refuses what it cannot read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import CheckpointError
from surgery.record import Contract, Edit, Operation, Record, TensorSpec

names = st.text("abc.0", min_size=1, max_size=8)
specs = st.builds(
    TensorSpec,
    st.lists(st.integers(0, 9), max_size=3).map(tuple),
    st.sampled_from(["float32", "bfloat16", "int8"]),
    st.booleans(),
)
contracts = st.builds(
    Contract, st.sampled_from(["exact", "close", "changes"]), st.floats(0, 1), st.floats(0, 1)
)
edits = st.builds(
    Edit,
    rule=names,
    pass_name=names,
    site=names,
    summary=names,
    adds=st.dictionaries(names, specs, max_size=2),
    uses=st.dictionaries(names, st.sampled_from(["extend", "replace"]), max_size=2),
    contract=contracts,
    payload=st.dictionaries(names, st.integers() | names | st.none(), max_size=2),
    notes=st.lists(names, max_size=2).map(tuple),
    reversible=st.booleans(),
)


@given(st.lists(edits, max_size=3))
def test_json_round_trip(done: list[Edit]) -> None:
    operation = Operation({"seed": 0}, done, ["a.weight"])
    record = Record([operation])
    again = Record.from_dict(json.loads(json.dumps(record.to_dict())))
    assert again == record


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"format": 2, "operations": []}, "format 2; this version reads format 1"),
        ({"operations": []}, "format None"),
        ({"format": 1}, "damaged: KeyError"),
        ({"format": 1, "operations": [{"recipe": {}}]}, "damaged"),
        ({"format": 1, "operations": [3]}, "damaged"),
    ],
)
def test_log_that_does_not_fit_is_refused(data: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Record.from_dict(data)


def test_weakest_contract_is_the_least_strict_with_the_widest_bounds() -> None:
    mixed = [Contract("exact"), Contract("close", 1e-5, 1e-8), Contract("close", 1e-6, 1e-3)]
    assert Contract.weakest(iter(mixed)) == Contract("close", 1e-5, 1e-3)
    assert Contract.weakest(iter([])) == Contract("exact")
    assert Contract.weakest(iter([Contract("changes"), *mixed])).kind == "changes"


def test_tensor_spec_counts_elements_and_bytes() -> None:
    spec = TensorSpec((16, 384), "bfloat16")
    assert (spec.numel, spec.nbytes) == (6144, 12288)
    assert TensorSpec((), "float64").nbytes == 8
