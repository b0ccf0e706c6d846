"""What is verified of every low-rank method, by doing it: ``python -m tests.methods_table``.

Each check returns what it found, and raises if that is wrong. The table in ``docs/methods.md`` is
written from one run; ``tests/test_methods_table.py`` runs the checks and compares.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import socket
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import surgery
from surgery import LowRank, Rule, adapters
from surgery.errors import CheckpointError
from surgery.optim import reflora
from surgery.optim.reflora_s import RefLoRAS
from surgery.optim.rule import Factors
from surgery.passes.hosts import bank_of
from surgery.passes.methods import method_named
from surgery.registry import ADAPTERS
from tests.passes.test_lowrank_methods import FORMULAS

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
GOLDEN = Path(__file__).parent / "golden"
BEGIN, END = "<!-- table: python -m tests.methods_table -->", "<!-- end of the table -->"
RANK, ALPHA = 3, 6.0

#: What PEFT calls a method, as the arguments of its LoraConfig.
IN_PEFT: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
}


def rows() -> list[str]:
    """The rows of the table: every registered method, and rsLoRA, which is a scaling."""
    return sorted([*ADAPTERS.names(), "rslora"])


def options_of(row: str, **changed: Any) -> LowRank:
    """The pass for a row, with options of the method changed where it has them."""
    method = "lora" if row == "rslora" else row
    known = {field.name for field in dataclasses.fields(method_named(method).Options)}
    return LowRank(
        method=method,
        rank=RANK,
        alpha=ALPHA,
        scaling="rslora" if row == "rslora" else "standard",
        options={name: value for name, value in changed.items() if name in known},
    )


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Two layers whose weights are the same in every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 6)).to(dtype)


def adapted(row: str, dtype: torch.dtype = torch.float64, **changed: Any) -> nn.Module:
    return surgery.apply(net(dtype), Rule(options_of(row, **changed)))


def perturb(model: nn.Module, scale: float = 0.3) -> None:
    """Move every tensor of the adapters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in adapters.parameters(model):
            tensor.add_(torch.randn_like(tensor), alpha=scale)


def batch(dtype: torch.dtype = torch.float64, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 8, generator=generator), torch.randn(8, 6, generator=generator)
    return x.to(dtype), y.to(dtype)


