"""Classes: loss and accuracy against a direct computation, and models that do not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import ModelStateError, TrainingError
from surgery.train.data.base import Facts
from surgery.train.objectives.classification import Classification
from surgery.train.objectives.configs import ClassificationObjective

DIGITS = Facts("digits", channels=1, size=(32, 32), classes=10)
SHARP = ClassificationObjective(kind="classification")
SMOOTH = ClassificationObjective(kind="classification", label_smoothing=0.2)
VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 1,
    "num_labels": 10,
}


class Plain(nn.Module):
    """One linear layer over the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32 * 32, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(images.flatten(1))


def timm(name: str = "vit_tiny_patch16_224", **changes: Any) -> nn.Module:
    fields: dict[str, Any] = {"in_chans": 1, "num_classes": 10, "img_size": 32, "depth": 2}
    return surgery.load(f"timm:{name}", config=fields | changes)


def rewired() -> nn.Module:
    model = timm(depth=3)
    surgery.apply(model, surgery.Rule(surgery.Shortcuts()))
    return model


def transformers(**changes: Any) -> nn.Module:
    return surgery.load("transformers:ViTForImageClassification", config=VIT | changes)


def batch(count: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "images": torch.rand(count, 1, 32, 32, generator=generator) * 2 - 1,
        "labels": torch.randint(0, 10, (count,), generator=generator),
    }


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        output = model.eval()(images)
    return output if isinstance(output, Tensor) else output.logits


BUILDS = [timm, rewired, transformers, Plain]


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("config", [SHARP, SMOOTH])
def test_loss_is_the_cross_entropy_with_a_smoothed_target(
    build: Any, config: ClassificationObjective
) -> None:
    model = build().eval()
    given = batch()
    loss = Classification(config, DIGITS, model).loss(model, given, step=1)
    logs = logits(model, given["images"]).double().log_softmax(dim=1)
    target = nn.functional.one_hot(given["labels"], 10) * (1 - config.label_smoothing)
    target = target + config.label_smoothing / 10
    # float32 beside float64.
    assert float(loss.detach()) == pytest.approx(
        float(-(target * logs).sum(dim=1).mean()), rel=1e-6
    )
    loss.backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("build", BUILDS)
def test_evaluation_is_sharp_and_over_all_samples(build: Any) -> None:
    model = build()
    given = batch(7)
    split = [{key: value[part] for key, value in given.items()} for part in (slice(5), slice(5, 7))]
    found = Classification(SMOOTH, DIGITS, model).evaluate(model, split)
    scores = logits(model, given["images"]).double()
    logs = scores.log_softmax(dim=1)
    rows = range(7)
    expected = -sum(float(logs[row, given["labels"][row]]) for row in rows) / 7
    right = sum(int(scores[row].argmax()) == int(given["labels"][row]) for row in rows)
    assert found["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["accuracy"] == right / 7


def test_accuracy_of_known_answers() -> None:
    model = Plain()
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    model.head.bias.data[4] = 1.0
    given = batch(4) | {"labels": torch.tensor([4, 4, 4, 1])}
    assert Classification(SHARP, DIGITS, model).evaluate(model, [given])["accuracy"] == 0.75


def test_weights_in_bfloat16_take_float32_images() -> None:
    model = timm().bfloat16()
    objective = Classification(SHARP, DIGITS, model)
    assert objective.loss(model, batch(), step=1).dtype == torch.float32
    assert 0 <= objective.evaluate(model, [batch()])["accuracy"] <= 1


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: timm(num_classes=9), r"data has 10 classes.*\(2, 9\)"),
        (lambda: transformers(num_labels=1000), r"data has 10 classes.*\(2, 1000\)"),
        (lambda: timm(in_chans=3), "1 channels, 32 by 32.*first convolution takes 3 channels"),
        (lambda: transformers(num_channels=3), "first convolution takes 3 channels"),
        (lambda: timm(img_size=64), r"32 by 32 pixels, .*does not take.*64"),
        (lambda: transformers(image_size=64), r"32 by 32 pixels, .*does not take.*64"),
        (lambda: surgery.load("timm:resnet10t"), "first convolution takes 3 channels"),
        (lambda: nn.Sequential(nn.Linear(32, 10)), r"logits \(2, 1, 32, 10\)"),
        (lambda: nn.Linear(7, 10), "does not take"),
        (lambda: timm(num_classes=0), r"\(2, 192\)"),
        (lambda: transformers().vit, "without logits"),
    ],
)
def test_models_that_do_not_fit_are_refused(build: Any, said: str) -> None:
    with pytest.raises(ModelStateError, match=said):
        Classification(SHARP, DIGITS, build())


def test_data_without_images_or_classes_is_refused() -> None:
    with pytest.raises(TrainingError, match="text data has no images"):
        Classification(SHARP, Facts("text", vocab_size=9), Plain())
    with pytest.raises(TrainingError, match="folder data has no classes"):
        Classification(SHARP, Facts("folder", channels=1, size=(32, 32)), Plain())


def test_the_trial_leaves_statistics_and_modes_alone() -> None:
    model = surgery.load("timm:resnet10t", config={"in_chans": 1, "num_classes": 10}).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Classification(SHARP, DIGITS, model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_drawn() -> None:
    objective = Classification(SHARP, DIGITS, Plain())
    assert objective.sample_every is None
    assert objective.state_dict() == {}
