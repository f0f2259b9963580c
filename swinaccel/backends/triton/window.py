"""Launches the Triton kernels: shapes to launches, tensors to pointers. Imports Triton at the first use only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..spec.window import Geometry
from .triton_checks import DTYPES, check_kinds, check_position, check_shapes, lse_shape

MAX_TOKENS, MAX_HEAD_DIM = 1024, 128

# Bytes to assume in place of the device's own limit: how the tests stand in for smaller GPUs.
shared_memory_override: int | None = None

_CHECKS = 32  # programs that look over one window's mask
_BLOCK = 4096


_INSTALLED = find_spec("triton") is not None


def unsupported_reason(
    device: torch.device, dtype: torch.dtype, geometry: Geometry, num_heads: int, head_dim: int, interpret: bool
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
        return f"a window of {'x'.join(map(str, geometry.window))} holds more than {MAX_TOKENS} tokens"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} is larger than {MAX_HEAD_DIM}"
    if math.prod(geometry.size) * 3 * num_heads * head_dim >= 2**31:
        return "q, k and v of one image are 2^31 numbers or more"
    return None


@lru_cache(maxsize=16)
def device_shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use."""
    if device.type != "cuda":
        return 1 << 17
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache(maxsize=16)
def has_copy_engine(device: torch.device) -> bool:
    """Whether a device copies tiles by descriptors, and is of the kind that this was measured on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _precision(dtype: torch.dtype) -> str:
    """How a product of fp32 tiles is computed: TF32 exactly where PyTorch's own products would be."""
    if dtype != torch.float32:
        return "ieee"
    try:
        return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    except RuntimeError:  # the process configures precision through torch.backends.*.fp32_precision
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def first_line(error: Exception) -> str:
    """What an error is, in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


class _Launch:
    """A kernel with all but its tensors decided: compiled once for each kind of those, and then only run.

    Triton's own launch path looks at every argument of every call again; here the integers are part of the key
    under which a launch is kept, so that only device, dtype and alignment of the tensors are left to look at.

    Attributes:
        names: of the tensors that come from outside, as `check_kinds` takes them, "" for others.
    """

    __slots__ = ("arguments", "described", "grid", "kernel", "latest", "names", "options", "runners")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        names: tuple[str, ...] = (),
        **options: int,
    ) -> None:
        """Decide all about a launch.

        Args:
            names: of tensors that come from outside, as `check_kinds` takes them, "" for those that do not.
        """
        self.kernel, self.arguments, self.names, self.options = kernel, arguments, names, options
        self.grid = (*grid, 1, 1)[:3]
        self.described: dict[int, tuple[type, dict[str, Any]]] = {}  # see `DescribedLaunch`
        self.runners: dict[tuple, tuple[Any, bool]] = {}
        self.latest: tuple[Any, tuple[Any, bool]] = None, _NOT_COMPILED  # of the runners, and what it is kept under

    def __call__(self, *tensors: Any) -> None:
        index = tensors[0].get_device()  # -1 on the CPU
        if index >= 0 and index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):  # Triton launches on the current device, whatever its tensors say
                return self(*tensors)
        pointers: list[int | None] = []
        kind: list[Any] = []  # compared as a list, which takes less time than to hash it
        for one in tensors:
            if one is None:
                pointers.append(None)
                kind.append(None)
            else:
                pointer = one.data_ptr()
                pointers.append(pointer)
                kind += one.dtype, one.get_device(), not pointer & 15
        known, (run, takes_pointers) = self.latest
        if kind != known:
            run, takes_pointers = self.runners.get(tuple(kind), _NOT_COMPILED)
            self.latest = kind, (run, takes_pointers)
        if run is None:
            return self._compile(index, tensors, tuple(kind))
        if takes_pointers:
            for place, (cls, attributes) in self.described.items():
                descriptor: Any = object.__new__(cls)
                descriptor.__dict__ = {**attributes, "base": tensors[place]}
                pointers[place] = descriptor
            run(pointers)
        else:
            run(self._passed(tensors))

    def _compile(self, index: int, tensors: tuple[Tensor | None, ...], kind: tuple) -> None:
        check_kinds(self.names, tensors)
        compiled = self.kernel[self.grid](*self._passed(tensors), *self.arguments, **self.options)
        if compiled is not None:  # the interpreter compiles nothing
            from ..kernels.run import runner

            # Triton asks the driver of each tensor's memory whether its GPU sees it. Of a pointer it does not ask, and
            # need not where all tensors are on the one device.
            is_here = index >= 0 and all(one is None or one.get_device() == index for one in tensors)
            stream_of = torch._C._cuda_getCurrentRawStream if index >= 0 else None
            run = runner(compiled, self.grid, self.arguments, stream_of, index)
            self.runners[kind] = run, is_here
            self.latest = list(kind), self.runners[kind]

    def _passed(self, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """What the kernel is given for its tensors."""
        return tensors


class DescribedLaunch(_Launch):
    """A launch that gives some of its tensors, each of one shape and strides only, as descriptors.

    Triton's checks of a descriptor take as long as a launch: they are made once, when a kind of tensors is compiled
    for. From then on a descriptor is a copy of that one, about another tensor.
    """

    __slots__ = ("describe",)

    def __init__(self, describe: Mapping[int, Callable[[Any], Any]], *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.describe = describe  # by place among the tensors

    def _passed(self, tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        passed: list[Any] = list(tensors)
        for place, describe in self.describe.items():
            passed[place] = one = describe(passed[place])
            self.described[place] = type(one), {**vars(one), "base": None}
        return tuple(passed)


_NOT_COMPILED = (None, False)


_launches: dict[tuple, Any] = {}


def _keep(key: tuple, value: Any) -> Any:
    if len(_launches) >= 4096:  # sizes that never come back, such as those of a dynamic batch
        _launches.clear()
    _launches[key] = value
    return value


def is_small(device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int) -> bool:
    """Whether forward and backward of such a problem run the small-window kernels, which keep no log-sum-exp."""
    from ..kernels import launch

    shared_memory = shared_memory_override or device_shared_memory(device)
    return launch.is_small_backward(
        tokens=tokens, head_dim=head_dim, element_size=dtype.itemsize, shared_memory=shared_memory
    )


def _three(numbers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """One number for each of (depth, rows, columns); flat images have that one for their depth."""
    return numbers if len(numbers) == 3 else (depth, *numbers)


def are_heads_apart(tokens: Tensor, geometry: Geometry) -> bool:
    """Whether tokens are (B, H, W, heads, D), with an axis of their own for the heads, rather than (B, H, W, C)."""
    return tokens.dim() == len(geometry.size) + 3


def empty_image(tokens: Tensor, geometry: Geometry, packed: bool) -> Tensor:
    """What the output is written to: (B, H, W, heads * D), or (B, H, W, heads, D) with the heads before W in memory."""
    shape = tokens.shape
    if are_heads_apart(tokens, geometry):
        return tokens.new_empty((*shape[:-3], shape[-2], shape[-3], shape[-1])).transpose(-3, -2)
    return tokens.new_empty((*shape[:-1], shape[-1] // 3 if packed else shape[-1]))


class _Problem(NamedTuple):
    """What the launches of one attention problem depend on, and the key that they are kept under.

    Attributes:
        shape, strides: of qkv, which is packed, or of q, and then k and v have shapes; and so on, None for what is not.
        is_dense: whether table and index were made of a bias that has no index.
        kept: shapes of the output's gradient, the output and what is kept of the softmax, where this is a backward.
    """

    geometry: Geometry
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]
    num_heads: int
    parts: tuple[torch.Size, ...] | None
    table_shape: torch.Size | None
    table_strides: tuple[int, ...] | None
    index_shape: torch.Size | None
    is_dense: bool
    padding_shape: torch.Size | None
    mask_shape: torch.Size | None
    logit_scale_shape: torch.Size | None
    mask_value: float
    scale: float
    factors: tuple[torch.Size, ...] | None
    seed_shape: torch.Size | None
    dropout: float
    for_backward: bool
    precision: str
    shared_memory: int | None
    kept: tuple[torch.Size | None, ...] | None = None

    @property
    def batch(self) -> int:
        return self.shape[0]

    @property
    def packed(self) -> bool:
        return self.parts is None

    @property
    def channels(self) -> int:
        if self.packed:
            return self.shape[-1] // 3
        return self.shape[-1] * (self.shape[-2] if self.heads_apart else 1)

    @property
    def is_padded(self) -> bool:
        return self.padding_shape is not None

    @property
    def has_mask(self) -> bool:
        return self.mask_shape is not None

    @property
    def cosine(self) -> bool:
        return self.logit_scale_shape is not None

    @property
    def rank(self) -> int:
        return 0 if self.factors is None else self.factors[0][-1]

    @property
    def table_rows(self) -> int:
        return 0 if self.table_shape is None else self.table_shape[0]

    @property
    def head_dim(self) -> int:
        return self.channels // self.num_heads

    @property
    def is_small(self) -> bool:
        if not self.for_backward:
            from ..kernels import launch

            return self.geometry.tokens <= launch.SMALL_WINDOW
        return is_small(self.device, self.dtype, self.geometry.tokens, self.head_dim)

    @property
    def mask_mode(self) -> int:
        from ..kernels import tiles

        if self.has_mask:
            return tiles.MASK_TENSOR.value
        return (tiles.MASK_REGIONS if self.geometry.is_shifted and self.mask_value else tiles.MASK_NONE).value

    @property
    def bias_mode(self) -> int:
        from ..kernels import tiles

        if self.table_strides is None:
            return tiles.BIAS_NONE.value
        if self.is_small:
            return tiles.BIAS_TABLE.value
        return (tiles.BIAS_FACTORS if self.rank else tiles.BIAS_DENSE).value

    @property
    def image_strides(self) -> tuple[int, ...]:
        """Of the token images, (batch, depth, row, column, head), those of q, k, v first.

        From head to head the kernels count in heads, so that neighbours, which are one apart, are nothing to compute.
        """
        height, width = self.geometry.size[-2:]
        axes, rows = len(self.geometry.size), width * self.channels
        col, head = (self.head_dim, width) if self.heads_apart else (self.channels, 1)
        out = (math.prod(self.geometry.size) * self.channels, height * rows, rows, col, head)
        token_head = self.strides[axes + 1] // self.head_dim if self.heads_apart else 1
        return (self.strides[0], *_three(self.strides[1 : axes + 1], 0), token_head, *out)

    @property
    def heads_apart(self) -> bool:
        return len(self.strides) == len(self.geometry.size) + 3

    @property
    def window(self) -> tuple[int, ...]:
        return _three(self.geometry.window, 1)

    @property
    def is_volume(self) -> bool:
        return len(self.geometry.size) == 3

    @property
    def places(self) -> tuple[Any, ...]:
        geometry = self.geometry
        numbers = (self.scale, self.mask_value, self.dropout)
        sizes = (*_three(geometry.size, 1), *_three(geometry.grid, 1))
        return (*sizes, *_three(geometry.shift, 0), *_three(geometry.roll, 0), *numbers)

    @property
    def constants(self) -> tuple[Any, ...]:
        flags = (self.is_padded, self.geometry.roll_first, self.dropout > 0)
        shape = (self.window, self.is_volume, self.head_dim, self.packed, self.cosine)
        return (*shape, self.bias_mode, self.mask_mode, *flags)

    def dense(self, block_m: int, block_n: int) -> tuple[tuple[int, int, int], torch.dtype]:
        """Shape and dtype of the dense bias: rows and columns of whole tiles; for 16-bit compute fp16 whatever the
        dtype, bf16 would round it eight times coarser.
        """
        tokens = self.geometry.tokens
        rows, cols = -(-tokens // block_m) * block_m, -(-tokens // block_n) * block_n
        return (self.num_heads, rows, cols), torch.float32 if self.dtype == torch.float32 else torch.float16


def forget_launches() -> None:
    """Plan all launches again; what is compiled stays so."""
    _launches.clear()


def _registers(large: Any) -> dict[str, int]:
    """The launch option that holds the compiler to so many registers; AMD's has none."""
    return {"maxnreg": large.max_registers} if large.max_registers and torch.version.hip is None else {}


