"""Launches the Triton kernels: shapes to launches, tensors to pointers. Imports Triton at the first use only."""
