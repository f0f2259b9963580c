"""Attention biases as products of factors."""
