"""LLaMA in the sizes that GaLore (arXiv 2403.03507) and ANCRe (arXiv 2602.09009) pretrain.

The fields are those of GaLore's ``configs/llama_*.json``, under the names transformers has for
them now: ``max_sequence_length`` is ``max_position_embeddings``. Their ``pad_token_id: -1`` stood
for "none", and would now make the last token of the vocabulary a padding row that never learns.
"""

from __future__ import annotations

from typing import Any

from architectures.backbones.base import Preset

_GALORE = "arXiv 2403.03507 and 2602.09009"
#: name → width, width of the MLP, layers, attention heads.
_SIZES = {
    "llama-60m": (512, 1376, 8, 8),
    "llama-130m": (768, 2048, 12, 12),
    "llama-350m": (1024, 2736, 24, 16),
    "llama-1b": (2048, 5461, 24, 32),
}
#: 256 bytes and room for eight special tokens.
_BYTE_VOCABULARY = 264


def parameters(width: int, mlp: int, layers: int, vocabulary: int) -> int:
    """How many parameters a LLaMA has whose embedding and head are not tied.

    Per layer 4 d² (q, k, v, o), 3 d f (gate, up, down) and 2 d (two norms); beside the layers
    2 V d (embedding and head) and d (the last norm).
    """
    layer = 4 * width**2 + 3 * width * mlp + 2 * width
    return layers * layer + 2 * vocabulary * width + width


def _preset(
    name: str, width: int, mlp: int, layers: int, heads: int, *, source: str, **fields: Any
) -> Preset:
    config: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "pad_token_id": None,
        **fields,
    }
    count = parameters(width, mlp, layers, fields["vocab_size"])
    return Preset(name, "transformers", "LlamaForCausalLM", config, count, source)


def _galore(name: str, width: int, mlp: int, layers: int, heads: int) -> Preset:
    return _preset(
        name,
        width,
        mlp,
        layers,
        heads,
        source=_GALORE,
        vocab_size=32000,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
    )


#: About 3 million parameters over bytes; no paper's. Which special tokens there are is the
#: tokenizer's business, so none is named here.
_TINY = _preset(
    "llama-tiny",
    192,
    384,
    8,
    6,
    source="ours, to run on a CPU",
    vocab_size=_BYTE_VOCABULARY,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
)

PRESETS: tuple[Preset, ...] = (_TINY, *(_galore(name, *sizes) for name, sizes in _SIZES.items()))
