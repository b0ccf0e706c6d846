"""Next-token prediction."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.errors import ModelStateError, TrainingError
from surgery.sources.libraries import BUILD_ERRORS
from surgery.train.objectives import texts
from surgery.train.objectives.base import (
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
from surgery.train.objectives.configs import LanguageObjective

if TYPE_CHECKING:
    from surgery.train.data.base import Facts

# Tokens of the trial: long enough for every head to look back, short enough to cost nothing.
_TRIAL_LENGTH = 8
# What torch's cross entropy leaves out.
_IGNORED = -100
_CAUSAL_HINT = "next-token prediction is for causal models, such as ...ForCausalLM classes"


class Language(Objective):
    """Cross entropy of each token given those before it.

    The model's own forward computes the loss where it takes ``labels`` (transformers), auxiliary
    losses included; of other models the logits (B, L, V) are taken. Evaluation is always on the
    logits, in float32, so that perplexity means the same for all of them.

    Args:
        config: Section ``objective``.
        facts: What the data is.
        model: The plain model, which is tried on a few tokens.

    Raises:
        ModelStateError: its vocabulary or context is too small; it sees the tokens that it should
            predict; its own loss is not that of the next token; it cannot draw samples, and
            should.
    """

    def __init__(self, config: LanguageObjective, facts: Facts, model: nn.Module) -> None:
        if facts.vocab_size is None:
            raise TrainingError(
                f"{facts.kind} data has no tokens to predict",
                hint="use data of kind text, tokens or stream",
            )
        self.config = config
        self.facts = facts
        self.sample_every = None if config.sample is None else config.sample.every
        # Where samples differ in length, parts of a batch have different numbers of tokens.
        self.weighed = facts.length is None
        parameters = inspect.signature(model.forward).parameters
        self._named = "input_ids" in parameters
        self._own_loss = self._named and "labels" in parameters
        # A cache of keys and values is of no use in training, and copies them.
        self._extra: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        self._check(model, facts.vocab_size)

    def loss(self, model: nn.Module, batch: Batch, *, step: int) -> Tensor:
        """Mean over all predicted tokens of ``input_ids`` (B, L).

        Where a batch has ``labels`` (B, L), they are the tokens to predict, and -100 is none;
        where it has ``attention_mask`` (B, L), the model is given it.
        """
        output = self._forward(model, batch, with_loss=self._own_loss)
        if self._own_loss:
            return output.loss
        return F.cross_entropy(*_predictions(logits_of(output), _labels(batch)))

    def weight(self, batch: Batch) -> Tensor:
        """Tokens that are predicted."""
        return (_labels(batch)[:, 1:] != _IGNORED).sum()

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], *, gather: Gather = alone
    ) -> dict[str, float]:
        """Mean loss per predicted token of the whole held-out part, and its exponential.

        Returns:
            ``loss`` in nats per token, and ``perplexity``.
        """
        with evaluating(model):
            nats, tokens, _ = measured(
                batches, lambda batch: self._per_sample(model, batch), gather
            )
        mean = nats / tokens
        # A model that has diverged is measured too: exp(710) is no float.
        perplexity = math.exp(mean) if mean < 709 else math.inf
        return {"loss": mean, "perplexity": perplexity}

    def sample(self, model: nn.Module, out: Path | None, step: int) -> Path | None:
        """Continue the prompts; ``step-000100.txt`` holds them with what the model added."""
        if self.config.sample is None:
            return None
        drawn = self.draw(model)
        return None if out is None else self.write(drawn, out / f"step-{step:06d}.txt")

    def draw(self, model: nn.Module) -> list[str]:
        """The prompts of the configuration, continued."""
        if self.config.sample is None:
            raise TrainingError("the configuration has no objective.sample to draw text by")
        return texts.draw(model, texts.tokenizer_of(self.facts), self.config.sample)

    def write(self, drawn: list[str], path: Path) -> Path:
        """Write texts to a file."""
        return texts.write(drawn, path)

    def _forward(self, model: nn.Module, batch: Batch, *, with_loss: bool) -> Any:
        ids = batch["input_ids"]
        if not self._named:
            return model(ids)
        extra = dict(self._extra)
        if "attention_mask" in batch:
            extra["attention_mask"] = batch["attention_mask"]
        if with_loss:
            extra["labels"] = _labels(batch)
        return model(input_ids=ids, **extra)

    def _per_sample(self, model: nn.Module, batch: Batch) -> Tensor:
        """Nats and predicted tokens of each sample: float32 (B, 2)."""
        logits, labels = logits_of(self._forward(model, batch, with_loss=False)), _labels(batch)
        # One sample at a time: float32 logits of a batch would be the largest tensor of the run.
        nats = [
            F.cross_entropy(
                *_predictions(logits[row : row + 1], labels[row : row + 1]), reduction="sum"
            )
            for row in range(len(labels))
        ]
        tokens = (labels[:, 1:] != _IGNORED).sum(dim=1)
        return torch.stack([torch.stack(nats), tokens.float()], dim=1)

    def _check(self, model: nn.Module, vocabulary: int) -> None:
        check_context(model, self.facts.length or self.facts.longest)
        device, dtype = placement(model)
        ids = torch.arange(self._trial_length(), device=device).remainder(2).unsqueeze(0)
        half = ids.shape[1] // 2
        # Other tokens, not the same in another order: a mean over all would not notice.
        other = torch.cat([ids[:, :half], torch.zeros_like(ids[:, half:])], dim=1)
        with evaluating(model):
            output = self._tried(model, ids)
            before = logits_of(output)
            check_shape(before, ids, vocabulary)
            check_inputs(model, vocabulary)
            after = logits_of(self._tried(model, other))
        _check_causal(before[:, :half].float(), after[:, :half].float(), dtype)
        if self._own_loss:
            _check_own_loss(output.loss, before, ids)
        if self.config.sample is not None:
            texts.tokenizer_of(self.facts)
            texts.check(model)

    def _trial_length(self) -> int:
        return min(self.facts.length or _TRIAL_LENGTH, _TRIAL_LENGTH)

    def _tried(self, model: nn.Module, ids: Tensor) -> Any:
        try:
            return self._forward(model, {"input_ids": ids}, with_loss=self._own_loss)
        except BUILD_ERRORS as error:
            # What a forward raises for a call it was not built for is the library's choice.
            raise ModelStateError(
                f"{type(model).__name__} cannot be called with tokens {tuple(ids.shape)}: "
                f"{first_line(error)}",
                hint=_CAUSAL_HINT,
            ) from error


def _labels(batch: Batch) -> Tensor:
    return batch["labels"] if "labels" in batch else batch["input_ids"]


def _predictions(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B * (L - 1), V) in float32, and the tokens that follow (B * (L - 1),)."""
    return logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()


