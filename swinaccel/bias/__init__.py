"""Attention biases as products of factors."""

from .table import forget

__all__ = ["forget"]
