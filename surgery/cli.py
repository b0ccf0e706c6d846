"""The ``surgery`` command: the public API's verbs, one command each.

Results go to stdout, as tables or with ``--json`` as JSON; messages, progress and errors go to
stderr. Exit codes: 0 done, 2 wrong usage, 1 a file could not be read or written, 70 a bug, 130
interrupted, and one per error class of ``surgery.errors``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Group
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

import surgery
from surgery import progress, registry, shipped
from surgery.errors import SourceError
from surgery.terminal import OK, Session

if TYPE_CHECKING:
    import torch
    from torch import nn

    from surgery.exporting import Fit
    from surgery.train.loop import Tell
    from surgery.train.run import Run


def known_device(name: str | None) -> str | None:
    """The name, if torch knows such a device."""
    if name is None:
        return None
    import torch

    try:
        return str(torch.device(name))
    except RuntimeError as error:
        raise typer.BadParameter(str(error).partition("\n")[0]) from None


class Precision(StrEnum):
    """Floating-point formats a model can be cast to, by torch's names."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


class Kind(StrEnum):
    """What ``surgery list`` can list."""

    PASSES = "passes"
    METHODS = "methods"
    TOPOLOGIES = "topologies"
    FORMATS = "formats"
    PRESETS = "presets"
    RULES = "rules"
    CONFIGS = "configs"


class Picture(StrEnum):
    """Formats of pictures."""

    PNG = "png"
    SVG = "svg"


class Animation(StrEnum):
    """Formats of animations."""

    GIF = "gif"
    WEBP = "webp"


