"""Text drawn from a language model with transformers' ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from surgery.errors import ModelStateError, TrainingError
from surgery.sources.libraries import require
from surgery.train.objectives.base import evaluating, placement
from surgery.train.objectives.configs import TextSampling

if TYPE_CHECKING:
    from surgery.train.data.base import Facts
    from surgery.train.data.tokenizer import Tokenizer

_RULER = "-" * 80


def tokenizer_of(facts: Facts) -> Tokenizer:
    """The tokenizer of the data.

    Raises:
        TrainingError: the data came without one.
    """
    if facts.tokenizer is None:
        raise TrainingError(
            f"{facts.kind} data came without a tokenizer, so that no text can be drawn",
            hint="leave objective.sample out",
        )
    return facts.tokenizer


def check(model: nn.Module) -> None:
    """Find out before training whether text can be drawn.

    Raises:
        ModelStateError: the model is none of transformers' that generate.
    """
    if not isinstance(model, require("transformers").GenerationMixin):
        raise ModelStateError(
            f"{type(model).__name__} cannot draw text: expected a model of transformers that has "
            "generate()",
            hint="leave objective.sample out",
        )


def draw(model: nn.Module, tokenizer: Tokenizer, config: TextSampling) -> list[str]:
    """Continue each prompt. The global random state is left as it was.

    Args:
        model: A causal model of transformers.
        tokenizer: What it was trained with.
        config: Prompts, length, temperature, seed.

    Returns:
        Prompts with their continuations; each ends where the model ends the document.

    Raises:
        ModelStateError: the model is none of transformers' that generate.
    """
    check(model)
    device, _ = placement(model)
    devices = [] if device.type == "cpu" else [device]
    fork = cast("Any", torch.random).fork_rng(devices, device_type=device.type)
    with evaluating(model), fork:
        return [_continued(model, tokenizer, prompt, config) for prompt in config.prompts]


def write(texts: list[str], path: Path) -> Path:
    """Write drawn texts, a ruler after each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n{_RULER}\n" for text in texts), encoding="utf-8")
    return path


def _continued(model: Any, tokenizer: Tokenizer, prompt: str, config: TextSampling) -> str:
    device, _ = placement(model)
    ids = torch.tensor([_start(tokenizer, prompt)], device=device)
    # generate() draws from the global generator: each prompt from the same seed, so that a text
    # does not depend on those before it.
    torch.manual_seed(config.seed)  # pyright: ignore[reportUnknownMemberType]
    drawn = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=config.tokens,
        **_strategy(config),
        # An architecture's own defaults are ids of another tokenizer.
        bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.eos if tokenizer.pad is None else tokenizer.pad,
        suppress_tokens=_never_drawn(model, tokenizer),
    )
    return tokenizer.decode(drawn[0].tolist())


def _strategy(config: TextSampling) -> dict[str, Any]:
    if config.temperature == 0:
        return {"do_sample": False}
    # For generate(), a top_k of 0 is none.
    return {"do_sample": True, "temperature": config.temperature, "top_k": config.top_k or 0}


def _start(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt; of an empty one, what a document begins after."""
    (ids,) = tokenizer.encode([prompt])
    if len(ids):
        return [int(each) for each in ids]
    return [tokenizer.eos if tokenizer.bos is None else tokenizer.bos]


def _never_drawn(model: Any, tokenizer: Tokenizer) -> list[int] | None:
    """Ids that stand for no text: those of bos and pad, and the model's beyond the tokenizer's."""
    size = model.config.get_text_config().vocab_size
    special = [each for each in (tokenizer.bos, tokenizer.pad) if each not in (None, tokenizer.eos)]
    return [*special, *range(tokenizer.vocab_size, size)] or None
