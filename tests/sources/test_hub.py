"""The hub, from a cache made here: no network, and no guess about what is not in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch

from surgery import CheckpointError, SourceError, load
from surgery.sources import SOURCE_ATTRIBUTE
from tests import zoo

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def put(cache: Path, name: str, *, subfolder: str = "", branch: str = "main") -> Path:
    """Save a model of the zoo into the cache as ``org/<name>``; returns its folder."""
    repository = cache / f"models--org--{name}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT / subfolder
    model: Any = zoo.build(name)[0]
    model.save_pretrained(folder, max_shard_size=100_000)
    return folder


@pytest.mark.parametrize("name", ["bert", "llama", "DiTTransformer2DModel"])
def test_loads_at_one_commit(name: str, cache: Path) -> None:
    put(cache, name)
    model = load(f"hub:org/{name}")
    expected = zoo.build(name)[0]
    assert type(model) is type(expected)
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    source = model.__dict__[SOURCE_ATTRIBUTE]
    assert (source["spec"], source["revision"]) == (f"hub:org/{name}", COMMIT)


def test_revision(cache: Path) -> None:
    put(cache, "bert", branch="v2")
    assert load("hub:org/bert@v2").__dict__[SOURCE_ATTRIBUTE]["revision"] == COMMIT
    with pytest.raises(SourceError, match=r"config\.json is not in the local cache"):
        load("hub:org/bert@v3")


def test_subfolder_of_a_pipeline(cache: Path) -> None:
    folder = put(cache, "AutoencoderKL", subfolder="vae")
    (folder.parent / "model_index.json").write_text('{"vae": ["diffusers", "AutoencoderKL"]}')
    model = load("hub:org/AutoencoderKL/vae")
    assert type(model).__name__ == "AutoencoderKL"
    assert model.__dict__[SOURCE_ATTRIBUTE]["revision"] == COMMIT


def test_what_is_not_cached(cache: Path) -> None:
    with pytest.raises(SourceError, match=r"(?s)hub:org/nothing: config\.json is not.*network"):
        load("hub:org/nothing")
    folder = put(cache, "bert")
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(CheckpointError, match="which is not there"):
        load("hub:org/bert")
    next(folder.glob("*.index.json")).unlink()
    with pytest.raises(CheckpointError, match="only the cache was searched"):
        load("hub:org/bert")


def test_bad_repository_id() -> None:
    with pytest.raises(SourceError, match="is no repository id"):
        load("hub:org/na me")
