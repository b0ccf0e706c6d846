"""``transformers``: a folder that ``AutoModel*.from_pretrained`` loads with ``trust_remote_code``.

The modelling file is generated from the rewritten methods and the inserted modules and subclasses
the stock classes; nothing of this library is needed to load it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import nn

from surgery.capture.graft import stock_class
from surgery.errors import ExportError
from surgery.exporting import remote
from surgery.exporting.agreement import Agreement
from surgery.exporting.base import Format
from surgery.exporting.code import apart
from surgery.exporting.code.rewrites import Rewrites, rewrites_of
from surgery.exporting.weights import SHARD, checked_size, write_weights
from surgery.record import record_of
from surgery.rules.strict import options
from surgery.sources import SOURCE_ATTRIBUTE, Example
from surgery.untrusted.paths import check_inside

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja",
)  # fmt: skip


@options
class Transformers(Format):
    """Remote code of transformers; a plain folder where the architecture is the stock one.

    Args:
        tokenizer: A folder whose tokenizer files are copied along; by default the folder the
            model was loaded from, if it has any.
        max_shard_size: Bytes of the largest file of weights, as a number or as text.
    """

    name: ClassVar[str] = "transformers"

    tokenizer: str | None = None
    max_shard_size: int | str = SHARD

    def misfit(self, model: nn.Module) -> str | None:
        """Models of other libraries, and rewrites that are no text."""
        return None if _is_remote(model) else remote.misfit(model, "transformers")

    def write(self, model: nn.Module, work: Path, example: Example) -> None:
        """Configuration, weights, and the modelling file if one is needed."""
        rewrites = None if _is_remote(model) else rewrites_of(model)
        if rewrites is None or not rewrites.any:
            # The library's own way: it knows what published names its architectures have, and
            # takes the modelling file of remote code along.
            limit = checked_size(self.max_shard_size)
            cast("Any", model).save_pretrained(work, max_shard_size=limit)
        else:
            self._write_remote(model, work, rewrites)
        for file in _tokenizer_files(self.tokenizer, model):
            shutil.copyfile(file, work / file.name)

    def check(self, model: nn.Module, written: Path, example: Example) -> Agreement:
        """Load it in a process that cannot import this library."""
        if _is_remote(model) or rewrites_of(model).any:
            auto = _auto_class(model)
            load = f"transformers.{auto}.from_pretrained(folder, trust_remote_code=True)"
        else:
            auto = stock_class(model).__name__
            load = f"transformers.{auto}.from_pretrained(folder)"
        body = f"import transformers\nmodel = {load}.eval()"
        consumer = f"{auto}.from_pretrained of transformers {version('transformers')}"
        return apart.agrees(consumer, model, apart.Job(written, body, example))

    def versions(self) -> dict[str, str]:
        """Of transformers."""
        return {"transformers": version("transformers")}

    def _write_remote(self, model: nn.Module, work: Path, rewrites: Rewrites) -> None:
        data: dict[str, Any] = cast("Any", model).config.to_dict()
        data.pop("_name_or_path", None)
        data |= self._remote(model, work, rewrites)
        remote.write_json(work / "config.json", data)
        write_weights(model, work, "model", rewrites.dropped, self.max_shard_size)
        if cast("Any", model).can_generate():
            cast("Any", model).generation_config.save_pretrained(work)

    def _remote(self, model: nn.Module, work: Path, rewrites: Rewrites) -> dict[str, Any]:
        config_class = _config_class(model)
        tested = {name: version(name) for name in ("torch", "transformers")}
        name = remote.modeling_file(work, model, rewrites, config_class=config_class, tested=tested)
        where = f"{remote.MODULE}.{name}"
        autos = list(_auto_classes(model)) or ["AutoModel"]
        return {
            "architectures": [name],
            "model_type": remote.model_type(config_class),
            "auto_map": {
                "AutoConfig": f"{remote.MODULE}.{remote.rewritten_name(config_class)}",
                **dict.fromkeys(autos, where),
            },
        }


def _config_class(model: nn.Module) -> type:
    return cast("Any", type(cast("object", cast("Any", model).config)))


def _is_remote(model: nn.Module) -> bool:
    """Whether a model was loaded with remote code, as an earlier export is, and is as loaded."""
    loaded_by: Any = vars(stock_class(model)).get("_auto_class")
    return loaded_by is not None and record_of(model) is None


def _auto_class(model: nn.Module) -> str:
    if _is_remote(model):
        return str(vars(stock_class(model))["_auto_class"])
    return next(_auto_classes(model), "AutoModel")


def _auto_classes(model: nn.Module) -> Iterator[str]:
    """Names of the ``Auto`` classes that load the stock class of a model."""
    from transformers.models.auto import modeling_auto

    cls, config = stock_class(model), _config_class(model)
    for name, auto in sorted(vars(modeling_auto).items()):
        mapping: Any = vars(auto).get("_model_mapping") if isinstance(auto, type) else None
        if mapping is None or not name.startswith("AutoModel") or config not in mapping:
            continue
        found: Any = mapping[config]
        if cls in (found if isinstance(found, (tuple, list)) else (found,)):
            yield name


def _tokenizer_files(given: str | None, model: nn.Module) -> list[Path]:
    source: dict[str, Any] = model.__dict__.get(SOURCE_ATTRIBUTE) or {}
    place = source.get("spec") if given is None else given
    if place is None:
        return []
    found = [Path(place, name) for name in _TOKENIZER_FILES if Path(place, name).is_file()]
    for path in found:
        # A link could put a file of this machine's owner into what is published.
        check_inside(path, Path(place), error=ExportError)
    if given is not None and not found:
        raise ExportError(f"{given} has no tokenizer files: none of {', '.join(_TOKENIZER_FILES)}")
    return found
