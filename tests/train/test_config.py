"""Training configurations: what is read, what is refused, and how it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from surgery import shipped
from surgery.errors import ConfigError
from surgery.train.adapt.config import AdaptConfig
from surgery.train.config import PretrainConfig
from surgery.train.finetune.config import FinetuneConfig

TINY = """\
version: 1
name: tiny
model: {source: "preset:mlp-8"}
data: {kind: digits}
objective: {kind: classification}
optim: {name: adamw, lr: 1e-3}
schedule: {kind: cosine, warmup: 2}
train: {steps: 10, batch: 8}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def test_what_is_left_out_has_its_default(file: Path):
    config = PretrainConfig.load(file)
    assert (config.train.accumulate, config.train.precision, config.seed) == (1, "fp32", 0)
    assert config.recipe is None


def test_an_override_takes_the_place_of_a_value(file: Path):
    overrides = ["train.steps=20", "optim.lr=3e-4", "model.config.depth=4", "name='007'"]
    config = PretrainConfig.load(file, overrides)
    assert config.train.steps == 20
    assert config.optim.lr == 3e-4
    assert config.model.config == {"depth": 4}
    assert config.name == "007"


def test_the_learning_rate_may_be_given_as_that_of_training(file: Path):
    assert PretrainConfig.load(file, ["train.lr=3e-4"]).optim.lr == 3e-4


def test_an_override_can_replace_a_section_by_one_of_another_kind(file: Path):
    config = PretrainConfig.load(file, ["optim={name: galore, lr: 1e-2, rank: 4}"])
    assert config.optim.name == "galore"


REFUSED: dict[str, tuple[str, ...]] = {
    # override: what the error says
    "train.stepz=3": ("train.stepz=3", "unknown key 'stepz'", "did you mean 'steps'?"),
    "train.batc=3": ("unknown key 'batc'", "did you mean 'batch'?"),
    "train.weight_decay=0": ("unknown key", "did you mean 'optim.weight_decay'?"),
    "train.steps='4'": ("train.steps", "expected an integer, got the string '4'"),
    "train.steps=0": ("train.steps", "must be at least 1, got 0"),
    "train.steps": ("expected KEY=VALUE",),
    "train.steps=[1": ("train.steps=[1", "ends within brackets"),
    "name.x=3": ("name is the string 'tiny', not a section",),
    "optim.lr=.nan": ("not a finite number",),
    "data.kind=digit": ("data.kind", "'digits'", "got the string 'digit'", "did you mean"),
    "data.path=x": ("unknown key 'path'",),
    "optim={lr: 1}": ("missing key 'name'",),
    "train.steps=1": ("schedule.warmup", "2 steps is longer than the run of 1"),
    "train.accumulate=3": ("train.batch", "8 cannot be split into 3"),
    "objective.kind=language": ("objective language cannot be trained on digits data",),
    "data={kind: text}": ("objective classification cannot be trained on text", "use language"),
    "rules=nothing.yaml": ("nothing.yaml", "there is no such file"),
    "rules={version: 1, rules: []}": ("rules", "at least one rule"),
    "version=2": ("version",),
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_is_wrong_is_told(file: Path, override: str):
    with pytest.raises(ConfigError) as caught:
        PretrainConfig.load(file, [override])
    for part in REFUSED[override]:
        assert part in str(caught.value)


TOGETHER: dict[tuple[str, ...], str] = {
    ("optim={name: galore, lr: 1, rank: 4}", "train.parallel=fsdp2"): "galore does not work with",
    ("model.dtype=bfloat16", "train.precision=bf16"): "autocast to bf16 is for float32 weights",
    ("schedule={kind: constant, final: 0.1}",): "a constant schedule does not end at 0.1",
}


@pytest.mark.parametrize("overrides", TOGETHER, ids=" ".join)
def test_contradictions_are_named(file: Path, overrides: tuple[str, ...]):
    with pytest.raises(ConfigError, match=TOGETHER[overrides]):
        PretrainConfig.load(file, overrides)


def test_every_problem_is_told_with_its_line(tmp_path: Path):
    path = tmp_path / "wrong.yaml"
    path.write_text(TINY.replace("steps: 10", "stepz: 10").replace("lr: 1e-3", "lr: fast"))
    with pytest.raises(ConfigError) as caught:
        PretrainConfig.load(path)
    assert f"{path}:6:26: optim.lr: expected a number" in str(caught.value)
    assert f"{path}:8:9: train: unknown key 'stepz'" in str(caught.value)
    assert f"{path}:8:8: train: missing key 'steps'" in str(caught.value)
    assert (caught.value.line, caught.value.exit_code) == (6, 12)


@pytest.mark.parametrize("content", ["", "- a list", "version: 1\nversion: 1\n", "a: [\n"])
def test_what_is_no_configuration_is_refused(tmp_path: Path, content: str):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"broken\.yaml:1|broken\.yaml:2"):
        PretrainConfig.load(path)


