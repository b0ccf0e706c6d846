"""Prove from the files alone what an export, a conversion or a saved model was made of."""

from surgery.proving.proof import Finding, Proof
from surgery.proving.run import prove

__all__ = ["Finding", "Proof", "prove"]
