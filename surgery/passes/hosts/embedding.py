"""Embeddings: a lookup in B, then A."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from architectures.adapters import Adapter
from surgery.passes.hosts.bank import bank_of
from surgery.passes.hosts.branch import add_branch


class EmbeddingHost(nn.Embedding):
    """An ``nn.Embedding`` with adapters. Stands right above it among its class's ancestors."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Embedding's name for it
        """Indices (...) to embeddings (..., dim)."""
        output = nn.Embedding.forward(self, input)  # by name, as in LinearHost
        bank = bank_of(self)
        if bank is None:
            return output
        output = with_lookups(self, bank.counting(), input, output)
        return bank.seal(output, output)


def with_lookups(
    layer: nn.Embedding, counting: list[tuple[Adapter, float]], indices: Tensor, output: Tensor
) -> Tensor:
    """What an embedding gives with its adapters.

    Args:
        layer: The embedding.
        counting: The adapters that count, each with its share.
        indices: What it was called with, (...).
        output: What it gave for them, (..., dim).
    """
    for adapter, share in counting:
        A, B = adapter.factors()
        rows = functional.embedding(indices, B)
        if adapter.dropout:
            rows = rows * _kept(rows, adapter.dropout, layer.training)
        branch = functional.linear(rows, A.t())
        if layer.padding_idx is not None:
            # The padding row of an embedding is used and never trained.
            padding = (indices == layer.padding_idx).unsqueeze(-1)
            branch = torch.where(padding, branch.detach(), branch)
        output = add_branch(output, branch, share * adapter.scaling)
    return output


def _kept(rows: Tensor, dropout: float, training: bool) -> Tensor:
    """Dropout of a one-hot input: an index keeps all of its change or none. Shape (..., 1)."""
    return functional.dropout(torch.ones_like(rows[..., :1]), dropout, training)
