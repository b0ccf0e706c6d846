"""``surgery inspect`` and ``surgery plan``: what is there, and what a rule file would do."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.syntax import Syntax
from rich.text import Text

import surgery
from surgery import progress
from surgery.cli.options import (
    Code,
    Config,
    Debug,
    Device,
    Dtype,
    Example,
    Full,
    Json,
    Model,
    Pretrained,
    Quiet,
    Rules,
)
from surgery.cli.session import load, read_example, session


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


def code_views(written: dict[str, str]) -> list[Any]:
    """Every rewritten method under its name, or a line saying that there is none."""
    if not written:
        return [Text("no code is rewritten")]
    return [
        part
        for name, text in written.items()
        for part in (Text(f"\n{name}", style="bold"), Syntax(text, "python", word_wrap=True))
    ]
