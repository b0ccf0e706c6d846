"""torch.compile, torch.export and ONNX."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from surgery.sources.examples import Example
from tests.survival.calls import (
    Case,
    Notes,
    same,
    same_gradients,
    still,
    train,
)
from tests.survival.checkpointing import switch_on
from tests.survival.reference import MAIN, coefficients


def captured_beforehand(case: Case, model: nn.Module, *examples: Example) -> None:
    """Call a model once as it will be compiled, where a forward of its blocks is captured.

    At residual scope a block has a generated forward per kind of call. None can be made while
    compiling: the library raises then and says to make the call once beforehand.
    """
    if case.column is not None and case.column.scope == "residual":
        for example in examples:
            still(model, example)


def _backend(case: Case) -> str:
    import torch._inductor.config as inductor

    # Dropout draws what it draws in eager mode.
    inductor.fallback_random = True
    main = case.column in {None, MAIN}
    return "inductor" if case.subject.inductor and main else "aot_eager"


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _no_more_graphs(case: Case) -> Notes:
    """Raise if more graphs were compiled than for the stock model."""
    found = _graphs()
    limit = case.stock.get("graphs", found)
    assert found <= limit, f"{found} graphs were compiled, {limit} for the unmodified model"
    return {"graphs": found}


def compiled(case: Case) -> Notes:
    """``torch.compile(fullgraph=True)`` in eval mode, with no more graphs than the stock model."""
    model = case.model()
    reference = case.reference(model)
    captured_beforehand(case, model, *(case.subject.example(n, quiet=True) for n in (0, 1)))
    fast = torch.compile(model, fullgraph=True, backend=_backend(case))
    for number in (0, 1, 0):
        example = case.subject.example(number, quiet=True)
        same(still(fast, example), still(reference.model, example))
    return _no_more_graphs(case)


def _compiled_training(case: Case, model: nn.Module, backend: str, sizes: tuple[int, ...]) -> Notes:
    reference = case.reference(model)
    reference.model.train()
    captured_beforehand(case, model, *(case.subject.example(n, quiet=True) for n in set(sizes)))
    fast = torch.compile(model, fullgraph=True, backend=backend)
    for number in sizes:
        example = case.subject.example(number, quiet=True)
        found_outputs, found = train(model, example, through=fast)
        wanted_outputs, wanted = train(reference, example)
        same(found_outputs, wanted_outputs)
        same_gradients(found, wanted)
    return _no_more_graphs(case)


def compiled_training(case: Case) -> Notes:
    """Forward and backward under ``torch.compile(fullgraph=True)``, dropout on."""
    return _compiled_training(case, case.model().train(), _backend(case), (0, 1, 0))


def compiled_checkpointing(case: Case) -> Notes:
    """The same with the library's gradient checkpointing."""
    model = case.model().train()
    switch_on(case, model, reentrant=False)
    return _compiled_training(case, model, "aot_eager", (0, 0))


def exported(case: Case) -> Notes:
    """``torch.export`` gives a program that computes the same."""
    model = case.model()
    reference = case.reference(model)
    example = case.subject.example(quiet=True)
    captured_beforehand(case, model, example)
    program = torch.export.export(model, example.args, example.kwargs)
    same(still(program.module(), example), still(reference.model, example))
    lost = set(coefficients(model)) - set(dict(program.named_parameters()))
    assert not lost, f"parameters that the program has not: {sorted(lost)}"
    return {}


def onnx(case: Case) -> Notes:
    """An ONNX file run by onnxruntime computes the same."""
    import onnxruntime
    from torch.utils._pytree import tree_leaves

    model = case.model()
    reference = case.reference(model)
    example = case.subject.example(quiet=True)
    program = torch.onnx.export(
        model, example.args, kwargs=example.kwargs, dynamo=True, verbose=False
    )
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        program.save(str(file))
        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        given = [t for t in tree_leaves((example.args, example.kwargs)) if isinstance(t, Tensor)]
        names = [value.name for value in session.get_inputs()]
        by_name = {name: t for name, t in example.kwargs.items() if name in names}
        feed = by_name if len(by_name) == len(names) else dict(zip(names, given, strict=True))
        outputs = session.run(None, {name: t.numpy() for name, t in feed.items()})
    found = [torch.from_numpy(out) for out in outputs if out.dtype.kind == "f"]
    same(found, still(reference.model, example))
    return {}
