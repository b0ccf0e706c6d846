"""The role of every weight of every family in the zoo, and what must not be given one."""

from __future__ import annotations

import pytest
import torch

from surgery.rules.match import path_matches
from surgery.rules.roles import ROLES
from surgery.select import ModelMap
from tests import zoo

LLAMA = {
    "embed.token": "model.embed_tokens",
    "attention.q": "model.layers.*.self_attn.q_proj",
    "attention.k": "model.layers.*.self_attn.k_proj",
    "attention.v": "model.layers.*.self_attn.v_proj",
    "attention.out": "model.layers.*.self_attn.o_proj",
    "mlp.gate": "model.layers.*.mlp.gate_proj",
    "mlp.in": "model.layers.*.mlp.up_proj",
    "mlp.out": "model.layers.*.mlp.down_proj",
    "norm": "{model.norm,model.layers.*.*_layernorm}",
    "head": "lm_head",
}
MIXTURE = {
    **{role: LLAMA[role] for role in LLAMA if not role.startswith("mlp.")},
    "router": "model.layers.*.mlp.gate",
    "mlp.gate_in": "model.layers.*.mlp.experts.gate_up_proj",
    "mlp.out": "model.layers.*.mlp.experts.down_proj",
}
Q_NORMS = "model.layers.*.self_attn.{q,k}_norm"

