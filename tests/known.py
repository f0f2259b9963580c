"""Kinds of failures that are known, each with its reason: tests of any call and of any state pass them over.

Empty the table, and all of them are judged.
"""

KNOWN = {
    # Calls: see the tags of cases under fuzz/.
    "NaN and infinities": "kernels and plain PyTorch hide NaN, and hand on what nobody sees",
    "masks of -inf": "a row that sees nothing is NaN in the original",
    "masks of a wider dtype": "the lowest number of fp64 becomes -inf in fp32",
    "gradients of large windows in half precision": "scores of forward and backward are not the same",
    "sequences of mixed dtypes": "plain PyTorch does not take masks and factors of other dtypes",
    "attention by itself of no windows": "raises where the original does not",
    # Edits and models: see edits.py and test_states.py.
    "not_a_number": "NaN and infinities are hidden",
}
