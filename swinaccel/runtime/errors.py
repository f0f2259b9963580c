"""Errors that calls raise."""

from __future__ import annotations


class FallbackError(RuntimeError):
    """Strict mode: an original would have run in place of a kernel."""
