"""Capture: a forward as an fx graph, with every value that Python demanded on record.

Whole models
============
``trace_model(model, args, kwargs) -> Trace`` runs the forward once on fake tensors, inlines
every module down to the atomic layers, and gives one `torch.fx.Graph`. The model, its flags,
buffers and caches and the random generators are left as they were.

``Trace``
    ``.graph``        `torch.fx.Graph`; it has no owning module, so look targets up in the model.
    ``.guards``       tuple of `Guard`, what Python demanded, in order.
    ``.constants``    ``{get_attr target: tensor}`` for tensors that no module owns.
    ``.assumptions``  the guards whose data was made up (meta device, or too expensive).
    ``.calls``        tuple of `Call`, every module call: its path, the ``owner`` whose forward
                      made it, ``where``, and args, kwargs and result as nodes, in their nesting.

Nodes
    ``placeholder``   one per tensor of ``args`` and ``kwargs``, named after the parameter.
    ``get_attr``      a parameter or buffer by its dotted name (a tied one by its first), or a
                      key of ``.constants``. One node per tensor.
    ``call_module``   an atomic layer (`is_atomic`: Linear, convolutions, Embedding, normalisation,
                      PReLU, recurrent layers, and subclasses of these); ``target`` is its
                      dotted path in the model, the first one of a shared module.
    ``call_function`` a torch function, as called (``F.scaled_dot_product_attention``,
                      ``torch.softmax``, ``F.softmax``, ``torch.addmm``, factories), an
                      ``operator`` function for anything Python has a sign for, however it was
                      written (``operator.add`` for ``x + y``, ``x.add(y)``, ``1 + x``; likewise
                      ``matmul``, ``mul``, ``getitem``, ``setitem``, ...), ``getattr`` for an
                      attribute (``x.T``, ``x.shape``), or a `torch.ops` overload when a scripted
                      function hid what it called.
    ``call_method``   a tensor method by name (``view``, ``softmax``, ``add_``, ...).
    ``output``        ``args[0]`` has the result's nesting: tuples, and dicts for mappings and
                      dataclasses; what is neither tensor nor nested is None.

    Everything else is inlined: HF's Conv1D shows as ``addmm`` with ``get_attr`` weight and bias,
    ``nn.MultiheadAttention`` down to its attention call, 3-D expert weights as ``get_attr``.
    Sizes are nodes too: ``getattr(x, "shape")``, ``getitem`` of it and arithmetic, so a node
    argument is not always a tensor (look at ``meta["val"]``). A function with several results
    is one node with a ``getitem`` node per tensor.

``node.meta``
    ``val``           `TensorSpec` (shape, dtype, device) of the example; an int, float or bool
                      for a size; tuples, lists and dicts of these.
    ``owner``         dotted path of the module whose forward was running ("" for the root).
    ``calls``         the paths of all modules whose forwards were running, outermost first.
    ``where``         ``"file:line"`` of the statement in the model's own code.
    ``mutates``       True on a node that writes to its first argument (``add_``, ``setitem``).
    ``written_by``    list of such nodes for a tensor that shares memory with what they wrote.

One module
==========
``capture(module, args, kwargs, inline=()) -> Capture`` traces a module's own forward with its
children as leaves (``inline`` names the ones to look into), and writes Python for it.

``Capture``
    ``.graph``      as above, with paths relative to the module. Placeholders are the parameters
                    of the forward; a tuple or dict is taken apart by ``getitem`` nodes, an object
                    (a cache) by ``getattr`` and method nodes. Besides: ``expect(value, expected)``
                    nodes, the guards, at their place (``meta["guard"]``); ``assign(path, value)``
                    nodes for ``self.path = value``; numbers of the module are ``get_attr`` nodes
                    (``self.training``, ``self.num_heads``); ``meta["context"]`` lists the
                    ``torch.no_grad`` and autocast blocks a node is in.
    ``.guards``     what Python demanded, in order.
    ``.signature``  per parameter: tensor, number, None or another fixed value, nested.
    ``.source``     the generated Python: ``accepts(self, ...)`` and ``forward(self, ...)``.
    ``.forward(module, *args, **kwargs)``  runs it with the original module as ``self``;
                    ``.accepts(...)`` says whether it may. Identical sources share one code object.
    ``.rewritten(graph, module, extra=())``  the same capture with another graph, which may have
                    more inputs: placeholders after the parameters, the last one ``*name``.

``capture_blocks(model, args, kwargs, paths=...)`` captures blocks at the calls that the model makes
of them, in one run.

``Forward(capture, edit=None)`` is what to put in place of a forward: it holds up to eight variants,
captures a new one when no variant accepts a call, does ``edit`` to it, and raises `CaptureError`
past that. Without a capture it makes its first one at its first call.

``forward_mixin(name, capture, module, edit)`` is the class to graft so that the module's forward is
the edited capture. Its extra inputs stand behind `RELAY` among the positional arguments of a call.
Modules of one source share the class. ``code_of(module)`` is the Python it runs.

Errors are `CaptureError`: the path and class of the module, the file and line, and why.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.capture.blocks import capture_blocks
    from surgery.capture.calls import Call
    from surgery.capture.guards import Guard, assign, expect
    from surgery.capture.own import Capture, capture
    from surgery.capture.relay import RELAY, Relay, Rewired, code_of, forward_mixin
    from surgery.capture.trace import Trace, is_atomic, trace_model
    from surgery.capture.values import TensorSpec
    from surgery.capture.variants import Forward

# Imported when first used: grafts live in this package too, and need none of it.
_HOMES = {
    "RELAY": "relay",
    "Relay": "relay",
    "Rewired": "relay",
    "capture_blocks": "blocks",
    "code_of": "relay",
    "forward_mixin": "relay",
    "Call": "calls",
    "Capture": "own",
    "Forward": "variants",
    "Guard": "guards",
    "TensorSpec": "values",
    "Trace": "trace",
    "assign": "guards",
    "capture": "own",
    "expect": "guards",
    "is_atomic": "trace",
    "trace_model": "trace",
}

__all__ = [
    "RELAY",
    "Call",
    "Capture",
    "Forward",
    "Guard",
    "Relay",
    "Rewired",
    "TensorSpec",
    "Trace",
    "assign",
    "capture",
    "capture_blocks",
    "code_of",
    "expect",
    "forward_mixin",
    "is_atomic",
    "trace_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery.capture' has no attribute {name!r}")
    return getattr(importlib.import_module(f"surgery.capture.{_HOMES[name]}"), name)
