"""Prove by measurement what a rewrite changed and what it did not."""

from surgery.verification.report import Report, Row, Unchecked
from surgery.verification.verify import verify

__all__ = ["Report", "Row", "Unchecked", "verify"]
