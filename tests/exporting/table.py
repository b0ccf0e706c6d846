"""Every format on every family of the survival table, each read by its own consumer.

``make exports`` writes the outcome to ``docs/export/families.md``. Rewritten twice: by learned
shortcuts with adapters beside them, and by adapters alone, which is what PEFT and merging are for.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from torch import nn

import surgery
from tests.exporting import models
from tests.survival.models import SUBJECTS, Subject

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "export" / "families.md"
RESULTS = Path(__file__).parent / "families.json"
TEXTS = {"transformers": "transformers", "diffusers": "diffusers", "timm": "python"}
WHOLE = ("text", "torch_export", "onnx")
ADAPTERS = ("peft", "merged", "diffusers_lora")

console = Console()

_HEAD = """# Formats and families

Written by `make exports`; tiny models of the families of the [survival table](../survival.md), with
random weights in everything that was inserted. A figure is the largest deviation of an output,
relative to the largest value of its tensor, as the consumer of the format computes it; for
`torch_export` and `onnx` over three calls of different sizes and the example.

`code` is the format of readable code: `transformers`, `diffusers`, or `python` for timm. It,
`torch_export` and `onnx` hold learned shortcuts between blocks and adapters that are not merged;
`peft`, `merged` and `diffusers_lora` adapters alone. An empty cell was not run. torch.export and
ONNX of the same families, with shortcuts, are also rows of the survival table.

"""


def rewritten(subject: Subject, *, adapters_alone: bool) -> nn.Module:
    """The model with adapters at every weight that takes one, and with shortcuts in every stack."""
    model, example = subject.build(), subject.example()
    if not adapters_alone:
        shortcuts = surgery.Rule(surgery.Shortcuts(), where=surgery.Stack("all"))
        models.randomise(surgery.apply(model, shortcuts, example=example))
    where = surgery.Role(["attention", "mlp", "conv"]) if adapters_alone else None
    surgery.apply(model, surgery.Rule(surgery.LowRank(rank=2), where=where), example=example)
    return models.stirred(model)


def cell(model: nn.Module, subject: Subject, form: str) -> str:
    """The deviation, or why there is none."""
    name = TEXTS[subject.library] if form == "text" else form
    example = subject.example(quiet=True)
    with TemporaryDirectory() as folder:
        try:
            done = surgery.export(model, Path(folder, "out"), format=name, example=example)
        except surgery.ExportError as error:
            return f"refused: {error.message.splitlines()[0]}"
    return f"{done.agreement.deviation:.0e}"


def measure(subjects: Iterable[Subject], forms: set[str]) -> dict[str, dict[str, str]]:
    """Family → format → what came of it."""
    found: dict[str, dict[str, str]] = {}
    for subject in subjects:
        row = found.setdefault(subject.name, {})
        for group, alone in ((WHOLE, False), (ADAPTERS, True)):
            wanted = [form for form in group if form in forms and _is_meant(form, subject)]
            model = rewritten(subject, adapters_alone=alone) if wanted else None
            for form in wanted:
                start = time.perf_counter()
                row[form] = cell(_there(model), subject, form)
                taken = f"{time.perf_counter() - start:.0f} s"
                console.print(f"{subject.name}: {form}: {row[form]} ({taken})", markup=False)
    return found


def _there(model: nn.Module | None) -> nn.Module:
    assert model is not None
    return model


def _is_meant(form: str, subject: Subject) -> bool:
    return form != "diffusers_lora" or subject.library == "diffusers"


def page(found: dict[str, dict[str, str]]) -> str:
    """The page."""
    forms = [*WHOLE, *ADAPTERS]
    notes: list[str] = []
    lines = [
        "| family | " + " | ".join("`code`" if f == "text" else f"`{f}`" for f in forms) + " |",
        "|---|" + "---|" * len(forms),
    ]
    for name, row in found.items():
        cells: list[str] = []
        for form in forms:
            text = row.get(form, "")
            if text.startswith("refused: "):
                reason = text.removeprefix("refused: ")
                if reason not in notes:
                    notes.append(reason)
                text = f"[{notes.index(reason) + 1}]"
            cells.append(text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    told = [f"{number}. {reason}" for number, reason in enumerate(notes, start=1)]
    return (
        _HEAD
        + "\n".join(lines)
        + "\n"
        + ("\nRefused:\n\n" + "\n".join(told) + "\n" if told else "")
    )


def main() -> None:
    """Measure what was asked for, keep what was measured before, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", help="names of families, with commas")
    parser.add_argument("--formats", help="formats, with commas; text for readable code")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    names = None if args.only is None else args.only.split(",")
    forms = {*WHOLE, *ADAPTERS} if args.formats is None else set(args.formats.split(","))
    subjects = [each for each in SUBJECTS if names is None or each.name in names]
    before: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for subject in subjects:
        before[subject.name] = (
            before.get(subject.name, {}) | measure([subject], forms)[subject.name]
        )
        ordered = {each.name: before[each.name] for each in SUBJECTS if each.name in before}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(ordered))


if __name__ == "__main__":
    main()
