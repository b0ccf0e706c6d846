"""Estimators of the meta-gradient, one a file.

- ``unrolled``: through every inner step; exact, memory grows with the steps
- ``first_order``: inner gradients are constants
- ``truncated``: through the last steps only
- ``binomial``: every product of at most L second derivatives (BinomGBML)
- ``implicit``: where the inner loop comes to rest (iMAML)
- ``bayesian``: the same of a posterior over the parameters (iBaML)
"""

from surgery.train.adapt.estimators.base import Estimate, Estimator, Solved
from surgery.train.adapt.estimators.bayesian import Bayesian, Posterior
from surgery.train.adapt.estimators.binomial import Binomial
from surgery.train.adapt.estimators.first_order import FirstOrder
from surgery.train.adapt.estimators.implicit import Implicit
from surgery.train.adapt.estimators.truncated import Truncated
from surgery.train.adapt.estimators.unrolled import Unrolled

__all__ = [
    "Bayesian",
    "Binomial",
    "Estimate",
    "Estimator",
    "FirstOrder",
    "Implicit",
    "Posterior",
    "Solved",
    "Truncated",
    "Unrolled",
]
