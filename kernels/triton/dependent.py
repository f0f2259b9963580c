"""Lets kernels follow each other without a gap, by programmatic dependent launches of Hopper GPUs."""

import triton
import triton.language as tl


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):
    """Wait until all that earlier kernels write is there, and let programs of the next kernel come, which wait, too.

    A kernel that is launched so calls this before it reads or writes anything, in all of its programs: the next kernel
    waits for this one alone, and so for earlier ones only because this one has.
    """
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
