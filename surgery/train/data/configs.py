"""The ``data`` section of a training configuration: one class per ``kind``.

Relative paths start at the folder where the command runs.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from surgery.rules.strict import invalid

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Name = Annotated[str, Field(min_length=1)]
Channels = Literal[1, 3]


class Section(BaseModel):
    """Base of all sections: frozen, strict, without unknown keys."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


# --- text -------------------------------------------------------------------------------------

Length = Annotated[int, Field(ge=2)]


class TextData(Section):
    """Local text, tokenized once and packed into samples of one length.

    Attributes:
        path: ``stdlib`` (the source of Python's standard library, which is always there), a text
            file, a folder, or a pattern such as ``corpus/**/*.md``.
        pattern: Which files of a folder; ``**/*.txt`` by default.
        tokenizer: ``bytes``; ``bpe``, trained on the training part; the folder of a tokenizer of
            transformers; or ``hub:ORG/NAME``.
        vocabulary: Tokens of ``bpe``.
        length: Tokens in a sample. The last one of a sample is the first one of the next, so that
            each token is predicted once.
        held_out: Part of the files that is kept for evaluation: whole files, chosen by a hash of
            their names, the same for every seed. Of a single file, its end.
        cache: Folder for the tokens; by default ``model-surgery/tokens`` in the user's cache.
    """

    kind: Literal["text"] = "text"
    path: Name = "stdlib"
    pattern: Name | None = None
    tokenizer: Name = "bytes"
    vocabulary: Annotated[int, Field(ge=260)] | None = None
    length: Length = 256
    held_out: Share = 0.05
    cache: Name | None = None

    @model_validator(mode="after")
    def _check_vocabulary(self) -> Self:
        if self.tokenizer == "bpe" and self.vocabulary is None:
            raise invalid("bpe needs data.vocabulary", at="tokenizer", hint="as in 4096")
        if self.tokenizer != "bpe" and self.vocabulary is not None:
            raise invalid(
                f"the vocabulary of {self.tokenizer!r} is given; only bpe is trained to one",
                at="vocabulary",
                hint="leave data.vocabulary out, or use tokenizer: bpe",
            )
        return self


class TokenData(Section):
    """Shards of tokens written by ``surgery data tokenize``, mapped into memory.

    Attributes:
        path: The folder of shards.
        length: Tokens in a sample; what the shards were made for by default.
        verify: Whether every byte is compared with its checksum at the start. Names, sizes and
            headers always are.
    """

    kind: Literal["tokens"] = "tokens"
    path: Name
    length: Length | None = None
    verify: bool = False


class StreamData(Section):
    """A dataset in the hub's layout, streamed, and tokenized as it comes.

    Attributes:
        path: Id of the dataset, such as ``allenai/c4``, or a folder.
        name: Its configuration, such as ``en``.
        revision: Branch, tag or commit.
        split: Split that is trained on.
        held_out: Split that is evaluated on; None takes the first documents of ``split``, which
            are then not trained on.
        held_out_samples: Samples that are evaluated on at most; they are tokenized once.
        column: Column that holds the text.
        tokenizer: ``bytes``, the folder of a tokenizer of transformers, or ``hub:ORG/NAME``.
        length: Tokens in a sample.
        packing: ``packed`` cuts the joined documents into full samples; ``padded`` cuts or fills
            up each document to one sample, as the GaLore recipes do.
        buffer: Documents among which the next one is drawn; 1 keeps the order.
        shuffle_seed: Seed of the order of the files and of the buffer.
        cache: Folder for held-out tokens and bookmarks; by default ``model-surgery/streams`` in
            the user's cache.
    """

    kind: Literal["stream"] = "stream"
    path: Name
    name: Name | None = None
    revision: Name | None = None
    split: Name = "train"
    held_out: Name | None = "validation"
    held_out_samples: Count = 1024
    column: Name = "text"
    tokenizer: Name
    length: Length = 256
    packing: Literal["packed", "padded"] = "packed"
    buffer: Count = 10_000
    shuffle_seed: Annotated[int, Field(ge=0)] = 42
    cache: Name | None = None

    @model_validator(mode="after")
    def _check_tokenizer(self) -> Self:
        if self.tokenizer == "bpe":
            raise invalid(
                "a BPE cannot be trained on a stream",
                at="tokenizer",
                hint="train one on text: surgery data tokenize ... --tokenizer bpe, and give "
                "the folder OUT/tokenizer",
            )
        return self


