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
    "forward_by_function": "forwards set on an instance are ignored in some places",
    "forward_by_partial": "only plain functions are seen in a forward's place",
    "forward_by_object": "only plain functions are seen in a forward's place",
    "proxy": "what passes attributes on is taken for the module itself",
    "fused_attention": "timm's fused path does not read its scale",
    "not_a_number": "NaN and infinities are hidden",
    "table_of_one_column": "kernels read beyond a table of fewer columns than heads",
    "logit_scale_of_one": "kernels read beyond a logit_scale of fewer numbers than heads",
    "timm CR": "its first call in training draws its dropout twice",
    # Tests of test_gaps.py.
    "drop paths": "unknown blocks are proven with drop-paths that drop nothing",
    "dropouts": "unknown code is proven with dropouts that drop nothing",
}
