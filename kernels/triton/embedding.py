"""The patch embedding of an image: patches that neither overlap nor leave gaps, so that its convolution is a product.

It is bound by memory: the image is read once, and the result written once, as rows of channels, normalised or not. A
patch is gathered where it lies, its numbers in the order of the weight's: by channel, row and column.
"""

import triton
import triton.language as tl

from .pointwise import load_channels, normalised


@triton.jit
def _embed_kernel(
    out_ptr,  # (batch, down, across, C)
    image_ptr,  # (batch, K // (PATCH_H * PATCH_W), down * PATCH_H, across * PATCH_W)
    weight_ptr,  # (C, K)
    bias_ptr, norm_weight_ptr, norm_bias_ptr,  # (C,) or None
    rows,  # batch * down * across
    down, across, eps,
    C: tl.constexpr, K: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, HAS_NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Embed BLOCK_M patches, along the rows of the image, in parts of BLOCK_K numbers each.

    In 16 numbers there are few rows of a patch, so that a load reads long runs of neighbouring patches' pixels.
    """
    tl.static_assert(C <= BLOCK_C)
    tl.static_assert(K % (PATCH_H * PATCH_W) == 0)
    patch = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # fits 32 bits, in which divisions are quick
    offs_c = tl.arange(0, BLOCK_C)
    inside_m, inside_c = patch < rows, offs_c < C
    # A width made of patches is known to be a multiple of their width: pixels of a patch's row are read at once.
    height, width = down * PATCH_H, across * PATCH_W
    image = (patch // (down * across)).to(tl.int64)
    row, col = patch // across % down * PATCH_H, patch % across * PATCH_W
    offs_m = (image * (K // (PATCH_H * PATCH_W)) * height + row) * width + col
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        inside_k = offs_k < K
        channel = (offs_k // (PATCH_H * PATCH_W)).to(tl.int64)
        pixels = (channel * height + offs_k // PATCH_W % PATCH_H) * width + offs_k % PATCH_W
        inside = inside_m[:, None] & inside_k[None, :]
        patches = tl.load(image_ptr + offs_m[:, None] + pixels[None, :], mask=inside, other=0.0)
        inside = inside_c[:, None] & inside_k[None, :]
        weight = tl.load(weight_ptr + offs_c[:, None] * K + offs_k[None, :], mask=inside, other=0.0)
        acc = tl.dot(patches, tl.trans(weight), acc, input_precision="ieee")
    if bias_ptr is not None:
        acc += load_channels(bias_ptr, offs_c, C)
    if HAS_NORM:
        acc = normalised(acc, norm_weight_ptr, norm_bias_ptr, offs_c, eps, C)
    offs = patch.to(tl.int64)[:, None] * C + offs_c[None, :]
    inside = inside_m[:, None] & inside_c[None, :]
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=inside)
