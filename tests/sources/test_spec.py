"""What a spec may be, and what is said about one that is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery import SourceError
from surgery.sources.spec import Spec, parse

GOOD = {
    "timm:vit_small_patch16_224": Spec("timm", "vit_small_patch16_224"),
    "transformers:llama": Spec("transformers", "llama"),
    "diffusers:UNet2DConditionModel": Spec("diffusers", "UNet2DConditionModel"),
    "hub:gpt2": Spec("hub", "gpt2"),
    "hub:org/name": Spec("hub", "org/name"),
    "hub:org/name@refs/pr/1": Spec("hub", "org/name", "", "refs/pr/1"),
    "hub:org/name/unet": Spec("hub", "org/name", "unet"),
    "hub:org/name/a/b@v1": Spec("hub", "org/name", "a/b", "v1"),
}

BAD = {
    "tim:resnet18": "unknown scheme 'tim'.*did you mean 'timm'",
    "resnet18": "no scheme and is not an existing folder.*did you mean 'timm:resnet18'",
    "LlamaForCausalLM": "did you mean .*'transformers:LlamaForCausalLM'",
    "UNet2DConditionModel": "did you mean .*'diffusers:UNet2DConditionModel'",
    "org/name": "did you mean 'hub:org/name'",
    "./nowhere": "no scheme and is not an existing folder",
    "timm:": "names no model",
    "hub:": "names no model",
    "hub:/name": "no repository id",
    "hub:org/../etc": "no repository id",
    "folder:x": "unknown scheme 'folder'",
    "": "no scheme and is not an existing folder",
}


@pytest.mark.parametrize(("text", "spec"), GOOD.items(), ids=list(GOOD))
def test_parses_and_prints_back(text: str, spec: Spec) -> None:
    assert parse(text) == spec
    assert str(spec) == text


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=list(BAD))
def test_refuses_and_suggests(text: str, message: str) -> None:
    with pytest.raises(SourceError, match=f"(?s){message}"):
        parse(text)


def test_existing_folder(tmp_path: Path) -> None:
    assert parse(tmp_path) == parse(str(tmp_path)) == Spec("folder", str(tmp_path))


def test_path_must_be_a_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(SourceError, match="expected a folder, but it is a file"):
        parse(file)
    with pytest.raises(SourceError, match="expected a folder, but it does not exist"):
        parse(tmp_path / "nowhere")
