"""Backends of the operators: `triton` on GPUs (and interpreted on the CPU), `torch` everywhere else.

Both take the live facts of a call and know nothing of modules, families or patching.
"""
