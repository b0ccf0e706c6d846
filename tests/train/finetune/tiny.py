"""Small pretrained models, tables and configurations for the tests of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from surgery.train.finetune.config import FinetuneConfig
from tests.train.tiny import overridden

WORDS = ("red", "green", "blue", "small", "large", "round", "flat", "old", "new", "dark", "pale")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
KINDS = ("colour", "shape", "age")


def bert(folder: Path) -> Path:
    """A BERT of two narrow layers with a tokenizer of a dozen words."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        # No dropout: losses are compared.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate((*SPECIAL, *WORDS))}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    return folder


def llama(folder: Path) -> Path:
    """A LLaMA of two narrow layers for bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows(count: int = 48) -> list[dict[str, Any]]:
    """Texts of one to eight words; the class is that of the first word."""
    draw = torch.Generator().manual_seed(0)
    made: list[dict[str, Any]] = []
    for number in range(count):
        length = 1 + number % 8
        first = number % 3
        rest = torch.randint(len(WORDS), (length - 1,), generator=draw).tolist()
        lead = (WORDS[first], WORDS[3 + first], WORDS[7 + first % 2])[first]
        text = " ".join([lead, *(WORDS[each] for each in rest)])
        made.append({"text": text, "kind": KINDS[first], "number": number})
    return made


def table(folder: Path, made: list[dict[str, Any]] | None = None) -> Path:
    """A JSONL file of rows."""
    path = folder / "table.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made or rows()), encoding="utf-8")
    return path


def lowrank(method: str = "lora", **options: Any) -> dict[str, Any]:
    """Rules that put adapters beside queries and values."""
    where = {"role": ["attention.q", "attention.v"]}
    rule = {"id": "adapters", "pass": "lowrank", "where": where}
    given = {"method": method, "rank": 2, "alpha": 4, **options}
    return {"version": 1, "recipe": method, "seed": 0, "rules": [{**rule, "with": given}]}


def classify(folder: Path, *overrides: str, rules: dict[str, Any] | None = None) -> FinetuneConfig:
    """The tiny BERT on the table, both in ``folder``; ``folder`` is made if it is not there."""
    if not folder.exists():
        folder.mkdir(parents=True)
        bert(folder / "bert")
        table(folder)
    data: dict[str, Any] = {
        "version": 1,
        "name": "tiny",
        "model": {"source": str(folder / "bert")},
        "rules": rules,
        "data": {
            "kind": "records",
            "path": str(folder / "table.jsonl"),
            "label": "kind",
            "held_out": 0.25,
        },
        "objective": {"kind": "sequence-classification"},
        **loop(),
    }
    return changed(data, overrides)


def loop() -> dict[str, Any]:
    """The sections about steps."""
    return {
        "optim": {"name": "adamw", "lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup": 2, "final": 0.1},
        "train": {"steps": 8, "batch": 8, "device": "cpu"},
        "evaluate": {"every": 4, "samples": 50},
        "checkpoint": {"every": 3, "keep": 2},
        "log": {"every": 1, "tensorboard": False},
    }


def changed(data: dict[str, Any], overrides: tuple[str, ...]) -> FinetuneConfig:
    """A configuration of plain data with ``section.key=JSON`` put in."""
    return FinetuneConfig.parse(overridden(data, overrides))