app = typer.Typer(
    name="surgery",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

data = typer.Typer(
    name="data", no_args_is_help=True, help="Prepare data to train on.", rich_markup_mode=None
)
app.add_typer(data)

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, transformers:ARCH, diffusers:CLASS, preset:NAME, hub:ID, or an existing "
        "folder.",
        show_default=False,
    ),
]
Rules = Annotated[
    Path, typer.Argument(metavar="RULES", help="A rule file (YAML).", show_default=False)
]
Saved = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A folder written by surgery apply.", show_default=False),
]
Config = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        "-c",
        metavar="KEY=VALUE",
        help="Override one field of the model's config; VALUE is read as YAML. Repeatable.",
    ),
]
Pretrained = Annotated[
    bool | None,
    typer.Option(
        "--pretrained/--random",
        help="Load weights, or start from random ones. Default: weights from hub: and folders.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to build the model: cpu, cuda, cuda:1, meta.",
        callback=known_device,
    ),
]
Dtype = Annotated[Precision | None, typer.Option(help="Cast the weights.")]
Example = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A safetensors file of forward arguments by name, where none can be inferred.",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.", show_default=False)
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The stock model with its weights, for a folder that holds the adapter only.",
    ),
]
AdapterOnly = Annotated[
    bool, typer.Option("--adapter-only", help="Save what was inserted, not the stock weights.")
]
ShardSize = Annotated[str, typer.Option(help="Largest weight file, such as 500MB.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
Full = Annotated[bool, typer.Option("--full", help="One row per site, not per run of like ones.")]
Code = Annotated[bool, typer.Option("--code", help="Show the Python that is rewritten.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")]


REGISTRIES = {
    Kind.PASSES: registry.PASSES,
    Kind.METHODS: registry.ADAPTERS,
    Kind.TOPOLOGIES: registry.TOPOLOGIES,
    Kind.FORMATS: registry.FORMATS,
}


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(f"model-surgery {surgery.__version__}")
        raise typer.Exit(OK)


@app.callback(epilog="Each command explains itself: surgery COMMAND --help")
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    """Rewrite the architecture of a PyTorch model from a short rule file, with proof."""


@app.command("inspect")
def inspect_model(
    model: Model,
    *,
    config: Config = None,
    pretrained: Pretrained = None,
    device: Device = None,
    dtype: Dtype = None,
    example: Example = None,
    full: Full = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a rule could name: sites with types, roles and stacks; and residual additions."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        with current.running():
            loaded = load(model, config, pretrained=pretrained, device=device, dtype=dtype)
            with progress.task("reading the structure"):
                found = surgery.inspect(loaded, example=read_example(example))
        current.result(found.view(full=full), found.to_dict())


@app.command()
def plan(
    model: Model,
    rules: Rules,
    *,
    config: Config = None,
    pretrained: Pretrained = None,
    device: Device = None,
    dtype: Dtype = None,
    example: Example = None,
    full: Full = False,
    code: Code = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a rule file would do to a model. Changes and writes nothing."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        with current.running():
            recipe = surgery.Recipe.load(rules)
            loaded = load(model, config, pretrained=pretrained, device=device, dtype=dtype)
            with progress.task("planning"):
                made = surgery.plan(loaded, recipe, example=read_example(example))
            written = made.code() if code else {}
        shown = Group(made.view(full=full), *code_views(written)) if code else made.view(full=full)
        data = {**made.to_dict(), "code": written} if code else made.to_dict()
        current.result(shown, data)


@app.command()
def apply(
    model: Model,
    rules: Rules,
    *,
    out: Out,
    config: Config = None,
    pretrained: Pretrained = None,
    device: Device = None,
    dtype: Dtype = None,
    example: Example = None,
    adapter_only: AdapterOnly = False,
    max_shard_size: ShardSize = "5GB",
    full: Full = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rewrite a model, verify it, and save it. Nothing is saved when a contract is broken."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        with current.running():
            recipe = surgery.Recipe.load(rules)
            inputs = read_example(example)
            loaded = load(model, config, pretrained=pretrained, device=device, dtype=dtype)
            with progress.task("planning"):
                made = surgery.plan(loaded, recipe, example=inputs)
            with progress.task("applying"):
                made.apply()
            report = surgery.verify(loaded, example=inputs)
            if report.ok:
                surgery.save(loaded, out, max_shard_size=max_shard_size, adapter_only=adapter_only)
        shown = Group(made.view(full=full), report)
        data = {"plan": made.to_dict(), "verify": report.to_dict(), "out": str(out)}
        current.result(shown, data)
        report.check()
        current.note(f"saved to {out}")


@app.command()
def verify(
    folder: Saved,
    *,
    base: Base = None,
    example: Example = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a saved rewrite against what its passes promised. Fails if a contract is broken."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        with current.running():
            model = restored(folder, base, device)
            report = surgery.verify(model, example=read_example(example))
        current.result(report, report.to_dict())
        report.check()


@app.command()
def undo(
    folder: Saved,
    *,
    out: Out,
    base: Base = None,
    device: Device = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Take a saved rewrite back and save the model as it was before."""
    with session(quiet=quiet, debug=debug) as current:
        with current.running():
            model = restored(folder, base, device)
            surgery.undo(model)
            surgery.save(model, out)
        current.note(f"saved to {out}")


@app.command()
def export(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="File or folder to write.", show_default=False),
    ] = None,
    *,
    form: Annotated[
        str | None,
        typer.Option("--format", "-f", help="Name of the format.", show_default=False),
    ] = None,
    listing: Annotated[
        bool,
        typer.Option("--list", help="Say which formats fit the model, and why the others do not."),
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-O",
            metavar="KEY=VALUE",
            help="Set one option of the format; VALUE is read as YAML. Repeatable.",
        ),
    ] = None,
    base: Base = None,
    config: Config = None,
    pretrained: Pretrained = None,
    device: Device = None,
    dtype: Dtype = None,
    example: Example = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model, rewritten or not, in a format that others read without this library.

    What is written is loaded with the program it is for and compared before it takes its place.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        if not listing and (out is None or form is None):
            raise typer.BadParameter("expected MODEL OUT --format NAME, or --list MODEL")
        from surgery import exporting

        with current.running():
            loaded = (
                load(model, config, pretrained=pretrained, device=device, dtype=dtype)
                if base is None
                else restored(Path(model), base, device)
            )
        if out is None or form is None or listing:
            found = exporting.fits(loaded)
            shown = [{"format": fit.format, "misfit": fit.misfit} for fit in found]
            current.result(fits_view(found), shown)
            return
        with current.running():
            done = surgery.export(
                loaded, out, format=form, example=read_example(example), **overrides(option or [])
            )
        current.result(done.view(), done.to_dict())
        current.note(f"saved to {out}")


@app.command()
def schema(
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write to a file.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the JSON schema of rule files, which editors use for completion."""
    with session(as_json=True, quiet=quiet, debug=debug) as current:
        from surgery.rules import json_schema

        with current.running():
            data = json_schema()
        if out is None:
            current.result("", data)
            return
        current.write_json(out, data)
        current.note(f"saved to {out}")


@app.command("list")
def list_names(
    kind: Annotated[Kind | None, typer.Argument(help="One kind only.", show_default=False)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List passes, methods, topologies, formats, presets and shipped rule files.

    Imports none of them.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        found = {each.value: entries(each) for each in ([kind] if kind else Kind)}
        current.result(names_view(found), found)


@data.command("tokenize")
def data_tokenize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A text file, a folder, a pattern such as 'texts/**/*.md', or stdlib.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)
    ],
    *,
    tokenizer: Annotated[
        str, typer.Option(help="bytes, bpe (trained on SOURCE), a folder, or hub:ORG/NAME.")
    ] = "bytes",
    vocabulary: Annotated[int | None, typer.Option(help="Tokens of bpe.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Which files of a folder. Default: **/*.txt")
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(help="Part of the files that is kept for evaluation.", min=1e-6, max=0.999),
    ] = 0.05,
    length: Annotated[
        int, typer.Option(help="Tokens in a sample, unless a configuration says otherwise.", min=2)
    ] = 256,
    workers: Annotated[
        int | None, typer.Option(help="Processes. Default: one per core.", min=1)
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Bytes of text in a shard of tokens.", min=1)] = 1
    << 25,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn text into shards of tokens. Interrupted, the same command goes on where it stopped."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train.data.making import tokenize

        with current.running():
            index = tokenize(
                source,
                out,
                tokenizer=tokenizer,
                vocabulary=vocabulary,
                pattern=pattern,
                held_out=held_out,
                length=length,
                workers=workers,
                shard_size=shard_size,
            )
        current.result(index.view(), index.summary())
        current.note(f"saved to {out}")


@data.command("check")
def data_check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of tokens.", show_default=False)
    ],
    *,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare every byte of a folder of tokens with its checksums."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train.data import shards

        with current.running():
            index = shards.read_index(folder)
            shards.verify(folder, index)
        current.result(index.view(), index.summary())


@app.command()
def pretrain(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]...",
            help="A configuration (YAML) or the name of a shipped one, and overrides such as "
            "train.steps=100.",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Folder of the run. Default: runs/ and its name."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")
    ] = False,
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="Draw the run when it is done.")
    ] = True,
    comparing: Annotated[
        bool,
        typer.Option(
            "--compare", help="Train several configurations under one budget and compare them."
        ),
    ] = False,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="0,1,2", help="Seeds of a comparison.", show_default=False),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS", help="Steps of every run of a comparison.", min=1, show_default=False
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a model from scratch. Works alone, with accelerate launch and with torchrun."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train import run
        from surgery.train.config import PretrainConfig

        files, changes = configurations(given, shipped.pretraining())
        if comparing:
            compare_runs(current, files, changes, out=out, seeds=seeds, budget=budget)
            return
        if seeds is not None or budget is not None:
            raise typer.BadParameter("--seeds and --budget belong to --compare")
        if len(files) != 1:
            raise typer.BadParameter(
                f"expected one configuration, received {len(files)}; --compare takes several"
            )

        with current.running():
            config = PretrainConfig.load(files[0], changes)
        folder = out or Path("runs") / config.name
        train(
            current,
            lambda tell: run.pretrain(config, out=folder, resume=resume, tell=tell),
            folder if plots else None,
        )


@app.command()
def finetune(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]...",
            help="A configuration (YAML) or the name of a shipped one, and overrides such as "
            "train.lr=2e-4.",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="DIR", help="Folder of the run. Default: runs/ and its name."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")
    ] = False,
    plots: Annotated[
        bool, typer.Option("--plots/--no-plots", help="Draw the run when it is done.")
    ] = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a pretrained model: adapters, a new head, or all of it. Also under a launcher."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train.finetune.config import FinetuneConfig
        from surgery.train.finetune.run import finetune as fine_tune

        files, changes = configurations(given, shipped.finetuning())
        if len(files) != 1:
            raise typer.BadParameter(f"expected one configuration, received {len(files)}")
        with current.running():
            config = FinetuneConfig.load(files[0], changes)
        folder = out or Path("runs") / config.name
        train(
            current,
            lambda tell: fine_tune(config, out=folder, resume=resume, tell=tell),
            folder if plots else None,
        )


@app.command()
def sample(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A folder written by pretrain.", show_default=False),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Fields of objective.sample, such as steps=100, count=40, guidance=3 for images, "
            "or prompts='[import]', tokens=200, temperature=0.7 for text.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="File to write. Default: in RUN/samples."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw text or a grid of images from the model that a run ended with."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train import sample as sampling

        with current.running():
            drawn = sampling.sample(folder, changes or [], out=out, device=device)
        current.result(drawn.view(), drawn.to_dict())
        if drawn.texts is not None:
            current.note(f"written to {drawn.path}")


@app.command()
def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders; several are compared with the first.",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder of the pictures. Default: plots/ of each run.",
        ),
    ] = None,
    picture: Annotated[
        Picture, typer.Option("--format", help="Of the pictures that do not move.")
    ] = Picture.PNG,
    animation: Annotated[Animation, typer.Option(help="Of the one that does.")] = Animation.GIF,
    threshold: Annotated[
        float, typer.Option(help="Smallest coefficient that the graph shows.", min=0.0)
    ] = 0.1,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw what runs learned: coefficients over time, their graph, loss curves side by side."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train import views

        with current.running():
            drawn = views.draw(
                runs,
                out=out,
                form=picture.value,
                animation=animation.value,
                threshold=threshold,
            )
        current.result(drawn.view(), drawn.to_dict())


