"""Losses of texts that are padded: those of the texts alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.errors import ModelStateError, TrainingError
from surgery.train.data import evaluation_loader, open_data
from surgery.train.data.base import Batch, Data, Place
from surgery.train.data.configs import RecordsData
from surgery.train.objectives.base import Objective
from surgery.train.objectives.configs import LanguageObjective, MaskedObjective, SequenceObjective
from surgery.train.objectives.language import Language
from surgery.train.objectives.masked import MaskedLanguage
from surgery.train.objectives.sequences import SequenceClassification
from tests.train.finetune import tiny

KINDS = ("sequence-classification", "language", "masked-language", "causal classification")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    tiny.bert(folder / "bert")
    tiny.llama(folder / "llama")
    tiny.table(folder)
    return folder


def opened(place: Path, kind: str) -> Data:
    causal = kind in ("language", "causal classification")
    section = RecordsData(
        path=str(place / "table.jsonl"),
        label="kind" if "classification" in kind else None,
        tokenizer="bytes" if causal else str(place / "bert"),
        length=48,
        held_out=0.5,
    )
    return open_data(section, seed=0)


def made(place: Path, kind: str) -> tuple[Objective, nn.Module, Data]:
    import transformers

    data = opened(place, kind)
    torch.manual_seed(1)
    classes: dict[str, Any] = {
        "sequence-classification": (transformers.BertForSequenceClassification, "bert"),
        "masked-language": (transformers.BertForMaskedLM, "bert"),
        "language": (transformers.LlamaForCausalLM, "llama"),
        "causal classification": (transformers.LlamaForSequenceClassification, "llama"),
    }
    cls, source = classes[kind]
    extra = {"num_labels": 3, "pad_token_id": 258} if "causal" in kind else {}
    extra |= {"num_labels": 3} if kind == "sequence-classification" else {}
    config = transformers.AutoConfig.from_pretrained(place / source, **extra)
    model = cls(config).eval()
    if kind == "language":
        return Language(LanguageObjective(kind="language"), data.facts, model), model, data
    if kind == "masked-language":
        section = MaskedObjective(kind="masked-language")
        return MaskedLanguage(section, data.facts, model, seed=0), model, data
    section = SequenceObjective(kind="sequence-classification")
    return SequenceClassification(section, data.facts, model), model, data


def batch(data: Data, indices: Sequence[int]) -> Batch:
    assert not hasattr(data.train, "at")
    return data.train.batch([Place(index, index) for index in indices])


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_loss(kind: str, place: Path):
    aim, model, data = made(place, kind)
    chosen = list(range(12))
    together = batch(data, chosen)
    assert (together["attention_mask"] == 0).any()
    one_by_one = [batch(data, [index]) for index in chosen]
    losses = torch.stack([aim.loss(model, each, step=1) for each in one_by_one])
    if aim.weighed:
        weights = torch.stack([aim.weight(each) for each in one_by_one]).float()
        assert weights.sum() == aim.weight(together)
    else:
        weights = torch.ones(len(chosen))
    alone = (losses * weights).sum() / weights.sum()
    # float32 kernels sum in another order for another shape.
    torch.testing.assert_close(aim.loss(model, together, step=1), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_no_gradient(kind: str, place: Path):
    aim, model, data = made(place, kind)
    chosen = [0, 7, 3]
    gradients: list[list[Tensor]] = []
    for longer in (False, True):
        each = batch(data, chosen)
        if longer:
            each = padded(each, 5)
        model.zero_grad()
        aim.loss(model, each, step=1).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def padded(given: Batch, by: int) -> Batch:
    """The same batch with more padding."""
    fill = {"input_ids": 258 if given["input_ids"].max() > 16 else 0, "labels": -100}
    return {
        name: torch.nn.functional.pad(tensor, (0, by), value=fill.get(name, 0))
        if tensor.ndim == 2
        else tensor
        for name, tensor in given.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_does_not_depend_on_how_it_is_batched(kind: str, place: Path):
    aim, model, data = made(place, kind)
    found = [
        aim.evaluate(model, evaluation_loader(data.held_out, batch=size)) for size in (1, 4, 100)
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_masks_are_those_of_the_position_whatever_the_padding(place: Path):
    aim, _, data = made(place, "masked-language")
    assert isinstance(aim, MaskedLanguage)
    hidden, labels = aim._hide(batch(data, range(10)), "train", 0)
    alone, own = aim._hide(batch(data, [4]), "train", 0)
    # Position 0 of a batch of one is another position: it is drawn anew.
    again, same = aim._hide(batch(data, range(10)), "train", 0)
    assert torch.equal(hidden, again)
    assert torch.equal(labels, same)
    length = alone.shape[1]
    assert torch.equal(labels[4, :length], own[0])
    assert torch.equal(hidden[4, :length], alone[0])
    assert (labels[4, length:] == -100).all()


def test_special_tokens_are_never_guessed(place: Path):
    aim, _, data = made(place, "masked-language")
    assert isinstance(aim, MaskedLanguage)
    _, labels = aim._hide(batch(data, range(20)), "train", 0)
    assert set(labels.unique().tolist()) <= {-100, *range(5, 16)}
    assert (labels != -100).any(dim=1).all()


def test_a_causal_model_guesses_no_masked_tokens(place: Path):
    import transformers

    data = opened(place, "masked-language")
    model = transformers.LlamaForCausalLM.from_pretrained(place / "llama")
    with pytest.raises(ModelStateError, match="does not see the tokens that come later"):
        MaskedLanguage(MaskedObjective(kind="masked-language"), data.facts, model, seed=0)


def test_a_tokenizer_without_a_mask_is_refused(place: Path):
    data = opened(place, "language")
    with pytest.raises(TrainingError, match="no mask token"):
        MaskedLanguage(MaskedObjective(kind="masked-language"), data.facts, nn.Identity(), seed=0)
