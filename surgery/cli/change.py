"""``surgery apply``, ``surgery verify`` and ``surgery undo``: a rewrite, its proof, its end."""

from __future__ import annotations

import typer
from rich.console import Group

import surgery
from surgery import progress
from surgery.cli.options import (
    AdapterOnly,
    Against,
    Base,
    Config,
    Debug,
    Device,
    Dtype,
    Example,
    Full,
    Json,
    Merged,
    Model,
    Out,
    Pretrained,
    Quiet,
    Rules,
    Saved,
    ShardSize,
    Weights,
)
from surgery.cli.session import load, read_example, restored, session


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
    materialize: Weights = None,
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
            place = device if materialize is None else "meta"
            loaded = load(model, config, pretrained=pretrained, device=place, dtype=dtype)
            with progress.task("planning"):
                made = surgery.plan(loaded, recipe, example=inputs)
            with progress.task("applying"):
                made.apply()
            if materialize is not None:
                surgery.materialize(loaded, materialize, device=device or "cpu")
            report = surgery.verify(loaded, example=inputs)
            if report.ok:
                surgery.save(loaded, out, max_shard_size=max_shard_size, adapter_only=adapter_only)
        shown = Group(made.view(full=full), report)
        data = {"plan": made.to_dict(), "verify": report.to_dict(), "out": str(out)}
        current.result(shown, data)
        report.check()
        current.note(f"saved to {out}")


def verify(
    folder: Saved,
    *,
    base: Base = None,
    example: Example = None,
    device: Device = None,
    against: Against = None,
    adapter: Merged = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a saved rewrite against what its passes promised. Fails if a contract is broken."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        if against is not None:
            if (base, example, device) != (None, None, None):
                raise typer.BadParameter(
                    "--against looks at files and calls no model: leave out --base, --example and "
                    "--device"
                )
            with current.running():
                proof = surgery.prove(folder, against=against, adapter=adapter)
            current.result(proof, proof.to_dict())
            proof.check()
            return
        if adapter is not None:
            raise typer.BadParameter("--adapter says what --against has to look for: give both")
        with current.running():
            model = restored(folder, base, device)
            report = surgery.verify(model, example=read_example(example))
        current.result(report, report.to_dict())
        report.check()


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
