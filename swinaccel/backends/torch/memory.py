"""Pages of memory on CPUs, which cost time when they come anew: the system zeroes each one first."""

from __future__ import annotations

from contextlib import suppress
from functools import cache

import torch

_LARGEST = 31 << 20  # bytes: the largest block of glibc's malloc that raises what follows, less its own header


@cache
def keep_pages() -> None:
    """Let malloc keep the pages of freed tensors, up to 62 MiB, for the next ones.

    glibc maps blocks from a threshold on anew each time, and gives back the top of its heap from twice that. Both
    follow the largest block freed so far, up to 32 MiB, as after a call with a larger batch. This one is never written
    to, and so takes no memory. Other allocators, and a threshold that somebody has set, stay as they are.
    """
    with suppress(RuntimeError):  # where so much is not to be had
        torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")
