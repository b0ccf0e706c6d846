"""What a training step of a LLaMA keeps in memory, with and without a history: arithmetic only.

``Tape`` plays a forward and a backward pass buffer by buffer, with autograd's rules for who holds
what and until when, and notes the peak. ``simulate`` writes the operations of transformers' model
on it. Nothing here imports torch or measures anything; ``scaling.py`` compares it with what
torch's allocator reports, and then uses it for sizes that do not fit here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

#: Bytes of the CPU's generator state: torch's checkpoint keeps it, to draw the same dropout again.
GENERATOR = 5056


@dataclass(eq=False)
class Buffer:
    """Memory of a tensor: freed when nobody holds it."""

    size: int
    holders: int = 0


@dataclass(eq=False)
class Value:
    """A tensor of the graph; several may share a buffer."""

    buffer: Buffer


@dataclass(eq=False)
class Op:
    """A node of autograd: inputs that get a gradient, output, and what its backward needs."""

    inputs: Sequence[Value]
    output: Value
    saved: Sequence[Buffer] = ()
    weight: int = 0
    temporary: int = 0
    passes: bool = False
    site: int | None = None
    tap: bool = False


@dataclass(eq=False)
class Segment:
    """A block under activation checkpointing.

    Attributes:
        held: Its input and the generator's state, until its backward is done.
        first: Index of its first operation.
        last: Index of its last operation.
        events: What its forward did, in order: +1 a hold, -1 a release, 0 a tensor that would
            have been saved.
    """

    held: Sequence[Buffer]
    first: int
    last: int = -1
    events: list[tuple[int, Buffer]] = field(default_factory=list)


class Tape:
    """A forward and a backward pass, as allocations.

    Args:
        resident: Whether gradients of parameters are there already, and new ones are added to
            them: after the first of several micro-batches, in DDP's buckets, or beside FSDP2's
            shards. Otherwise they are allocated as the backward pass makes them.

    Attributes:
        live: Bytes in use now.
        peak: Most bytes in use so far.
        kept: Bytes that the graph held when the backward pass began.
    """

    def __init__(self, *, resident: bool) -> None:
        self._resident = resident
        self.live = self.peak = self.kept = 0
        self._ops: list[Op] = []
        self._segments: list[Segment] = []
        self._open: Segment | None = None
        self._gradients: dict[Value, Buffer] = {}
        self._aside: list[Buffer] = []

    def value(self, size: int) -> Value:
        """A tensor that the program holds until ``drop``."""
        value = Value(Buffer(size))
        self._take(value.buffer)
        return value

    def drop(self, *values: Value) -> None:
        """The program's references go."""
        for value in values:
            self._note(-1, value.buffer)
            self._release(value.buffer)

    def op(
        self,
        *inputs: Value,
        size: int,
        saves: Sequence[Value] = (),
        saves_output: bool = False,
        weight: int = 0,
        temporary: int = 0,
        passes: bool = False,
    ) -> Value:
        """An operation; the program holds its output.

        Args:
            inputs: What gets a gradient.
            size: Bytes of the output.
            saves: Tensors that it keeps for the backward.
            saves_output: Whether it keeps its output too.
            weight: Bytes of the parameter's gradient that its backward makes.
            temporary: Bytes that its backward needs besides.
            passes: Whether its backward hands the gradient on as it is, as that of a sum does.
        """
        output = self.value(size)
        saved = [value.buffer for value in saves]
        saved += [output.buffer] if saves_output else []
        for buffer in saved:
            self._save(buffer)
        self._ops.append(Op(inputs, output, saved, weight, temporary, passes))
        return output

    def tap(self, x: Value, site: int) -> Value:
        """Where a state enters: the same memory, kept until the tap's own backward."""
        alias = Value(x.buffer)
        self._take(alias.buffer)
        self._save(x.buffer)
        self._ops.append(Op([x], alias, [x.buffer], site=site, tap=True))
        return alias

    def mix(self, y: Value, site: int) -> Value:
        """The next state from the output of a block and the states before it; keeps nothing."""
        mixed = self.value(y.buffer.size)
        self._ops.append(Op([y], mixed, passes=True, site=site))
        return mixed

    @contextmanager
    def checkpoint(self, x: Value, *, on: bool) -> Iterator[None]:
        """A block that keeps nothing but its input and runs again in the backward pass."""
        if not on:
            yield
            return
        held = [self._hold(x.buffer), self._hold(Buffer(GENERATOR))]
        self._open = Segment(held, len(self._ops))
        yield
        segment, self._open = self._open, None
        segment.last = len(self._ops) - 1
        self._segments.append(segment)

    def backward(self, loss: Value) -> None:
        """The backward pass. Gradients of parameters stay, everything else goes."""
        self.kept = self.live
        self._gradients[loss] = self._hold(Buffer(loss.buffer.size))
        lasts = {segment.last: segment for segment in self._segments}
        firsts = {segment.first: segment for segment in self._segments}
        for index in reversed(range(len(self._ops))):
            if index in lasts:
                self._recompute(lasts[index])
            self._step_back(self._ops[index])
            if index in firsts:
                for buffer in firsts[index].held:
                    self._release(buffer)
        self.drop(loss)

    def _step_back(self, op: Op) -> None:
        gradient = self._gradients.pop(op.output)
        if op.passes:
            made = [self._hold(gradient) for _ in op.inputs]
        else:
            made = [self._hold(Buffer(value.buffer.size)) for value in op.inputs]
        if op.tap and op.site == 0:
            # The tap of the first state is the last reader of every sum.
            while self._aside:
                self._release(self._aside.pop())
        if op.site is not None and not op.tap:
            self._aside.append(self._hold(gradient))
        spare = self._hold(Buffer(op.temporary))
        weight = self._hold(Buffer(op.weight))
        self._release(spare)
        if self._resident:
            self._release(weight)
        for buffer in op.saved:
            self._release(buffer)
        self._release(gradient)
        for value, buffer in zip(op.inputs, made, strict=True):
            self._accumulate(value, buffer)

    def _accumulate(self, value: Value, buffer: Buffer) -> None:
        """Autograd adds in place where nobody else looks, and makes a sum otherwise."""
        old = self._gradients.get(value)
        if old is None:
            self._gradients[value] = buffer
            return
        if old.holders > 1:
            self._gradients[value] = self._hold(Buffer(old.size))
            self._release(old)
        self._release(buffer)

    def _recompute(self, segment: Segment) -> None:
        """Run a block again, up to the last tensor that its backward needs."""
        end = max(index for index, (kind, _) in enumerate(segment.events) if kind == 0) + 1
        program: Counter[Buffer] = Counter()
        for kind, buffer in segment.events[:end]:
            (self._release if kind < 0 else self._hold)(buffer)
            program[buffer] += kind
        for buffer, references in program.items():
            for _ in range(references):
                self._release(buffer)

    def _save(self, buffer: Buffer) -> None:
        self._note(0, buffer)
        if self._open is None:
            self._hold(buffer)

    def _take(self, buffer: Buffer) -> None:
        self._note(1, buffer)
        self._hold(buffer)

    def _note(self, kind: int, buffer: Buffer) -> None:
        if self._open is not None:
            self._open.events.append((kind, buffer))

    def _hold(self, buffer: Buffer) -> Buffer:
        if not buffer.holders:
            self.live += buffer.size
            self.peak = max(self.peak, self.live)
        buffer.holders += 1
        return buffer

    def _release(self, buffer: Buffer) -> None:
        assert buffer.holders > 0
        buffer.holders -= 1
        if not buffer.holders:
            self.live -= buffer.size