def step(model: Any, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    optimizer.step()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    """Some steps with the method's rule, each on a batch of its own."""
    for seed in seeds:
        x, y = batch(next(model.parameters()).dtype, seed)
        step(model, optimizer, x, y)


def effective(model: nn.Module) -> list[Tensor]:
    """The weights that the adapted layers compute with."""
    found: list[Tensor] = []
    for layer in model.modules():
        bank = bank_of(layer) if "lowrank" in layer._modules else None
        if bank is not None:
            weight = layer._parameters["weight"]
            assert weight is not None
            found.append((weight + bank.adapters["default"].change(weight)).detach())
    return found


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


# The checks: row → what was found.


def reference(row: str) -> str:
    """Against the authors' numbers or PEFT's layer, where there are any."""
    if row == "reflora":
        return "golden vectors " + _not_above(_golden_reflora(), 1e-9)
    if row == "reflora-s":
        return "golden vectors " + _not_above(_golden_reflora_s(), 1e-9)
    if row in IN_PEFT:
        # float32, two layers; PEFT sums in another order.
        return "PEFT " + _not_above(_peft(row), 1e-5)
    return "-"


def _not_above(error: float, bound: float) -> str:
    assert error <= bound, f"{error:g} is more than {bound:g}"
    return f"≤ {bound:.0e}"


def _golden(name: str) -> list[dict[str, Tensor]]:
    """The pairs of factors in a file, each with what belongs to it."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in safetensors.torch.load_file(GOLDEN / f"{name}.safetensors").items():
        pair, _, kind = key.partition(".")
        pairs.setdefault(pair, {})[kind] = tensor
    return list(pairs.values())


def _golden_reflora() -> float:
    worst = 0.0
    for get in _golden("reflora"):
        made = reflora.precondition(get["A"], get["B"], get["grad_A"], get["grad_B"])
        expected = (get["out_grad_A"], get["out_grad_B"])
        worst = max(worst, *(apart(a, b) for a, b in zip(made, expected, strict=True)))
    return worst


def _golden_reflora_s() -> float:
    worst = 0.0
    for get in _golden("reflora_s"):
        A, B = nn.Parameter(get["A"].clone()), nn.Parameter(get["B"].clone())
        optimizer = torch.optim.AdamW([A, B])
        for factor, letter in ((A, "A"), (B, "B")):
            factor.grad = torch.zeros_like(factor)
            optimizer.state[factor] = {
                "step": torch.tensor(1.0),
                **{k: get[f"{k}_{letter}"].clone() for k in ("exp_avg", "exp_avg_sq")},
            }
        with torch.no_grad():
            RefLoRAS([Factors("pair", A, B, 1.0, None)], warmup=0).after(optimizer)
        found = {"A": A.detach(), "B": B.detach()}
        for factor, letter in ((A, "A"), (B, "B")):
            for kind in ("exp_avg", "exp_avg_sq"):
                found[f"{kind}_{letter}"] = optimizer.state[factor][kind]
        worst = max(worst, *(apart(found[k], get[f"out_{k}"]) for k in found))
    return worst


def _peft(row: str) -> float:
    """Our factors in PEFT's layers; where the weight is split, beside what PEFT left of it."""
    import peft

    config = peft.LoraConfig(
        r=RANK, lora_alpha=int(ALPHA), target_modules=["0", "2"], **IN_PEFT[row]
    )
    theirs = peft.get_peft_model(net(torch.float32), config)
    ours = adapted(row, torch.float32)
    perturb(ours, 0.1)
    other = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, tensor in ours.named_parameters():
            layer, found, kind = name.partition(".lowrank.default.")
            if found:
                other[f"base_model.model.{layer}.{kind}.default.weight"].copy_(tensor)
        x, _ = batch(torch.float32)
        return apart(ours(x), theirs(x))


def start(row: str) -> str:
    """Outputs right after the rewrite against those before, in float32."""
    x, _ = batch(torch.float32)
    plan = surgery.plan(net(torch.float32), Rule(options_of(row)))
    error = apart(plan.apply()(x), net(torch.float32)(x))
    if plan.contract.kind == "exact":
        assert error == 0
        return "exact"
    return "close, " + _not_above(error, 1e-6)


def formula(row: str) -> str:
    """Outputs with every tensor moved against the weight of the paper's formula, in float64."""
    model = adapted(row)
    perturb(model)
    plain = net()
    x, _ = batch()
    made = options_of(row)
    for index in (0, 2):
        weight = model[index].weight.detach()  # type: ignore[index]
        tensors = dict(bank_of(model[index]).adapters["default"].named_parameters())  # type: ignore[index, union-attr]
        if made.method in FORMULAS:
            changed = _scaled(FORMULAS[made.method], made.factor)(weight, tensors)
        else:
            changed = weight + made.factor * tensors["lora_B"] @ tensors["lora_A"]
        plain[index].weight.data.copy_(changed)  # type: ignore[union-attr]
    return _not_above(apart(model(x), plain(x)), 1e-12)


def _scaled(
    formula: Callable[[Tensor, Mapping[str, Tensor]], Tensor], factor: float
) -> Callable[[Tensor, Mapping[str, Tensor]], Tensor]:
    """A formula of the tests, which is for their scaling, for another one."""
    from tests.passes.test_lowrank_methods import SCALE

    def scaled(weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        moved = {**tensors, "lora_B": tensors["lora_B"] * (factor / SCALE)}
        return formula(weight, moved)

    return scaled


def invariance(row: str) -> str:
    """Which other factors of the same product three steps of SGD move to the same weight."""
    if "lora_S" in dict(adapted(row)[0].lowrank.default.named_parameters()):  # type: ignore[index, union-attr]
        return "-"
    torch.manual_seed(3)
    Q = torch.linalg.qr(torch.randn(RANK, RANK, dtype=torch.float64)).Q
    general = Q @ torch.diag(torch.tensor([3.0, 1.0, 0.5], dtype=torch.float64)) @ Q.T.roll(1, 0)
    kept = [
        name
        for name, P in {"rotations": Q, "scale": 2 * Q, "any basis": general}.items()
        if _same_path(row, P)
    ]
    if kept == ["rotations", "scale", "any basis"]:
        return "any basis"
    return " and ".join(kept) or "none"


def _same_path(row: str, P: Tensor) -> bool:
    moved: list[list[Tensor]] = []
    for transform in (torch.eye(RANK, dtype=torch.float64), P):
        model = adapted(row, warmup=0)
        perturb(model)
        with torch.no_grad():
            for layer in (model[0], model[2]):  # type: ignore[index]
                adapter = layer.lowrank.default  # type: ignore[union-attr]
                adapter.lora_A.copy_(torch.linalg.solve(transform, adapter.lora_A))
                adapter.lora_B.copy_(adapter.lora_B @ transform)
        before = effective(model)
        optimizer = torch.optim.SGD(adapters.parameters(model), lr=1e-2)
        adapters.prepare(model, optimizer)
        trained(model, optimizer, range(3))
        moved.append([after - one for after, one in zip(effective(model), before, strict=True)])
    return all(apart(a, b) < 1e-6 for a, b in zip(*moved, strict=True))


def merge(row: str) -> str:
    """Merged against unmerged outputs in float64, the bits that come back, and undo."""
    model = adapted(row)
    perturb(model)
    x, _ = batch()
    output = model(x)
    adapters.merge(model)
    error = apart(model(x), output)
    adapters.unmerge(model)
    assert torch.equal(model(x), output)
    adapters.merge(model)
    surgery.undo(model)
    assert torch.equal(model(x), net()(x))
    return _not_above(error, 1e-12) + ", back bitwise"


def checkpoint(row: str) -> str:
    """A trained model saved and restored, whole and as an adapter; training goes on the same."""
    model = adapted(row, torch.float32, warmup=1)
    optimizer = torch.optim.AdamW(adapters.parameters(model), lr=1e-2)
    adapters.prepare(model, optimizer)
    trained(model, optimizer, range(3))
    x, _ = batch(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        whole = surgery.save(model, Path(folder) / "whole")
        try:
            alone = surgery.save(model, Path(folder) / "alone", adapter_only=True)
        except CheckpointError:
            assert method_named(row).folds_weight
            text = "whole model"
        else:
            restored = surgery.restore(alone, model=net(torch.float32))
            assert torch.equal(restored(x), model(x))
            text = "whole and alone"
        state = copy.deepcopy(optimizer.state_dict())
        back = surgery.restore(whole, model=net(torch.float32))
    assert torch.equal(back(x), model(x))
    again = torch.optim.AdamW(adapters.parameters(back), lr=1e-2)
    adapters.prepare(back, again)
    again.load_state_dict(state)
    trained(model, optimizer, range(3, 6))
    trained(back, again, range(3, 6))
    for (name, one), other in zip(
        model.state_dict().items(), back.state_dict().values(), strict=True
    ):
        assert torch.equal(one, other), name
    return f"{text}, resumed bitwise"


def compiled(row: str) -> str:
    """One graph, forward and backward."""
    model = adapted(row)
    perturb(model)
    x, y = batch()
    grads: list[list[Tensor]] = []
    torch.compiler.reset()
    for each in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        (each(x) - y).square().mean().backward()
        grads.append([tensor.grad.clone() for tensor in adapters.parameters(model)])  # type: ignore[union-attr]
    assert max(apart(a, b) for a, b in zip(*grads, strict=True)) < 1e-10
    return "one graph"


def distributed(wanted: list[str]) -> dict[str, str]:
    """Row → what two gloo ranks under DDP found, each with half of the batches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_rank, args=(port, wanted), nprocs=2)
    return dict.fromkeys(wanted, "2 ranks = 1")


def _rank(rank: int, port: int, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for row in wanted:
        _compare_ranks(row, rank)
    dist.destroy_process_group()


def _compare_ranks(row: str, rank: int) -> None:
    alone, shared = (adapted(row, warmup=1) for _ in range(2))
    # Raises at the next forward if a parameter took no part in a step.
    wrapped = DistributedDataParallel(shared)
    for model, called in ((alone, alone), (shared, wrapped)):
        optimizer = torch.optim.AdamW(adapters.parameters(model), lr=1e-2)
        adapters.prepare(model, optimizer)
        for seed in range(4):
            x, y = batch(seed=seed)
            if called is wrapped:
                x, y = x[4 * rank : 4 * rank + 4], y[4 * rank : 4 * rank + 4]
            step(called, optimizer, x, y)
    for one, other in zip(effective(shared), effective(alone), strict=True):
        # Means of two halves in float64; Adam divides by what may be as small as its gradient.
        assert apart(one, other) < 1e-7, row
    for tensor in shared.state_dict().values():
        both = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(both, tensor)
        assert torch.equal(both[0], both[1]), row


#: Column → check of one row.
CHECKS: dict[str, Callable[[str], str]] = {
    "start": start,
    "formula": formula,
    "peers": reference,
    "an SGD step ignores": invariance,
    "merge": merge,
    "saved and resumed": checkpoint,
    "compiled": compiled,
}


def sources() -> dict[str, str]:
    """Row → where the method comes from, read from its module."""
    found: dict[str, str] = {}
    for name in ADAPTERS.names():
        text = inspect.getmodule(method_named(name)).__doc__ or ""  # type: ignore[union-attr]
        number = re.search(r"arXiv (\d{4}\.\d{5})", text)
        link = re.search(r"github\.com/[\w./-]+\w", text)
        if number is not None:
            found[name] = f"[{number[1]}](https://arxiv.org/abs/{number[1]})"
        elif link is not None:
            found[name] = f"[{link[0].partition('/')[2]}](https://{link[0]})"
        else:
            raise AssertionError(f"the module of {name} does not say where it comes from")
    return {**found, "rslora": "[2312.03732](https://arxiv.org/abs/2312.03732)"}


def header() -> list[str]:
    """Names of the columns."""
    return ["method", "source", *CHECKS, "DDP"]


def table() -> str:
    """The table, from one run of every check."""
    ranks, origin = distributed(rows()), sources()
    lines = [header(), ["---"] * len(header())]
    for row in rows():
        name = f"`{row}`" if row != "rslora" else "`lora`, `scaling: rslora`"
        lines.append([name, origin[row], *(check(row) for check in CHECKS.values()), ranks[row]])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def written() -> list[list[str]]:
    """The cells of the table in the page, header first."""
    text = PAGE.read_text(encoding="utf-8")
    body = text.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body]
    return [cells[0], *cells[2:]]


def main() -> None:
    """Write the table into the page."""
    text = PAGE.read_text(encoding="utf-8")
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