# Model → role → the sites that play it, all of them and no others. A role that is not named is
# played by none, save ``conv`` and ``scale``, which say little; norms have a test of their own,
# since some have no weight.
EXPECTED: dict[str, dict[str, str]] = {
    "llama": LLAMA,
    "qwen3": {**LLAMA, "norm": f"{{model.norm,model.layers.*.*_layernorm,{Q_NORMS}}}"},
    "gemma3_text": {**LLAMA, "norm": f"{{model.norm,model.layers.*.*_layernorm,{Q_NORMS}}}"},
    "mixtral": MIXTURE,
    "qwen3_moe": {**MIXTURE, "norm": f"{{model.norm,model.layers.*.*_layernorm,{Q_NORMS}}}"},
    "gpt2": {
        "embed.token": "transformer.wte",
        "embed.position": "transformer.wpe",
        "attention.qkv": "transformer.h.*.attn.c_attn",
        "attention.out": "transformer.h.*.attn.c_proj",
        "mlp.in": "transformer.h.*.mlp.c_fc",
        "mlp.out": "transformer.h.*.mlp.c_proj",
        "norm": "transformer.{ln_f,h.*.ln_*}",
        "head": "lm_head",
    },
    "bert": {
        "embed.token": "embeddings.word_embeddings",
        "embed.position": "embeddings.position_embeddings",
        "embed.type": "embeddings.token_type_embeddings",
        "attention.q": "encoder.layer.*.attention.self.query",
        "attention.k": "encoder.layer.*.attention.self.key",
        "attention.v": "encoder.layer.*.attention.self.value",
        "attention.out": "encoder.layer.*.attention.output.dense",
        "mlp.in": "encoder.layer.*.intermediate.dense",
        "mlp.out": "encoder.layer.*.output.dense",
        "norm": "**.LayerNorm",
        "head": "pooler.dense",
    },
    "t5": {
        "embed.token": "{encoder,decoder}.embed_tokens",
        "attention.q": "**.{SelfAttention,EncDecAttention}.q",
        "attention.k": "**.{SelfAttention,EncDecAttention}.k",
        "attention.v": "**.{SelfAttention,EncDecAttention}.v",
        "attention.out": "**.{SelfAttention,EncDecAttention}.o",
        "attention_bias": "**.relative_attention_bias",
        "mlp.gate": "**.DenseReluDense.wi_0",
        "mlp.in": "**.DenseReluDense.wi_1",
        "mlp.out": "**.DenseReluDense.wo",
        "norm": "**.{layer_norm,final_layer_norm}",
        "head": "lm_head",
    },
    "deberta-v2": {
        "embed.token": "embeddings.word_embeddings",
        "embed.position": "encoder.rel_embeddings",
        "attention.q": "**.self.query_proj",
        "attention.k": "**.self.key_proj",
        "attention.v": "**.self.value_proj",
        "attention.out": "**.attention.output.dense",
        "mlp.in": "**.intermediate.dense",
        "mlp.out": "encoder.layer.*.output.dense",
        "norm": "**.LayerNorm",
    },
    "vit": {
        "embed.learned": "embeddings.cls_token",
        "embed.position": "embeddings.position_embeddings",
        "embed.patch": "embeddings.patch_embeddings.projection",
        "attention.q": "layers.*.attention.q_proj",
        "attention.k": "layers.*.attention.k_proj",
        "attention.v": "layers.*.attention.v_proj",
        "attention.out": "layers.*.attention.o_proj",
        "mlp.in": "layers.*.mlp.fc1",
        "mlp.out": "layers.*.mlp.fc2",
        "norm": "{layernorm,layers.*.layernorm_*}",
        "head": "pooler.dense",
    },
    "whisper": {
        "embed.token": "model.decoder.embed_tokens",
        "embed.position": "model.*.embed_positions",
        "attention.q": "**.{self_attn,encoder_attn}.q_proj",
        "attention.k": "**.{self_attn,encoder_attn}.k_proj",
        "attention.v": "**.{self_attn,encoder_attn}.v_proj",
        "attention.out": "**.{self_attn,encoder_attn}.out_proj",
        "mlp.in": "model.*.layers.*.fc1",
        "mlp.out": "model.*.layers.*.fc2",
        "norm": "**.{layer_norm,*_layer_norm}",
        "head": "proj_out",
    },
    "UNet2DConditionModel": {
        "attention.q": "**.{attn1,attn2}.to_q",
        "attention.k": "**.{attn1,attn2}.to_k",
        "attention.v": "**.{attn1,attn2}.to_v",
        "attention.out": "**.{attn1,attn2}.to_out.0",
        "mlp.gate_in": "**.ff.net.0.proj",
        "mlp.out": "**.ff.net.2",
        "conditioning": "time_embedding.linear_{1,2}",
        "modulation": "**.time_emb_proj",
        "norm": "**.{norm,norm1,norm2,norm3,conv_norm_out}",
        "head": "conv_out",
    },
    "DiTTransformer2DModel": {
        "embed.patch": "pos_embed.proj",
        "embed.class": "**.class_embedder.embedding_table",
        "attention.q": "**.attn1.to_q",
        "attention.k": "**.attn1.to_k",
        "attention.v": "**.attn1.to_v",
        "attention.out": "**.attn1.to_out.0",
        "mlp.in": "**.ff.net.0.proj",
        "mlp.out": "**.ff.net.2",
        "conditioning": "**.timestep_embedder.linear_{1,2}",
        "modulation": "{proj_out_1,**.norm1.linear}",
        "norm": "{norm_out,**.norm1.norm,**.norm3}",
        "head": "proj_out_2",
    },
    "PixArtTransformer2DModel": {
        "embed.patch": "pos_embed.proj",
        "embed.input": "caption_projection.linear_{1,2}",
        "attention.q": "**.{attn1,attn2}.to_q",
        "attention.k": "**.{attn1,attn2}.to_k",
        "attention.v": "**.{attn1,attn2}.to_v",
        "attention.out": "**.{attn1,attn2}.to_out.0",
        "mlp.in": "**.ff.net.0.proj",
        "mlp.out": "**.ff.net.2",
        "conditioning": "adaln_single.emb.timestep_embedder.linear_{1,2}",
        "modulation": "{adaln_single.linear,**.scale_shift_table}",
        "norm": "{norm_out,**.norm1,**.norm2}",
        "head": "proj_out",
    },
    "SD3Transformer2DModel": {
        "embed.patch": "pos_embed.proj",
        "embed.input": "context_embedder",
        "attention.q": "**.attn.{to_q,add_q_proj}",
        "attention.k": "**.attn.{to_k,add_k_proj}",
        "attention.v": "**.attn.{to_v,add_v_proj}",
        "attention.out": "**.attn.{to_out.0,to_add_out}",
        "mlp.in": "**.{ff,ff_context}.net.0.proj",
        "mlp.out": "**.{ff,ff_context}.net.2",
        "conditioning": "time_text_embed.*.linear_{1,2}",
        "modulation": "**.{norm1,norm1_context,norm_out}.linear",
        "norm": "{**.norm,**.norm2,**.norm2_context,**.attn.norm_*}",
        "head": "proj_out",
    },
    "FluxTransformer2DModel": {
        "embed.input": "{context,x}_embedder",
        "attention.q": "**.attn.{to_q,add_q_proj}",
        "attention.k": "**.attn.{to_k,add_k_proj}",
        "attention.v": "**.attn.{to_v,add_v_proj}",
        "attention.out": "{**.attn.to_out.0,**.attn.to_add_out,single_*.*.proj_out}",
        "mlp.in": "{**.ff.net.0.proj,**.ff_context.net.0.proj,**.proj_mlp}",
        "mlp.out": "{**.ff.net.2,**.ff_context.net.2,single_*.*.proj_out}",
        "conditioning": "time_text_embed.*.linear_{1,2}",
        "modulation": "**.{norm,norm1,norm1_context,norm_out}.linear",
        "norm": "{**.norm,**.norm2,**.norm2_context,**.attn.norm_*}",
        "head": "proj_out",
    },
    "AutoencoderKL": {
        "attention.q": "**.to_q",
        "attention.k": "**.to_k",
        "attention.v": "**.to_v",
        "attention.out": "**.to_out.0",
        "norm": "**.{norm1,norm2,group_norm,conv_norm_out}",
        "head": "decoder.conv_out",
    },
    "timm_vit": {
        "embed.learned": "cls_token",
        "embed.position": "pos_embed",
        "embed.patch": "patch_embed.proj",
        "attention.qkv": "blocks.*.attn.qkv",
        "attention.out": "blocks.*.attn.proj",
        "mlp.in": "blocks.*.mlp.fc1",
        "mlp.out": "blocks.*.mlp.fc2",
        "norm": "{norm,blocks.*.norm*}",
        "head": "head",
    },
    "timm_swin": {
        "embed.patch": "patch_embed.proj",
        "attention.qkv": "**.attn.qkv",
        "attention.out": "**.attn.proj",
        "attention_bias": "**.relative_position_bias_table",
        "mlp.in": "**.mlp.fc1",
        "mlp.out": "**.mlp.fc2",
        "norm": "{**.norm,**.norm1,**.norm2}",
        "head": "head.fc",
    },
    "timm_convnext": {
        "embed.patch": "stem.0",
        "mlp.in": "**.mlp.fc1",
        "mlp.out": "**.mlp.fc2",
        "norm": "{stem.1,**.norm,**.downsample.0}",
        "head": "head.fc",
    },
    "timm_poolformer": {
        "mlp.in": "**.mlp.fc1",
        "mlp.out": "**.mlp.fc2",
        "norm": "**.{norm,norm1,norm2}",
        "head": "head.fc",
    },
    "timm_caformer": {
        "attention.qkv": "**.token_mixer.qkv",
        "attention.out": "**.token_mixer.proj",
        "mlp.in": "stages.**.mlp.fc1",
        "mlp.out": "stages.**.mlp.fc2",
        "norm": "**.{norm,norm1,norm2}",
        "head": "head.fc.fc2",
    },
    "timm_eva": {
        "embed.learned": "cls_token",
        "embed.position": "pos_embed",
        "embed.patch": "patch_embed.proj",
        "attention.qkv": "blocks.*.attn.qkv",
        "attention.out": "blocks.*.attn.proj",
        "mlp.gate_in": "blocks.*.mlp.fc1",
        "mlp.out": "blocks.*.mlp.fc2",
        "norm": "{fc_norm,blocks.*.norm*}",
        "head": "head",
    },
    "timm_resnet": {"norm": "**.{bn*,downsample.1}", "head": "fc"},
    "timm_efficientnet": {"norm": "**.bn*", "head": "classifier"},
}
UNTESTED = ("conv", "scale", "norm")

