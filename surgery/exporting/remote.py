"""What the remote-code formats of transformers and diffusers have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.capture.graft import stock_class
from surgery.exporting.code.literals import identifier, literal
from surgery.exporting.code.rewrites import Rewrites, obstacle
from surgery.exporting.code.text import Code
from surgery.passes.hosts import CHILD, Bank
from surgery.sources.libraries import library_of, require

MODULE = "modeling_rewritten"

_DOCSTRING = """{name}: a {stock} of {library} with its rewrite.

Loaded with ``trust_remote_code=True``.
Made by model-surgery; how and from what is in ``surgery.json``. Tested with the versions below.
"""

_VERSIONS = """#: What this file was tested with.
TESTED: dict[str, str] = {tested}


def _check_versions() -> None:
    for package, tested in TESTED.items():
        found = version(package)
        if found.split("+")[0] != tested.split("+")[0]:
            warnings.warn(
                f"{{__name__}} was tested with {{package}} {{tested}}, {{found}} is installed",
                stacklevel=2,
            )


_check_versions()"""


def misfit(model: nn.Module, library: str) -> str | None:
    """Why a model is no whole model of a library whose rewrites are text, or None."""
    cls = stock_class(model)
    found = library_of(cls)
    if found != library:
        return f"it is no model of {library}"
    base = {"transformers": "PreTrainedModel", "diffusers": "ModelMixin"}[library]
    if not issubclass(cls, getattr(require(library), base)):
        return f"{cls.__name__} is a part of a model, not a whole one"
    return obstacle(model)


def rewritten_name(cls: type) -> str:
    """Name of the class that is generated for a stock one."""
    return f"Rewritten{identifier(cls.__name__)}"


def modeling_file(
    work: Path,
    model: nn.Module,
    rewrites: Rewrites,
    *,
    config_class: type | None,
    tested: dict[str, str],
) -> str:
    """Write the file and return the name of the model's class in it.

    Args:
        work: Folder to write into.
        model: The model.
        rewrites: What distinguishes it from its stock class.
        config_class: Class of its configuration, which gets a model type of its own.
        tested: Package → version.
    """
    cls = stock_class(model)
    library = str(library_of(cls))
    name = rewritten_name(cls)
    code = Code(rewrites, records=library == "transformers")
    base = code.root_class(cls)
    config = "" if config_class is None else _config(code, config_class)
    rewrite = code.rewrite()
    body = [f"class {name}({base}):", f'    """A ``{cls.__name__}`` with its rewrite."""', ""]
    if config_class is not None:
        body += [f"    config_class = {rewritten_name(config_class)}"]
        body += [f"    _keep_in_fp32_modules_strict = {literal(_kept(cls, rewrites))}", ""]
        body += ["    def __init__(self, config, *args, **kwargs):"]
        body += ["        super().__init__(config, *args, **kwargs)", "        rewrite(self)"]
        body += _training(code)
    else:
        code.inlined.imported("import inspect", "inspect", __import__("inspect"))
        code.inlined.add("diffusers.configuration_utils", "register_to_config")
        body += _diffusers_init(cls)
    code.inlined.imported("import warnings", "warnings", __import__("warnings"))
    code.inlined.add("importlib.metadata", "version")
    text = code.assembled(
        _DOCSTRING.format(name=name, stock=cls.__name__, library=library),
        _VERSIONS.format(tested=literal(tested)),
        rewrite,
        config,
        "\n".join(body),
    )
    (work / f"{MODULE}.py").write_text(text, encoding="utf-8")
    return name


def _kept(cls: type, rewrites: Rewrites) -> list[str]:
    """What stays in float32 when the rest of the model is loaded in half precision."""
    inherited: Any = getattr(cls, "_keep_in_fp32_modules_strict", None) or ()
    inserted = {"shortcuts"} if rewrites.shortcuts else set[str]()
    if any(_is_wider(one.bank, one.dtype) for one in rewrites.adapted):
        inserted.add(CHILD)
    return sorted({*map(str, inherited), *inserted})


def _is_wider(bank: Bank, weight: torch.dtype | None) -> bool:
    """Whether adapters are float32 beside a weight of half precision."""
    found = {parameter.dtype for parameter in bank.parameters()}
    return weight is not None and weight.itemsize < 4 and torch.float32 in found


def _training(code: Code) -> list[str]:
    """A method for what a loader does not keep: that only adapters are trained."""
    frozen = code.frozen("self")
    if not frozen:
        return []
    return [
        "",
        "    def train_adapters(self):",
        '        """Let only what was trained before be trained, which is all after loading."""',
        f"        {frozen[0]}",
    ]


def _config(code: Code, cls: type) -> str:
    base = code.stock(cls)
    kind = literal(model_type(cls))
    return "\n".join(
        [
            f"class {rewritten_name(cls)}({base}):",
            '    """Tells these models from stock ones, which load other code."""',
            "",
            f"    model_type = {kind}",
        ]
    )


def model_type(cls: Any) -> str:
    """The model type of rewritten models of a configuration class."""
    return f"rewritten_{cls.model_type}"


def _diffusers_init(cls: type) -> list[str]:
    import inspect

    given = list(inspect.signature(cls.__init__).parameters.values())[1:]
    names = [identifier(item.name) for item in given]
    parameters = [
        f"{item.name}={literal(item.default)}" if item.default is not item.empty else item.name
        for item in given
    ]
    passed = ", ".join(f"{name}={name}" for name in names)
    return [
        "    @register_to_config",
        f"    def __init__(self, {', '.join(parameters)}):",
        f"        super().__init__({passed})",
        "        rewrite(self)",
    ]


def write_json(file: Path, data: Any) -> None:
    """A JSON file as the libraries write it."""
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