def check_shape(logits: Tensor, ids: Tensor, vocabulary: int) -> None:
    """Refuse logits that are not one per token and entry of the vocabulary."""
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ModelStateError(
            f"the model returned logits {tuple(logits.shape)} for tokens {tuple(ids.shape)}; "
            f"expected ({ids.shape[0]}, {ids.shape[1]}, vocabulary)"
        )
    if logits.shape[-1] < vocabulary:
        raise _vocabulary_too_small("predicts", logits.shape[-1], vocabulary)


def _vocabulary_too_small(what: str, size: int, vocabulary: int) -> ModelStateError:
    return ModelStateError(
        f"the tokenizer has {vocabulary} tokens, and the model {what} {size}",
        hint=f"set model.config: {{vocab_size: {vocabulary}}}, or use a smaller tokenizer",
    )


def check_inputs(model: nn.Module, vocabulary: int) -> None:
    """Refuse a transformers model that embeds fewer ids than the tokenizer has."""
    from surgery.sources.libraries import installed

    if not installed("transformers"):
        return
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return
    embedding: Any = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding) and embedding.num_embeddings < vocabulary:
        raise _vocabulary_too_small("embeds", embedding.num_embeddings, vocabulary)


def check_context(model: nn.Module, length: int | None) -> None:
    """Refuse samples longer than the context that a transformers model is configured for."""
    context: object = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if length is not None and isinstance(context, int) and context < length:
        raise ModelStateError(
            f"samples have {length} tokens, and the model's context is {context}",
            hint=f"lower data.length, or set model.config: {{max_position_embeddings: {length}}}",
        )


def _check_causal(before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
    """Refuse a model whose predictions change with tokens that come later."""
    scale = before.abs().max().clamp(min=1e-12)
    change = float((before - after).abs().max() / scale)
    # A causal model repeats the same arithmetic; the margin is for kernels that sum otherwise.
    if change > max(1e-5, 4 * torch.finfo(dtype).eps):
        raise ModelStateError(
            f"predictions change by {change:.2g} of their size with tokens that come later: the "
            "model sees what it should predict",
            hint=_CAUSAL_HINT,
        )


def _check_own_loss(loss: object, logits: Tensor, ids: Tensor) -> None:
    """Refuse a model whose own loss is that of the token itself, not of the next one."""
    if not isinstance(loss, Tensor):
        raise ModelStateError(
            f"the model takes labels and returned {type(loss).__name__} for a loss",
            hint=_CAUSAL_HINT,
        )
    following = F.cross_entropy(*_predictions(logits, ids))
    same = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
    if torch.allclose(loss.float(), same) and not torch.allclose(loss.float(), following):
        raise ModelStateError(
            f"given labels, the model's loss is {float(loss):.6g}: that of each token itself, "
            f"where that of the next token is {float(following):.6g}",
            hint=_CAUSAL_HINT,
        )
