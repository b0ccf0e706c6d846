"""ScaLoRA: low-rank steps whose sum is of high rank.

Source: "ScaLoRA: optimally scaled low-rank adaptation for efficient high-rank fine-tuning",
arXiv 2510.23818. The authors published no code; formulas the paper does not state are derived
here, and checked numerically in the tests.

With ``G`` the gradient of the weight ``W' = W + s B A``, a gradient step of size η on the factors
moves the weight along ``B Bᵀ G + G Aᵀ A`` and nowhere else. Before a step, ScaLoRA therefore
continues from other factors,

    B̃ = B diag(α)        Ã = diag(β) A        W̃ = W + s (B A - B̃ Ã)

which leaves ``W'`` as it is, with the α and β that bring the step nearest to a step of full
gradient descent at the smoothness ``L``::

    f(α, β) = ‖ G/L - s² η (G Aᵀ diag(β²) A + B diag(α²) Bᵀ G) ‖²

Since ``W̃`` takes in what the factors let go, the change of ``W'`` over many steps is not of rank
``r``. Nothing but the factors and their own gradients is needed, ``G`` is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from surgery.errors import ModelStateError
from surgery.optim.linalg import wide
from surgery.optim.moments import check_state, powers_of, scale_state
from surgery.optim.rule import Attached, Factors, StepRule

_linalg = cast("Any", torch.linalg)  # it has no types

Kind = Literal["none", "scalar", "column"]
KINDS: tuple[Kind, ...] = ("none", "scalar", "column")
_NONE, _SCALAR, _COLUMN = range(3)

#: Elements of a change that are formed at a time in float64.
_AT_A_TIME = 2**22

#: No column gets shorter than this share of the root mean square length of all new columns. A
#: column of B and the row of A beside it have no gradients any more once both are zero.
FLOOR = 1e-4


def column_scaling(
    lora_A: Tensor,
    lora_B: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    *,
    lipschitz: float,
    lr: float,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor, Kind | tuple[Kind, ...]]:
    """The α and β that bring one step on the factors nearest to a full gradient step.

    They minimise ``f`` of the module's docstring. With ``U = [B, grad_B]`` and
    ``V = [grad_Aᵀ, Aᵀ]``, both with 2r columns, ``α² = v[:r] / (s² L η)`` and
    ``β² = v[r:] / (s² L η)`` where::

        M v = [‖grad_A's rows‖²; ‖grad_B's columns‖²]        M = (Uᵀ U) ⊙ (Vᵀ V)

    If some ``v`` is negative no such α and β exist; then the best pair of two numbers is taken,
    one α for all columns and one β. The scale of the gradients does not matter. Sums of products
    are formed and the equations are solved in float64 (float32 on devices without it).

    Args:
        lora_A: A, ``(*batch, r, in)``.
        lora_B: B, ``(*batch, out, r)``.
        grad_A: The gradient of A, of its shape.
        grad_B: The gradient of B, of its shape.
        lipschitz: ``L``, the smoothness of the loss as a function of the weight; in units of loss
            over weight squared.
        lr: η, the size of the step.
        scaling: s, the factor of ``B A`` in the weight.

    Returns:
        α ``(*batch, r)`` for the columns of B; β ``(*batch, r)`` for the rows of A, both at least
        float32; and the kind of solution: ``column``, ``scalar``, or ``none``, with ones, where a
        factor or its gradient is zero, as B is at the start. With batch dimensions the kinds of
        all, in row-major order.

    Raises:
        ValueError: shapes do not fit, or a number is not positive.
    """
    _check_shapes(lora_A, lora_B, grad_A, grad_B)
    for name, value in (("lipschitz", lipschitz), ("lr", lr), ("scaling", scaling)):
        _check_positive(name, value)
    with torch.no_grad():
        found = _Grams.of(lora_A, lora_B, grad_A, grad_B, scaling).solve()
        each = torch.full_like(found.scaling, lr)
        alpha, beta = found.scales(torch.full_like(each, lipschitz), each, each)
    dtype = torch.promote_types(lora_A.dtype, torch.float32)
    shape = lora_A.shape[:-1]
    kinds: tuple[Kind, ...] = tuple(KINDS[code] for code in _codes(found.kinds))
    return (
        alpha.to(dtype).reshape(shape),
        beta.to(dtype).reshape(shape),
        kinds if lora_A.dim() > 2 else kinds[0],
    )


class ScaLoRA(StepRule):
    """Scales the columns of the factors before a step, and folds the difference into the weight.

    In the coordinates of the new factors the gradient of B is ``diag(β)`` times as large and that
    of A ``diag(α)``, so these and the optimizer's moments of them are scaled, second moments by
    the squares. Weight decay and other things an optimizer does to parameters act on the factors as
    they then are; what was folded into the base weight is no longer decayed.

    **Which η.** A schedule that lets the learning rate go to zero would make the factors grow
    without bounds, since ``α² ∝ 1/(Lη)``. η is therefore the peak of the schedule: the group's
    ``initial_lr``, which every scheduler of torch sets, or its ``lr`` if there is none. Factors in
    groups of their own (LoRA+) have each their own η.

    **Rounding.** A base weight narrower than float32 cannot take in changes smaller than its
    last bit. What a fold loses is kept, as a tensor of the size and dtype of the weight in the
    optimizer's state, and goes into the next fold.

    Args:
        factors: The adapters; each has a ``fold``.
        interval: Steps from one scaling to the next: 1 is ScaLoRA, 10 the paper's ScaLoRA-I.
        lipschitz: ``L``. By default each weight gets its own at its first scaling: the one with
            which the new factors have together the Frobenius norm that they had before.
        warmup: Steps before the first scaling.

    Raises:
        ValueError: an option is out of range.
        ModelStateError: the weights are sharded.
    """

    folds = True

    def __init__(
        self,
        factors: Sequence[Factors],
        *,
        interval: int = 1,
        lipschitz: float | None = None,
        warmup: int = 0,
    ) -> None:
        super().__init__(factors)
        _check_options(interval, lipschitz, warmup)
        for each in factors:
            _check_foldable(each)
        self.interval = interval
        self.lipschitz = lipschitz
        self.warmup = warmup
        self._kinds: dict[str, tuple[Kind, ...]] = {}
        self.kept = {each.name: self._start(each) for each in factors}

    @property
    def kinds(self) -> dict[str, tuple[Kind, ...]]:
        """Adapter name → what its last scaling was; one kind per matrix of a stack."""
        return dict(self._kinds)

    @torch.no_grad()
    def before(self, optimizer: Optimizer) -> None:
        """Swap the factors, their gradients and moments, and fold what they let go."""
        since = self.steps - self.warmup
        if since < 0 or since % self.interval:
            return
        lrs = _peak_lrs(optimizer)
        # Where the learning rate is 0 there is no step to scale for.
        acting = [each for each in self.with_gradients() if lrs[each.A] > 0 and lrs[each.B] > 0]
        for each in acting:
            check_state(optimizer, each.A)
            check_state(optimizer, each.B)
        for alike in _alike(acting):
            self._scale(alike, optimizer, lrs)

    def attach(self, optimizer: Optimizer) -> Attached:
        """As for every rule; raises ModelStateError for an optimizer that is not supported."""
        powers_of(optimizer)
        return super().attach(optimizer)

    def _start(self, each: Factors) -> dict[str, Tensor]:
        stack = each.A.shape[:-2]
        kept: dict[str, Tensor] = {}
        if self.lipschitz is None:
            dtype = wide(each.A.device)
            kept["lipschitz"] = torch.full(stack, math.nan, dtype=dtype, device=each.A.device)
        if each.base_dtype is not None and each.base_dtype.itemsize < torch.float32.itemsize:
            shape = (*stack, each.B.shape[-2], each.A.shape[-1])
            kept["lost"] = torch.zeros(shape, dtype=each.base_dtype, device=each.A.device)
        return kept

    def _scale(
        self, alike: Sequence[Factors], optimizer: Optimizer, lrs: dict[Tensor, float]
    ) -> None:
        """Scale adapters of one rank on one device; the small systems are solved as one batch."""
        found = _Grams.cat(
            [
                _Grams.of(each.A, each.B, _grad(each.A), _grad(each.B), each.scaling)
                for each in alike
            ]
        ).solve()
        counts = [math.prod(each.A.shape[:-2]) for each in alike]
        lr_A = _repeated([lrs[each.A] for each in alike], counts, found.scaling)
        lr_B = _repeated([lrs[each.B] for each in alike], counts, found.scaling)
        lipschitz = self._lipschitz(alike, found, found.balanced(lr_A, lr_B))
        alphas, betas = (_split(scale, counts) for scale in found.scales(lipschitz, lr_A, lr_B))
        codes = _codes(found.kinds)
        for each, count, alpha, beta in zip(alike, counts, alphas, betas, strict=True):
            own, codes = codes[:count], codes[count:]
            self._kinds[each.name] = tuple(KINDS[code] for code in own)
            if any(code != _NONE for code in own):
                shape = each.A.shape[:-1]
                self._swap(each, optimizer, alpha.reshape(shape), beta.reshape(shape))

    def _lipschitz(self, alike: Sequence[Factors], found: _Solution, balanced: Tensor) -> Tensor:
        """L of every matrix, ``(K,)``; that of its first scaling where none was given."""
        if self.lipschitz is not None:
            return torch.full_like(balanced, self.lipschitz)
        kept = [self.kept[each.name]["lipschitz"] for each in alike]
        known = torch.cat([each.reshape(-1) for each in kept])
        first = known.isnan() & (found.kinds != _NONE)
        lipschitz = torch.where(first, balanced, known)
        parts = _split(lipschitz, [each.numel() for each in kept])
        for each, own in zip(kept, parts, strict=True):
            each.copy_(own.reshape(each.shape))
        return lipschitz

    def _swap(self, each: Factors, optimizer: Optimizer, alpha: Tensor, beta: Tensor) -> None:
        dtype = torch.promote_types(each.A.dtype, torch.float32)
        by_column, by_row = alpha.to(dtype).unsqueeze(-2), beta.to(dtype).unsqueeze(-1)
        A, B = each.A.detach(), each.B.detach()
        new_A, new_B = (A * by_row).to(A.dtype), (B * by_column).to(B.dtype)
        # From the factors as they are rounded: what that loses is folded as well.
        left, right = torch.cat([B, -new_B], -1), torch.cat([A, new_A], -2)
        self._fold(each, _product(left, right, each.scaling, dtype))
        each.A.copy_(new_A)
        each.B.copy_(new_B)
        _grad(each.A).mul_(by_column.mT)
        _grad(each.B).mul_(by_row.mT)
        scale_state(optimizer, each.A, by_column.mT)
        scale_state(optimizer, each.B, by_row.mT)

    def _fold(self, each: Factors, change: Tensor) -> None:
        fold = each.fold
        assert fold is not None  # noqa: S101 - checked when the rule was built
        lost = self.kept[each.name].get("lost")
        if lost is None:
            fold(change)
        else:
            lost.copy_(fold(change.add_(lost)))


@dataclass(frozen=True)
class _Grams:
    """Products of all columns of ``U`` with each other, and of ``V``, for K adapters.

    Attributes:
        left: ``Uᵀ U`` with ``U = [B, grad_B]``, ``(K, 2r, 2r)``.
        right: ``Vᵀ V`` with ``V = [grad_Aᵀ, Aᵀ]``, ``(K, 2r, 2r)``.
        scaling: s, ``(K,)``.
        precision: The unit of rounding of what the products were formed from.
    """

    left: Tensor
    right: Tensor
    scaling: Tensor
    precision: float

    @classmethod
    def of(cls, A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor, scaling: float) -> _Grams:
        """Of the factors of one adapter, or of a stack."""
        dtype = wide(A.device)
        U = torch.cat([B.to(dtype), grad_B.to(dtype)], -1)
        V = torch.cat([grad_A.to(dtype), A.to(dtype)], -2)
        size = V.shape[-2]
        left, right = (U.mT @ U).reshape(-1, size, size), (V @ V.mT).reshape(-1, size, size)
        precision = max(torch.finfo(each.dtype).eps for each in (A, B, grad_A, grad_B))
        return cls(left, right, torch.full_like(left[:, 0, 0], scaling), precision)

    @classmethod
    def cat(cls, each: Sequence[_Grams]) -> _Grams:
        """Several as one batch."""
        return cls(
            torch.cat([one.left for one in each]),
            torch.cat([one.right for one in each]),
            torch.cat([one.scaling for one in each]),
            max(one.precision for one in each),
        )

    def solve(self) -> _Solution:
        """``v``, one number per column where that is possible, else one per factor."""
        r = self.left.shape[-1] // 2
        products = self.left * self.right
        lefts = self.left.diagonal(dim1=-2, dim2=-1)
        rights = self.right.diagonal(dim1=-2, dim2=-1)
        target = torch.cat([rights[:, :r], lefts[:, r:]], -1)
        columns = torch.cat([lefts[:, :r], rights[:, r:]], -1)
        # The same problem for one α and one β sums the products and the targets.
        whole = products.reshape(-1, 2, r, 2, r).sum((-3, -1))
        usable = (whole.diagonal(dim1=-2, dim2=-1) > 0).all(-1)

        system, unit = _equilibrated(products)
        y = _least_squares(system, _over(target, unit), self.precision)
        least = -self.precision * y.abs().amax(-1)
        columnwise = usable & (y.amin(-1) >= least)
        by_column = _over(y.clamp(min=0), unit)
        by_factor = _two(whole, target.reshape(-1, 2, r).sum(-1), self.precision)
        v = torch.where(columnwise[:, None], by_column, by_factor.repeat_interleave(r, -1))
        v = torch.where(usable[:, None] & (unit > 0), v, math.nan)
        # One number for a factor stays one number, whatever it is compared with.
        mean = columns.reshape(-1, 2, r).mean(-1).repeat_interleave(r, -1)
        columns = torch.where(columnwise[:, None], columns, mean)
        kinds = torch.where(columnwise, _COLUMN, torch.where(usable, _SCALAR, _NONE))
        return _Solution(v, columns, kinds, self.scaling)


@dataclass(frozen=True)
class _Solution:
    """α² and β² up to the factor ``1 / (s² L η)``.

    Attributes:
        v: ``(K, 2r)``; NaN for a column that is to stay as it is.
        columns: The squared lengths of the columns of B and of the rows of A, ``(K, 2r)``; their
            mean in each factor for the kind ``scalar``.
        kinds: Indices in ``KINDS``, ``(K,)``.
        scaling: s, ``(K,)``.
    """

    v: Tensor
    columns: Tensor
    kinds: Tensor
    scaling: Tensor

    def scales(self, lipschitz: Tensor, lr_A: Tensor, lr_B: Tensor) -> tuple[Tensor, Tensor]:
        """α and β, ``(K, r)``. The term of α is a step on A, so that it goes with A's η."""
        squared = self._over_lr(lr_A, lr_B) / (lipschitz * self.scaling**2)[:, None]
        mean = (squared * self.columns).nanmean(-1, keepdim=True)
        squared = torch.maximum(squared, FLOOR**2 * mean / self.columns)
        alpha, beta = squared.sqrt().nan_to_num(nan=1.0).chunk(2, -1)
        return alpha, beta

    def balanced(self, lr_A: Tensor, lr_B: Tensor) -> Tensor:
        """The L with which the new factors have together the norm of the old ones, ``(K,)``."""
        new = self._over_lr(lr_A, lr_B) * self.columns
        old = torch.where(new.isnan(), math.nan, self.columns)
        return new.nansum(-1) / (old.nansum(-1) * self.scaling**2)

    def _over_lr(self, lr_A: Tensor, lr_B: Tensor) -> Tensor:
        r = self.v.shape[-1] // 2
        return self.v / torch.stack([lr_A, lr_B], -1).repeat_interleave(r, -1)


