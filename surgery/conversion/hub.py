"""The folder of an unchanged architecture, as its library's ``from_pretrained`` reads it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from surgery.capture.graft import stock_class
from surgery.checkpoints import manifest
from surgery.checkpoints.manifest import FileEntry
from surgery.checkpoints.saving import index_of, shards_of
from surgery.conversion.jobs import joined
from surgery.conversion.journal import Finished
from surgery.conversion.layout import OutFile, empty, spots_of
from surgery.conversion.output import Output
from surgery.conversion.stock import Stock
from surgery.exporting import provenance
from surgery.exporting.provenance import File, Provenance
from surgery.files import sha256_of
from surgery.sources import describe
from surgery.untrusted.documents import read_object
from surgery.untrusted.paths import check_inside

_CONFIG = "config.json"
_SUFFIX = ".safetensors"
#: Weights in any format, which are not copied along: they would be the unconverted ones.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|gguf|onnx|onnx_data|ot|tflite|npz)"
    r"|.*\.index(\.[\w-]+)?\.json|surgery\.json"
)
_DTYPE_KEYS = ("dtype", "torch_dtype")


class Hub(Output):
    """What ``from_pretrained`` of the stock class reads.

    Args:
        model: The stock model, its parameters on the meta device.
        stock: Its tensors.
        dtype: What floating tensors are cast to; None to leave them.
        limit: Most bytes per file; None to leave tensors in the files they are in.
        told: The options, for ``surgery.json``.
    """

    kind = "stock model"

    def __init__(
        self,
        model: nn.Module,
        stock: Stock,
        *,
        dtype: torch.dtype | None,
        limit: int | None,
        told: Mapping[str, Any],
    ) -> None:
        stock.check_by_key()
        self._model = model
        self._told = dict(told)
        self._dtype = dtype
        self._folder = stock.checkpoint.folder
        tensors = stock.checkpoint.tensors
        order = sorted(tensors, key=lambda key: (tensors[key].file, tensors[key].slot.start))
        self._forms = {
            key: empty(tensors[key].slot.shape, self._cast_to(key, stock)) for key in order
        }
        name = (stock.checkpoint.index or stock.checkpoint.files[0]).name
        self._stem = name.partition(_SUFFIX)[0]
        self.files = self._as_they_are(stock) if limit is None else self._cut(limit)
        spots = spots_of(self.files)
        self.jobs = joined(
            stock.by_key(key, form.dtype, spots[key])
            for file in self.files
            for key, form in file.tensors
        )

    def check_replaceable(self, folder: Path) -> None:
        """Raise unless a conversion or an export wrote everything in the folder."""
        provenance.check_replaceable(folder)

    def finish(
        self, work: Path, finished: Mapping[str, Finished], origin: Mapping[str, FileEntry]
    ) -> None:
        """The index, the configuration, the small files, and ``surgery.json``."""
        if len(self.files) > 1 or self.files[0].name != f"{self._stem}{_SUFFIX}":
            places = {key: file.name for file in self.files for key, _ in file.tensors}
            index = index_of(sum(each.nbytes for each in self._forms.values()), places)
            (work / f"{self._stem}{_SUFFIX}.index.json").write_text(index, encoding="utf-8")
        self._copy_small(work)
        files = {
            name: File(bytes=each.bytes, sha256=each.sha256) for name, each in finished.items()
        }
        for path in sorted(work.iterdir()):
            if path.name not in files:
                files[path.name] = File(bytes=path.stat().st_size, sha256=sha256_of(path))
        cls = stock_class(self._model)
        made = Provenance(
            export="convert",
            options=self._told,
            versions=manifest.versions(cls),
            model_class=f"{cls.__module__}.{cls.__qualname__}",
            source=describe(self._model),
            recipes=[],
            tensors={},
            files=dict(sorted(files.items())),
            agreement={},
            origin={n: File(bytes=each.bytes, sha256=each.sha256) for n, each in origin.items()},
        )
        provenance.write(work, made)

    def _cast_to(self, key: str, stock: Stock) -> torch.dtype:
        stored = stock.checkpoint.tensors[key].slot.dtype
        fixed = not stored.is_floating_point or stock.quantised.format_of(key) is not None
        return stored if fixed or self._dtype is None else self._dtype

    def _as_they_are(self, stock: Stock) -> list[OutFile]:
        by_file: dict[str, list[str]] = {file.name: [] for file in stock.checkpoint.files}
        for key in self._forms:
            by_file[stock.checkpoint.tensors[key].file.name].append(key)
        return [
            OutFile.of(name, [(key, self._forms[key]) for key in keys])
            for name, keys in by_file.items()
        ]

    def _cut(self, limit: int) -> list[OutFile]:
        shards = shards_of(list(self._forms.items()), limit)
        if len(shards) == 1:
            return [OutFile.of(f"{self._stem}{_SUFFIX}", shards[0])]
        count = len(shards)
        return [
            OutFile.of(f"{self._stem}-{number:05d}-of-{count:05d}{_SUFFIX}", shard)
            for number, shard in enumerate(shards, start=1)
        ]

    def _copy_small(self, work: Path) -> None:
        for path in _small(self._folder):
            check_inside(path, self._folder)
            if path.name == _CONFIG and self._dtype is not None:
                config = _with_dtype(
                    read_object(path, infinities=True), str(self._dtype).removeprefix("torch.")
                )
                text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
                (work / _CONFIG).write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(path, work / path.name)


def _small(folder: Path) -> Iterable[Path]:
    """The files beside the weights: configurations, tokenizers, licences."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name[0] != "." and not _WEIGHTS.fullmatch(path.name):
            yield path


def _with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A configuration with another dtype, in it and in those it contains."""
    known = [key for key in _DTYPE_KEYS if key in config]
    changed = {**config, **dict.fromkeys(known, name)}
    if not known and "model_type" in config:
        changed["dtype"] = name
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            inner = cast("dict[str, Any]", value)
            present = [each for each in _DTYPE_KEYS if each in inner]
            changed[key] = {**inner, **dict.fromkeys(present, name)}
    return changed
