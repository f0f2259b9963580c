"""Errors that swinaccel raises beside ValueError and TypeError."""

from __future__ import annotations


class FallbackError(RuntimeError):
    """Strict mode: an original would have run in place of a kernel."""


class KernelError(RuntimeError):
    """A kernel failed, and plain PyTorch must not or cannot stand in for it."""


class ArgumentError(KernelError, ValueError):
    """A tensor does not fit the problem that a kernel was asked to solve with it: nothing was run."""
