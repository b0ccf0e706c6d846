"""Runs a forward once and writes down every tensor operation as an fx graph.

The forward runs as ordinary Python on a clone of the module (``clone.py``), with proxies for
its tensors (``values.py``). A ``TorchFunctionMode`` sees every torch call, factory functions
included, records it, and computes the result's shape on fake tensors. Calls between modules
arrive here through the clones: each is recorded as a leaf or run, as the caller decides.

    tracer    takes every call of a module and of torch
    writer    writes nodes and guards
    fakes     runs calls on fake tensors
    symbols   sizes and numbers
    facts     what else a forward is told of its tensors
    proxies   what a forward gets for its inputs and results
    objects   what a forward does to objects
"""

from surgery.capture.tracing.options import Options
from surgery.capture.tracing.tracer import Tracer

__all__ = ["Options", "Tracer"]