def _equilibrated(system: Tensor) -> tuple[Tensor, Tensor]:
    """A positive semidefinite system with a unit diagonal, and what it was divided by.

    Args:
        system: ``(K, n, n)``. A row that is zero is made that of the identity.

    Returns:
        ``(K, n, n)`` and the root of the diagonal, ``(K, n)``.
    """
    unit = system.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    scaled = _over(_over(system, unit[:, :, None]), unit[:, None, :])
    scaled.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return scaled, unit


def _over(numerator: Tensor, unit: Tensor) -> Tensor:
    """The quotient, and 0 where the unit is 0."""
    return torch.where(unit > 0, numerator / torch.where(unit > 0, unit, 1.0), 0.0)


def _least_squares(system: Tensor, target: Tensor, precision: float) -> Tensor:
    """Solve ``(K, n, n)`` systems with a unit diagonal that may be singular, ``(K, n)``.

    One without full rank to ``precision`` gets the shortest of its solutions.
    """
    factor, info = cast("tuple[Tensor, Tensor]", _linalg.cholesky_ex(system))
    pivots = factor.diagonal(dim1=-2, dim2=-1).amin(-1).square()
    regular = (info == 0) & (pivots > precision)
    solved = torch.cholesky_solve(target.unsqueeze(-1), factor).squeeze(-1)
    if bool(regular.all()):
        return solved
    singular = ~regular
    values, vectors = cast("tuple[Tensor, Tensor]", _linalg.eigh(system[singular]))
    cut = precision * values.amax(-1, keepdim=True)
    inverse = torch.where(values > cut, 1 / torch.where(values > cut, values, 1.0), 0.0)
    parts = (vectors.mT @ target[singular].unsqueeze(-1)).squeeze(-1) * inverse
    shortest = (vectors @ parts.unsqueeze(-1)).squeeze(-1)
    return solved.masked_scatter(singular[:, None], shortest)


