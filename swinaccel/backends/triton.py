"""Launches the Triton kernels: shapes to launches, tensors to pointers. Imports Triton at the first use only."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from ..config import env_interpret
from ..spec import Geometry

MAX_TOKENS, MAX_HEAD_DIM = 1024, 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@lru_cache(maxsize=1)
def _installed() -> bool:
    return find_spec("triton") is not None


def unsupported_reason(device: torch.device, dtype: torch.dtype, geometry: Geometry, head_dim: int) -> str | None:
    """Why the kernels cannot serve a problem, as one sentence, or None."""
    if not _installed():
        return "Triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and env_interpret()):
        return f"the Triton kernels run on CUDA devices, not on {device.type}"
    if device.type == "cuda" and env_interpret():
        return "TRITON_INTERPRET=1 interprets the kernels on CPU tensors only"
    if dtype not in DTYPES:
        return f"the Triton kernels take fp16, bf16 and fp32, not {dtype}"
    if geometry.tokens > MAX_TOKENS:
        return f"a window of {geometry.window[0]}x{geometry.window[1]} holds more than {MAX_TOKENS} tokens"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is larger than {MAX_HEAD_DIM}"
    return None


# Bytes to assume in place of the device's own limit: how the tests stand in for smaller GPUs.
shared_memory_override: int | None = None


@lru_cache(maxsize=16)
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 1 << 17
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


def _precision(dtype: torch.dtype) -> str:
    """How a product of fp32 tiles is computed: TF32 exactly where PyTorch's own products would be."""
    if dtype != torch.float32:
        return "ieee"
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # the process configures precision through torch.backends.*.fp32_precision
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def shifted_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    *,
    num_heads: int,
    table: Tensor | None,
    index: Tensor | None,
    padding: Tensor | None,
    mask: Tensor | None,
    mask_value: float,
    scale: float,
    logit_scale: Tensor | None,
    factors: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """As `reference.shifted_window_attention`, with one kernel.

    Args:
        q, k, v: with equal strides, the last one 1.
        factors: q's (heads, N, R) and k's (heads, N, R) factors of the bias in log2 units, and the table and index
            that they were computed from; where those differ from the live ones, the live table is used.
    """
    if q.device.type == "cuda" and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return _launch(
                q, k, v, geometry, num_heads, table, index, padding, mask, mask_value, scale, logit_scale, factors
            )
    return _launch(
        q, k, v, geometry, num_heads, table, index, padding, mask, mask_value, scale, logit_scale, factors
    )


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Geometry,
    num_heads: int,
    table: Tensor | None,
    index: Tensor | None,
    padding: Tensor | None,
    mask: Tensor | None,
    mask_value: float,
    scale: float,
    logit_scale: Tensor | None,
    factors: tuple[Tensor, Tensor, Tensor, Tensor] | None,
) -> Tensor:
    from ..kernels import bias as bias_kernels
    from ..kernels import launch, window_fwd

    batch, height, width, channels = q.shape
    head_dim = channels // num_heads
    out = torch.empty((batch, height, width, channels), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    tokens, (windows_h, windows_w) = geometry.tokens, geometry.grid
    pad_q = pad_k = pad_v = q  # never read without HAS_PAD
    has_pad = geometry.is_padded and padding is not None
    if has_pad:
        pad_q, pad_k, pad_v = padding.contiguous().chunk(3)
    if index is not None:
        index = index.contiguous()
    if mask is not None:
        mask = mask.contiguous()
        mask_mode = window_fwd.MASK_TENSOR
    elif geometry.is_shifted and mask_value:
        mask_mode = window_fwd.MASK_REGIONS
    else:
        mask_mode = window_fwd.MASK_NONE
    tensors = (out, q, k, v, pad_q, pad_k, pad_v, table, index, mask)
    strides = (*q.stride()[:3], *out.stride()[:3], *(table.stride() if table is not None else (0, 0)))
    places = (height, width, windows_h, windows_w, *geometry.shift, *geometry.roll, scale, mask_value)
    constants = {
        "WINDOW_H": geometry.window[0],
        "WINDOW_W": geometry.window[1],
        "HEAD_DIM": head_dim,
        "COSINE": logit_scale is not None,
        "MASK": mask_mode,
        "HAS_PAD": has_pad,
        "ROLL_FIRST": geometry.roll_first,
        "PRECISION": _precision(q.dtype),
    }
    element_size = q.element_size()
    shared_memory = shared_memory_override or _shared_memory(q.device)

    if tokens <= launch.SMALL_WINDOW:
        small = launch.small(
            tokens=tokens,
            head_dim=head_dim,
            batch=batch,
            positions=geometry.num_windows * num_heads,
            element_size=element_size,
            shared_memory=shared_memory,
        )
        grid = (geometry.num_windows * num_heads, -(-batch // small.images))
        window_fwd._window_attention_fwd_small_kernel[grid](
            *tensors,
            logit_scale,
            *strides,
            batch,
            num_heads,
            *places,
            **constants,
            BIAS=window_fwd.BIAS_NONE if table is None else window_fwd.BIAS_TABLE,
            BLOCK_N=small.block_n,
            BLOCK_D=small.block_d,
            IMAGES=small.images,
            num_warps=small.num_warps,
            num_stages=small.num_stages,
        )
        return out

    large = launch.large(
        tokens=tokens, head_dim=head_dim, element_size=element_size, shared_memory=shared_memory
    )
    masked = dense = q_factor = k_factor = stale = None
    rank = 16
    if mask is not None:
        masked = torch.empty(geometry.num_windows, dtype=torch.int32, device=q.device)
        bias_kernels._flag_masked_windows_kernel[(geometry.num_windows,)](
            masked, mask, tokens * tokens, BLOCK=4096
        )
    if table is None:
        bias_mode = window_fwd.BIAS_NONE
    elif factors is not None:
        bias_mode = window_fwd.BIAS_FACTORS
        q_factor, k_factor, known_table, known_index = factors
        rank = q_factor.shape[-1]
        stale = torch.zeros(1, dtype=torch.int32, device=q.device)
        for live, known in ((table.contiguous(), known_table), (index, known_index)):
            grid = (-(-live.numel() // 4096),)
            bias_kernels._compare_kernel[grid](stale, live, known, live.numel(), BLOCK=4096)
    else:
        bias_mode = window_fwd.BIAS_DENSE
        dense = _expand_bias(table, index, q.dtype, large.block_m, large.block_n)
    grid = (-(-tokens // large.block_m) * num_heads * geometry.num_windows * batch,)
    window_fwd._window_attention_fwd_kernel[grid](
        *tensors,
        masked,
        logit_scale,
        dense,
        q_factor,
        k_factor,
        stale,
        *strides,
        *(dense.stride()[:2] if dense is not None else (0, 0)),
        num_heads,
        *places,
        **constants,
        BIAS=bias_mode,
        RANK=rank,
        BLOCK_M=large.block_m,
        BLOCK_N=large.block_n,
        BLOCK_D=large.block_d,
        num_warps=large.num_warps,
        num_stages=large.num_stages,
    )
    return out


def _expand_bias(table: Tensor, index: Tensor | None, dtype: torch.dtype, block_m: int, block_n: int) -> Tensor:
    """The dense bias (heads, rows, cols) of a call in log2 units, padded to whole tiles, -inf beyond N.

    For 16-bit compute it is kept in fp16 whatever the dtype: bf16 would round it eight times coarser.
    """
    from ..kernels import bias as bias_kernels

    assert index is not None
    tokens, heads = index.shape[0], table.shape[1]
    rows, cols = -(-tokens // block_m) * block_m, -(-tokens // block_n) * block_n
    dense_dtype = torch.float32 if dtype == torch.float32 else torch.float16
    dense = torch.empty((heads, rows, cols), dtype=dense_dtype, device=table.device)
    tile_rows, tile_cols = 16, 128
    bias_kernels._expand_bias_kernel[(heads, -(-rows // tile_rows), -(-cols // tile_cols))](
        dense,
        table,
        index,
        *dense.stride()[:2],
        *table.stride(),
        tokens,
        rows,
        cols,
        LIMIT=3e38 if dense_dtype == torch.float32 else 6e4,
        ROWS=tile_rows,
        COLS=tile_cols,
    )
    return dense