@dataclass(frozen=True)
class Shape:
    """A LLaMA and a batch.

    Attributes:
        width: d.
        mlp: Width inside the feed-forward layers.
        layers: K.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        vocabulary: V.
        batch: Sequences per step on one device.
        length: Tokens of a sequence.
        itemsize: Bytes of a weight and of a state: 4 for float32, 2 for bfloat16.
        tied: Whether the head is the embedding.
    """

    width: int
    mlp: int
    layers: int
    heads: int
    vocabulary: int
    batch: int
    length: int
    kv_heads: int = 0
    itemsize: int = 4
    tied: bool = False

    @property
    def tokens(self) -> int:
        """Tokens per step on one device."""
        return self.batch * self.length

    @property
    def state(self) -> int:
        """Bytes of one state, S = batch · length · width · itemsize."""
        return self.tokens * self.width * self.itemsize

    @property
    def kv_width(self) -> int:
        """Width of keys, and of values."""
        return self.width * (self.kv_heads or self.heads) // self.heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of a block: q, o; k, v; gate, up, down; two norms."""
        d = self.width
        return 2 * d * d + 2 * d * self.kv_width + 3 * d * self.mlp + 2 * d

    @property
    def parameters(self) -> int:
        """Parameters of the model, embedding and head included."""
        ends = (1 if self.tied else 2) * self.vocabulary * self.width
        return self.layers * self.layer_parameters + ends + self.width


