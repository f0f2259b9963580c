"""What is read off compute-sanitizer; the kernels run under it by `python tests/sanitize.py`, on a GPU."""

from __future__ import annotations

import sanitize

TEXT = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at _norm_kernel+0x1d0 in pointwise.py:67
=========     by thread (0,0,0) in block (0,0,0)
=========         Host Frame: run in run.py:43
=========
========= INFO: Potential WAW hazard detected at __shared__ 0x10 in block (3,0,0) :
=========     Write Thread (0,0,0) at _window_attention_bwd_query_kernel+0x90 in softmax.py:67
=========     Write Thread (64,0,0) at _window_attention_bwd_query_kernel+0x90 in softmax.py:67
=========     Current Value : 7, Incoming Value : {incoming}
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at cudnn::conv(float*)+0x80
========= ERROR SUMMARY: 3 errors
========= Target application returned an error at exit
"""


def test_reports_are_counted_by_kernel():
    kernels = sanitize.all_kernels()
    assert {"_norm_kernel", "_window_attention_bwd_query_kernel"} <= kernels
    for incoming, is_same in (7, True), (8, True), (200, False):
        assert list(sanitize.reports(TEXT.format(incoming=incoming), kernels)) == [
            ("_norm_kernel", False),
            ("_window_attention_bwd_query_kernel", is_same),
            ("another's: cudnn::conv(float*)", False),
        ]


def test_a_group_says_what_it_launched():
    assert sanitize.run("embeddings") == {"_embed_kernel"}
