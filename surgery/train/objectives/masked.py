"""Guessing masked tokens, as BERT does (arXiv 1810.04805)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.errors import ModelStateError, TrainingError
from surgery.sources.libraries import BUILD_ERRORS
from surgery.train.data.transforms import derive
from surgery.train.objectives.base import (
    POSITION,
    Batch,
    Gather,
    Objective,
    alone,
    evaluating,
    first_line,
    logits_of,
    measured,
    placement,
)
from surgery.train.objectives.configs import MaskedObjective
from surgery.train.objectives.language import check_context, check_inputs, check_shape

if TYPE_CHECKING:
    from surgery.train.data.base import Facts

_IGNORED = -100
_MASKED, _OTHER = 0.8, 0.9
"""Of the guessed tokens so many are masked, and those up to the second figure are other tokens."""
_HINT = "masked tokens are for models that see both sides, such as ...ForMaskedLM classes"


class MaskedLanguage(Objective):
    """Cross entropy of the tokens that are hidden from the model.

    Which tokens are hidden is a function of the seed and the position of a sample in the run;
    in evaluation of the position alone, so that two models are asked the same.

    Args:
        config: Section ``objective``.
        facts: What the data is.
        model: The plain model, which is tried on a few tokens.
        seed: Seed of the masks.

    Raises:
        ModelStateError: its vocabulary or context is too small, or it returns no logits per token.
        TrainingError: the data has no tokens, or its tokenizer no mask.
    """

    weighed = True

    def __init__(
        self, config: MaskedObjective, facts: Facts, model: nn.Module, *, seed: int
    ) -> None:
        if facts.vocab_size is None or facts.tokenizer is None:
            raise TrainingError(f"{facts.kind} data has no tokens", hint="use data of text")
        if facts.tokenizer.mask is None:
            raise TrainingError(
                "the tokenizer has no mask token", hint="use that of a masked language model"
            )
        self._config, self._seed = config, seed
        self._mask, self._vocabulary = facts.tokenizer.mask, facts.vocab_size
        self._special = torch.tensor(facts.tokenizer.special)
        parameters = inspect.signature(model.forward).parameters
        self._takes = [name for name in ("attention_mask", "token_type_ids") if name in parameters]
        check_context(model, facts.length or facts.longest)
        check_inputs(model, facts.vocab_size)
        self._check(model)

    def loss(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Mean over the hidden tokens of ``input_ids`` (B, L)."""
        hidden, labels = self._hide(batch, "train", self._seed)
        logits = self._logits(model, batch, hidden)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    def weight(self, batch: Batch) -> Tensor:
        """Tokens that are hidden."""
        _, labels = self._hide(batch, "train", self._seed)
        return (labels != _IGNORED).sum()

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], *, gather: Gather = alone
    ) -> dict[str, float]:
        """Over all hidden tokens of the held-out part.

        Returns:
            ``loss`` in nats per hidden token, ``perplexity``, and ``accuracy`` from 0 to 1.
        """
        with evaluating(model):
            nats, right, tokens, _ = measured(
                batches, lambda batch: self._per_sample(model, batch), gather
            )
        mean = nats / tokens
        perplexity = math.exp(mean) if mean < 709 else math.inf
        return {"loss": mean, "perplexity": perplexity, "accuracy": right / tokens}

    def _per_sample(self, model: nn.Module, batch: Batch) -> Tensor:
        """Nats, right guesses and hidden tokens of each sample: float32 (B, 3)."""
        hidden, labels = self._hide(batch, "held out", 0)
        logits = self._logits(model, batch, hidden).float()
        nats = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)
        right = ((logits.argmax(-1) == labels) & (labels != _IGNORED)).sum(1)
        return torch.stack([nats, right.float(), (labels != _IGNORED).sum(1).float()], dim=1)

    def _hide(self, batch: Batch, purpose: str, seed: int) -> tuple[Tensor, Tensor]:
        """Ids with some hidden, and the labels of those: int64 (B, L) each."""
        ids = batch["input_ids"]
        where = cast("list[int]", cast("Any", batch[POSITION]).tolist())
        whole = ids.cpu()
        real = ~torch.isin(whole, self._special)
        if "attention_mask" in batch:
            real &= batch["attention_mask"].cpu().bool()
        rows = [
            self._hide_row(row, found, derive(seed, position, purpose))
            for row, found, position in zip(whole, real, where, strict=True)
        ]
        return (
            torch.stack([hidden for hidden, _ in rows]).to(ids.device),
            torch.stack([labels for _, labels in rows]).to(ids.device),
        )

    def _hide_row(self, ids: Tensor, real: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        places = real.nonzero().flatten()
        hidden, labels = ids.clone(), torch.full_like(ids, _IGNORED)
        if not len(places):
            return hidden, labels
        count = max(1, round(self._config.share * len(places)))
        # Drawn for places in the text, whatever padding follows.
        chosen = places[torch.randperm(len(places), generator=draw)[:count]]
        fate = torch.rand(count, generator=draw)
        other = torch.randint(self._vocabulary, (count,), generator=draw)
        labels[chosen] = ids[chosen]
        hidden[chosen] = torch.where(
            fate < _MASKED, self._mask, torch.where(fate < _OTHER, other, ids[chosen])
        )
        return hidden, labels

    def _logits(self, model: nn.Module, batch: Batch, ids: Tensor) -> Tensor:
        given = {name: batch[name] for name in self._takes if name in batch}
        return logits_of(model(input_ids=ids, **given))

    def _check(self, model: nn.Module) -> None:
        device, _ = placement(model)
        ids = torch.full((1, 4), self._mask, device=device)
        with evaluating(model):
            try:
                logits = self._logits(model, {}, ids)
            except BUILD_ERRORS as error:
                raise ModelStateError(
                    f"{type(model).__name__} cannot be called with tokens {tuple(ids.shape)}: "
                    f"{first_line(error)}",
                    hint=_HINT,
                ) from error
        check_shape(logits, ids, self._vocabulary)
        later = ids.clone()
        later[0, -1] = 0
        with evaluating(model):
            other = self._logits(model, {}, later)
        if torch.equal(logits[:, 0], other[:, 0]):
            raise ModelStateError(
                f"{type(model).__name__} does not see the tokens that come later", hint=_HINT
            )
