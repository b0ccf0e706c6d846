"""Models in a state that a rewrite would not survive are refused, with the order that works."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery.capture.graft import graft
from surgery.errors import Conflict, ModelStateError
from surgery.preflight import preflight


class Nothing:
    """A mixin that changes nothing."""


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def compiled() -> nn.Module:
    return torch.compile(mlp())  # type: ignore[return-value]


def compiled_in_place() -> nn.Module:
    model = mlp()
    model[2].compile()
    return model


def data_parallel() -> nn.Module:
    return nn.DataParallel(mlp())


def offloaded() -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    model = mlp()
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    return model


def part_of_a_rewritten_model() -> nn.Module:
    model = mlp()
    graft(model[0], Nothing)
    return model


REFUSED = [
    (compiled, r"compiled by torch\.compile", r"rewrite the model first, then compile it"),
    (compiled_in_place, r"2 was compiled in place", "then call compile"),
    (data_parallel, "wrapped by DataParallel", r"model\.module"),
    (offloaded, "0 carries an accelerate hook that offloads", "before dispatch_model"),
    (part_of_a_rewritten_model, "0 is rewritten, but this model has no edit log", "whole model"),
]


@pytest.mark.parametrize(
    ("make", "message", "hint"), REFUSED, ids=lambda v: getattr(v, "__name__", "")
)
def test_refused_with_the_order_that_works(make, message: str, hint: str) -> None:
    with pytest.raises(ModelStateError, match=rf"(?s){message}.*hint.*{hint}"):
        preflight(make())


def test_model_under_peft_is_a_conflict_that_names_peft() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(Conflict, match=r"(?s)peft.*already rewritten.*hint.*merge_and_unload"):
        preflight(model)


def test_ddp_and_fsdp_are_refused() -> None:
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(ModelStateError, match="wrapped by DistributedDataParallel"):
            preflight(DistributedDataParallel(mlp()))
        mesh = torch.distributed.init_device_mesh("cpu", (2,))
        with pytest.raises(ModelStateError, match=r"(?s)sharded by FSDP.*then shard it"):
            preflight(fully_shard(mlp(), mesh=mesh))
    finally:
        destroy_process_group()


def test_plain_dispatched_and_hooked_models_pass() -> None:
    model = mlp()
    model.register_forward_hook(lambda *_: None)
    preflight(model)
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(execution_device="cpu"))
    preflight(model)
