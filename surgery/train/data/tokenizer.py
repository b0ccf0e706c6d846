"""Tokenizers: bytes, a BPE trained on the spot, or one of transformers'.

A spec says which: ``bytes``, ``bpe``, an existing folder, or ``hub:ORG/NAME[@REVISION]``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from surgery.errors import DataError

if TYPE_CHECKING:
    import tokenizers

Ids = NDArray[np.uint32]
Kind = Literal["bytes", "bpe", "transformers"]

_BPE_FILE = "tokenizer.json"
BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
_BPE_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": BOS,
    "eos_token": EOS,
    "pad_token": PAD,
    "clean_up_tokenization_spaces": False,
}


@dataclass(frozen=True)
class Framed:
    """A text as a model takes it.

    Attributes:
        ids: uint32 (L,), special tokens among them.
        types: Which text of a pair each id belongs to, (L,); None where the model takes none.
        cut: Whether something of the text was cut off.
    """

    ids: Ids
    types: Ids | None
    cut: bool


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        kind: Which class ``load_saved`` reads it back with.
        vocab_size: Ids are below it.
        bos: Id that may begin a text; None where there is none.
        eos: Id that ends a document.
        pad: Id that fills a sample up; None where there is none.
        mask: Id that stands for a token to guess; None where there is none.
        special: Ids that stand for no text, such as those above.
    """

    kind: Kind
    vocab_size: int
    bos: int | None
    eos: int
    pad: int | None
    mask: int | None
    special: tuple[int, ...]

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, without bos and eos."""
        ...

    def frame(self, texts: Sequence[str], pairs: Sequence[str] | None, length: int) -> list[Framed]:
        """Ids of each text, or pair of texts, as a model takes them: with its special tokens.

        Args:
            texts: N texts.
            pairs: N second texts.
            length: Ids at most; what is longer is cut.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids. Special ones give no text."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 in hex of all that ``encode`` depends on."""
        ...

    def save(self, folder: Path) -> None:
        """Write what ``load_saved`` needs to a folder that there is not yet, in one step."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 0 to 255, then bos (256), eos (257) and pad (258): a vocabulary of 259.

    ``decode(encode(text)) == text`` for every text that UTF-8 can express.
    """

    kind: Kind = "bytes"
    vocab_size = 259
    bos: int | None = 256
    eos = 257
    pad: int | None = 258
    mask: int | None = None
    special: tuple[int, ...] = (256, 257, 258)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """One id per byte."""
        return [
            np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32) for text in texts
        ]

    def frame(self, texts: Sequence[str], pairs: Sequence[str] | None, length: int) -> list[Framed]:
        """The bytes, and eos after each text."""
        return _framed(self, texts, pairs, length)

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes as text; what is no UTF-8, as an untrained model writes it, becomes U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def fingerprint(self) -> str:
        """The same for all of them."""
        return _digest("bytes", 259)

    def save(self, folder: Path) -> None:
        """Nothing: it has no parameters."""


