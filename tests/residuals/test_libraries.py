"""Models of transformers and diffusers, by their layers."""

from __future__ import annotations

import pytest

from tests import zoo
from tests.coverage import cases
from tests.residuals.expected import DECODERS, DIFFUSERS, ENCODERS, Layers, found


# Mochi's rotary embedding asks for autocast to float32, which a CPU does not have.
@pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")
@pytest.mark.parametrize("row", [*DECODERS, *ENCODERS, *DIFFUSERS], ids=lambda row: row.name)
def test_residuals(row: Layers):
    known = row.name in zoo.TINY
    model, example = zoo.build(row.name) if known else cases.MODELS[row.name].build()
    per_layer = (each * len(model.get_submodule(at)) for at, each in row.per_layer.items())
    residuals = found(model, example.args, example.kwargs).residuals
    assert len(residuals) == sum(per_layer) + row.extra


def branches(name: str) -> set[int]:
    model, example = zoo.build(name) if name in zoo.TINY else cases.MODELS[name].build()
    residuals = found(model, example.args, example.kwargs).residuals
    return {len(residual.branches) for residual in residuals}


PARALLEL = ("PhiForCausalLM", "CohereForCausalLM", "FalconForCausalLM", "GPTNeoXForCausalLM")


@pytest.mark.parametrize("name", [*PARALLEL, "GPTJForCausalLM"])
def test_attention_and_mlp_side_by_side_are_two_branches(name: str):
    assert branches(name) == {2}


def test_attention_and_mlp_in_a_row_are_one_each():
    assert branches("llama") == {1}
