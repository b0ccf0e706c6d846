"""Source-level rewriting of the code that drives a stack of blocks.

``loop_mixins(cls, stacks, runtime) -> Loops`` rewrites every method of a driver (a model class with
``for layer in self.layers``, an `nn.Sequential`, a class with ``self.block1(x)``) that runs a block
of the stacks, and gives mixins to graft onto it. A method that runs blocks in a way that is not
understood is replaced by one that raises a `CaptureError`; nothing is left to run unmixed.

What a rewritten method looks like
==================================
Before the first use, outside every loop, once per call and per container::

    steps = begin(self.layers)

and then, in place of

    ``layer(...)``, ``self.layers[i](...)``     ``steps(layer)(...)``
    ``layer.forward(...)``                      ``steps(layer.forward)(...)``
    ``checkpoint(layer, ...)``                  ``steps.through(checkpoint)(layer, ...)``
    ``checkpoint(layer.__call__, ...)``         likewise
    ``checkpoint(partial(layer, ...), ...)``    likewise
    ``checkpoint(function_around_layer, ...)``  ``steps.through(checkpoint, layer)(...)``
    ``checkpoint_seq(self.blocks, ...)``        ``steps.sequence(checkpoint_seq)(self.blocks, ...)``
    ``self.children()``                         ``steps.view(self.children)()``

What the runtime promises
=========================
``begin(container)``
    makes the local object of one forward. ``container`` is the module that holds the blocks: the
    driver itself for an `nn.Sequential` and for blocks that are attributes of the driver. A
    container the runtime knows nothing of (a slice of a Sequential) gets steps that change nothing.
``steps(target)``
    a callable with the block's signature that returns the block's own structure. ``target`` is a
    block or its bound ``forward`` or ``__call__``. It is only *probably* a block: anything that is
    not one of the container's is to be returned as it is.
``steps.through(function, block=None)``
    a callable ``(target, *args, **kwargs)`` that runs ``function(target, *args, **kwargs)``, once,
    and mixes outside of it. ``target`` as above, or a `functools.partial` of it. For any other
    target it is ``function``. `block_of` tells what a target is. With ``block`` the target is a
    function made around that block, which passes its arguments on to it, first and in order.
``steps.sequence(function)``
    a callable ``(blocks, *args, **kwargs)`` that runs ``function`` so that every block of
    ``blocks`` (a Sequential, a list, a slice or an iterator) runs in order with mixing in between.
    For foreign blocks it is ``function``.

``steps.view(function)``
    a callable that lists what ``function``, the ``children`` or ``named_children`` of the
    container, does: the blocks, without what the runtime itself keeps beside them.

Where a name may be a block of several containers, their steps are nested:
``first_steps(second_steps(block))(x)``. A loop inside another reaches ``begin`` once: a block that
comes a second time in one call starts a new pass. Blocks may come in reverse order, and a method
may run only some of them: the runtime is to check the order it was made for.
"""

from surgery.capture.loops.mixins import Loops, Stack, loop_mixin, loop_mixins, loops_of
from surgery.capture.loops.targets import block_of

__all__ = ["Loops", "Stack", "block_of", "loop_mixin", "loop_mixins", "loops_of"]
