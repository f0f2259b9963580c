"""Triton kernels of swinaccel, installed as ``swinaccel.kernels``. They import Triton and nothing else."""