def train(current: Session, run: Callable[[Tell], Run], drawn: Path | None) -> None:
    """Train, say what came out, and draw the folder ``drawn`` if there is one."""
    from surgery.train import engine, views

    def tell(kind: str, text: str) -> None:
        if kind != "step" or not current.interactive:
            current.note(text)

    with current.running():
        done = run(tell)
        engine.leave()
    if not engine.main_process():
        return
    current.result(done.view(), done.to_dict())
    if drawn is not None:
        with current.running():
            pictures = views.draw([drawn])
        current.note(f"drawn: {', '.join(map(str, pictures.files))}")


def compare_runs(
    current: Session,
    files: list[Path],
    changes: list[str],
    *,
    out: Path | None,
    seeds: str | None,
    budget: int | None,
) -> None:
    """Train and compare configurations, and print the table."""
    from surgery.train import engine
    from surgery.train.compare import compare
    from surgery.train.config import PretrainConfig

    with current.running():
        configs = [PretrainConfig.load(file, changes) for file in files]
        folder = out or Path("runs") / "-vs-".join(config.name for config in configs)
        found = compare(configs, numbers(seeds or "0"), folder, budget=budget, tell=current.note)
        engine.leave()
    if engine.main_process():
        current.result(found.view(), found.to_dict())
        for note in (*found.notes, f"saved to {folder}"):
            current.note(note)


