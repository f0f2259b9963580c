"""Plan whole blocks: attention with the norms, residual sums and MLP around it in few kernels.

That a class of blocks is built as its family says is proven at `accelerate()`; here it is decided, from live modules,
whether these are plain enough to be stood in for now. Where they are not, and where anything about dtypes is not
obviously the same, the answer is no, and the block runs its own forward around the attention alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends.torch import block as torch_block
from ..backends.torch import products
from ..backends.triton import block as kernels
from ..backends.triton.launches import BoundLaunch
from ..config import AccelConfig, env_strict
from ..errors import FallbackError
from ..layers import PLAIN_TENSORS, has_hooks, is_builtin, replaced_methods
from ..ops import block_autograd as recorded
from ..ops.block import HALVES, BoundRest, is_like
from ..ops.failures import failures
from ..ops.observed import count_modes
from ..spec.block import Block
from ..spec.reference_block import drop_factors
from ..trust.fingerprint import rates
from ..trust.libraries import is_of_library
from .context import are_functions_torchs, product_dtype

logger = logging.getLogger("swinaccel")

DTYPES = (*HALVES, torch.float32)


class NotFusable(Exception):
    """Reason why kernels cannot stand in for a module: something in it is not plain."""


class BlockFacts:
    """Parts of a plain block.

    Attributes:
        block: its description.
        norms: weight, bias and eps of each, in the order of their use.
        linears: weight and bias of each, likewise.
        drops: the drop-paths of attention and MLP that drop now; None where nothing is dropped.
        has_plain_products: the attention's products take their input in any dtype, under autocast.
    """

    __slots__ = ("block", "channels", "drops", "has_plain_products", "hidden", "linears", "norms")

    def __init__(self, module: nn.Module, block: Block) -> None:
        # Before any weight is looked at: a parametrized one is computed then, and may count that.
        require(
            all(is_builtin(one, nn.Linear) for one in (block.fc1, block.fc2)), "its MLP is not of plain linear layers"
        )
        require(
            all(is_builtin(one, nn.LayerNorm) for one in (block.norm1, block.norm2)), "its norms are no layer norms"
        )
        self.block = block
        self.hidden, self.channels = block.fc1.weight.shape
        inside = set(block.attention.modules())
        drops = (block.drop1, block.drop2)
        require_no_hooks(part for part in module.modules() if part not in inside)
        around = [part for part in module.modules() if part not in inside]
        require_no_dropout(around, drops)
        named = {block.norm1, block.norm2, block.fc1, block.fc2, block.activation, *drops}
        for part in around:
            is_leaf = not part._modules and part not in named
            require(not is_leaf or does_nothing(part), f"what {type(part).__name__} does is not known")
            require(part is module or part._compiled_call_impl is None, f"{type(part).__name__} is compiled by itself")
        linears = (block.fc1, self.channels, self.hidden), (block.fc2, self.hidden, self.channels)
        for norm in (block.norm1, block.norm2):
            require_norm_size(norm, self.channels)
        for layer, fan_in, fan_out in linears:
            require(tuple(layer.weight.shape) == (fan_out, fan_in), "the sizes of its MLP do not fit each other")
            require(layer.bias is None or tuple(layer.bias.shape) == (fan_out,), "a bias of its MLP has another size")
        self.norms: Any = tuple((one.weight, one.bias, one.eps) for one in (block.norm1, block.norm2))
        self.linears: Any = tuple((layer.weight, layer.bias) for layer, _, _ in linears)
        self.drops = [None if one is None or not drops_now(one) else one for one in drops]
        products = (part for part in inside if isinstance(part, nn.Linear))
        self.has_plain_products = all(type(one) is nn.Linear for one in products)

    def accepts(self, x: Tensor) -> bool:
        """Return True if x is what the block takes."""
        return x.is_contiguous() and x.shape[-1] == self.channels

    def parameters(self) -> list[Tensor]:
        """Return the parameters that kernels are given."""
        return [one for group in (*self.norms, *self.linears) for one in group[:2] if one is not None]


def require(holds: bool, reason: str) -> None:
    """Raise NotFusable unless something holds."""
    if not holds:
        raise NotFusable(reason)


def require_norm_size(norm: Any, channels: int) -> None:
    """Raise NotFusable where a layer norm is not over so many channels."""
    shapes = [tuple(one.shape) for one in (norm.weight, norm.bias) if one is not None]
    fits = all(shape == (channels,) for shape in (norm.normalized_shape, *shapes))
    require(fits, "its norms have other channels")


def require_no_hooks(parts: Any) -> None:
    """Raise NotFusable where someone watches a module or has replaced a method of it."""
    for part in parts:
        require(not has_hooks(part), f"{type(part).__name__} has hooks")
        require(not replaced_methods(part), f"a method of {type(part).__name__} was replaced")


def require_no_dropout(parts: Any, drops: tuple[Any, ...]) -> None:
    """Raise NotFusable where a module beside the drop-paths drops numbers now."""
    for part in parts:
        if not any(part is one for one in drops):
            require(not drops_now(part), f"dropout of {type(part).__name__} is active")


def does_nothing(part: nn.Module) -> bool:
    """Return True if a module is known to hand on what it is given, however large or small, while it drops nothing."""
    is_drop = is_of_library(part) and ("Drop" in type(part).__name__ or "StochasticDepth" in type(part).__name__)
    return is_builtin(part, nn.Identity) or is_builtin(part, nn.Dropout) or (is_drop and type(part) is not nn.Dropout)


def drops_now(part: nn.Module) -> bool:
    """Return True if a module is in training and holds a rate of dropout that is not zero."""
    if not part.training:
        return False
    rate = part.__dict__.get("p", part.__dict__.get("drop_prob", 0.0))
    return (rate is not None and rate != 0.0) or any(value for _, value in rates(part))


def common_reason(x: Tensor, parameters: list[Tensor]) -> str | None:
    """Return why kernels must not stand in for layers around an attention in this call, or None."""
    if not are_functions_torchs():
        return "a function of PyTorch's was replaced"
    if count_modes():
        return "a mode looks at operators"
    dtype, device = product_dtype(x), x.device
    if dtype not in DTYPES or x.dtype not in (dtype, torch.float32):
        return f"kernels around the attention do not take {x.dtype}"
    if dtype == torch.bfloat16 and not x.is_cuda:
        return "Triton's interpreter does not multiply bfloat16"
    is_autocast = torch.is_autocast_enabled(device.type)
    for tensor in parameters:
        fits = tensor.dtype is x.dtype or (is_autocast and tensor.dtype in DTYPES)
        is_readable = tensor.layout is torch.strided and tensor.is_contiguous() and not tensor.is_neg()
        if type(tensor) not in PLAIN_TENSORS or not fits or tensor.device != device or not is_readable:
            return "its parameters are of another dtype, device or layout than its input"
    return None


def needs_autograd(x: Tensor, parameters: list[Tensor], drops: Any = ()) -> bool:
    """Return True if autograd functions must run: for gradients, dropped samples or autocast."""
    if torch.is_autocast_enabled(x.device.type) or any(one is not None for one in drops):
        return True
    return torch.is_grad_enabled() and (x.requires_grad or any(one.requires_grad for one in parameters))


def failed(problem: tuple, error: kernels.LaunchError, config: AccelConfig) -> None:
    """Note that a kernel around the attention failed; raise where strict.

    Raises:
        FallbackError: in strict mode.
    """
    reason = failures.record(problem, str(error))
    if config.strict or env_strict():
        raise FallbackError(f"a {problem[0]} would run its own layers: {reason}") from error
    warnings.warn(
        f"swinaccel: only the attention is accelerated in modules of this kind, because {reason}; results are right",
        stacklevel=6,
    )


class FusedBlock:
    """A block in few kernels.

    Args:
        attend: the attention, of x's shape to the same, and of a mask in place of its own, or None; on Triton's
            backend a `TritonSection`.
        backend: "torch" on CPUs.
    Attributes:
        run: the block's forward, of x, and of the mask of a call that has brought it.
        bare: the same, but for `as_output`.
    """

    __slots__ = ("_attend", "_config", "_facts", "_first", "_output", "_problem", "_rest", "bare", "run")

    def __init__(self, facts: BlockFacts, attend: Any, x: Tensor, backend: str, config: AccelConfig) -> None:
        self._facts, self._config, self._attend = facts, config, attend
        self._problem = block_problem(facts, x, backend)
        as_output = facts.block.as_output
        if needs_autograd(x, facts.parameters(), facts.drops):
            run = self._with_autograd
        elif backend == "torch":
            run = self._on_cpu
        else:
            run = self._bound if self._bind(x) else self._unfused
        self.bare: Callable[..., Tensor] = run
        self.run: Callable[..., Any] = run if as_output is None else lambda *call: as_output(run(*call))

    def _bind(self, x: Tensor) -> bool:
        """Bind what is around the attention to its launches; return False where that fails."""
        facts, post_norm = self._facts, self._facts.block.post_norm
        eps = facts.norms[0][2], facts.norms[1][2]
        try:
            self._first: Any = None
            if not post_norm and x.numel():
                sizes = x.numel() // facts.channels, facts.channels
                self._first = BoundLaunch(kernels.norm_launch(kernels.NORM, x.device, *sizes, eps[0]))
            self._rest = BoundRest(x.shape, x.dtype, x.device, facts.hidden, eps, post_norm)
            self._output = self._attend.output_layer(x) if self._rest.projects else None
        except kernels.LaunchError as error:
            failed(self._problem, error, self._config)
            return False
        return True

    def _bound(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        facts, first, y = self._facts, self._first, x
        try:
            if first is not None:
                y = torch.empty_like(x)
                kernels.run(first, x, y, None, None, None, None, *facts.norms[0][:2], None)
        except kernels.LaunchError as error:
            failed(self._problem, error, self._config)
            y = facts.block.norm1(x)
        output = self._output
        branch = self._attend(y, mask) if output is None else self._attend.before_output(y, mask)
        if branch.requires_grad and torch.is_grad_enabled():
            return self._others(x, branch)
        try:
            out = self._rest.run(x, branch, facts.norms, facts.linears, output)
        except kernels.LaunchError as error:
            failed(self._problem, error, self._config)
            out = None
        return self._others(x, branch) if out is None else out

    def _others(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return what follows the kernels of an attention, by PyTorch and the modules themselves."""
        return rest(self._facts.block, x, branch if self._output is None else F.linear(branch, *self._output))

    def _unfused(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        block = self._facts.block
        return rest(block, x, self._attend(x if block.post_norm else block.norm1(x), mask))

    def _on_cpu(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        block = self._facts.block
        branch = self._attend(x if block.post_norm else block.norm1(x), mask)
        return torch_block.rest(x, branch, block) if is_like(branch, x, x.dtype) else rest(block, x, branch)

    def _with_autograd(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the result where gradients are recorded or autocast is active."""
        facts, block = self._facts, self._facts.block
        (norm1, norm2), (fc1, fc2), (drop1, drop2) = facts.norms, facts.linears, facts.drops
        dtype = product_dtype(x)
        try:
            narrow = dtype if facts.has_plain_products else torch.promote_types(x.dtype, norm_dtype(x))
            x, y = (x, x) if block.post_norm else recorded.norm(x, norm1, narrow)
        except kernels.LaunchError as error:
            failed(self._problem, error, self._config)
            return rest(block, x, self._attend(block.norm1(x), mask))
        branch = self._attend(y, mask)
        if not is_like(branch, x, dtype):
            return rest(block, x, branch)
        try:
            if block.post_norm:
                normed = norm_dtype(x)
                wide = torch.promote_types(x.dtype, normed)
                total, copied = recorded.norm_add(x, branch, _drawn(drop1, x, normed), norm1, wide, True)
                added = recorded.mlp(None, total if copied is None else copied, None, fc1, fc2)
                return recorded.norm_add(total, added, _drawn(drop2, x, normed), norm2, wide, False)[0]
            total, y = recorded.add_norm(x, branch, _drawn(drop1, x, dtype), norm2)
            return recorded.mlp(total, y, _drawn(drop2, x, dtype), fc1, fc2)
        except kernels.LaunchError as error:
            failed(self._problem, error, self._config)
            return rest(block, x, branch)


def block_problem(facts: BlockFacts, x: Tensor, backend: str) -> tuple:
    """Return what failures of the kernels around an attention are kept under."""
    sizes = facts.channels, facts.hidden, facts.block.post_norm
    return "block", backend, x.device, product_dtype(x), *sizes, needs_autograd(x, facts.parameters(), facts.drops)


def norm_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that layer norms of products come out in."""
    kind = x.device.type
    return torch.float32 if kind != "cpu" and torch.is_autocast_enabled(kind) else product_dtype(x)


def _drawn(drop: Any, x: Tensor, dtype: torch.dtype) -> Tensor | None:
    return None if drop is None else drop_factors(drop, x, dtype)


def rest(block: Block, x: Tensor, branch: Tensor) -> Tensor:
    """Return what follows a block's attention, by the modules themselves."""
    drop1, drop2 = (_nothing if one is None else one for one in (block.drop1, block.drop2))
    if block.post_norm:
        x = x + drop1(block.norm1(branch))
        return x + drop2(block.norm2(block.fc2(block.activation(block.fc1(x)))))
    x = x + drop1(branch)
    return x + drop2(block.fc2(block.activation(block.fc1(block.norm2(x)))))


def _nothing(x: Tensor) -> Tensor:
    return x


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weightᵀ + bias, as PyTorch does it; where gradients are recorded, by `ops.block_autograd.linear`."""
    if torch.is_grad_enabled() and are_functions_torchs() and _is_recorded(x, weight, bias):
        return recorded.linear(x, weight, bias, product_dtype(x))
    return products.linear(x, weight, bias) if x.is_cpu else F.linear(x, weight, bias)


def _is_recorded(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    given = (x, weight) if bias is None else (x, weight, bias)
    if not any(one.requires_grad for one in given) or not all(type(one) in PLAIN_TENSORS for one in given):
        return False
    if torch.is_autocast_enabled(x.device.type):
        return product_dtype(x) in HALVES and all(one.dtype in DTYPES for one in given)
    return x.dtype in HALVES and all(one.dtype is x.dtype for one in given)
