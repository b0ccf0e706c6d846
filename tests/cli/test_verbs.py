"""Every verb on a tiny model, as a person would type it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import surgery
from surgery import errors
from surgery.cli import app
from surgery.cli.names import Kind
from surgery.terminal import INTERNAL, INTERRUPTED, USAGE

TINY = [
    "transformers:BertModel",
    *("-c", "hidden_size=16"),
    *("-c", "num_hidden_layers=2"),
    *("-c", "num_attention_heads=2"),
    *("-c", "intermediate_size=32"),
    *("-c", "vocab_size=64"),
]
LORA = """\
version: 1
recipe: tiny-lora
rules:
  - id: adapters
    pass: lowrank
    where: {path: "**.self.*"}
    with: {method: lora, rank: 2}
"""


@pytest.fixture
def rules(tmp_path: Path) -> str:
    path = tmp_path / "lora.yaml"
    path.write_text(LORA)
    return str(path)


def call(*args: str) -> Result:
    return CliRunner().invoke(app, list(args), env={"NO_COLOR": "1", "COLUMNS": "80"})


def succeed(*args: str) -> Result:
    result = call(*args)
    assert result.exit_code == 0, result.stderr
    return result


@pytest.fixture
def saved(tmp_path: Path, rules: str) -> str:
    folder = str(tmp_path / "saved")
    succeed("apply", TINY[0], rules, "--out", folder, *TINY[1:])
    return folder


# --- what each verb does -----------------------------------------------------------------------


def test_inspect_shows_runs_of_like_sites_and_their_roles():
    shown = succeed("inspect", *TINY).stdout
    assert "encoder.layer.{0..1}.attention.self.query" in shown
    assert "attention.q" in shown


def test_inspect_in_full_names_every_site():
    shown = succeed("inspect", *TINY, "--full").stdout
    for layer in range(2):
        for name in ("query", "key", "value"):
            assert f"encoder.layer.{layer}.attention.self.{name} " in shown


def test_inspect_as_json_gives_roles():
    data = json.loads(succeed("inspect", *TINY, "--json").stdout)
    roles = {site["path"]: site["roles"] for site in data["sites"]}
    assert roles["encoder.layer.1.attention.self.query"] == ["attention.q"]
    assert roles["encoder.layer.1.attention.self.value"] == ["attention.v"]


def test_plan_shows_and_writes_nothing(rules: str, tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    shown = succeed("plan", TINY[0], rules, *TINY[1:], "--full").stdout
    assert "encoder.layer.1.attention.self.query" in shown
    assert "adapters" in shown
    assert sorted(tmp_path.iterdir()) == before


def test_plan_as_json_lists_every_edit(rules: str):
    data = json.loads(succeed("plan", TINY[0], rules, *TINY[1:], "--json").stdout)
    assert len(data["edits"]) == 6
    assert data["totals"]["added"] == 6 * 2 * (16 + 16)


def test_apply_verifies_and_saves(rules: str, tmp_path: Path):
    folder = tmp_path / "out"
    data = json.loads(
        succeed("apply", TINY[0], rules, "--out", str(folder), "--json", *TINY[1:]).stdout
    )
    assert len(data["plan"]["edits"]) == 6
    assert data["out"] == str(folder)
    restored = surgery.restore(folder)
    names = [name for name, _ in restored.named_parameters() if "lora_" in name]
    assert len(names) == 12


def test_verify_proves_a_saved_folder(saved: str):
    assert "exact" in succeed("verify", saved).stdout


def test_plan_reads_a_rewritten_folder_too(saved: str, rules: str):
    result = call("plan", saved, rules)
    assert result.exit_code == errors.Conflict.exit_code
    assert "before" in result.stderr


def test_undo_writes_the_stock_model(saved: str, tmp_path: Path):
    back = tmp_path / "back"
    succeed("undo", saved, "--out", str(back))
    stock = load_file(back / "model.safetensors")
    rewritten = load_file(Path(saved) / "model.safetensors")
    assert not [name for name in stock if "lora_" in name]
    assert all(torch.equal(tensor, rewritten[name]) for name, tensor in stock.items())


@pytest.fixture
def stock_folder(tmp_path: Path) -> str:
    """A tiny model with its weights, as the hub lays it out."""
    folder = tmp_path / "stock"
    overrides = dict(pair.split("=") for pair in TINY[2::2])
    config = {name: int(value) for name, value in overrides.items()}
    model: Any = surgery.load(TINY[0], config=config)
    model.save_pretrained(folder)
    return str(folder)


def test_an_adapter_alone_goes_back_onto_its_base(stock_folder: str, rules: str, tmp_path: Path):
    folder = tmp_path / "adapter"
    succeed("apply", stock_folder, rules, "--out", str(folder), "--adapter-only")
    (weights,) = folder.glob("*.safetensors")
    assert all("lora_" in name for name in load_file(weights))
    assert "exact" in succeed("verify", str(folder), "--base", stock_folder).stdout
    assert call("verify", str(folder)).exit_code == errors.CheckpointError.exit_code


def test_weights_are_loaded_from_a_folder_unless_asked_not_to(
    stock_folder: str, rules: str, tmp_path: Path
):
    stock = load_file(Path(stock_folder) / "model.safetensors")
    name = "encoder.layer.0.attention.self.query.weight"
    for option, kept in ((), True), (("--random",), False):
        out = tmp_path / "".join(["out", *option])
        succeed("apply", stock_folder, rules, "--out", str(out), *option)
        assert torch.equal(load_file(out / "model.safetensors")[name], stock[name]) is kept


def test_shards_are_as_small_as_asked(rules: str, tmp_path: Path):
    out = tmp_path / "sharded"
    succeed("apply", TINY[0], rules, "--out", str(out), "--max-shard-size", "8KB", *TINY[1:])
    assert len(list(out.glob("*.safetensors"))) > 1


def test_schema_prints_and_writes_the_same(tmp_path: Path):
    path = tmp_path / "schema.json"
    printed = json.loads(succeed("schema").stdout)
    succeed("schema", "--out", str(path))
    assert json.loads(path.read_text()) == printed
    assert "rules" in printed["properties"]


@pytest.mark.parametrize("kind", Kind)
def test_list_one_kind(kind: Kind):
    assert list(json.loads(succeed("list", kind, "--json").stdout)) == [kind]


def test_list_names_what_is_there():
    shown = succeed("list").stdout
    for name in ("lowrank", "lora"):
        assert name in shown


def test_version():
    assert succeed("--version").stdout == f"model-surgery {surgery.__version__}\n"


@pytest.mark.parametrize("verb", ["inspect", "plan", "apply", "verify", "undo", "schema", "list"])
def test_every_verb_explains_itself(verb: str):
    assert "--debug" in succeed(verb, "--help").stdout


def test_an_example_file_is_used(rules: str, tmp_path: Path):
    path = tmp_path / "inputs.safetensors"
    save_file({"input_ids": torch.ones(2, 5, dtype=torch.long)}, path)
    succeed("plan", TINY[0], rules, *TINY[1:], "--example", str(path))


# --- wrong input ---------------------------------------------------------------------------------

WRONG_USAGE = [
    (["lst"], "Did you mean 'list'"),
    (["plan", "timm:vit_tiny_patch16_224"], "RULES"),
    (["inspect", "x", "--device", "gpu"], "gpu"),
    (["inspect", "x", "--dtype", "int8"], "float32"),
    (["inspect", "x", "-c", "hidden_size"], "KEY=VALUE"),
    (["inspect", "x", "-c", "sizes=[1"], "YAML"),
    (["apply", "x", "rules.yaml"], "--out"),
]


@pytest.mark.parametrize(("args", "said"), WRONG_USAGE, ids=lambda value: str(value)[:30])
def test_wrong_usage_exits_with_2(args: list[str], said: str):
    result = call(*args)
    assert result.exit_code == USAGE
    assert result.stdout == ""
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_rule_file_is_told_with_its_line(tmp_path: Path):
    path = tmp_path / "wrong.yaml"
    path.write_text(LORA.replace("pass: lowrank", "pass: lowrnk"))
    result = call("plan", TINY[0], str(path), *TINY[1:])
    assert result.exit_code == errors.RuleError.exit_code
    assert f"{path}:5" in result.stderr.replace("\n", "")
    assert "lowrank" in result.stderr
    assert result.stdout == ""


def test_a_rule_that_matches_nothing_names_the_nearest(tmp_path: Path):
    path = tmp_path / "nothing.yaml"
    path.write_text(LORA.replace("**.self.*", "**.self.querry"))
    result = call("plan", TINY[0], str(path), *TINY[1:])
    assert result.exit_code == errors.NoMatch.exit_code
    assert "self.query" in result.stderr


def test_a_missing_rule_file(tmp_path: Path):
    result = call("plan", TINY[0], str(tmp_path / "none.yaml"))
    assert result.exit_code in (1, errors.RuleError.exit_code)
    assert "none.yaml" in result.stderr.replace("\n", "")


def test_an_unknown_scheme(rules: str):
    result = call("plan", "tim:vit_tiny_patch16_224", rules)
    assert result.exit_code == errors.SourceError.exit_code
    assert "timm" in result.stderr


def test_a_folder_without_a_rewrite(tmp_path: Path):
    assert call("verify", str(tmp_path)).exit_code == errors.CheckpointError.exit_code


def test_an_example_that_is_no_safetensors_file(rules: str, tmp_path: Path):
    path = tmp_path / "inputs.safetensors"
    path.write_bytes(b"not a tensor file")
    result = call("plan", TINY[0], rules, "--example", str(path), *TINY[1:])
    assert result.exit_code == errors.SourceError.exit_code


def test_a_broken_contract_saves_nothing(
    rules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from surgery.passes.lowrank import LowRank

    honest = LowRank.apply

    def broken(self, model, edit, context):
        honest(self, model, edit, context)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.ones_(parameter)

    monkeypatch.setattr(LowRank, "apply", broken)
    folder = tmp_path / "out"
    result = call("apply", TINY[0], rules, "--out", str(folder), *TINY[1:])
    assert result.exit_code == errors.ContractBroken.exit_code
    assert not folder.exists()
    assert result.stdout, "the report shows where"


@pytest.mark.parametrize(
    ("raised", "code"), [(TypeError("bug"), INTERNAL), (KeyboardInterrupt(), INTERRUPTED)]
)
def test_nothing_ends_in_a_traceback(
    raised: BaseException, code: int, rules: str, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(surgery, "load", fail, raising=False)
    result = call("plan", TINY[0], rules)
    assert result.exit_code == code
    assert "Traceback" not in result.stderr
    debugged = call("plan", TINY[0], rules, "--debug")
    assert debugged.exit_code == code
    assert "Traceback" in debugged.stderr


# --- a real process ------------------------------------------------------------------------------


def process(root: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "surgery.cli", *args],
        cwd=root,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_piped_plan_is_whole_and_stderr_is_silent(root: Path, rules: str):
    done = process(root, "plan", TINY[0], rules, *TINY[1:], "--full", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "encoder.layer.1.attention.self.query" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""


def test_help_does_not_wait_for_torch(root: Path):
    script = "import sys, surgery.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=root, check=True)


def test_a_misspelt_shipped_configuration_gets_the_nearest_names():
    result = call("pretrain", "llama-tyni")
    assert result.exit_code == USAGE
    assert "'llama-tiny'" in result.stderr
