"""Denoising: the loss by hand, labels, averages, models that do not fit, and learning digits."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import CheckpointError, ModelStateError, TrainingError
from surgery.train.data.base import Facts
from surgery.train.objectives import gaussian, noise
from surgery.train.objectives.configs import DiffusionObjective, ImageSampling
from surgery.train.objectives.diffusion import Diffusion

DIGITS = Facts("digits", channels=1, size=(8, 8), classes=10)
DIT: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 1,
    "num_layers": 3,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
UNET: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "sample_size": 8,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


class Toy(nn.Module):
    """Scales what it is given by learned numbers, and adds a number per class."""

    def __init__(self, channels: int = 1, slots: int = 11, outputs: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_class_embeds=slots, sample_size=8)
        self.scale = nn.Parameter(torch.linspace(0.2, 0.7, outputs * channels))
        self.shift = nn.Embedding(slots, 1)
        self.seen: list[Tensor] = []

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        self.seen.append(class_labels)
        repeated = sample.repeat(1, len(self.scale) // sample.shape[1], 1, 1)
        level = (timestep / 1000).reshape(-1, 1, 1, 1)
        shift = self.shift(class_labels).reshape(-1, 1, 1, 1)
        return SimpleNamespace(
            sample=repeated * self.scale.reshape(1, -1, 1, 1) + 0.1 * shift + level
        )


def dit(**changes: Any) -> nn.Module:
    return surgery.load("diffusers:DiTTransformer2DModel", config=DIT | changes)


def rewired(**changes: Any) -> nn.Module:
    model = dit(**changes)
    surgery.apply(model, surgery.Rule(surgery.Shortcuts()))
    return model


def unet(**changes: Any) -> nn.Module:
    return surgery.load("diffusers:UNet2DModel", config=UNET | changes)


def section(**changes: Any) -> DiffusionObjective:
    return DiffusionObjective(kind="diffusion", **({"ema": None} | changes))


def batch(count: int = 6, start: int = 100) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        "images": torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1,
        "labels": torch.randint(0, 10, (count,), generator=generator),
        "position": torch.arange(start, start + count),
    }


def aim(model: nn.Module, seed: int = 4, **changes: Any) -> Diffusion:
    return Diffusion(section(**changes), DIGITS, model, seed=seed)


# --- the loss -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("steps", [1000, 250])
def test_loss_by_hand(prediction: Any, outputs: int, steps: int) -> None:
    model = Toy(outputs=outputs)
    given = batch()
    objective = aim(model, prediction=prediction, steps=steps)
    assert objective.denoiser.learns_variance == (outputs == 2)
    found = objective.loss(model, given, step=7)

    drawn = noise.for_training(4, 7, range(100, 106), given["images"], levels=steps, dropout=0.1)
    t, clean = drawn.timesteps, given["images"].double()
    betas = torch.linspace(0.1 / steps, 20 / steps, steps, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)[t].reshape(-1, 1, 1, 1)
    noised = bar.sqrt() * clean + (1 - bar).sqrt() * drawn.noise
    velocity = bar.sqrt() * drawn.noise - (1 - bar).sqrt() * clean
    labels = torch.where(drawn.dropped, 10, given["labels"])
    scale = model.scale.double().reshape(1, -1, 1, 1)
    with torch.no_grad():
        shift = 0.1 * model.shift(labels).double().reshape(-1, 1, 1, 1)
        output = noised * scale + shift + (t / 1000).double().reshape(-1, 1, 1, 1)
        error = (output[:, :1] - (drawn.noise if prediction == "epsilon" else velocity)) ** 2
        expected = float(error.mean())
        if outputs == 2:
            process = gaussian.Diffusion(steps, prediction)
            parts = [each.float() for each in (clean, noised, output[:, :1], output[:, 1:])]
            expected += steps / 1000 * float(process.bound(*parts, t).mean())  # type: ignore[arg-type]
    # float32, and diffusers' float32 schedule, beside float64.
    assert float(found.detach()) == pytest.approx(expected, rel=2e-4)


def test_the_bound_does_not_reach_the_prediction() -> None:
    both, plain = Toy(outputs=2), Toy(outputs=1)
    plain.load_state_dict(both.state_dict() | {"scale": both.scale[:1].detach()})
    for model in (both, plain):
        aim(model).loss(model, batch(), step=1).backward()
    assert both.scale.grad is not None
    assert plain.scale.grad is not None
    # The number that scales the prediction has the gradient of the squared error alone.
    torch.testing.assert_close(both.scale.grad[:1], plain.scale.grad, rtol=1e-5, atol=1e-7)
    assert float(both.scale.grad[1].abs()) > 0


def test_loss_does_not_depend_on_how_a_batch_is_split() -> None:
    model = Toy()
    objective = aim(model)
    whole = batch(8)
    halves = [
        {key: value[part] for key, value in whole.items()} for part in (slice(4), slice(4, 8))
    ]
    together = objective.loss(model, whole, step=3)
    apart = sum(objective.loss(model, half, step=3) for half in halves) / 2
    assert float(together.detach()) == pytest.approx(
        float(cast("Tensor", apart).detach()), rel=1e-6
    )


def test_dropped_labels_become_the_null_class() -> None:
    model = Toy()
    objective = aim(model, label_dropout=0.25)
    model.seen.clear()
    for step in range(20):
        objective.loss(model, batch(100, start=100 * step), step=step)
    seen = torch.stack(model.seen)
    assert set(seen.unique().tolist()) == set(range(11))
    # Five standard deviations over 2000 labels.
    assert float((seen == 10).double().mean()) == pytest.approx(0.25, abs=0.05)
    assert torch.equal(seen[seen != 10], batch(100)["labels"].repeat(20, 1)[seen != 10])


@pytest.mark.parametrize("build", [dit, rewired])
def test_all_randomness_is_by_position(build: Any) -> None:
    model = build().train()
    objective = aim(model, label_dropout=0.5)
    before = torch.get_rng_state()
    first = objective.loss(model, batch(), step=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert torch.equal(first, objective.loss(model, batch(), step=2))
    assert not torch.equal(first, objective.loss(model, batch(), step=3))
    first.backward()
    # The layer behind the last modulation starts random in diffusers' class: all is reached.
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []


@pytest.mark.parametrize("build", [dit, unet])
def test_weights_in_bfloat16(build: Any) -> None:
    model = build().to(torch.bfloat16)
    loss = aim(model, label_dropout=0.1).loss(model, batch(), step=1)
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_a_batch_without_positions_is_refused() -> None:
    model = Toy()
    given = batch()
    del given["position"]
    with pytest.raises(TrainingError, match="images, labels and no 'position'"):
        aim(model).loss(model, given, step=1)


# --- evaluation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2])
def test_evaluation_is_the_mean_over_samples_and_repeats(outputs: int) -> None:
    model = Toy(outputs=outputs)
    objective = aim(model)
    given = batch(7, start=0)
    split = [{key: value[part] for key, value in given.items()} for part in (slice(5), slice(5, 7))]
    found = objective.evaluate(model, split)
    assert set(found) == ({"loss", "bound"} if outputs == 2 else {"loss"})
    assert found == pytest.approx(objective.evaluate(model, [given]), rel=1e-6)
    drawn = noise.for_evaluation(range(7), given["images"], levels=1000)
    process = gaussian.Diffusion(1000, "epsilon")
    noised = process.noised(given["images"], drawn.noise, drawn.timesteps)
    with torch.no_grad():
        output = model(noised, drawn.timesteps, given["labels"]).sample[:, :1]
    assert found["loss"] == pytest.approx(float((output - drawn.noise).square().mean()), rel=1e-6)


def test_runs_with_other_seeds_are_evaluated_alike() -> None:
    model = Toy()
    one, other = aim(model, seed=1), aim(model, seed=2)
    given = [batch(start=0)]
    assert one.evaluate(model, given) == other.evaluate(model, given)
    assert not torch.equal(one.loss(model, batch(), step=1), other.loss(model, batch(), step=1))


def test_evaluation_measures_the_average_too() -> None:
    model = Toy()
    objective = aim(model, ema=0.5)
    objective.start(model)
    given = [batch(start=0)]
    first = objective.evaluate(model, given)
    assert first["loss"] == first["loss_ema"]
    with torch.no_grad():
        model.scale += 1.0
    objective.stepped()
    second = objective.evaluate(model, given)
    with torch.no_grad():
        model.scale -= 0.5
    assert objective.evaluate(model, given)["loss"] == pytest.approx(second["loss_ema"], rel=1e-6)
    assert second["loss_ema"] != second["loss"]


# --- state --------------------------------------------------------------------------------------


def train(model: nn.Module, objective: Diffusion, optimizer: Any, steps: range) -> list[float]:
    losses: list[float] = []
    for step in steps:
        loss = objective.loss(model, batch(start=6 * step), step=step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.stepped()
        losses.append(float(loss.detach()))
    return losses


def test_resuming_changes_no_bit() -> None:
    def begun() -> tuple[nn.Module, Diffusion, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = rewired().train()
        objective = aim(model, ema=0.9)
        objective.start(model)
        return model, objective, torch.optim.AdamW(model.parameters(), lr=1e-3)

    whole = begun()
    losses = train(*whole, range(5))
    first = begun()
    train(*first, range(3))
    saved = [{k: v.clone() for k, v in first[0].state_dict().items()}]
    state = first[1].state_dict()
    kept = {n: v.clone() for n, v in state["ema"]["average"].items()}
    packed = {"ema": state["ema"] | {"average": kept}}
    again = begun()
    again[0].load_state_dict(saved[0])
    again[1].load_state_dict(packed)
    again[2].load_state_dict(first[2].state_dict())
    assert train(*again, range(3, 5)) == losses[3:]
    for name, average in whole[1].state_dict()["ema"]["average"].items():
        assert torch.equal(average, again[1].state_dict()["ema"]["average"][name])


def test_state_of_another_configuration_is_refused() -> None:
    model = Toy()
    with_average, without = aim(model, ema=0.9), aim(model)
    with_average.start(model)
    without.start(model)
    assert without.state_dict() == {}
    with pytest.raises(CheckpointError, match="holds an average of weights, and this run keeps no"):
        without.load_state_dict(with_average.state_dict())
    with pytest.raises(CheckpointError, match="holds no average of weights, and this run keeps an"):
        with_average.load_state_dict({})


# --- models that do not fit -----------------------------------------------------------------------


class Timeless(nn.Linear):
    """Takes no timestep."""


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: dit(sample_size=16), "samples of 8 by 8, and the model's sample_size is 16"),
        (lambda: dit(in_channels=4), "1 channels, 8 by 8.*first convolution takes 4 channels"),
        (lambda: dit(out_channels=3), r"returned \(2, 3, 8, 8\).*or \(2, 2, 8, 8\) where"),
        (lambda: dit(num_embeds_ada_norm=9), "10 classes, and the model embeds 9 and the null"),
        (lambda: unet(num_class_embeds=10), "10 classes, and the model embeds 9 and the null"),
        (lambda: Timeless(8, 8), "Timeless takes no timestep"),
        (lambda: surgery.load("timm:resnet10t"), "takes no timestep"),
    ],
)
def test_models_that_do_not_fit_are_refused(build: Any, said: str) -> None:
    with pytest.raises(ModelStateError, match=said):
        aim(build())


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (Facts("text", vocab_size=9), "text data has no images"),
        (Facts("folder", channels=1, size=(8, 8)), "conditioned on classes, and folder data has"),
    ],
)
def test_data_that_does_not_fit_is_refused(facts: Facts, said: str) -> None:
    with pytest.raises(TrainingError, match=said):
        Diffusion(section(), facts, dit(), seed=0)


def test_labels_of_other_models() -> None:
    labelled = aim(unet(num_class_embeds=11))
    assert labelled.denoiser.null == 10
    # Without dropout no row is set aside.
    assert aim(unet(num_class_embeds=10), label_dropout=0.0).denoiser.null is None
    free = unet()
    objective = Diffusion(section(), Facts("folder", channels=1, size=(8, 8)), free, seed=0)
    assert not objective.denoiser.labelled
    given = batch()
    del given["labels"]
    assert objective.loss(free, given, step=1).isfinite()


def test_diffusers_own_label_dropout_is_off() -> None:
    from diffusers.models.embeddings import LabelEmbedding

    model = dit()
    rows = {m.embedding_table.num_embeddings for m in labels_of(model, LabelEmbedding)}
    objective = aim(model)
    assert objective.denoiser.null == 10
    assert {m.dropout_prob for m in labels_of(model, LabelEmbedding)} == {0.0}
    assert (
        rows == {11} == {m.embedding_table.num_embeddings for m in labels_of(model, LabelEmbedding)}
    )


def labels_of(model: nn.Module, kind: type) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, kind))


def test_guidance_without_a_null_class_is_refused() -> None:
    facts = Facts("folder", channels=1, size=(8, 8))
    config = section(sample=ImageSampling(guidance=2.0))
    with pytest.raises(TrainingError, match=r"guidance 2\.0 needs a model with a null class"):
        Diffusion(config, facts, unet(), seed=0)


# --- learning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 2])
def test_digits_are_learned(outputs: int) -> None:
    from surgery.train.data import evaluation_loader, open_data, training_loader
    from surgery.train.data.configs import DigitsData

    data = open_data(DigitsData(kind="digits"), seed=0)
    model = rewired(out_channels=outputs, attention_head_dim=16).train()
    objective = Diffusion(section(ema=0.9), data.facts, model, seed=0)
    objective.start(model)
    optimizer = torch.optim.AdamW(surgery.parameter_groups(model, weight_decay=0.0), lr=3e-3)
    held_out = evaluation_loader(data.held_out, batch=64, count=64)
    before = objective.evaluate(model, held_out)
    loader = iter(training_loader(data.train, batch=16, seed=0))
    for step in range(40):
        objective.loss(model, next(loader), step=step).backward()
        optimizer.step()
        optimizer.zero_grad()
        objective.stepped()
    after = objective.evaluate(model, held_out)
    # Predicting nothing has a loss of 1; diffusers' fresh weights start above it.
    assert before["loss"] > 0.9
    assert after["loss"] < 0.5
    assert after["loss_ema"] < 0.7
    assert outputs == 1 or after["bound"] < before["bound"]
