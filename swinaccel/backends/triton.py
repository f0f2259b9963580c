"""Launches the Triton kernels: shapes to launches, tensors to pointers. Imports Triton at the first use only."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..spec import Geometry

MAX_TOKENS, MAX_HEAD_DIM = 1024, 128
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Bytes to assume in place of the device's own limit: how the tests stand in for smaller GPUs.
shared_memory_override: int | None = None

_CHECKS = 32  # programs that look over one window's mask
_BLOCK = 4096


_INSTALLED = find_spec("triton") is not None


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, geometry: Geometry, head_dim: int, interpret: bool
) -> str | None:
    """Why the kernels cannot serve a problem, as one sentence, or None."""
    if not _INSTALLED:
        return "Triton is not installed"
    if device.type != "cuda" and not (device.type == "cpu" and interpret):
        return f"the Triton kernels run on CUDA devices, not on {device.type}"
    if dtype not in DTYPES:
        return f"the Triton kernels take fp16, bf16 and fp32, not {dtype}"
    if interpret and dtype == torch.bfloat16:
        return "Triton's interpreter takes the bits of a bfloat16 for an integer when it multiplies"
    if geometry.tokens > MAX_TOKENS:
        return f"a window of {geometry.window[0]}x{geometry.window[1]} holds more than {MAX_TOKENS} tokens"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is larger than {MAX_HEAD_DIM}"
    return None


@lru_cache(maxsize=16)
def _device_shared_memory(device: torch.device) -> int:
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


class _Launch:
    """A kernel with all but its tensors decided: compiled once for each kind of those, and then only run.

    Triton's own launch path looks at every argument of every call again; here the integers are part of the key
    under which a launch is kept, so that only dtypes and alignment of the tensors are left to look at.
    """

    __slots__ = ("arguments", "grid", "kernel", "options", "runners")

    def __init__(self, kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], **options: int) -> None:
        self.kernel, self.arguments, self.options = kernel, arguments, options
        self.grid = (*grid, 1, 1)[:3]
        self.runners: dict[tuple, Any] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        kind = tuple([None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors])
        runner = self.runners.get(kind)
        if runner is None:
            compiled = self.kernel[self.grid](*tensors, *self.arguments, **self.options)
            if compiled is not None:  # the interpreter compiles nothing
                self.runners[kind] = compiled[self.grid]
        else:
            runner(*tensors, *self.arguments)


_launches: dict[tuple, Any] = {}


def _keep(key: tuple, value: Any) -> Any:
    if len(_launches) >= 4096:  # sizes that never come back, such as those of a dynamic batch
        _launches.clear()
    _launches[key] = value
    return value


class _Window:
    """The launches of one attention problem, and what it needs allocated."""

    __slots__ = ("attention", "check", "checks_shape", "dense_dtype", "dense_shape", "expand", "is_small")

    def __init__(self, is_small: bool) -> None:
        self.is_small = is_small
        self.attention: Any = None
        self.check: Any = None
        self.expand: Any = None
        self.checks_shape: tuple[int, ...] = ()
        self.dense_shape: tuple[int, ...] = ()
        self.dense_dtype = torch.float16


def shifted_window_attention(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
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
    factors: tuple[Tensor, ...] | None = None,
) -> Tensor:
    """As `reference.shifted_window_attention`, by one kernel.

    Args:
        qkv: packed, or q alone where k and v are given, all with equal strides, the last one 1.
        index, mask, padding, logit_scale: contiguous.
        factors: q's (heads, N, R) and k's (heads, N, R) factors of the bias in log2 units, and the table and index
            that they were computed from; where those differ from the live ones, the live table is used.
    """
    device = qkv.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return shifted_window_attention(
                qkv, k, v, geometry, num_heads=num_heads, table=table, index=index, padding=padding, mask=mask,
                mask_value=mask_value, scale=scale, logit_scale=logit_scale, factors=factors,
            )  # fmt: skip
    batch, height, width, channels = qkv.shape
    channels = channels // 3 if k is None else channels
    out = torch.empty((batch, height, width, channels), dtype=qkv.dtype, device=device)
    if out.numel() == 0:
        return out
    if not geometry.is_padded:
        padding = None
    rank = 0 if factors is None else factors[0].shape[-1]
    key = (
        device, qkv.dtype, batch, qkv.stride(), geometry, num_heads, channels, k is None, padding is None,
        None if table is None else table.stride(), mask is None, mask_value, scale, logit_scale is None, rank,
        _precision(qkv.dtype), shared_memory_override,
    )  # fmt: skip
    window = _launches.get(key) or _keep(key, _plan(*key))
    if window.is_small:
        window.attention(out, qkv, k, v, padding, table, index, mask, logit_scale)
        return out

    unusual = dense = q_factor = k_factor = stale = None
    if window.check is not None:
        unusual = torch.empty(window.checks_shape, dtype=torch.int32, device=device)
        window.check(unusual, mask)
    if factors is not None:
        assert table is not None
        assert index is not None
        q_factor, k_factor, known_table, known_index = factors
        stale = torch.zeros(1, dtype=torch.int32, device=device)
        _compare(stale, table.contiguous(), known_table)
        _compare(stale, index, known_index)
    elif window.expand is not None:
        dense = torch.empty(window.dense_shape, dtype=window.dense_dtype, device=device)
        window.expand(dense, table, index)
    window.attention(
        out, qkv, k, v, padding, table, index, mask, unusual, logit_scale, dense, q_factor, k_factor, stale
    )
    return out


def _plan(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    strides: tuple[int, ...],
    geometry: Geometry,
    num_heads: int,
    channels: int,
    packed: bool,
    unpadded: bool,
    table_strides: tuple[int, ...] | None,
    no_mask: bool,
    mask_value: float,
    scale: float,
    dot_product: bool,
    rank: int,
    precision: str,
    shared_memory: int | None,
) -> _Window:
    """The launches for one problem; its arguments are the key that they are kept under."""
    from ..kernels import bias as bias_kernels
    from ..kernels import launch, window_fwd

    (height, width), (window_h, window_w), tokens = geometry.size, geometry.window, geometry.tokens
    head_dim, element_size = channels // num_heads, dtype.itemsize
    shared_memory = shared_memory or _device_shared_memory(device)
    if not no_mask:
        mask_mode = window_fwd.MASK_TENSOR
    elif geometry.is_shifted and mask_value:
        mask_mode = window_fwd.MASK_REGIONS
    else:
        mask_mode = window_fwd.MASK_NONE
    out_strides = (height * width * channels, width * channels, channels)
    places = (height, width, *geometry.grid, *geometry.shift, *geometry.roll, scale, mask_value)
    shared = (window_h, window_w, head_dim, packed, not dot_product)
    flags = (mask_mode.value, not unpadded, geometry.roll_first, precision)
    plan = _Window(tokens <= launch.SMALL_WINDOW)

    if plan.is_small:
        small = launch.small(
            tokens=tokens,
            head_dim=head_dim,
            batch=batch,
            positions=geometry.num_windows * num_heads,
            element_size=element_size,
            shared_memory=shared_memory,
        )
        bias_mode = window_fwd.BIAS_NONE if table_strides is None else window_fwd.BIAS_TABLE
        plan.attention = _Launch(
            window_fwd._window_attention_fwd_small_kernel,
            (geometry.num_windows * num_heads, -(-batch // small.images)),
            (
                *strides[:3], *out_strides, *(table_strides or (0, 0)), batch, num_heads, *places, *shared,
                bias_mode.value, *flags, small.block_n, small.block_d, small.images,
            ),
            num_warps=small.num_warps,
            num_stages=small.num_stages,
        )  # fmt: skip
        return plan

    large = launch.large(tokens=tokens, head_dim=head_dim, element_size=element_size, shared_memory=shared_memory)
    rows = -(-tokens // large.block_m) * large.block_m
    cols = -(-tokens // large.block_n) * large.block_n
    bias_mode = window_fwd.BIAS_FACTORS if rank else window_fwd.BIAS_DENSE
    if table_strides is None:
        bias_mode = window_fwd.BIAS_NONE
    elif not rank:
        # For 16-bit compute the dense form is fp16 whatever the dtype: bf16 would round it eight times coarser.
        wide = dtype == torch.float32
        plan.dense_shape, plan.dense_dtype = (num_heads, rows, cols), torch.float32 if wide else torch.float16
        plan.expand = _Launch(
            bias_kernels._expand_bias_kernel,
            (-(-rows // 16), -(-cols // 128), -(-num_heads // 4)),
            (rows * cols, cols, *table_strides, tokens, rows, cols, num_heads, 3e38 if wide else 6e4, 4, 16, 128),
        )
    if mask_mode == window_fwd.MASK_TENSOR:
        plan.checks_shape = (geometry.num_windows, _CHECKS)
        plan.check = _Launch(
            bias_kernels._check_mask_kernel,
            (geometry.num_windows, _CHECKS),
            (*geometry.grid, *geometry.shift, mask_value, window_h, window_w, _CHECKS, 1024),
        )
    plan.attention = _Launch(
        window_fwd._window_attention_fwd_kernel,
        (rows // large.block_m * num_heads * geometry.num_windows * batch,),
        (
            *strides[:3], *out_strides, *(table_strides or (0, 0)), rows * cols, cols, num_heads, *places, *shared,
            bias_mode.value, *flags, rank or 16, _CHECKS, large.block_m, large.block_n, large.block_d,
        ),
        num_warps=large.num_warps,
        num_stages=large.num_stages,
    )  # fmt: skip
    return plan


def _compare(differs: Tensor, left: Tensor, right: Tensor) -> None:
    """Raise the flag where two contiguous tensors of one shape differ."""
    from ..kernels import bias as bias_kernels

    if left.shape != right.shape:
        differs.fill_(1)
        return
    count = left.numel()
    key = ("compare", left.device, count)
    run = _launches.get(key) or _keep(
        key, _Launch(bias_kernels._compare_kernel, (-(-count // _BLOCK),), (count, _BLOCK))
    )
    run(differs, left, right)


def position_table(coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor:
    """SwinV2's bias table 16 · sigmoid(MLP(coords)), as one kernel in fp32.

    Args:
        coords: (..., 2), T log-spaced offsets.
        hidden_weight, hidden_bias: (hidden, 2) and (hidden,).
        weight: (heads, hidden).
    Returns:
        (T, heads), fp32.
    """
    from ..kernels import bias as bias_kernels
    from ..kernels.launch import power_of_two

    rows, (heads, hidden) = coords.numel() // 2, weight.shape
    table = torch.empty((rows, heads), dtype=torch.float32, device=coords.device)
    key = ("position", coords.device, rows, heads, hidden)
    run = _launches.get(key) or _keep(
        key,
        _Launch(
            bias_kernels._position_table_kernel,
            (-(-rows // 16),),
            (rows, heads, hidden, 16, power_of_two(heads), 64),
        ),
    )
    run(table, coords.contiguous(), hidden_weight.contiguous(), hidden_bias.contiguous(), weight.contiguous())
    return table