class BpeTokenizer:
    """Byte-level BPE of the ``tokenizers`` library. Loses nothing: every byte has an id.

    Args:
        text: The content of a ``tokenizer.json``.
    """

    kind: Kind = "bpe"

    def __init__(self, text: str) -> None:
        import tokenizers

        self._text = text
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        # A document that speaks of "<|eos|>" does not end there.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.bos: int | None = self._id(BOS)
        self.eos = self._id(EOS)
        self.pad: int | None = self._id(PAD)
        self.mask: int | None = None
        self.special = (self._id(BOS), self.eos, self._id(PAD))

    def __reduce__(self) -> tuple[type[BpeTokenizer], tuple[str]]:
        # The library's own pickle forgets that special tokens are not looked for.
        return BpeTokenizer, (self._text,)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, in parallel over the texts."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, dtype=np.uint32) for each in found]

    def frame(self, texts: Sequence[str], pairs: Sequence[str] | None, length: int) -> list[Framed]:
        """The ids, and eos after each text."""
        return _framed(self, texts, pairs, length)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def fingerprint(self) -> str:
        """Of the file's content."""
        return _digest("bpe", self._text)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, and what transformers wants to know beside it."""
        _publish(folder, self._write)

    def _write(self, folder: Path) -> None:
        (folder / _BPE_FILE).write_text(self._text, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(_BPE_CONFIG, indent=1) + "\n", encoding="utf-8"
        )

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise DataError(f"the BPE tokenizer has no token {token!r}")
        return found


class TransformersTokenizer:
    """A tokenizer of transformers.

    Args:
        tokenizer: An instance of ``PreTrainedTokenizerBase``.
        name: What an error calls it.

    Raises:
        DataError: it has no token that ends a text.
    """

    kind: Kind = "transformers"

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        # Not its length: ids may have gaps.
        self.vocab_size = max(tokenizer.get_vocab().values()) + 1
        self.bos = cast("int | None", tokenizer.bos_token_id)
        self.pad = cast("int | None", tokenizer.pad_token_id)
        self.mask = cast("int | None", tokenizer.mask_token_id)
        self.special = tuple(sorted(set(cast("list[int]", tokenizer.all_special_ids))))
        ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)
        end = next((each for each in ends if each is not None), None)
        if end is None:
            raise DataError(
                f"the tokenizer {name} has neither an eos nor a sep token, and documents are "
                "joined by one",
                hint="give it an eos_token in its tokenizer_config.json",
            )
        self.eos = int(end)

    def encode(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, without special tokens."""
        if not texts:
            return []
        # Not verbose: a document may be longer than the model the tokenizer was made for takes.
        found = self._tokenizer(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return [np.array(ids, dtype=np.uint32) for ids in found["input_ids"]]

    def frame(self, texts: Sequence[str], pairs: Sequence[str] | None, length: int) -> list[Framed]:
        """What the library makes of them, and the token that ends a text where it adds none."""
        whole = self._framed(texts, pairs, None)
        # Of a model that adds no end, an id is kept free for it.
        ends = all(ids and ids[-1] in self.special for ids in whole["input_ids"])
        room = length if ends else length - 1
        cut = [len(ids) > room for ids in whole["input_ids"]]
        found = self._framed(texts, pairs, room) if any(cut) else whole
        types = found.get("token_type_ids")
        return [
            Framed(
                np.array(ids if ends else [*ids, self.eos], dtype=np.uint32),
                None if types is None else _extended(types[row], 0 if ends else 1),
                cut[row],
            )
            for row, ids in enumerate(found["input_ids"])
        ]

    def _framed(self, texts: Sequence[str], pairs: Sequence[str] | None, length: int | None) -> Any:
        return self._tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=length is not None,
            max_length=length,
            return_attention_mask=False,
            verbose=False,
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids."""
        plain = [int(i) for i in ids]
        return str(
            self._tokenizer.decode(
                plain, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def fingerprint(self) -> str:
        """Of the fast tokenizer's own file, or of the class and the vocabulary of a slow one."""
        if self._tokenizer.is_fast:
            return _digest("transformers", self._tokenizer.backend_tokenizer.to_str())
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        return _digest("transformers", type(self._tokenizer).__name__, vocabulary)

    def save(self, folder: Path) -> None:
        """Write the files that ``AutoTokenizer`` reads."""
        _publish(folder, self._tokenizer.save_pretrained)


def _framed(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, length: int
) -> list[Framed]:
    """Ids with eos after each text; of what is too long the end is cut, eos aside."""
    ids = tokenizer.encode(texts)
    end = np.array([tokenizer.eos], dtype=np.uint32)
    if pairs is not None:
        seconds = tokenizer.encode(pairs)
        ids = [np.concatenate([a, end, b]) for a, b in zip(ids, seconds, strict=True)]
    return [Framed(np.append(each[: length - 1], end), None, len(each) >= length) for each in ids]


def _extended(types: Sequence[int], by: int) -> Ids:
    return np.array([*types, *[types[-1]] * by], dtype=np.uint32)


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer a spec names; ``bpe`` is trained instead, by ``train_bpe``.

    Args:
        spec: ``bytes``, an existing folder, or ``hub:ORG/NAME[@REVISION]``.

    Raises:
        DataError: it is none of these, or cannot be loaded.
    """
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("hub:"):
        name, _, revision = spec.removeprefix("hub:").partition("@")
        return _transformers(name, spec, local=False, revision=revision or None)
    if Path(spec).is_dir():
        return _transformers(spec, spec, local=True)
    raise DataError(
        f"unknown tokenizer {spec!r}: expected bytes, bpe, an existing folder, or hub:ORG/NAME",
        hint=f"a tokenizer on the hub is written hub:{spec}" if "/" in spec else None,
    )


def load_saved(kind: Kind, folder: Path) -> Tokenizer:
    """The tokenizer that ``save`` wrote to a folder.

    Raises:
        DataError: its files are missing or broken.
    """
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "transformers":
        return _transformers(str(folder), str(folder), local=True)
    path = folder / _BPE_FILE
    try:
        return BpeTokenizer(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except Exception as error:
        # The library raises bare Exceptions for a file it cannot read.
        raise DataError(f"{path} is no tokenizer of the tokenizers library: {error}") from error


def train_bpe(texts: Iterable[str], vocabulary: int) -> BpeTokenizer:
    """Train a byte-level BPE (Sennrich et al., arXiv 1508.07909). The same texts give the same one.

    Args:
        texts: What it is trained on.
        vocabulary: Tokens at most, the 256 bytes and the 3 special ones among them.

    Raises:
        DataError: the vocabulary has no room for the bytes.
    """
    if vocabulary < 259:
        raise DataError(
            f"a byte-level BPE of {vocabulary} tokens has no room for 256 bytes and "
            f"{BOS}, {EOS} and {PAD}",
            hint="raise the vocabulary to more than 259",
        )
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return BpeTokenizer(_canonical(made))


def bpe_recipe(vocabulary: int) -> str:
    """All that a trained BPE depends on beside its texts."""
    import tokenizers

    return f"bpe {vocabulary} tokenizers {tokenizers.__version__}"


def _canonical(tokenizer: tokenizers.Tokenizer) -> str:
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=1) + "\n"


def _transformers(name: str, spec: str, *, local: bool, revision: str | None = None) -> Tokenizer:
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError:
        raise DataError(
            f"the tokenizer {spec} is one of transformers, which is not installed",
            hint="pip install 'model-surgery[transformers]'",
        ) from None
    load = cast("Any", AutoTokenizer).from_pretrained
    try:
        # None would ask in the terminal whether code that comes with the tokenizer may run.
        loaded = load(
            name, local_files_only=local, revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().partition("\n")[0]
        hint = (
            "the folder holds tokenizer.json or the files of its class, and tokenizer_config.json"
            if local
            else "the hub cannot be reached, or has no such tokenizer; a folder works offline"
        )
        raise DataError(f"the tokenizer {spec} cannot be loaded: {first}", hint=hint) from error
    return TransformersTokenizer(loaded, spec)


def _publish(folder: Path, write: Callable[[Path], object]) -> None:
    """Write a folder beside its place and rename it there; whoever is first wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write(new)
        new.chmod(0o755)
        new.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _digest(*parts: object) -> str:
    return sha256(json.dumps(parts, ensure_ascii=False).encode("utf-8")).hexdigest()