# Sites that look like something they are not, and what may be said of them.
NEGATIVE: list[tuple[str, str, str | None]] = [
    ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias", "attention_bias"),
    ("timm_swin", "layers.1.downsample.reduction", None),
    ("timm_efficientnet", "blocks.3.0.se.conv_reduce", "conv"),
    ("timm_efficientnet", "blocks.3.0.se.conv_expand", "conv"),
    ("timm_efficientnet", "blocks.3.0.conv_pw", "conv"),
    ("timm_resnet", "layer1.0.conv1", "conv"),
    ("timm_resnet", "layer1.0.conv3", "conv"),
    ("timm_resnet", "conv1", "conv"),
    ("timm_caformer", "stages.0.blocks.0.token_mixer.pwconv1", "conv"),
    ("timm_caformer", "stages.0.blocks.0.token_mixer.pwconv2", "conv"),
    ("timm_caformer", "head.fc.fc1", None),
    ("timm_convnext", "stages.1.downsample.1", "conv"),
    ("timm_convnext", "stages.0.blocks.0.gamma", "scale"),
    ("timm_poolformer", "stages.0.blocks.0.layer_scale1", "scale"),
    ("UNet2DConditionModel", "conv_in", "conv"),
    ("UNet2DConditionModel", "down_blocks.0.attentions.0.proj_in", "conv"),
    ("AutoencoderKL", "quant_conv", "conv"),
    ("AutoencoderKL", "encoder.conv_out", "conv"),
    ("whisper", "model.encoder.conv1", "conv"),
    ("mixtral", "model.layers.0.mlp.experts", None),
    ("llama", "model.layers.0.self_attn", None),
    ("t5", "shared", None),
]