def numbers(text: str) -> list[int]:
    """``0,1,2`` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers such as 0,1,2, received {text!r}") from None


def configurations(
    given: list[str], shipped_ones: Mapping[str, Path]
) -> tuple[list[Path], list[str]]:
    """Configuration files, and the overrides among them."""
    changes = [each for each in given if "=" in each and not Path(each).exists()]
    names = [each for each in given if each not in changes]
    # A file wins over a shipped configuration of the same name.
    found = {name: Path(name) for name in names if Path(name).exists()}
    for name in names:
        if name not in found and name not in shipped_ones and not Path(name).suffix:
            raise typer.BadParameter(
                f"{name!r} is no file and no shipped configuration; "
                f"{registry.suggest(name, shipped_ones)}"
            )
    return [found[n] if n in found else shipped_ones.get(n, Path(n)) for n in names], changes


@contextmanager
def session(
    *, as_json: bool = False, quiet: bool = False, debug: bool = False
) -> Generator[Session]:
    """A session whose errors end the command with their exit code and without a traceback."""
    current = Session(as_json=as_json, quiet=quiet, debug=debug)
    try:
        yield current
    except (typer.Exit, typer.BadParameter, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the outermost frame: told, and turned into the exit code
        raise typer.Exit(current.failed(error)) from None


def load(
    model: str,
    config: list[str] | None,
    *,
    pretrained: bool | None,
    device: str | None,
    dtype: Precision | None,
) -> nn.Module:
    """The model a command was given: a rewritten one from its folder, or a stock one."""
    folder = Path(model)
    if (folder / "surgery.json").is_file():
        from surgery.exporting import provenance

        # An export for transformers or diffusers is a folder of that library.
        if not (provenance.is_export(folder) and (folder / "config.json").is_file()):
            return restored(folder, None, device)
    with progress.task(f"loading {model}"):
        return surgery.load(
            model,
            config=overrides(config or []),
            pretrained=pretrained,
            device=device,
            dtype=dtype,
        )


def restored(folder: Path, base: str | None, device: str | None) -> nn.Module:
    """The model a folder holds, over ``base`` where it holds an adapter only."""
    stock = None
    if base is not None:
        with progress.task(f"loading {base}"):
            stock = surgery.load(base, pretrained=True, device=device)
    with progress.task(f"restoring {folder}"):
        return surgery.restore(folder, stock, device=device)


def overrides(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` options as data, each value read as YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"expected KEY=VALUE, received {pair!r}")
        try:
            found[key] = cast("Any", YAML(typ="safe", pure=True)).load(text)
        except YAMLError as error:
            raise typer.BadParameter(f"the value of {key!r} is not YAML: {error}") from None
    return found


def read_example(path: Path | None) -> dict[str, torch.Tensor] | None:
    """Forward arguments by name from a safetensors file."""
    if path is None:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    try:
        return load_file(path)
    except SafetensorError as error:
        raise SourceError(f"{path} is not a safetensors file: {error}") from None


def entries(kind: Kind) -> list[dict[str, str]]:
    """What is registered or shipped under one kind: names and where each comes from."""
    if kind is Kind.RULES:
        return [{"name": name, "origin": str(path)} for name, path in shipped.rules().items()]
    if kind is Kind.CONFIGS:
        found = {**shipped.pretraining(), **shipped.finetuning()}
        return [{"name": name, "origin": str(path)} for name, path in found.items()]
    if kind is Kind.PRESETS:
        from surgery.sources import presets

        return presets.listed()
    found = REGISTRIES[kind]
    return [{"name": name, "origin": found.origin(name)} for name in found.names()]


def code_views(written: dict[str, str]) -> list[Any]:
    """Every rewritten method under its name, or a line saying that there is none."""
    if not written:
        return [Text("no code is rewritten")]
    return [
        part
        for name, text in written.items()
        for part in (Text(f"\n{name}", style="bold"), Syntax(text, "python", word_wrap=True))
    ]


def fits_view(found: list[Fit]) -> Table:
    """Formats with whether they fit."""
    table = Table("format", "fits", "why not")
    for fit in found:
        table.add_row(Text(fit.format), "no" if fit.misfit else "yes", Text(fit.misfit or ""))
    return table


def names_view(found: dict[str, list[dict[str, str]]]) -> Table:
    """Names by kind as a table."""
    table = Table("kind", "name", "from")
    for kind, names in found.items():
        for entry in names:
            table.add_row(kind, Text(entry["name"]), Text(entry["origin"]))
    return table


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    sys.exit(main())