def _two(system: Tensor, target: Tensor, precision: float) -> Tensor:
    """The non-negative least-squares solution of ``(K, 2, 2)`` systems, ``(K, 2)``.

    If one of the two numbers is negative it is 0 in the best solution, and the other stands alone.
    """
    scaled, unit = _equilibrated(system)
    goal = _over(target, unit)
    common = scaled[:, 0, 1:]
    rest = 1 - common**2
    apart = (goal - common * goal.flip(-1)) / torch.where(rest > precision, rest, 1.0)
    # Both say the same thing then, and share it.
    y = torch.where(rest > precision, apart, goal / 2)
    alone = torch.where(y < 0, 0.0, goal)
    y = torch.where((y < 0).any(-1, keepdim=True), alone, y)
    return _over(y, unit)


def _product(left: Tensor, right: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """``scaling · left @ right`` in a dtype, each element rounded once.

    In float32 a GPU may multiply with ten bits (TF32), as it is told to for the model's sake; a
    weight that takes in a change at each step would drift.
    """
    left, right = left.to(wide(left.device)) * scaling, right.to(wide(right.device))
    product = torch.empty((*left.shape[:-1], right.shape[-1]), dtype=dtype, device=left.device)
    rows = max(1, _AT_A_TIME // right[..., 0, :].numel())
    for start in range(0, left.shape[-2], rows):
        part = slice(start, start + rows)
        product[..., part, :] = left[..., part, :] @ right
    return product


def _alike(factors: Sequence[Factors]) -> list[list[Factors]]:
    """Adapters by rank and device."""
    found: dict[tuple[int, torch.device], list[Factors]] = {}
    for each in factors:
        found.setdefault((each.rank, each.A.device), []).append(each)
    return list(found.values())


def _peak_lrs(optimizer: Optimizer) -> dict[Tensor, float]:
    """Parameter → the largest learning rate of its group's schedule."""
    return {
        parameter: float(group.get("initial_lr", group["lr"]))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def _repeated(values: Sequence[float], counts: Sequence[int], like: Tensor) -> Tensor:
    """Each value as often as its count says, in one tensor."""
    flat = [value for value, count in zip(values, counts, strict=True) for _ in range(count)]
    return torch.tensor(flat, dtype=like.dtype).to(like.device)


def _split(values: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    return cast("Any", torch).split(values, counts)


def _codes(kinds: Tensor) -> list[int]:
    """The one synchronisation with the device, but for a system that is singular."""
    return cast("list[int]", cast("Any", kinds).tolist())


def _grad(parameter: Tensor) -> Tensor:
    return cast("Tensor", parameter.grad)


def _check_shapes(A: Tensor, B: Tensor, grad_A: Tensor, grad_B: Tensor) -> None:
    shapes = [tuple(each.shape) for each in (A, B, grad_A, grad_B)]
    fit = A.dim() > 1 and B.dim() == A.dim() and A.shape[:-2] == B.shape[:-2]
    if fit and A.shape[-2] == B.shape[-1] and shapes[:2] == shapes[2:]:
        return
    raise ValueError(
        "lora_A must be (*batch, r, in), lora_B (*batch, out, r), and each gradient of its "
        f"factor's shape; got {', '.join(str(shape) for shape in shapes)}"
    )


def _check_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_options(interval: int, lipschitz: float | None, warmup: int) -> None:
    if interval < 1 or warmup < 0:
        raise ValueError(
            f"interval must be 1 or more and warmup 0 or more, got {interval} and {warmup}"
        )
    if lipschitz is not None:
        _check_positive("lipschitz", lipschitz)


def _check_foldable(each: Factors) -> None:
    if each.sharded:
        raise ModelStateError(
            f"ScaLoRA adds to the base weight beside {each.name}, and both are sharded",
            hint="train ScaLoRA under DDP, or use a method that leaves the base weight alone, "
            "such as reflora",
        )
    if each.fold is None:
        raise ModelStateError(
            f"ScaLoRA adds to the base weight beside {each.name}, and was given no way to",
            hint="surgery.adapters.prepare gives it one",
        )