class _Forward:
    """The launches of one forward, and what it needs allocated."""

    __slots__ = ("attention", "check", "checks_shape", "dense", "expand", "is_small", "lse_shape")

    def __init__(self, problem: _Problem) -> None:
        from ..kernels import bias as bias_kernels
        from ..kernels import launch, tiles, window_fwd

        check_shapes(problem)
        geometry, tokens = problem.geometry, problem.geometry.tokens
        shared_memory = problem.shared_memory or device_shared_memory(problem.device)
        self.is_small = problem.is_small
        self.check: Any = None
        self.expand: Any = None
        self.checks_shape = (geometry.num_windows, _CHECKS)
        self.lse_shape = (0,)
        table_strides = (*(problem.table_strides or (0, 0)), problem.table_rows)
        if self.is_small:
            small = launch.small(
                tokens=tokens,
                head_dim=problem.head_dim,
                batch=problem.batch,
                positions=geometry.num_windows * problem.num_heads,
                element_size=problem.dtype.itemsize,
                shared_memory=shared_memory,
            )
            self.attention: Any = _Launch(
                window_fwd._window_attention_fwd_small_kernel,
                (geometry.num_windows * problem.num_heads, -(-problem.batch // small.images)),
                (
                    *problem.image_strides, *table_strides, problem.batch, problem.num_heads, *problem.places,
                    *problem.constants, problem.precision, small.block_n, small.block_d, small.images,
                ),
                ("", "qkv", "k", "v", "padding", "table", "index", "mask", "logit_scale", "seed"),
                num_warps=small.num_warps,
                num_stages=small.num_stages,
            )  # fmt: skip
            return
        large = launch.large(
            tokens=tokens,
            head_dim=problem.head_dim,
            batch=problem.batch,
            positions=geometry.num_windows * problem.num_heads,
            element_size=problem.dtype.itemsize,
            shared_memory=shared_memory,
        )
        self.dense = problem.dense(large.block_m, large.block_n)
        _, rows, cols = self.dense[0]
        if problem.bias_mode == tiles.BIAS_DENSE.value:
            self.expand = _expand(problem, self.dense)
        if problem.has_mask:
            self.check = _Launch(
                bias_kernels._check_mask_kernel,
                (geometry.num_windows, _CHECKS),
                (
                    *_three(geometry.grid, 1), *_three(geometry.shift, 0), problem.mask_value, problem.window,
                    problem.is_volume, _CHECKS, 1024,
                ),
            )  # fmt: skip
        if problem.for_backward:
            shape = lse_shape(problem.batch, geometry, problem.num_heads, problem.has_mask)
            self.lse_shape = shape  # type: ignore[assignment]
        self.attention = _Launch(
            window_fwd._window_attention_fwd_kernel,
            (rows // large.block_m * problem.num_heads * geometry.num_windows * -(-problem.batch // large.images),),
            (
                *problem.image_strides, *table_strides, problem.batch, problem.num_heads,
                *problem.places, *problem.constants, problem.for_backward, problem.precision, problem.rank or 16,
                _CHECKS, rows, cols, large.block_m, large.block_n, large.block_d, large.images,
            ),
            (
                "", "qkv", "k", "v", "padding", "table", "index", "mask", "", "logit_scale", "", "a factor", "a factor",
                "", "seed",
            ),
            num_warps=large.num_warps,
            num_stages=large.num_stages,
            **_registers(large),
        )  # fmt: skip


def _expand(problem: _Problem, dense: tuple[tuple[int, int, int], torch.dtype]) -> _Launch:
    """The launch that expands the live table into the dense bias."""
    from ..kernels import bias as bias_kernels
    from ..kernels import softmax

    (heads, rows, cols), dtype = dense
    limit = softmax.LARGEST.value if dtype == torch.float32 else 6e4
    assert problem.table_strides is not None
    return _Launch(
        bias_kernels._expand_bias_kernel,
        (-(-rows // 8), -(-cols // 128), -(-heads // 4)),
        (
            rows * cols, cols, *problem.table_strides, problem.table_rows, problem.geometry.tokens, rows, cols, heads,
            limit, 4, 8, 128,
        ),
        ("", "table", "index"),
    )  # fmt: skip


def _as_table(table: Tensor | None, index: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A bias (heads, N, N), which has no index, as a table with a row for every query and key.

    The index is made anew at each call: one that was kept might have been made inside a CUDA graph's memory.
    """
    if table is None or index is not None or table.dim() != 3:
        return table, index
    tokens = table.shape[-1]
    pairs = torch.arange(tokens * tokens, dtype=torch.int32, device=table.device)
    return table.flatten(1).t(), pairs.view(tokens, tokens)


def _shapes(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple([None if one is None else one.shape for one in tensors])


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
    dropout: float = 0.0,
    seed: Tensor | None = None,
    for_backward: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.shifted_window_attention`, by one kernel.

    Args:
        qkv: packed, or q alone where k and v are given, all with equal strides, the last one 1. Those may have an
            axis of their own for the heads, (B, H, W, heads, D), whose stride is a multiple of D; so has the output.
        index, mask, padding, logit_scale: contiguous.
        table: (T, heads); without index the bias itself, (heads, N, N).
        factors: q's (heads, N, R) and k's (heads, N, R) factors of the bias, and the table and index
            that they were computed from; where those differ from the live ones, the live table is used.
        dropout, seed: of the attention weights, and a (1,) int64 that its random numbers follow from.
        for_backward: keep what the backward needs.
    Returns:
        (B, H, W, heads * D), and where `for_backward` what is kept of the softmax, of `lse_shape`, which is empty for
        small windows.
    """
    device, dtype = qkv.device, qkv.dtype
    is_dense = index is None and table is not None
    if is_dense:
        table, index = _as_table(table, index)
    if not geometry.is_padded:
        padding = None
    # Of a geometry its numbers, since tuples are compared in a fraction of a dataclass's time.
    key = (
        geometry.window, geometry.shift, geometry.roll_first, device, dtype, qkv.shape, qkv.stride(), num_heads,
        None if k is None else _shapes(k, v), None if table is None else table.shape,
        None if table is None else table.stride(), None if index is None else index.shape, is_dense,
        None if padding is None else padding.shape, None if mask is None else mask.shape,
        None if logit_scale is None else logit_scale.shape, mask_value, scale,
        None if factors is None else _shapes(*factors[:2]), None if seed is None else seed.shape, dropout, for_backward,
        "ieee" if dtype is not torch.float32 else _precision(dtype), shared_memory_override,
    )  # fmt: skip
    forward = _launches.get(key) or _keep(key, _Forward(_Problem(geometry, *key[3:])))
    out = empty_image(qkv, geometry, k is None)
    lse = torch.empty(forward.lse_shape, dtype=torch.float32, device=device) if for_backward else None
    if out.numel() == 0:
        return out, lse
    if forward.is_small:
        forward.attention(out, qkv, k, v, padding, table, index, mask, logit_scale, seed)
        return out, lse

    unusual = dense = q_factor = k_factor = stale = None
    if forward.check is not None:
        unusual = torch.empty(forward.checks_shape, dtype=torch.int32, device=device)
        forward.check(unusual, mask)
    if factors is not None:
        assert table is not None
        assert index is not None
        q_factor, k_factor, known_table, known_index = factors
        stale = torch.zeros(1, dtype=torch.int32, device=device)
        _compare(stale, table.contiguous(), known_table)
        _compare(stale, index, known_index)
    elif forward.expand is not None:
        shape, dtype = forward.dense
        dense = torch.empty(shape, dtype=dtype, device=device)
        forward.expand(dense, table, index)
    forward.attention(
        out, qkv, k, v, padding, table, index, mask, unusual, logit_scale, dense, q_factor, k_factor, stale, seed, lse
    )
    return out, lse


class _Backward:
    """The launches of one backward, and what it needs allocated."""

    __slots__ = (
        "bias", "bias_shape", "dense", "expand", "is_small", "key", "padding_shape", "query", "query_shape", "reduce",
        "row_shape", "scale_shape", "small",
    )  # fmt: skip

    def __init__(self, problem: _Problem, grad_bias: bool) -> None:
        from ..kernels import bias as bias_kernels
        from ..kernels import launch, window_bwd

        check_shapes(problem)
        geometry, heads, batch = problem.geometry, problem.num_heads, problem.batch
        tokens, windows = geometry.tokens, geometry.num_windows
        self.is_small = problem.is_small
        self.expand: Any = None
        self.bias: Any = None
        self.reduce = _Launch(
            bias_kernels._reduce_bias_kernel,
            (math.prod(2 * side - 1 for side in geometry.window), heads),
            (problem.table_rows, heads, problem.window, 64 if self.is_small else 256),
            ("", "", "index"),
            num_warps=2,
        )
        options: dict[str, int] = {
            "head_dim": problem.head_dim,
            "element_size": problem.dtype.itemsize,
            "shared_memory": problem.shared_memory or device_shared_memory(problem.device),
        }
        if self.is_small:
            small = launch.small_backward(tokens=tokens, batch=batch, windows=windows, num_heads=heads, **options)
            parts = -(-windows // small.windows) * -(-batch // small.images)
            self.small: Any = _Launch(
                window_bwd._window_attention_bwd_small_kernel,
                (-(-windows // small.windows) * heads, -(-batch // small.images)),
                (
                    *problem.image_strides, *(problem.table_strides or (0, 0)), problem.table_rows, batch, heads,
                    *problem.places, *problem.constants, grad_bias, problem.precision, small.block_n, small.block_d,
                    small.images, small.windows,
                ),
                (*[""] * 6, "grad", "qkv", "k", "v", "padding", "table", "index", "mask", "logit_scale", "seed"),
                num_warps=small.num_warps,
                num_stages=small.num_stages,
            )  # fmt: skip
            self.bias_shape = (parts, heads, tokens, tokens)
            self.scale_shape: tuple[int, ...] = (parts, heads)
            self.padding_shape = (parts, 3 * problem.channels)
            return
        large = launch.large_backward(tokens=tokens, **options)
        blocks = [(one.block_m, one.block_n) for one in large]
        self.dense = problem.dense(max(m for m, _ in blocks), max(n for _, n in blocks))
        _, rows, cols = self.dense[0]
        if problem.table_strides is not None:
            self.expand = _expand(problem, self.dense)

        def plan(
            kernel: Any,
            one: launch.LargeLaunch,
            grid: tuple[int, ...],
            names: tuple[str, ...],
            *sizes: int,
            images: Any = (),
        ) -> _Launch:
            names = (*names, "qkv", "k", "v", "padding", "mask", "logit_scale", "", "seed")
            numbers = (*problem.image_strides, *sizes, heads, *problem.places, *problem.constants)
            shape = (problem.precision, rows, cols, one.block_m, one.block_n, one.block_d, *images)
            options = {"num_warps": one.num_warps, "num_stages": one.num_stages, **_registers(one)}
            return _Launch(kernel, grid, (*numbers, *shape), names, **options)

        parts = heads * windows * batch
        self.row_shape = (batch, windows, heads, tokens)
        self.query_shape = (*self.row_shape, problem.head_dim)
        tiles = -(-tokens // large.query.block_m)
        self.query = plan(
            window_bwd._window_attention_bwd_query_kernel, large.query, (tiles * parts,),
            (*[""] * 5, "grad", "out", "lse"),
        )  # fmt: skip
        self.scale_shape = (batch, windows, tiles, heads)
        key_tiles = -(-tokens // large.key.block_n)
        self.key = plan(
            window_bwd._window_attention_bwd_key_kernel, large.key, (key_tiles * parts,),
            (*[""] * 5, "grad", "lse", "", ""),
        )  # fmt: skip
        self.padding_shape = (batch * windows * max(tiles, key_tiles), 3 * problem.channels)
        if grad_bias:
            tiles = -(-tokens // large.bias.block_m) * -(-tokens // large.bias.block_n) * heads
            chunk = launch.bias_chunk(tiles=tiles, windows=windows, batch=batch)
            groups = -(-windows // chunk.windows), -(-batch // chunk.images)
            self.bias = plan(
                window_bwd._window_attention_bwd_bias_kernel, large.bias, (tiles, *groups),
                ("", "grad", "lse", "", "", ""), batch, images=(chunk.images, chunk.windows),
            )  # fmt: skip
            self.bias_shape = (groups[0] * groups[1], heads, tokens, tokens)


class Gradients(NamedTuple):
    """Gradients of one call, each as its input; None where not asked for."""

    qkv: Tensor | None
    k: Tensor | None
    v: Tensor | None
    table: Tensor | None
    padding: Tensor | None
    logit_scale: Tensor | None


def shifted_window_attention_backward(
    grad_out: Tensor,
    out: Tensor | None,
    lse: Tensor,
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
    dropout: float,
    seed: Tensor | None,
    grad_table: bool,
) -> Gradients:
    """Gradients of `shifted_window_attention` with `for_backward`.

    Args:
        grad_out: in memory as `empty_image` makes it, and so are tokens with an axis for the heads.
        out, lse: what the forward gave; small windows need no out.
        qkv, k, v: else contiguous, as everything.
        grad_table: whether the table's gradient is wanted, the only one that costs much.
    """
    device = qkv.device
    pad = padding if geometry.is_padded else None
    is_dense = table is not None and index is None
    table, index = _as_table(table, index)
    grad_table = grad_table and table is not None
    problem = _Problem(
        geometry, device, qkv.dtype, qkv.shape, qkv.stride(), num_heads, None if k is None else _shapes(k, v),
        None if table is None else table.shape, None if table is None else table.stride(),
        None if index is None else index.shape, is_dense, None if pad is None else pad.shape,
        None if mask is None else mask.shape, None if logit_scale is None else logit_scale.shape, mask_value, scale,
        None, None if seed is None else seed.shape, dropout, True, _precision(qkv.dtype), shared_memory_override,
        _shapes(grad_out, out, lse),
    )  # fmt: skip
    key = ("backward", grad_table, problem)
    backward = _launches.get(key) or _keep(key, _Backward(problem, grad_table))

    def fp32(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    grad_qkv, grad_k, grad_v = (None if t is None else torch.empty_like(t) for t in (qkv, k, v))
    grad_bias = fp32(backward.bias_shape) if grad_table else None
    grad_scale = None if logit_scale is None else fp32(backward.scale_shape)
    grad_pad = None if pad is None else torch.zeros(backward.padding_shape, dtype=torch.float32, device=device)
    if grad_out.numel() == 0:
        grad_bias = None if grad_bias is None else grad_bias.zero_()
    elif backward.is_small:
        backward.small(
            grad_qkv, grad_k, grad_v, grad_bias, grad_pad, grad_scale, grad_out, qkv, k, v, pad, table, index, mask,
            logit_scale, seed,
        )  # fmt: skip
    else:
        dense = None
        if backward.expand is not None:
            dense = torch.empty(backward.dense[0], dtype=backward.dense[1], device=device)
            backward.expand(dense, table, index)
        delta = fp32(backward.row_shape)
        norms = None if logit_scale is None else fp32(backward.row_shape)
        queries = torch.empty(backward.query_shape, dtype=qkv.dtype, device=device)
        operands = (qkv, k, v, pad, mask, logit_scale, dense, seed)
        backward.query(grad_qkv, grad_pad, grad_scale, delta, queries, grad_out, out, lse, *operands)
        backward.key(grad_qkv, grad_k, grad_v, grad_pad, norms, grad_out, lse, delta, queries, *operands)
        if grad_table:
            backward.bias(grad_bias, grad_out, lse, delta, norms, queries, *operands)
    return Gradients(
        grad_qkv,
        grad_k,
        grad_v,
        None if grad_bias is None else _reduce_bias(grad_bias, table, None if is_dense else index, backward),
        None if padding is None else _sum_parts(grad_pad, padding),
        None if grad_scale is None else grad_scale.flatten(0, -2).sum(0).to(logit_scale.dtype),  # type: ignore[union-attr]
    )


def _sum_parts(parts: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if parts is None else parts.sum(0).to(like.dtype)


def _reduce_bias(parts: Tensor, table: Tensor | None, index: Tensor | None, backward: _Backward) -> Tensor:
    """From the dense bias gradients of all parts (parts, heads, N, N) to the table's (T, heads), or without index
    to that of a bias which is dense itself.
    """
    assert table is not None
    grad_bias = parts[0] if parts.shape[0] == 1 else parts.sum(0)
    if index is None:
        return grad_bias.to(table.dtype)
    grad_table = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    if torch.are_deterministic_algorithms_enabled():  # the kernel is, unless the index is an unusual one
        grad_table.index_put_((index.view(-1),), grad_bias.flatten(1).t(), accumulate=True)
    else:
        backward.reduce(grad_table, grad_bias, index)
    return grad_table.to(table.dtype)


def _compare(differs: Tensor, left: Tensor, right: Tensor) -> None:
    """Raise the flag where two contiguous tensors of one shape differ."""
    if left.shape != right.shape:
        differs.fill_(1)
        return
    count = left.numel()
    run = _launches.get(("compare", left.device, count)) or _plan_compare(left.device, count)
    run(differs, left, right)


def _plan_compare(device: torch.device, count: int) -> _Launch:
    from ..kernels import bias as bias_kernels

    launch = _Launch(bias_kernels._compare_kernel, (-(-count // _BLOCK),), (count, _BLOCK))
    return _keep(("compare", device, count), launch)


def position_table(coords: Tensor, hidden_weight: Tensor, hidden_bias: Tensor, weight: Tensor) -> Tensor:
    """SwinV2's bias table 16 · sigmoid(MLP(coords)), as one kernel in fp32.

    Args:
        coords: (..., 2), T log-spaced offsets.
        hidden_weight, hidden_bias: (hidden, 2) and (hidden,).
        weight: (heads, hidden).
    Returns:
        (T, heads), fp32; the heads come first in memory.
    """
    key = ("position", coords.device, coords.shape, hidden_weight.shape, hidden_bias.shape, weight.shape)
    run, shape = _launches.get(key) or _plan_position(*key)
    table = torch.empty(shape, dtype=torch.float32, device=coords.device)
    run(table, coords.contiguous(), hidden_weight.contiguous(), hidden_bias.contiguous(), weight.contiguous())
    return table.t()


def _plan_position(
    name: str, device: torch.device, coords: torch.Size, weight1: torch.Size, bias1: torch.Size, weight2: torch.Size
) -> tuple[_Launch, tuple[int, int]]:
    from ..kernels import bias as bias_kernels
    from ..kernels.launch import power_of_two

    rows, heads, hidden = check_position(coords, weight1, bias1, weight2)
    launch = _Launch(
        bias_kernels._position_table_kernel,
        (-(-rows // 16), heads),
        (rows, hidden, 16, min(512, power_of_two(hidden))),
        ("", "coords", "hidden_weight", "hidden_bias", "weight"),
    )
    return _keep((name, device, coords, weight1, bias1, weight2), (launch, (heads, rows)))