# --- texts, one a sample ------------------------------------------------------------------------


class Texts(Section):
    """What all data of separate texts says about how they become samples.

    Attributes:
        tokenizer: ``model`` takes the one in the model's own folder; else ``bytes``, a folder of
            a tokenizer of transformers, or ``hub:ORG/NAME``.
        length: Tokens in a sample at most; longer texts are cut, and how many is said.
    """

    tokenizer: Name = "model"
    length: Length = 128


class Columns(Texts):
    """Which columns of a table are what.

    Attributes:
        text: Column of the text.
        pair: Column of a second text, as in entailment.
        label: Column of the class, text or an integer; None for data without classes.
        labels: The classes in the order of the model's outputs; by default those that occur,
            sorted.
    """

    text: Name = "text"
    pair: Name | None = None
    label: Name | None = None
    labels: Annotated[tuple[Name, ...], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if self.labels is None:
            return self
        if self.label is None:
            raise invalid("classes need a column", at="labels", hint="set data.label")
        if len(set(self.labels)) < len(self.labels):
            raise invalid(f"a class is named twice in {', '.join(self.labels)}", at="labels")
        return self


class RecordsData(Columns):
    """Texts in a local table: JSONL (one object a line), CSV or TSV, told apart by the ending.

    Attributes:
        path: The file.
        held_out: A part of each class that is kept for evaluation, the same for every seed; or
            the file with the texts for it.
    """

    kind: Literal["records"] = "records"
    path: Name
    held_out: Share | Name = 0.1


class HubData(Columns):
    """Texts of a dataset in the hub's layout, read whole by the library ``datasets``.

    Attributes:
        path: Id of the dataset, such as ``nyu-mll/glue``, or a folder.
        name: Its configuration, such as ``sst2``.
        revision: Branch, tag or commit.
        split: Split that is trained on.
        held_out: A part of each class that is kept for evaluation, or the split for it.
    """

    kind: Literal["hub"] = "hub"
    path: Name
    name: Name | None = None
    revision: Name | None = None
    split: Name = "train"
    held_out: Share | Name = "validation"


#: What is evaluated on: options are chosen by the one, results reported of the other.
Part = Literal["validation", "test"]


class DocstringsData(Texts):
    """Docstrings of Python's standard library, which is always there; the class is the package.

    Modules are divided as a whole, so that no module is in two parts, and what gives the answer
    away is masked: names of packages anywhere, names of modules as words.

    Attributes:
        most: Training texts of a package at most.
        part: Which held-out part is evaluated on; neither is ever trained on.
    """

    kind: Literal["docstrings"] = "docstrings"
    length: Length = 48
    most: Count = 200
    part: Part = "validation"


# --- images -----------------------------------------------------------------------------------


class Augment(Section):
    """What happens at random to a training sample; held-out samples are never augmented.

    Attributes:
        resized_crop: Whether a random part of the image, 8 % to 100 % of its area with an aspect
            ratio of 3/4 to 4/3, is scaled to the sample's size, in the place of ``fit``
            (arXiv 1409.4842).
        pad: Pixels that are added in black on each side, before the sample's size is cropped at
            random (arXiv 1512.03385 uses 4 for CIFAR).
        flip: Whether half of the samples are mirrored left to right.
    """

    resized_crop: bool = False
    pad: Annotated[int, Field(ge=0)] = 0
    flip: bool = False


#: How an image becomes a square of ``size``, where ``augment`` does not say otherwise.
#: center: the shorter side is scaled to size, and the centre is cropped.
#: imagenet: the same with the shorter side at size × 256/224, the evaluation of classifiers.
#: adm: the centre crop of ADM and DiT: halved by box filter as often as possible, then bicubic.
Fit = Literal["center", "imagenet", "adm"]

#: What is looked at before training starts: nothing, the header of every file, or every pixel.
Check = Literal["none", "headers", "pixels"]


def _check_size(size: int | None, augment: Augment, check: Check) -> None:
    if size is None and augment.resized_crop:
        raise invalid("a resized crop needs data.size", at="augment")
    if size is None and check == "none":
        raise invalid("check: none needs data.size, for shapes are not looked at", at="check")


class DigitsData(Section):
    """The 1797 handwritten digits that ship with scikit-learn: 8 × 8, one channel, ten classes.

    Attributes:
        size: Height and width; above 8 they are enlarged (bilinear).
        channels: 1, or 3 equal ones.
        augment: At random on training samples.
        held_out: Part of each class that is kept for evaluation, the same for every seed.
    """

    kind: Literal["digits"] = "digits"
    size: Annotated[int, Field(ge=8)] = 8
    channels: Channels = 1
    augment: Augment = Augment()
    held_out: Share = 0.2

    @model_validator(mode="after")
    def _check_augment(self) -> Self:
        if self.augment.resized_crop:
            raise invalid("digits have no resized crop", at="augment", hint="use pad")
        return self


class ShiftedDigitsData(DigitsData):
    """The digits turned and inverted: what a model that was trained on digits has not seen.

    Attributes:
        rotate: Quarter turns counter-clockwise.
        invert: Whether black becomes white.
        held_out: Part of each class that is kept; half of it is the validation part.
        part: Which half is evaluated on.
    """

    kind: Literal["shifted-digits"] = "shifted-digits"  # type: ignore[assignment]
    rotate: Annotated[int, Field(ge=0, le=3)] = 1
    invert: bool = True
    held_out: Share = 0.6
    part: Part = "validation"


class FolderData(Section):
    """A folder of images, with a folder inside it for each class, or without labels.

    Attributes:
        path: The folder.
        labels: ``folders`` takes the names of its subfolders, sorted, as classes; ``none`` takes
            every image under it, with label 0.
        size: Height and width of a sample; None keeps the images as they are, all of one shape.
        channels: 1 (grey) or 3 (colour).
        fit: How an image becomes ``size`` × ``size``.
        augment: At random on training samples.
        check: What is looked at before training starts; ``none`` needs ``size``.
        held_out: Part of each class that is kept for evaluation, the same for every seed.
    """

    kind: Literal["folder"] = "folder"
    path: Name
    labels: Literal["folders", "none"] = "folders"
    size: Count | None = None
    channels: Channels = 3
    fit: Fit = "center"
    augment: Augment = Augment()
    check: Check = "headers"
    held_out: Share = 0.1

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        _check_size(self.size, self.augment, self.check)
        return self


class CifarData(Section):
    """CIFAR-10 or CIFAR-100 in the published binary layout.

    Attributes:
        path: The folder with ``data_batch_1.bin`` ... (CIFAR-10) or ``train.bin`` (CIFAR-100), or
            the published ``.tar.gz`` of it.
        labels: ``fine`` (10 or 100 classes), or ``coarse`` (20 superclasses of CIFAR-100).
        augment: At random on training samples.
        subset: Whether files may hold fewer images than the published ones.
    """

    kind: Literal["cifar"] = "cifar"
    path: Name
    labels: Literal["fine", "coarse"] = "fine"
    augment: Augment = Augment(pad=4, flip=True)
    subset: bool = False

    @model_validator(mode="after")
    def _check_augment(self) -> Self:
        if self.augment.resized_crop:
            raise invalid("CIFAR has no resized crop", at="augment", hint="use pad")
        return self


class ImagenetData(Section):
    """ImageNet as folders, ``train/WNID/*.JPEG`` and ``val/WNID/*.JPEG``; any such pair will do.

    Attributes:
        path: The folder that holds both.
        size: Height and width of a sample.
        channels: 1 (grey) or 3 (colour).
        fit: How a held-out image becomes ``size`` × ``size``, and a training image unless
            ``augment.resized_crop``.
        augment: At random on training samples; DiT uses ``{flip: true}`` with ``fit: adm``.
        check: What is looked at before training starts.
        held_out: Name of the folder with the images for evaluation.
    """

    kind: Literal["imagenet"] = "imagenet"
    path: Name
    size: Count = 224
    channels: Channels = 3
    fit: Fit = "imagenet"
    augment: Augment = Augment(resized_crop=True, flip=True)
    check: Check = "none"
    held_out: Name = "val"


class WebDatasetData(Section):
    """Tar shards in the WebDataset layout: ``KEY.jpg`` beside ``KEY.cls``.

    Attributes:
        path: A shard, a folder of shards, or a brace pattern such as ``train-{000..009}.tar``.
        held_out: A part of each class that is kept for evaluation, or the shards for it.
        images: Endings of the members that are images; one of them per sample.
        label: Ending of the member that holds the label as a number in text; ``json:KEY`` takes
            it from a JSON member; None for data without labels.
        classes: How many classes there are; None takes the largest label and one more.
        size: Height and width of a sample; None keeps the images as they are, all of one shape.
        channels: 1 (grey) or 3 (colour).
        fit: How an image becomes ``size`` × ``size``.
        augment: At random on training samples.
        check: What is looked at before training starts; ``none`` needs ``size``.
        index: File that keeps the table of members, which is made anew when a shard has changed;
            None reads every shard's headers at each start.
    """

    kind: Literal["webdataset"] = "webdataset"
    path: Name
    held_out: Share | Name = 0.05
    images: tuple[Name, ...] = ("jpg", "jpeg", "png", "webp", "ppm", "pgm")
    label: Name | None = "cls"
    classes: Count | None = None
    size: Count | None = None
    channels: Channels = 3
    fit: Fit = "center"
    augment: Augment = Augment()
    check: Check = "headers"
    index: Name | None = None

    @model_validator(mode="after")
    def _check_size(self) -> Self:
        _check_size(self.size, self.augment, self.check)
        return self


ImageData = Annotated[
    DigitsData | FolderData | CifarData | ImagenetData | WebDatasetData,
    Field(discriminator="kind"),
]


class LatentData(Section):
    """Images encoded once with a VAE; what is trained on are the cached latents.

    Attributes:
        images: Where the images come from. They are encoded once, so that all their augmentation
            can do is ``flip``: each image is then encoded a second time mirrored.
        vae: A ``surgery.load`` spec with weights, ``hub:...`` or a folder, of diffusers'
            ``AutoencoderKL``.
        cache: Folder of the latents; it is made, and completed where it is not.
        posterior: Whether a latent is drawn from the encoder's distribution each time it is seen
            (``sample``, as DiT does), or is its ``mean``.
        dtype: Of the cache.
        batch: Images encoded at a time.
        device: Where the VAE runs.
    """

    kind: Literal["latents"] = "latents"
    images: ImageData
    vae: Name
    cache: Name
    posterior: Literal["sample", "mean"] = "sample"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    batch: Count = 16
    device: Name = "cpu"

    @model_validator(mode="after")
    def _check_augment(self) -> Self:
        augment = self.images.augment
        if augment.resized_crop or augment.pad:
            raise invalid(
                "images that are encoded once cannot be cropped anew each time",
                at="images",
                hint="set images.augment: {flip: true}, or {}",
            )
        return self


# --- all --------------------------------------------------------------------------------------

DataConfig = Annotated[
    TextData
    | TokenData
    | StreamData
    | DigitsData
    | FolderData
    | CifarData
    | ImagenetData
    | WebDatasetData
    | LatentData,
    Field(discriminator="kind"),
]

FinetuneDataConfig = Annotated[
    TextData
    | TokenData
    | StreamData
    | RecordsData
    | HubData
    | DocstringsData
    | DigitsData
    | ShiftedDigitsData
    | FolderData
    | CifarData
    | ImagenetData
    | WebDatasetData
    | LatentData,
    Field(discriminator="kind"),
]

#: Kinds that are texts with a sample each.
TEXTS = ("records", "hub", "docstrings")
