"""Small models written out plainly, one per family, for tests that rewrite this very file.

``FAMILIES`` gives each family's class; a model takes no arguments, and ``example(family)`` is a
call for it. ``test_renamed.py`` replaces every name in this file and asks for the same roles.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, HEADS, WIDE, VOCAB = 16, 2, 24, 40


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight_of_norm = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        root = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight_of_norm * (x * root)


def rotate(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] * torch.arange(half)[None, :] * 0.1
    both = torch.cat([angles, angles], -1)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * both.cos() + turned * both.sin()


class GroupedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D, D, bias=False)
        self.k_proj = nn.Linear(D, D // HEADS, bias=False)
        self.v_proj = nn.Linear(D, D // HEADS, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)
        self.q_norm = RMSNorm(D // HEADS)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        split = (batch, length, -1, D // HEADS)
        query = rotate(self.q_norm(self.q_proj(x).view(split)).transpose(1, 2))
        key = rotate(self.k_proj(x).view(split).transpose(1, 2)).repeat_interleave(HEADS, 1)
        value = self.v_proj(x).view(split).transpose(1, 2).repeat_interleave(HEADS, 1)
        made = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(made.transpose(1, 2).reshape(batch, length, D))


class GatedUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, WIDE, bias=False)
        self.up_proj = nn.Linear(D, WIDE, bias=False)
        self.down_proj = nn.Linear(WIDE, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_norm = RMSNorm(D)
        self.attention = GroupedAttention()
        self.post_norm = RMSNorm(D)
        self.mlp = GatedUnit()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x))
        return x + self.mlp(self.post_norm(x))


class LlamaLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(LlamaLayer() for _ in range(2))
        self.last_norm = RMSNorm(D)
        self.lm_head = nn.Linear(D, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.last_norm(x))


class SoftmaxAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(D, D)
        self.key = nn.Linear(D, D)
        self.value = nn.Linear(D, D)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], HEADS, -1).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self.heads(f(x)) for f in (self.query, self.key, self.value))
        scores = torch.matmul(query, key.transpose(-1, -2)) / 8**0.5
        found = F.dropout(F.softmax(scores, dim=-1), 0.1, self.training) @ value
        return found.permute(0, 2, 1, 3).flatten(2)


class BertLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = SoftmaxAttention()
        self.attention_out = nn.Linear(D, D)
        self.attention_norm = nn.LayerNorm(D)
        self.intermediate = nn.Linear(D, WIDE)
        self.shrink = nn.Linear(WIDE, D)
        self.shrink_norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention_norm(x + self.attention_out(self.attention(x)))
        return self.shrink_norm(self.shrink(F.gelu(self.intermediate(x))) + x)


class BertLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(VOCAB, D)
        self.position_embeddings = nn.Embedding(32, D)
        self.type_embeddings = nn.Embedding(2, D)
        self.embedding_norm = nn.LayerNorm(D)
        self.encoder = nn.ModuleList(BertLayer() for _ in range(2))
        self.pooler = nn.Linear(D, D)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.arange(tokens.shape[1])
        x = self.word_embeddings(tokens) + self.position_embeddings(places)
        x = self.embedding_norm(x + self.type_embeddings(torch.zeros_like(tokens)))
        for layer in self.encoder:
            x = layer(x)
        return x, torch.tanh(self.pooler(x[:, 0]))


class LayerScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((D,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class FusedAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.qkv(x).reshape(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        made = F.scaled_dot_product_attention(query, key, value)
        return self.proj(made.transpose(1, 2).reshape(batch, length, D))


class ViTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first_norm = nn.LayerNorm(D)
        self.attention = FusedAttention()
        self.first_scale = LayerScale()
        self.second_norm = nn.LayerNorm(D)
        self.widen = nn.Linear(D, WIDE)
        self.act = nn.GELU()
        self.narrow = nn.Linear(WIDE, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first_scale(self.attention(self.first_norm(x)))
        return x + self.narrow(self.act(self.widen(self.second_norm(x))))


class ViTLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, D, 4, stride=4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, D))
        self.positions = nn.Parameter(torch.zeros(1, 17, D))
        self.blocks = nn.Sequential(ViTBlock(), ViTBlock())
        self.last_norm = nn.LayerNorm(D)
        self.classifier = nn.Linear(D, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.classifier(self.last_norm(self.blocks(x))[:, 0])


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(4, 2 * WIDE, D))
        self.down = nn.Parameter(torch.randn(4, D, WIDE))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        gate, up = torch.einsum("nd,nkwd->nkw", x, self.gate_up[chosen]).chunk(2, -1)
        made = torch.einsum("nkw,nkdw->nkd", F.silu(gate) * up, self.down[chosen])
        return (made * weights[..., None]).sum(1)


class MixtureLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = FusedAttention()
        self.route = nn.Linear(D, 4, bias=False)
        self.experts = Experts()
        self.norm = RMSNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        flat = x.reshape(-1, D)
        weights, chosen = torch.topk(self.route(flat).softmax(-1), 2)
        return x + self.experts(flat, chosen, weights).view_as(x)


class MixtureLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, D)
        self.layers = nn.ModuleList(MixtureLayer() for _ in range(2))
        self.head = nn.Linear(D, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ModulatedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steer = nn.Linear(D, 3 * D)
        self.norm = nn.LayerNorm(D, elementwise_affine=False)
        self.attention = FusedAttention()

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale, gate = self.steer(F.silu(condition))[:, None].chunk(3, -1)
        return x + gate * self.attention(self.norm(x) * (1 + scale) + shift)


class DiTLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, D)
        self.time_in = nn.Linear(D, D)
        self.time_out = nn.Linear(D, D)
        self.blocks = nn.ModuleList(ModulatedBlock() for _ in range(2))
        self.leave = nn.Linear(D, 8)

    def forward(self, latent: Tensor, time: Tensor) -> Tensor:
        angles = time[:, None] * torch.arange(D // 2)[None]
        waves = torch.cat([angles.sin(), angles.cos()], -1)
        condition = self.time_out(F.silu(self.time_in(waves)))
        x = self.enter(latent)
        for block in self.blocks:
            x = block(x, condition)
        return self.leave(x)


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(D, D, 3, padding=1, groups=D)
        self.norm = nn.GroupNorm(1, D)
        self.widen = nn.Conv2d(D, WIDE, 1)
        self.narrow = nn.Conv2d(WIDE, D, 1)
        self.squeeze = nn.Conv2d(D, 4, 1)
        self.excite = nn.Conv2d(4, D, 1)

    def forward(self, x: Tensor) -> Tensor:
        made = self.narrow(F.gelu(self.widen(self.norm(self.depthwise(x)))))
        pooled = made.mean((2, 3), keepdim=True)
        return x + made * torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))


class ConvLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, D, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(ConvBlock(), ConvBlock())
        self.classifier = nn.Linear(D, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(image)).mean((2, 3)))


FAMILIES = {
    "llama": LlamaLike,
    "bert": BertLike,
    "vit": ViTLike,
    "mixture": MixtureLike,
    "dit": DiTLike,
    "conv": ConvLike,
}


def example(family: str) -> tuple[Tensor, ...]:
    if family in ("vit", "conv"):
        return (torch.randn(2, 3, 16, 16),)
    if family == "dit":
        return torch.randn(2, 6, 8), torch.rand(2)
    return (torch.randint(0, VOCAB, (2, 7)),)