_maps: dict[str, ModelMap] = {}


def mapped(name: str) -> ModelMap:
    if name not in _maps:
        _maps[name] = ModelMap(*zoo.build(name))
    return _maps[name]


def played(found: ModelMap) -> dict[str, set[str]]:
    sites: dict[str, set[str]] = {}
    for site in found.sites:
        for name in found.role(site).names:
            sites.setdefault(name, set()).add(site.path)
    return sites


def test_the_table_covers_the_zoo():
    assert set(EXPECTED) == set(zoo.names())


@pytest.mark.parametrize("name", EXPECTED)
def test_roles(name: str):
    found = mapped(name)
    weighty = {site.path for site in found.sites if site.weight is not None}
    expected = {
        role: {path for path in weighty if path_matches(pattern, path)}
        for role, pattern in EXPECTED[name].items()
        if role != "norm"
    }
    assert all(expected.values()), "a pattern of the table matches nothing"
    have = {
        role: {path for path in paths if path in weighty}
        for role, paths in played(found).items()
        if role not in UNTESTED
    }
    assert have == expected


@pytest.mark.parametrize("name", EXPECTED)
def test_norms(name: str):
    found = mapped(name)
    norms = {site.path for site in found.sites if "norm" in found.role(site).names}
    pattern = EXPECTED[name]["norm"]
    named = {site for site in found.sites if path_matches(pattern, site.path)}
    assert norms == {s.path for s in named if s.path in norms}
    # What is named like one and has a weight was called, so it must have been recognised.
    assert {s.path for s in named if s.weight is not None and s.path in found.roles} <= norms


@pytest.mark.parametrize(("name", "path", "role"), NEGATIVE)
def test_what_looks_like_something_else(name: str, path: str, role: str | None):
    found = mapped(name)
    assert found.role(found.by_path[path]).name == role


@pytest.mark.parametrize("name", EXPECTED)
def test_every_site_has_a_reason_and_only_known_roles(name: str):
    found = mapped(name)
    for site in found.sites:
        role = found.role(site)
        assert role.reason
        assert set(role.names) <= set(ROLES)


def test_tracing_leaves_the_model_alone():
    model, example = zoo.build("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    _ = ModelMap(model, example).roles
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(state, torch.get_rng_state())


def test_roles_on_meta_are_those_on_cpu():
    model, example = zoo.build("qwen3")
    there = ModelMap(model.to("meta"), example.to("meta"))
    here = mapped("qwen3")
    assert {p: r.names for p, r in there.roles.items()} == {
        p: r.names for p, r in here.roles.items()
    }
