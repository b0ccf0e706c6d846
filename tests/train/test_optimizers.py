from __future__ import annotations

import io
import math

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import CheckpointError, ConfigError, ModelStateError, NoMatch
from surgery.optim import GaLoreAdamW
from surgery.train.config import AdamWConfig, GaloreConfig, ScheduleConfig
from surgery.train.optimizers import Curve, build_optimizer, build_schedule


def adamw(**options) -> AdamWConfig:
    return AdamWConfig(**{"name": "adamw", "lr": 3e-3, **options})


def galore(**options) -> GaloreConfig:
    return GaloreConfig(**{"name": "galore", "lr": 1e-2, "rank": 2, **options})


def scheduled(kind: str, warmup: int = 5, final: float = 0.1) -> ScheduleConfig:
    return ScheduleConfig(kind=kind, warmup=warmup, final=final)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.mlp(self.norm(x)))


class Net(nn.Module):
    def __init__(self, width: int = 6, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def rewired() -> nn.Module:
    torch.manual_seed(0)
    rule = surgery.Rule(surgery.Shortcuts(init="uniform"))
    return surgery.apply(Net(), rule, example=torch.randn(2, 6))


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# --- AdamW ----------------------------------------------------------------------------------


def test_adamw_is_torchs_fused_with_the_settings_of_the_configuration() -> None:
    settings = adamw(lr=2e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    optimizer = build_optimizer(Net(), settings)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    chosen = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay", "fused")}
    assert chosen == {
        "lr": 2e-3,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "weight_decay": 0.1,
        "fused": True,
    }


def test_fused_steps_equal_those_of_the_plain_loop() -> None:
    ours, theirs = rewired(), rewired()
    optimizer = build_optimizer(ours, adamw(weight_decay=0.1))
    groups = surgery.parameter_groups(theirs, weight_decay=0.1)
    plain = torch.optim.AdamW(groups, lr=3e-3, foreach=False)
    for _ in range(5):
        one_step(ours, optimizer)
        one_step(theirs, plain)
    for fused, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        # A step is 3e-3; a fused kernel rounds its products in another order, in float32.
        torch.testing.assert_close(fused, reference, rtol=1e-5, atol=1e-7)


def test_logits_have_no_decay_and_everything_else_has() -> None:
    model = rewired()
    optimizer = build_optimizer(model, adamw(weight_decay=0.5))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    named = dict(model.named_parameters())
    logits = {name for name, p in named.items() if decay[id(p)] == 0.0}
    assert logits == {"blocks.shortcuts.0.topology.logits"}
    assert len(decay) == len(named)


def test_a_frozen_parameter_is_left_out() -> None:
    model = Net()
    model.head.requires_grad_(requires_grad=False)
    held = {id(p) for g in build_optimizer(model, adamw()).param_groups for p in g["params"]}
    assert held == {id(p) for p in model.blocks.parameters()}


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(ModelStateError, match="nothing to train"):
        build_optimizer(Net().requires_grad_(requires_grad=False), adamw())


def test_parameters_without_data_are_refused() -> None:
    with torch.device("meta"):
        model = Net()
    with pytest.raises(ModelStateError, match="meta device"):
        build_optimizer(model, adamw())


# --- GaLore ---------------------------------------------------------------------------------

LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
DIT = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}


def llama(*, ancre: bool) -> nn.Module:
    model = surgery.load("transformers:LlamaForCausalLM", config=LLAMA, pretrained=False)
    if ancre:
        surgery.apply(model, surgery.Rule(surgery.Shortcuts(init="uniform")))
    return model.train()


def projected_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    held = {id(p) for group in optimizer.param_groups if "rank" in group for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in held}


@pytest.mark.parametrize("ancre", [False, True])
def test_galore_projects_the_papers_matrices_of_a_llama(ancre: bool) -> None:
    model = llama(ancre=ancre)
    optimizer = build_optimizer(model, galore(weight_decay=0.1, gap=7, scale=0.5, mode="full"))
    assert type(optimizer) is GaLoreAdamW
    # The rule of the authors' code: linear layers with attn or mlp in their name.
    assert projected_names(model, optimizer) == {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ("attn" in name or "mlp" in name)
    }
    first = optimizer.param_groups[0]
    assert (first["rank"], first["gap"], first["scale"], first["mode"]) == (2, 7, 0.5, "full")
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len({id(p) for p in held})
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == ([0.1, 0.1, 0.0] if ancre else [0.1, 0.1])


def test_galore_finds_attention_and_feed_forward_in_a_dit_by_what_they_do() -> None:
    source = "diffusers:DiTTransformer2DModel"
    model = surgery.load(source, config=DIT | {"sample_size": 8}, pretrained=False).train()
    names = projected_names(model, build_optimizer(model, galore()))
    kinds = {name.removeprefix("transformer_blocks.").partition(".")[2] for name in names}
    assert kinds == {
        "attn1.to_q.weight",
        "attn1.to_k.weight",
        "attn1.to_v.weight",
        "attn1.to_out.0.weight",
        "ff.net.0.proj.weight",
        "ff.net.2.weight",
    }


def test_galore_takes_the_targets_of_the_configuration() -> None:
    model = Net()
    chosen = galore(targets={"path": "blocks.{0,2}.mlp"})
    names = projected_names(model, build_optimizer(model, chosen))
    assert names == {"blocks.0.mlp.weight", "blocks.2.mlp.weight"}


def test_galore_leaves_frozen_matrices_out() -> None:
    model = Net()
    model.blocks[0].requires_grad_(requires_grad=False)
    chosen = galore(targets={"path": "**.mlp"})
    names = projected_names(model, build_optimizer(model, chosen))
    assert names == {"blocks.1.mlp.weight", "blocks.2.mlp.weight"}


def test_galore_and_shortcuts_train_together() -> None:
    model = rewired()
    optimizer = build_optimizer(model, galore(targets={"path": "**.mlp"}, weight_decay=0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        one_step(model, optimizer)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name


def test_galore_with_nothing_to_project_is_refused() -> None:
    with pytest.raises(NoMatch, match=r"selects no trainable matrix.*nearest"):
        build_optimizer(Net(), galore(targets={"path": "**.norm"}))


def test_a_rank_that_saves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank 6 is no less than the shorter side"):
        build_optimizer(Net(), galore(rank=6, targets={"path": "**.mlp"}))


# --- schedules ------------------------------------------------------------------------------

STEPS, WARMUP, FINAL, LR = 40, 7, 0.1, 3e-3


def cosine(step: int) -> float:
    if step < WARMUP:
        return LR * step / WARMUP
    angle = math.pi * (step - WARMUP) / (STEPS - WARMUP)
    return LR * FINAL + LR * (1 - FINAL) * math.cos(angle / 2) ** 2


def linear(step: int) -> float:
    if step < WARMUP:
        return LR * step / WARMUP
    return LR + (LR * FINAL - LR) * (step - WARMUP) / (STEPS - WARMUP)


def constant(step: int) -> float:
    return LR * step / WARMUP if step < WARMUP else LR


@pytest.mark.parametrize("formula", [cosine, linear, constant])
def test_every_step_has_the_learning_rate_of_the_formula(formula) -> None:
    optimizer = build_optimizer(rewired(), adamw(lr=LR))
    schedule = build_schedule(optimizer, scheduled(formula.__name__, WARMUP, FINAL), STEPS)
    for step in range(STEPS + 1):
        for group in optimizer.param_groups:
            # Float64 in two forms of one formula.
            assert group["lr"] == pytest.approx(formula(step), rel=1e-12, abs=1e-18)
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == pytest.approx([formula(STEPS)] * 2)  # and stays there


def test_without_a_warm_up_the_first_step_has_the_whole_learning_rate() -> None:
    optimizer = build_optimizer(Net(), adamw(lr=LR))
    build_schedule(optimizer, scheduled("linear", warmup=0), STEPS)
    assert optimizer.param_groups[0]["lr"] == LR


@pytest.mark.parametrize("stop", [3, 7, 20])
def test_a_schedule_goes_on_where_it_stopped(stop: int) -> None:
    settings = scheduled("cosine", WARMUP, FINAL)
    first = build_optimizer(Net(), adamw(lr=LR))
    schedule = build_schedule(first, settings, STEPS)
    for _ in range(stop):
        first.step()
        schedule.step()
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "schedule": schedule.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second = build_optimizer(Net(), adamw(lr=LR))
    resumed = build_schedule(second, settings, STEPS)
    resumed.load_state_dict(saved["schedule"])
    second.load_state_dict(saved["optimizer"])
    for step in range(stop, STEPS):
        assert second.param_groups[0]["lr"] == pytest.approx(cosine(step), rel=1e-12, abs=1e-18)
        second.step()
        resumed.step()


@pytest.mark.parametrize(
    ("settings", "steps", "changed"),
    [
        (scheduled("linear", WARMUP, FINAL), STEPS, "kind cosine → linear"),
        (scheduled("cosine", WARMUP, FINAL), STEPS * 2, "steps 40 → 80"),
        (scheduled("cosine", WARMUP + 1, 0.2), STEPS, "warmup 7 → 8, final 0.1 → 0.2"),
    ],
)
def test_the_state_of_another_schedule_is_refused(settings, steps: int, changed: str) -> None:
    optimizer = build_optimizer(Net(), adamw())
    saved = build_schedule(optimizer, scheduled("cosine", WARMUP, FINAL), STEPS).state_dict()
    other = build_schedule(build_optimizer(Net(), adamw()), settings, steps)
    with pytest.raises(CheckpointError, match=changed):
        other.load_state_dict(saved)


@pytest.mark.parametrize(
    ("kind", "steps", "warmup", "final", "told"),
    [
        ("cosine", 10, 11, 0.1, "warm-up of 11 steps does not fit a run of 10"),
        ("linear", 10, -1, 0.1, "warm-up of -1"),
        ("cosine", 10, 2, 1.5, "from 0 to 1; got 1.5"),
    ],
)
def test_a_curve_that_contradicts_itself_is_refused(kind, steps, warmup, final, told) -> None:
    with pytest.raises(ConfigError, match=told):
        Curve(kind, steps, warmup, final)
