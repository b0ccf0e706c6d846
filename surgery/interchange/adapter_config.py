"""``adapter_config.json`` of a PEFT LoRA adapter: what of it decides what the adapter computes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from surgery.errors import CheckpointError
from surgery.untrusted import documents
from surgery.untrusted.paths import short

_MAX_BYTES = 1 << 24
#: Starts that leave the stock weight alone.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
#: Starts that take a part out of the weight which is the same at every start, so that the factors
#: in a file are known to be those of the rest; each with our method of that start.
_SPLITTING_STARTS = {"pissa": "pissa", "olora": "olora"}
#: Fields that say where layers are, how they started or how PEFT trains and runs them: the file
#: itself says which layers there are, and what they compute does not depend on the rest.
_NO_MATTER = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
#: A pattern of these is matched in polynomial time: no repeated groups, few repetitions.
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_REPETITION = re.compile(r"(?<!\\)[*+{]")
_MAX_REPETITIONS = 3
_MAX_PATTERN = 1000


class AdapterConfig(BaseModel):
    """The fields that are used, with PEFT's defaults; ``AdapterConfig.read`` refuses the rest.

    Attributes:
        rank: Rank where no pattern says another; the tensors decide.
        alpha: Numerator of the scaling where no pattern says another.
        rslora: Whether it is over the root of the rank.
        dora: Whether rows are scaled to a magnitude (arXiv 2402.09353).
        dropout: Probability of dropping an input of a branch while training.
        alpha_pattern: Regular expressions for the end of a layer's path → its own numerator.
        target_parameters: Names, or ends of names, of the parameters that are adapted.
        modules_to_save: Ends of the paths of stock modules whose trained weights are in the file.
        bias: Which stock biases are in the file.
    """

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    kind: Literal["LORA"] = Field(default="LORA", alias="peft_type")
    rank: Annotated[int, Field(ge=1, alias="r")] = 8
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False, alias="lora_alpha")] = 8
    rslora: bool = Field(default=False, alias="use_rslora")
    dora: bool = Field(default=False, alias="use_dora")
    dropout: Annotated[float, Field(ge=0, lt=1, alias="lora_dropout")] = 0.0
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    init_lora_weights: bool | str | None = True

    @classmethod
    def read(cls, data: object, where: str) -> AdapterConfig:
        """Check what a file says.

        Args:
            data: What its JSON holds.
            where: Name of the file, for messages.

        Raises:
            CheckpointError: it is no LoRA configuration, or it asks for something else than a
                change of low rank beside stock weights.
        """
        try:
            config = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            field = short(".".join(map(str, first["loc"]))) or "it"
            raise CheckpointError(
                f"{where}: {field}: {first['msg']}, received {_short(first['input'])}",
                hint="a LoRA adapter of PEFT is expected (peft_type: LORA)",
            ) from None
        config._check_start(where)
        config._check_others(where)
        for pattern in config.alpha_pattern or {}:
            _check_pattern(pattern, where)
        return config

    @property
    def method(self) -> str:
        """Our method of such layers."""
        return _SPLITTING_STARTS.get(str(self.init_lora_weights), "dora" if self.dora else "lora")

    @property
    def splits(self) -> bool:
        """Whether the factors are those of what a start left of the weight."""
        return self.init_lora_weights in _SPLITTING_STARTS

    def alpha_of(self, path: str) -> float:
        """The numerator for a layer, by PEFT's rule for patterns.

        Args:
            path: Path of the module, or full name of the adapted parameter.
        """
        found = next((alpha for pattern, alpha in self._alphas if pattern.match(path)), None)
        return self.alpha if found is None else found

    @cached_property
    def _alphas(self) -> list[tuple[re.Pattern[str], float]]:
        patterns = self.alpha_pattern or {}
        return [(re.compile(rf"(.*\.)?({text})$"), alpha) for text, alpha in patterns.items()]

    def _check_start(self, where: str) -> None:
        if self.splits and not self.dora:
            return
        if self.init_lora_weights not in _PLAIN_STARTS:
            raise CheckpointError(
                f"{where}: its factors are of a weight that PEFT changed when the adapter was made "
                f"(init_lora_weights: {self.init_lora_weights!r}), and not of the stock weight",
                hint="save it again from PEFT with path_initial_model_for_weight_conversion=, "
                "which turns it into factors of the stock weight",
            )

    def _check_others(self, where: str) -> None:
        extra: Mapping[str, Any] = self.model_extra or {}
        odd = [name for name, value in extra.items() if value and name not in _NO_MATTER]
        if odd:
            raise CheckpointError(
                f"{where}: {short(odd[0])} is {_short(extra[odd[0]])}, which changes what "
                "the adapter computes, or is newer than this version",
                hint="LoRA, rsLoRA and DoRA on layers and parameters can be loaded",
            )


def parse(text: bytes, where: str) -> object:
    """What a JSON file holds.

    Raises:
        CheckpointError: it is no JSON by ``surgery.untrusted.documents``, or too large.
    """
    if len(text) > _MAX_BYTES:
        raise CheckpointError(f"{where} is {len(text)} bytes, expected at most {_MAX_BYTES}")
    return documents.parse(text, where)


def _check_pattern(pattern: str, where: str) -> None:
    """Refuse a regular expression that is none, or that could take for ever to match."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: alpha_pattern {_short(pattern)} is no regular expression: {error}"
        ) from None
    repeated = _REPEATED_GROUP.search(pattern) is not None
    if repeated or len(_REPETITION.findall(pattern)) > _MAX_REPETITIONS:
        raise CheckpointError(
            f"{where}: alpha_pattern {_short(pattern)} repeats too much to be matched in bounded "
            "time",
            hint=f"at most {_MAX_REPETITIONS} repetitions, and none of a group",
        )
    if len(pattern) > _MAX_PATTERN:
        raise CheckpointError(f"{where}: an alpha_pattern is longer than {_MAX_PATTERN} characters")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
