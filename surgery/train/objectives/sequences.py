"""Cross entropy over classes of texts."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from surgery.errors import ModelStateError, TrainingError
from surgery.sources.libraries import BUILD_ERRORS
from surgery.train.objectives.base import Batch, evaluating, first_line, logits_of, placement
from surgery.train.objectives.classification import Classification
from surgery.train.objectives.configs import SequenceObjective
from surgery.train.objectives.language import check_context, check_inputs

if TYPE_CHECKING:
    from surgery.train.data.base import Facts

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_HINT = "use a class with such a head, such as ...ForSequenceClassification; model.head: new"


class SequenceClassification(Classification):
    """Cross entropy of the class of a text, or of a pair of texts.

    The model takes ``input_ids`` (B, L) and, where its forward names them, ``attention_mask`` and
    ``token_type_ids``, and returns logits (B, K).

    Args:
        config: Section ``objective``.
        facts: What the data is.
        model: The plain model, which is tried on two texts.

    Raises:
        ModelStateError: it takes no tokens, ignores padding, or has another number of classes.
        TrainingError: the data has no classes, or no texts.
    """

    unlabelled: ClassVar[str] = "name the column of the classes: data.label"

    def __init__(self, config: SequenceObjective, facts: Facts, model: nn.Module) -> None:
        if facts.vocab_size is None:
            raise TrainingError(
                f"{facts.kind} data has no texts to classify", hint="use records, hub or docstrings"
            )
        parameters = inspect.signature(model.forward).parameters
        self._takes = [name for name in _INPUTS if name in parameters]
        if _INPUTS[0] not in self._takes:
            raise ModelStateError(f"{type(model).__name__} takes no input_ids", hint=_HINT)
        if _INPUTS[1] not in self._takes:
            raise ModelStateError(
                f"{type(model).__name__} takes no attention_mask, so that its answer would depend "
                "on how far a text is padded",
                hint=_HINT,
            )
        check_context(model, facts.longest)
        check_inputs(model, facts.vocab_size)
        super().__init__(config, facts, model)

    def tried(self, model: nn.Module, facts: Facts) -> Tensor:
        """The logits of two short texts."""
        device, _ = placement(model)
        ids = torch.ones(2, min(4, facts.longest or 4), dtype=torch.int64, device=device)
        with evaluating(model):
            try:
                return self.logits(
                    model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                )
            except BUILD_ERRORS as error:
                raise ModelStateError(
                    f"{type(model).__name__} cannot be called with tokens {tuple(ids.shape)}: "
                    f"{first_line(error)}",
                    hint=_HINT,
                ) from error

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Those of a batch of texts: float32 (B, K)."""
        given = {name: batch[name] for name in self._takes if name in batch}
        return logits_of(model(**given)).float()