@dataclass(frozen=True)
class Memory:
    """What a step needs besides weights and moments.

    Attributes:
        kept: Bytes that autograd holds between forward and backward.
        peak: Most bytes at any time, gradients of parameters included.
    """

    kept: int
    peak: int


def simulate(shape: Shape, *, history: bool, checkpointing: bool, resident: bool = False) -> Memory:
    """One forward and backward pass of transformers' LLaMA in eager mode.

    Args:
        shape: The model and its batch.
        history: Whether every state is mixed into every later one.
        checkpointing: Whether blocks run again in the backward pass.
        resident: Whether gradients of parameters are there already; they are not counted then.
    """
    tape = Tape(resident=resident)
    angles = 2 * shape.length * (shape.width // shape.heads) * shape.itemsize
    tape.value(angles)  # sine and cosine, which every block reads
    x = tape.op(size=shape.state, weight=shape.vocabulary * shape.width * shape.itemsize)
    for site in range(shape.layers):
        if history:
            entered = tape.tap(x, site)
            tape.drop(x)
            x = entered
        with tape.checkpoint(x, on=checkpointing):
            y = _block(tape, shape, x)
        if history:
            mixed = tape.mix(y, site)
            tape.drop(y)
            y = mixed
        # A list of states would hold no more: each of them is saved by the tap.
        tape.drop(x)
        x = y
    _loss(tape, shape, x)
    return Memory(tape.kept, tape.peak)


def _block(tape: Tape, shape: Shape, x: Value) -> Value:
    residual = _add(tape, shape, x, _attention(tape, shape, _norm(tape, shape, x)))
    out = _feed_forward(tape, shape, _norm(tape, shape, residual))
    y = _add(tape, shape, residual, out)
    tape.drop(residual)
    return y


def _add(tape: Tape, shape: Shape, x: Value, branch: Value) -> Value:
    total = tape.op(x, branch, size=shape.state, passes=True)
    tape.drop(branch)
    return total


def _norm(tape: Tape, shape: Shape, x: Value) -> Value:
    """RMSNorm in float32: transformers casts there and back, which float32 states need not."""
    wide, row = shape.tokens * shape.width * 4, shape.tokens * 4
    cast = shape.itemsize != 4
    precise = tape.op(x, size=wide) if cast else x
    squares = tape.op(precise, size=wide, saves=[precise], temporary=wide)
    mean = tape.op(squares, size=row)
    tape.drop(squares)
    inverse = tape.op(mean, size=row, saves_output=True)
    tape.drop(mean)
    normed = tape.op(precise, inverse, size=wide, saves=[precise, inverse], temporary=wide)
    tape.drop(inverse)
    if cast:
        narrow = tape.op(normed, size=shape.state)
        tape.drop(normed, precise)
        normed = narrow
    scaled = tape.op(
        normed, size=shape.state, saves=[normed], weight=shape.width * shape.itemsize,
        temporary=shape.state,
    )  # fmt: skip
    tape.drop(normed)
    return scaled


def _linear(tape: Tape, shape: Shape, x: Value, width: int, out: int) -> Value:
    size = shape.tokens * out * shape.itemsize
    return tape.op(x, size=size, saves=[x], weight=width * out * shape.itemsize)


def _attention(tape: Tape, shape: Shape, h: Value) -> Value:
    """Projections, rotation and SDPA, which keeps q, k, v, its output and a number per head."""
    d, kv = shape.width, shape.kv_width
    q, k, v = (_linear(tape, shape, h, d, out) for out in (d, kv, kv))
    tape.drop(h)
    turned = []
    for part in (q, k):
        turned.append(tape.op(part, size=part.buffer.size, temporary=2 * part.buffer.size))
        tape.drop(part)
    if kv != d:
        turned[1], v = (_repeat(tape, shape, part) for part in (turned[1], v))
    sums = tape.value(shape.tokens * shape.heads * 4)
    out = tape.op(*turned, v, size=shape.state, saves=[*turned, v, sums], saves_output=True)
    tape.drop(*turned, v, sums)
    projected = _linear(tape, shape, out, d, d)
    tape.drop(out)
    return projected


def _repeat(tape: Tape, shape: Shape, part: Value) -> Value:
    """Keys and values once per query head."""
    whole = tape.op(part, size=shape.state)
    tape.drop(part)
    return whole


def _feed_forward(tape: Tape, shape: Shape, h: Value) -> Value:
    size = shape.tokens * shape.mlp * shape.itemsize
    gate = _linear(tape, shape, h, shape.width, shape.mlp)
    act = tape.op(gate, size=size, saves=[gate])
    tape.drop(gate)
    up = _linear(tape, shape, h, shape.width, shape.mlp)
    tape.drop(h)
    product = tape.op(act, up, size=size, saves=[act, up])
    tape.drop(act, up)
    down = _linear(tape, shape, product, shape.mlp, shape.width)
    tape.drop(product)
    return down


def _loss(tape: Tape, shape: Shape, x: Value) -> None:
    """The last norm, the head, and a cross entropy in float32."""
    normed = _norm(tape, shape, x)
    tape.drop(x)
    logits = _linear(tape, shape, normed, shape.width, shape.vocabulary)
    tape.drop(normed)
    wide = shape.tokens * shape.vocabulary * 4
    if shape.itemsize != 4:
        narrow, logits = logits, tape.op(logits, size=wide)
        log_probabilities = tape.op(logits, size=wide, saves_output=True)
        tape.drop(narrow)
    else:
        log_probabilities = tape.op(logits, size=wide, saves_output=True)
    tape.drop(logits)
    loss = tape.op(log_probabilities, size=4, saves=[log_probabilities])
    tape.drop(log_probabilities)
    tape.backward(loss)


def mixing_bytes(layers: int, state: int) -> int:
    """Bytes that mixing reads and writes in a step: ``(2R + 5K) S`` with ``R = K (K + 1) / 2``.

    The forward sum of site k reads k + 1 states and y and writes one: R + 2K. The backward of
    state j reads it, its gradient and those of K - j sums, and writes one: R + 3K.
    """
    return (layers * (layers + 1) + 5 * layers) * state


def step_operations(shape: Shape, *, checkpointing: bool) -> int:
    """Floating-point operations of a step: 6 per weight and token, 8 where blocks run twice.

    Attention adds 12 · length · width per token and layer, halved by the causal mask; the
    embedding is a look-up.
    """
    weights = shape.layers * shape.layer_parameters + shape.vocabulary * shape.width
    attention = shape.layers * shape.length * shape.width
    return shape.tokens * (8 if checkpointing else 6) * (weights + attention)


def border_states(layers: int, stages: int, border: int) -> int:
    """States that a history adds to what crosses a border between pipeline stages, one way.

    Behind border p lie ``p K / P`` states, before it ``K - p K / P`` sites. Sent are the states
    themselves, or for each later site its sum over the earlier states, whichever is less; the
    backward pass sends as many gradients.

    Args:
        layers: K.
        stages: P.
        border: p, from 1 to P - 1.
    """
    behind = border * layers // stages
    return min(behind, layers - behind)


def held_in_stage(layers: int, stages: int, stage: int) -> tuple[int, int]:
    """States that a pipeline stage holds under 1F1B and checkpointing: without and with a history.

    Stage s has up to ``P - s`` micro-batches in flight. For each it keeps the inputs of its own
    ``K / P`` blocks, and with a history the states that came in, for the gradients of their
    coefficients. Where sums come in, those gradients are the sender's work.

    Args:
        layers: K.
        stages: P.
        stage: s, from 0.
    """
    own, flying = layers // stages, stages - stage
    behind = stage * layers // stages
    incoming = behind if 2 * behind <= layers else 0
    return own * flying, (own + incoming) * flying