def test_a_file_that_is_missing_is_told_with_its_neighbours(file: Path):
    with pytest.raises(ConfigError, match=r"no such file\n.*did you mean 'tiny.yaml'"):
        PretrainConfig.load(file.with_name("tinny.yaml"))
    with pytest.raises(ConfigError, match="this is a folder"):
        PretrainConfig.load(file.parent)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (PretrainConfig, "llama-tiny"),
        (FinetuneConfig, "minilm-lora"),
        (AdaptConfig, "sinusoid-maml"),
    ],
)
def test_a_shipped_configuration_is_loaded_by_name(
    kind: type[PretrainConfig | FinetuneConfig | AdaptConfig],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    assert kind.load(name, ["seed=7"]) == kind.load(kind.shipped()[name], ["seed=7"])
    # A folder of that name, such as a run's, is none; a file is.
    (tmp_path / name).mkdir()
    assert kind.load(name).name == name
    (tmp_path / name).rmdir()
    own = {**kind.load(name).dump(), "name": "mine"}
    (tmp_path / name).write_text(kind.parse(own).to_yaml())
    assert kind.load(name).name == "mine"


def test_a_name_that_is_neither_file_nor_shipped_is_told():
    with pytest.raises(ConfigError, match=r"no file and no shipped .*\n.*mean 'minilm-lora'"):
        FinetuneConfig.load("minilm-lra")


def test_rules_start_at_the_file_that_names_them_and_become_part_of_it(tmp_path: Path):
    (tmp_path / "rules").mkdir()
    rules = shipped.rules()["ancre"].read_text()
    (tmp_path / "rules" / "some.yaml").write_text(rules)
    path = tmp_path / "with.yaml"
    path.write_text(TINY + "rules: rules/some.yaml\n")
    config = PretrainConfig.load(path)
    recipe = config.recipe
    assert recipe is not None
    assert recipe.rules[0].options.name == "shortcuts"
    (tmp_path / "rules" / "some.yaml").unlink()
    path.write_text(config.to_yaml())
    assert PretrainConfig.load(path) == config


@pytest.mark.parametrize("name", shipped.pretraining())
def test_shipped_configurations_are_read_and_written_back(name: str, tmp_path: Path):
    config = PretrainConfig.load(shipped.pretraining()[name])
    assert config.name == name
    assert (config.recipe is not None) == name.endswith(("-ancre", "-ancre-replace"))
    assert PretrainConfig.parse(config.dump()) == config
    path = tmp_path / "again.yaml"
    path.write_text(config.to_yaml())
    assert PretrainConfig.load(path) == config


def test_twins_differ_in_their_rules_only():
    configs = shipped.pretraining()
    twins = [name for name in configs if f"{name}-ancre" in configs]
    others = [f"{name}-ancre" for name in twins] + ["resnet-56-digits-ancre-replace"]
    # What fine-tuning begins with, and trained for that alone.
    assert sorted([*twins, *others, "vit-tiny-digits"]) == sorted(configs)
    for name in others:
        one, other = (_bare(configs[each]) for each in (name.partition("-ancre")[0], name))
        assert one == other, name


def test_what_takes_the_place_of_shortcuts_keeps_a_resnet_from_growing():
    import surgery

    sizes: dict[str, float] = {}
    for name in ("resnet-56-digits", "resnet-56-digits-ancre", "resnet-56-digits-ancre-replace"):
        config = PretrainConfig.load(shipped.pretraining()[name])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = surgery.load(config.model.source, config=config.model.config)
        if config.recipe is not None:
            surgery.apply(model, config.recipe, example=torch.zeros(2, 1, 8, 8))
        images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            sizes[name.removeprefix("resnet-56-digits")] = float(model.train()(images).std())
    assert sizes["-ancre"] > 100 * sizes[""]
    assert sizes["-ancre-replace"] < 2 * sizes[""]


def _bare(path: Path) -> dict[str, Any]:
    data = PretrainConfig.load(path).dump()
    data["log"].pop("matrices")
    return {key: value for key, value in data.items() if key not in ("name", "rules")}


PAPERS = {
    # name: learning rate, steps, warm-up; arXiv 2602.09009 and its code
    "llama-60m": (5e-3, 10_000, 1_000),
    "llama-130m": (1e-3, 20_000, 2_000),
    "llama-350m": (1e-3, 60_000, 6_000),
    "llama-1b": (5e-4, 100_000, 10_000),
    "llama-60m-galore": (1e-2, 10_000, 1_000),
    "llama-130m-galore": (5e-2, 20_000, 2_000),
    "llama-350m-galore": (5e-2, 60_000, 6_000),
    "llama-1b-galore": (5e-3, 100_000, 10_000),
}
RANKS = {"60m": 128, "130m": 256, "350m": 256, "1b": 512}


@pytest.mark.parametrize("name", PAPERS)
def test_language_models_follow_the_papers(name: str):
    config = PretrainConfig.load(shipped.pretraining()[name])
    assert (config.optim.lr, config.train.steps, config.schedule.warmup) == PAPERS[name]
    assert config.optim.weight_decay == 0
    assert (config.schedule.kind, config.schedule.final) == ("cosine", 0.1)
    assert (config.model.dtype, config.train.precision, config.train.clip) == (
        "bfloat16",
        "fp32",
        None,
    )
    assert (config.train.batch, config.seed) == (512, 0)
    assert config.data.kind == "stream"
    assert (config.data.path, config.data.shuffle_seed, config.data.length) == (
        "allenai/c4",
        42,
        256,
    )
    if config.optim.name == "galore":
        size = name.removeprefix("llama-").removesuffix("-galore")
        assert (config.optim.rank, config.optim.gap, config.optim.scale) == (RANKS[size], 200, 0.25)


@pytest.mark.parametrize("name", ["dit-s2", "dit-b2"])
def test_diffusion_models_follow_the_paper(name: str):
    config = PretrainConfig.load(shipped.pretraining()[name])
    assert (config.optim.name, config.optim.lr, config.optim.weight_decay) == ("adamw", 1e-4, 0)
    assert config.schedule.kind == "constant"
    assert (config.train.batch, config.train.precision, config.train.compile) == (256, "bf16", True)
    assert config.objective.kind == "diffusion"
    assert (config.objective.label_dropout, config.objective.ema) == (0.1, 0.9999)
    assert (config.data.kind, config.checkpoint.every, config.seed) == ("latents", 50_000, 42)


# GaLore's recipes train the same models.
REWIRED = [n for n in shipped.pretraining() if "-ancre" in n and "galore" not in n]


@pytest.mark.parametrize("name", REWIRED)
def test_models_of_shipped_configurations_are_built_and_rewired(name: str):
    import surgery

    config = PretrainConfig.load(shipped.pretraining()[name])
    recipe = config.recipe
    assert recipe is not None
    model = surgery.load(
        config.model.source, config=config.model.config, dtype=config.model.dtype, device="meta"
    )
    surgery.apply(model, recipe)
    assert surgery.parameter_groups(model, weight_decay=0.1)[1]["weight_decay"] == 0
