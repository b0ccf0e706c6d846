"""Which shortcut a deep linear network has decides how fast it learns.

The experiment behind the theory of ANCRe (arXiv 2602.09009): three linear layers without bias,
gradient descent, whitened inputs. ``i:j`` adds state i to state j, so that with layers W1, W2, W3
the networks compute::

    none             W3 W2 W1                 what no rule touches
    0:1              W3 W2 (W1 + I)
    0:2              W3 (W2 W1 + I)
    0:1, 1:2, 2:3    (W3 + I)(W2 + I)(W1 + I) ordinary residual connections
    ancre            every earlier state at every layer, coefficients learned

The target is a projection: half of the directions pass, the other half have to be forgotten. A
direction is forgotten when the factors that multiply it vanish, and balanced factors vanish
together. With n of them, each of size a and da/dt = -a^(2n-1), the loss falls as t^(-n/(n-1)):
as t^-2 for the two factors of 0:1, as t^-1.5 for the three of the cascade and of no shortcut. In
0:2 one factor alone vanishes, W3: dL/dt ≤ -2 (1 - λ)² L while |W2 W1| ≤ λ, so that the loss is
below L(0) exp(-2 (1 - λ)² t), which is the paper's rate.

Run: ``python examples/deep_linear.py [--out docs/images] [--time 400]``
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import surgery
from surgery import Rule, Shortcuts

WIDTH, SAMPLES = 8, 32
STEP = 0.1  # of gradient descent; `--time` counts in these
SCALE = 0.5  # every layer starts as this times one rotation, which balances them
#: Below this a loss in float64 is rounding error.
FLOOR = 1e-24

console = Console()


@dataclass(frozen=True)
class Variant:
    """One network of the comparison.

    Attributes:
        rule: What is done to the plain network; None for nothing.
        slope: Exponent of the power law that theory gives; None where the loss falls as an
            exponential.
        color: Of its curve, from the palette of Okabe and Ito.
        style: Of its line, since not everybody tells colours apart.
    """

    rule: Rule | None
    slope: float | None
    color: str
    style: str


def static(edges: str) -> Rule:
    """Fixed shortcuts between layers that have no residual connection of their own."""
    return Rule(Shortcuts(topology="static", edges=edges, plain_blocks=True))


# The authors' temperature of 0.01 is for Adam: under plain gradient descent it multiplies the
# steps of the coefficients by 10 000.
ANCRE = Rule(Shortcuts(topology="ancre", temperature=1.0, plain_blocks=True))
VARIANTS = {
    "no shortcut": Variant(None, -1.5, "#999999", ":"),
    "0:1": Variant(static("0:1"), -2.0, "#D55E00", "--"),
    "0:1, 1:2, 2:3": Variant(static("0:1, 1:2, 2:3"), -1.5, "#0072B2", "-."),
    "0:2": Variant(static("0:2"), None, "#009E73", "-"),
    "ancre": Variant(ANCRE, None, "#CC79A7", "-"),
}


@dataclass
class Curve:
    """What training one network gave.

    Attributes:
        times: Step size times number of steps.
        losses: The loss before each step.
        product: The largest spectral norm of W2 W1 on the way, λ.
        matrix: Coefficients at the end, (3, 3); None without shortcuts.
    """

    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    product: float = 0.0
    matrix: Tensor | None = None


def main() -> None:
    """Train the five networks, fit their rates, draw their losses."""
    parser = argparse.ArgumentParser(description="Shortcuts of a deep linear network.")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="folder of the plot")
    parser.add_argument("--time", type=float, default=400.0, help="step size times steps")
    args = parser.parse_args()
    curves = {}
    for name, variant in VARIANTS.items():
        with console.status(f"training: {name}"):
            curves[name] = train(variant, round(args.time / STEP))
    console.print(rates(curves))
    matrix = curves["ancre"].matrix
    console.print(f"What ancre learned, row k the coefficients of the states in x_k+1:\n{matrix}")
    check(curves)
    args.out.mkdir(parents=True, exist_ok=True)
    image = args.out / "deep_linear.png"
    draw(curves, image)
    console.print(f"The losses are drawn in {image}.")


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Whitened inputs (samples, width), the target map and a rotation, both (width, width)."""
    draw_ = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw_, dtype=torch.float64)

    inputs = math.sqrt(SAMPLES) * torch.linalg.qr(normal(SAMPLES, WIDTH)).Q
    basis = torch.linalg.qr(normal(WIDTH, WIDTH)).Q[:, : WIDTH // 2]
    skew = normal(WIDTH, WIDTH).triu(1)
    skew = skew - skew.mT
    # A rotation by half a radian: no direction starts with the wrong sign.
    rotation = torch.matrix_exp(0.5 * skew / torch.linalg.matrix_norm(skew, 2))
    return inputs, basis @ basis.mT, rotation


def network(variant: Variant, rotation: Tensor, inputs: Tensor) -> nn.Sequential:
    """Three linear layers, rewired as the variant says."""
    layers = [nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64) for _ in range(3)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(SCALE * rotation)
    model = nn.Sequential(*layers)
    if variant.rule is not None:
        surgery.apply(model, variant.rule, example=inputs)
    return model.double()


def train(variant: Variant, steps: int) -> Curve:
    """Plain gradient descent on half the mean squared error."""
    inputs, target, rotation = problem()
    wanted = inputs @ target.mT
    model = network(variant, rotation, inputs)
    parameters = list(model.parameters())
    first, second = parameters[:2]
    curve = Curve()
    for step in range(steps):
        loss = (model(inputs) - wanted).square().sum() / (2 * SAMPLES)
        gradients = torch.autograd.grad(loss, parameters)
        curve.times.append(step * STEP)
        curve.losses.append(loss.item())
        with torch.no_grad():
            norm = torch.linalg.matrix_norm(second @ first, 2).item()
            curve.product = max(curve.product, norm)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(gradient, alpha=STEP)
    if variant.rule is not None:
        (curve.matrix,) = surgery.shortcuts(model).values()
    return curve


def power(curve: Curve) -> float:
    """Slope of log loss against log time over the last three quarters of the time."""
    last = curve.times[-1]
    points = zip(curve.times, curve.losses, strict=True)
    return slope([(math.log(t), math.log(loss)) for t, loss in points if t > last / 4])


def exponential(curve: Curve) -> float:
    """Rate r of exp(-r t), after the first tenth of the way down to rounding errors."""
    points = [(t, math.log(x)) for t, x in zip(curve.times, curve.losses, strict=True) if x > FLOOR]
    return -slope(points[len(points) // 10 :])


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares."""
    x, y = torch.tensor(points, dtype=torch.float64).unbind(1)
    x = x - x.mean()
    return (x @ y / (x @ x)).item()


def bound(curve: Curve) -> float:
    """The paper's rate 2 (1 - λ)², with λ as it was measured."""
    return 2 * (1 - curve.product) ** 2


def rates(curves: dict[str, Curve]) -> Table:
    """Fitted rates beside those of the theory."""
    table = Table("shortcuts", "loss at the end", "falls as", "theory")
    for name, curve in curves.items():
        wanted, last = VARIANTS[name].slope, f"{curve.losses[-1]:.1e}"
        if wanted is not None:
            table.add_row(name, last, f"t^{power(curve):.2f}", f"t^{wanted:g}")
            continue
        theory = f"exp(-{bound(curve):.2f} t) or faster" if name == "0:2" else "exponential"
        table.add_row(name, last, f"exp(-{exponential(curve):.2f} t)", theory)
    return table


def check(curves: dict[str, Curve]) -> None:
    """Stop if the regimes are not those of the theory."""
    for name, curve in curves.items():
        wanted = VARIANTS[name].slope
        if wanted is None:
            must(curve.losses[-1] < FLOOR, f"{name} falls to rounding error")
        else:
            must(abs(power(curve) - wanted) < 0.25, f"{name} falls as t^{wanted:g}")
    held = curves["0:2"]
    limit = [held.losses[0] * math.exp(-bound(held) * t) for t in held.times]
    below = all(x <= max(y, FLOOR) for x, y in zip(held.losses, limit, strict=True))
    must(below, "0:2 stays below L(0) exp(-2 (1 - λ)² t)")
    console.print("Checked: each falls as theory says; 0:2 stays below its bound at every step.")


def must(holds: bool, claim: str) -> None:
    """Stop if a claim does not hold."""
    if not holds:
        sys.exit(f"FAILED: {claim}")


def draw(curves: dict[str, Curve], image: Path) -> None:
    """The losses over logarithmic and over linear time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for name, curve in curves.items():
        variant = VARIANTS[name]
        shown = [(t, x) for t, x in zip(curve.times, curve.losses, strict=True) if x > FLOOR]
        times, losses = zip(*shown, strict=True)
        for axes in (left, right):
            axes.plot(times, losses, color=variant.color, linestyle=variant.style, label=name, lw=2)
    held = curves["0:2"]
    until = [t for t in held.times if bound(held) * t < 56]
    limit = [held.losses[0] * math.exp(-bound(held) * t) for t in until]
    right.plot(until, limit, color="black", lw=1, label="0:2, the paper's bound")
    left.set(xscale="log", xlabel="time (steps times step size)", ylabel="loss", title="Log-log")
    left.set(xlim=(0.5, curves["0:1"].times[-1]), ylim=(1e-9, 50))
    right.set(
        xlabel="time (steps times step size)", title="Semi-log", xlim=(0, 60), ylim=(FLOOR, 50)
    )
    for axes in (left, right):
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    handles, names = right.get_legend_handles_labels()
    figure.legend(handles, names, title="shortcuts", loc="outside right center")
    figure.suptitle("Gradient descent on three linear layers: a power law, or an exponential")
    figure.savefig(image, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
