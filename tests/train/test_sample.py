"""``surgery sample``: text and images from the result of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from surgery.errors import ConfigError, DataError, TrainingError
from surgery.train.config import PretrainConfig
from surgery.train.run import pretrain
from surgery.train.sample import Drawn, sample
from tests.train import tiny


def diffusion(**objective: Any) -> PretrainConfig:
    """A narrow DiT with learned residual connections on digits."""
    model = {"num_layers": 3, "num_attention_heads": 2, "attention_head_dim": 8}
    data: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {"source": "preset:dit-tiny", "config": model},
        "rules": tiny.ancre(),
        "data": {"kind": "digits"},
        "objective": {"kind": "diffusion", "ema": 0.9} | objective,
        "optim": {"name": "adamw", "lr": 1e-2},
        "train": {"steps": 4, "batch": 8, "device": "cpu"},
        "evaluate": {"every": 4, "samples": 16},
        "checkpoint": {"every": 4, "keep": 1},
        "log": {"every": 1, "tensorboard": False, "matrices": None},
    }
    return PretrainConfig.parse(data)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that draws a grid every second step."""
    folder = tmp_path_factory.mktemp("images")
    config = diffusion(sample={"every": 2, "steps": 3, "count": 4, "guidance": 1.5})
    return pretrain(config, out=folder / "run").out


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a language model that drew nothing while it trained."""
    folder = tmp_path_factory.mktemp("texts")
    config = tiny.language(tiny.corpus(folder), "train.steps=3")
    return pretrain(config, out=folder / "run").out


def pixels(path: Path) -> bytes:
    with Image.open(path) as file:
        return file.tobytes()


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["sample", *arguments])


def test_a_run_of_diffusion_evaluates_and_draws_with_its_average(images: Path) -> None:
    (line,) = tiny.log(images, "evaluation")
    assert {"loss", "loss_ema"} <= set(line)
    assert line["loss"] != line["loss_ema"]
    grids = sorted(path.name for path in (images / "samples").glob("step-*"))
    assert grids == ["step-000002.png", "step-000004.png"]
    drawn = sample(images)
    assert drawn.path == images / "samples" / "sample.png"
    assert drawn.model == images / "model-ema"
    # The last grid of the run is of the same weights, noise and sampler.
    assert pixels(drawn.path) == pixels(images / "samples" / "step-000004.png")


def test_the_averaged_result_is_rewired_and_another_one(images: Path) -> None:
    model, averaged = (surgery.restore(images / name) for name in ("model", "model-ema"))
    (matrix,) = surgery.shortcuts(averaged).values()
    assert matrix.shape == (3, 3)
    own = dict(model.named_parameters())
    assert all(not torch.equal(v, own[n]) for n, v in averaged.named_parameters() if v.ndim > 1)


def test_overrides_change_what_is_drawn(images: Path, tmp_path: Path) -> None:
    few = sample(images, ["count=1"], out=tmp_path / "few.png")
    with Image.open(few.path) as file:
        assert file.size == (64, 64)
    seeds = [sample(images, [f"seed={seed}"], out=tmp_path / f"{seed}.png") for seed in (0, 1)]
    assert pixels(seeds[0].path) != pixels(seeds[1].path)


def test_text_is_drawn_from_a_run_that_drew_none(texts: Path) -> None:
    assert not (texts / "samples").exists()
    drawn = sample(texts, ["prompts=[import]", "tokens=5"])
    assert drawn.texts is not None
    assert drawn.path == texts / "samples" / "sample.txt"
    assert drawn.path.read_text(encoding="utf-8").startswith("import")
    assert len(drawn.texts) == 1
    assert sample(texts, ["prompts=[import]", "tokens=5"]).texts == drawn.texts


def test_text_is_drawn_where_the_data_is_not(tmp_path: Path) -> None:
    corpus = tiny.corpus(tmp_path)
    data = {"path": str(corpus), "tokenizer": "bpe", "vocabulary": 262, "length": 16}
    config = tiny.language(corpus, f"data={json.dumps({'kind': 'text', **data})}", "train.steps=2")
    out = pretrain(config, out=tmp_path / "run").out
    here = sample(out, ["prompts=[import]", "tokens=5"]).texts
    corpus.unlink()
    moved = out.rename(tmp_path / "elsewhere")
    assert sample(moved, ["prompts=[import]", "tokens=5"]).texts == here
    (moved / "data.json").write_text('{"kind": "text"')
    with pytest.raises(DataError, match=r"data\.json is broken"):
        sample(moved)
    (moved / "data.json").unlink()
    with pytest.raises(DataError, match=r"data\.json is missing"):
        sample(moved)


def test_the_command_line_prints_texts(texts: Path, tmp_path: Path) -> None:
    shown = invoke(str(texts), "prompts=[abc, xyz]", "tokens=3", "--out", str(tmp_path / "a.txt"))
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.startswith("abc")
    assert "\nxyz" in shown.stdout
    assert "written to" in shown.stderr
    data = invoke(str(texts), "prompts=[abc]", "tokens=3", "--json", "--quiet")
    found = json.loads(data.stdout)
    assert found["texts"][0].startswith("abc")
    assert found["model"] == str(texts / "model")


def test_control_characters_do_not_reach_the_terminal() -> None:
    drawn = Drawn(Path("a.txt"), Path("model"), ("a\x1b[31mb\n\tc\x07",))
    console = Console(file=io.StringIO(), width=80)
    console.print(drawn.view())
    file: Any = console.file
    assert file.getvalue().split("\n")[0] == "a\ufffd[31mb"
    assert file.getvalue().split("\n")[1].strip() == "c\ufffd"


def test_the_command_line_names_the_grid(images: Path, tmp_path: Path) -> None:
    shown = invoke(str(images), "count=2", "--out", str(tmp_path / "grid.png"))
    assert shown.exit_code == 0, shown.stderr
    assert shown.stdout.strip() == str(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").is_file()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("stps=3", "stps"),
        ("steps=0", "steps"),
        ("steps=2000", "2000 sampling steps, and the schedule has 1000 levels"),
        ("guidance=0.5", "guidance"),
    ],
)
def test_wrong_overrides_are_refused(images: Path, change: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        sample(images, [change])


def test_folders_that_are_no_finished_run_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"is no run: it has no config\.yaml"):
        sample(tmp_path)
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text((images / "config.yaml").read_text())
    with pytest.raises(TrainingError, match="has not ended: it has no model"):
        sample(begun)
    assert invoke(str(tmp_path)).exit_code == TrainingError.exit_code


def test_a_classifier_draws_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(tiny.digits().to_yaml())
    with pytest.raises(TrainingError, match="trained a classifier"):
        sample(tmp_path)
