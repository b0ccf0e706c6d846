"""``surgery.prove``: hold a result against what it was made of, file by file, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery import progress
from surgery.checkpoints.base_weights import digest_of
from surgery.checkpoints.inventory import places
from surgery.copies import same_bits
from surgery.errors import SurgeryError
from surgery.exporting import provenance
from surgery.interchange.folder import PREFIX, WRAPPED
from surgery.passes.hosts.merging import BEFORE_MERGE
from surgery.proving.proof import Finding, Proof
from surgery.proving.replay import Adapter, Candidate, Replay
from surgery.proving.sides import Side, Tensors, open_side, tensors_by_name
from surgery.record import Record
from surgery.sources import rebuild

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: What a merge that was computed in another order of sums may be off by, relative to the largest
#: value of the weight: float32 sums of a few hundred terms.
_ORDER = 1e-6


def prove(
    result: str | os.PathLike[str],
    *,
    against: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
) -> Proof:
    """Account for everything in an export, a conversion or a saved model, from the files alone.

    Every file must have the size and the SHA-256 that were written, and every tensor must be the
    source's bit for bit, a cast of it, the source's with adapters merged or as a rule changes it
    (both computed again), or made by a rule. No code that comes with the result is run: models are
    rebuilt on the meta device from the installed libraries' own classes. One tensor at a time is
    in memory, with what is computed from it.

    Args:
        result: A folder that ``export``, ``convert`` or ``save`` wrote, or an exported file.
        against: What it was made of: a checkpoint folder, or one that ``surgery.save`` wrote.
        adapter: The adapter folder that was merged, where the source does not hold it.

    Raises:
        CheckpointError: a folder is no checkpoint, or damaged.
        ExportError: the provenance of the result is missing or was changed.
        SourceError: the library of the model is not installed.
    """
    side, source = open_side(Path(result)), open_side(Path(against))
    check = _Check(side, source, None if adapter is None else Path(adapter))
    with progress.task("proving"):
        findings = [*check.files(), *check.origin(), *check.tensors()]
    count = len(side.files or {}) - sum(each.verdict == "wrong file" for each in findings)
    return Proof(side.path, source.path, max(count, 0), tuple(findings), tuple(check.unchecked))


class _Check:
    """The state of one ``prove``."""

    def __init__(self, side: Side, source: Side, adapter: Path | None) -> None:
        self.side = side
        self.source = source
        self.unchecked: list[str] = []
        self.description = side.description or source.description
        model = None if self.description is None else rebuild(self.description, device="meta")
        self.result = tensors_by_name(side, model)
        self.given = tensors_by_name(source, model)
        self.consumed: set[str] = set()
        self.found: set[str] = set()
        own = self._replay(side.record, self.result, None)
        chosen = side.options.get("adapter")
        theirs = self._replay(
            source.record, self.given, chosen if isinstance(chosen, str) else None
        )
        self.own, self.theirs = own, theirs
        self.adapter = None
        if adapter is not None and self.description is not None:
            self.adapter = Adapter(self.description, adapter, self.given)
        if side.files is None:
            self.unchecked.append(
                f"the files of {side.path}: no surgery.json says what they should be"
            )
        if side.hashes:
            self.unchecked.append(
                f"the tensors inside {side.path}: the SHA-256 of the file stands for them; what is "
                "compared are the hashes of the tensors that it was made of"
            )

    def _replay(self, record: Record, tensors: Tensors, adapter: str | None) -> Replay | None:
        if self.description is None or not record.operations:
            return None
        return Replay(self.description, record, tensors, adapter)

    # -- files ---------------------------------------------------------------------------------

    def files(self) -> Iterator[Finding]:
        """Files that are not as they were written."""
        listed = self.side.files
        if listed is None:
            return
        single = self.side.path.is_file()
        folder = self.side.path.parent if single else self.side.path
        for name, entry in listed.items():
            path = self.side.path if single else folder / name
            wrong = _wrong_file(path, entry.bytes, entry.sha256)
            if wrong is not None:
                yield Finding(name, "wrong file", wrong)
        if not single:
            present = {each.name for each in folder.iterdir()}
            for name in sorted(present - {*listed, provenance.NAME}):
                yield Finding(name, "wrong file", "surgery.json does not list it")

    def origin(self) -> Iterator[Finding]:
        """Files of the source that are not the ones the result was made of."""
        for name, entry in self.side.origin.items():
            wrong = _wrong_file(self.source.path / name, entry.bytes, entry.sha256)
            if wrong is not None:
                yield Finding(f"{self.source.path / name}", "wrong file", f"of the source: {wrong}")

    # -- tensors -------------------------------------------------------------------------------

    def tensors(self) -> Iterator[Finding]:
        """One finding for each tensor of the result, and those of the source that are gone."""
        for name, read in self.result.stock.items():
            yield self._account(name, read())
        for name, digest in self.side.hashes.items():
            yield self._account_hash(name, digest)
        for key, read in self.result.kept.items():
            yield self._account_kept(key, read())
        for name, read in self.result.transient.items():
            yield self._account_built(name, read())
        yield from self._lost()

    def _account(self, name: str, tensor: Tensor) -> Finding:
        try:
            return self._explained(name, tensor)
        except SurgeryError as error:
            return Finding(name, "unaccounted", error.message)

    def _explained(self, name: str, tensor: Tensor) -> Finding:
        rule = self.side.added.get(name, self.source.added.get(name))
        source = self._source(name)
        if source is not None:
            same = _same(name, tensor, source)
            if same is not None:
                self._consume_if_merged(name, tensor, source)
                return same
        if rule is not None:
            return self._new(name, tensor, rule, known=source is not None)
        if source is None:
            return self._elsewhere(name, tensor)
        worst = ""
        for verdict, detail, expected in self._candidates(name, tensor.dtype, source):
            found = _near(tensor, expected)
            if found is None:
                continue
            if verdict == "merged" and self.theirs is not None:
                self.consumed |= self.theirs.consumed(name)
            return Finding(name, verdict, f"{detail}{found}")
        if tensor.shape == source.shape:
            gap = (tensor.double() - source.double()).abs()
            index = int(gap.argmax())
            worst = f", by up to {float(gap.max()):.3g} at element {index}"
        return Finding(name, "unaccounted", f"differs from the source's{worst}")

    def _consume_if_merged(self, name: str, tensor: Tensor, source: Tensor) -> None:
        """Adapters that add nothing, as untrained ones, leave no trace where they are merged."""
        if self.theirs is None:
            return
        for verdict, _, made in self.theirs.candidates(name, source, settled=True):
            if verdict == "merged" and same_bits(tensor, made.to(tensor.dtype)):
                self.consumed |= self.theirs.consumed(name)

    def _source(self, name: str) -> Tensor | None:
        """The source's tensor of a name, whichever of its names the source has."""
        ties = self.given.ties
        aliases = [alias for alias, first in self.result.ties.items() if first == name]
        for each in (name, ties.get(name), self.result.ties.get(name), *aliases):
            read = None if each is None else self.given.stock.get(each)
            if read is not None and each is not None:
                self.found.add(each)
                return read()
        return None

    def _candidates(self, name: str, dtype: torch.dtype, source: Tensor) -> Iterator[Candidate]:
        cast = source.to(dtype)
        if self.own is not None:
            yield from self.own.candidates(name, cast, settled=False)
        if self.theirs is not None:
            for verdict, detail, made in self.theirs.candidates(name, source, settled=True):
                if verdict == "merged":
                    yield verdict, detail, made.to(dtype)
        if self.adapter is not None:
            for verdict, detail, made in self.adapter.candidates(name, source):
                yield verdict, detail, made.to(dtype)

    def _new(self, name: str, tensor: Tensor, rule: str, *, known: bool) -> Finding:
        if known:
            return Finding(name, "unaccounted", f"of rule {rule!r}, differs from the source's")
        spec = self.side.specs.get(name)
        layout = (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if spec is not None and layout != (tuple(spec.shape), spec.dtype):
            told = f"{spec.dtype} {tuple(spec.shape)}"
            return Finding(
                name, "unaccounted", f"{layout[1]} {layout[0]}, rule {rule!r} adds {told}"
            )
        return Finding(name, "new", f"by rule {rule!r}")

    def _elsewhere(self, name: str, tensor: Tensor) -> Finding:
        """A tensor under a name that the source lacks: perhaps one of its adapters' own."""
        twin = self._added_digests.get(_content(tensor))
        if twin is None:
            along = self._along_in_peft(name, tensor)
            if along is not None:
                return along
            if self._is_converted(name, tensor):
                return Finding(name, "converted", "to a LoRA of the original weights")
            return Finding(
                name, "unaccounted", "the source has no such tensor, and no rule adds it"
            )
        self.found.add(twin)
        return Finding(name, "equal", f"{twin} of the source")

    def _along_in_peft(self, name: str, tensor: Tensor) -> Finding | None:
        """A stock tensor that goes along with an adapter of PEFT, because it was trained."""
        if not name.startswith(PREFIX):
            return None
        source = self._source(name.removeprefix(PREFIX).replace(f".{WRAPPED}.", "."))
        return None if source is None else _same(name, tensor, source)

    def _is_converted(self, name: str, tensor: Tensor) -> bool:
        if self.theirs is None or not name.startswith(PREFIX):
            return False
        expected = self.theirs.in_peft.get(name)
        return expected is not None and _same(name, tensor, expected) is not None

    @cached_property
    def _added_digests(self) -> dict[str, str]:
        """Content of what rewrites added to the source, as it lies and transposed → its name."""
        found: dict[str, str] = {}
        for name in self.source.added:
            read = self.given.stock.get(name)
            if read is not None:
                tensor = read()
                found.setdefault(_content(tensor), name)
                if tensor.dim() > 1:
                    found.setdefault(_content(tensor.mT), name)
        return found

    def _account_hash(self, name: str, digest: str) -> Finding:
        rule = self.side.added.get(name)
        source = self._source(name)
        if source is None:
            if rule is not None:
                return Finding(name, "new", f"by rule {rule!r}")
            return Finding(
                name, "unaccounted", "the source has no such tensor, and no rule adds it"
            )
        if digest_of(source) == digest:
            return Finding(name, "equal", "by its hash")
        dtypes = _FLOATS if source.is_floating_point() else ()
        for dtype in dtypes:
            if digest_of(source.to(dtype)) == digest:
                return Finding(name, "cast", f"of {source.dtype} to {dtype}, by its hash")
        for dtype in dtypes:
            for verdict, detail, expected in self._candidates(name, dtype, source):
                if digest_of(expected) == digest:
                    return Finding(name, verdict, f"{detail}, by its hash")
        return Finding(name, "unaccounted", "its hash is not that of the source's tensor")

    def _account_kept(self, key: str, tensor: Tensor) -> Finding:
        """A copy that undo needs: the source's tensor, as it was before a rule changed it."""
        name = key.partition("/")[2]
        plain = name.removesuffix(BEFORE_MERGE)
        source = self._source(plain)
        if source is None:
            return Finding(f"copy of {name}", "unaccounted", "the source has no such tensor")
        theirs = self.given.kept.get(key)
        for known in (source, *([] if theirs is None else [theirs()])):
            same = _same(f"copy of {name}", tensor, known)
            if same is not None:
                return same
        if self.own is not None:
            made = self.own.candidates(plain, source.to(tensor.dtype), settled=False)
            for verdict, detail, expected in made:
                if verdict == "changed" and same_bits(tensor, expected):
                    return Finding(f"copy of {name}", verdict, detail)
        return Finding(f"copy of {name}", "unaccounted", "differs from the source's")

    def _account_built(self, name: str, tensor: Tensor) -> Finding:
        built = self._built.get(name)
        if built is not None and _same(name, tensor, built.to(tensor.dtype)) is not None:
            return Finding(name, "built")
        read = self.given.transient.get(name)
        same = None if read is None else _same(name, tensor, read())
        return same or Finding(name, "unaccounted", "not as its library builds it")

    @cached_property
    def _built(self) -> Mapping[str, Tensor]:
        if self.description is None:
            return {}
        model: nn.Module = rebuild(self.description, parameters="meta")
        held = {name: place.tensor for name, place in places(model)}
        return {name: tensor for name, tensor in held.items() if not tensor.is_meta}

    def _lost(self) -> Iterator[Finding]:
        """Tensors of the source that nothing in the result is made of."""
        if not (self.result.whole and self.given.whole):
            return
        firsts = {self.given.ties.get(name, name) for name in self.found}
        for name in self.given.stock:
            if self.given.ties.get(name, name) not in firsts and name not in self.consumed:
                yield Finding(name, "lost", "in the source and nowhere in the result")


def _wrong_file(path: Path, size: int, digest: str) -> str | None:
    if path.is_symlink() or not path.is_file():
        return "it is missing"
    now = path.stat().st_size
    if now != size:
        return f"{now} bytes, {size} were written"
    return None if provenance.file_of(path).sha256 == digest else "other bytes than were written"


def _same(name: str, tensor: Tensor, source: Tensor) -> Finding | None:
    """A finding if a tensor is the source's, or a cast of it, bit for bit."""
    if tensor.shape != source.shape:
        return None
    tensor, source = tensor.contiguous(), source.contiguous()
    if tensor.dtype == source.dtype:
        return Finding(name, "equal") if same_bits(tensor, source) else None
    floats = tensor.is_floating_point() and source.is_floating_point()
    if floats and same_bits(tensor, source.to(tensor.dtype)):
        return Finding(name, "cast", f"of {source.dtype} to {tensor.dtype}")
    return None


def _near(tensor: Tensor, expected: Tensor) -> str | None:
    """How exactly a tensor is what was computed again, or None if it is not.

    A merge rounds once, so it may differ by one unit in the last place where the sums before the
    rounding were formed in another order.
    """
    if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
        return None
    if same_bits(tensor, expected):
        return ", bit for bit"
    unit = torch.finfo(tensor.dtype).eps
    scale = float(expected.abs().max())
    close = torch.isclose(tensor.double(), expected.double(), rtol=unit, atol=_ORDER * scale)
    if not bool(close.all()):
        return None
    return ", to the rounding of one sum"


def _content(tensor: Tensor) -> str:
    """The hash of a tensor's values and shape."""
    return digest_of(tensor.contiguous())
