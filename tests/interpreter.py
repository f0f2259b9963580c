"""Triton's interpreter: what it gets wrong is mended, and what makes it slow and shows nothing is left out."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any


def mend() -> None:
    """Mend what Triton's interpreter gets wrong on its own account, so that the kernels can be tested in it.

    It keeps bfloat16 as uint16, and its dot takes the bits for integers; from fp32 it truncates where every GPU
    rounds to nearest. Of e4m3 it knows neither NaN nor ties to even. And that of Triton 3.6 takes loop bounds from
    arrays of one entry in a way that NumPy 2.4 has given up.
    """
    import numpy as np
    import torch
    from triton import language as tl
    from triton.runtime import interpreter

    convert_float = interpreter._convert_float

    def rounding(data: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
        if (input_dtype, output_dtype) == (tl.float32, tl.float8e4nv):
            eight = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).to(torch.float8_e4m3fn)
            return eight.view(torch.uint8).numpy()
        if input_dtype == tl.float8e4nv and output_dtype in (tl.float16, tl.float32):
            eight = torch.from_numpy(np.ascontiguousarray(data)).view(torch.float8_e4m3fn)
            return eight.to(torch.float16 if output_dtype == tl.float16 else torch.float32).numpy()
        if (input_dtype, output_dtype) != (tl.float32, tl.bfloat16):
            return convert_float(data, input_dtype, output_dtype, rounding_mode)
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even
        return np.where(np.isnan(data), bits >> 16 | 0x40, nearest).astype(np.uint16)

    interpreter._convert_float = rounding

    class Widened:
        def __init__(self, handle: Any) -> None:
            self.dtype = handle.dtype
            self.data = (handle.data.astype(np.uint32) << 16).view(np.float32)

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (Widened(handle) if handle.data.dtype == np.uint16 else handle for handle in (a, b))
        return plain(self, a, b, *rest)

    create_dot.plain = plain
    interpreter.InterpreterBuilder.create_dot = create_dot

    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, *rest: Any) -> None:
        patch(tensor, *rest)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patch_lang_tensor


def hasten() -> None:
    """Leave out what makes Triton's interpreter slow and shows nothing here: these tests would take four times as long.

    It patches the whole language anew at every call of a device function, although the launch has done so; it follows
    every sum of integers with one in 64 bits, which no problem of these sizes needs (the test of offsets beyond 32 bits
    runs on a GPU); it derives the same few types again for every operation, and writes constants and scalars out to
    whole blocks, where NumPy broadcasts them by itself.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    patched: set[int] = set()  # modules' namespaces since the launch began

    def launch(fn: Any) -> Any:
        patched.clear()
        patched.add(id(fn.__globals__))
        return patch(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            patch(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter._patch_lang = launch
    interpreter.InterpretedFunction.__call__ = call
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )
    _remember_builtins()
    _remember_types()
    _take_operands()


def _remember_builtins() -> None:
    """Search the language for its functions once, and not at each launch."""
    from triton import language as tl
    from triton.runtime import interpreter

    @functools.cache
    def builtins(package: Any) -> list[tuple[str, Any]]:
        return [(name, member) for name, member in inspect.getmembers(package) if tl.core.is_builtin(member)]

    def patch_builtin(package: Any, *rest: Any) -> None:
        for name, member in builtins(package):
            if getattr(package, name) is member:  # a second namespace of one launch finds it patched
                set_attribute = getattr(rest[-1], "set_attr", setattr)  # newer ones note what they set
                set_attribute(package, name, quick(member))

    wrapper = tl.core.builtin(lambda: None).__code__

    @functools.cache
    def quick(member: Any) -> Any:
        """The function with the interpreter's `_semantic`, without what looks if one is given."""
        if getattr(member, "__code__", None) is wrapper:
            member = member.__wrapped__

        def run(*args: Any, **options: Any) -> Any:
            options["_semantic"] = interpreter.interpreter_semantic
            return member(*args, **options)

        return run

    interpreter._patch_builtin = patch_builtin


def _remember_types() -> None:
    """Make every type and shape once, name a type when somebody asks, and broadcast no equal shapes."""
    from triton import language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    core = tl.core
    shapes: dict[tuple[int, ...], tuple[Any, ...]] = {}
    known: dict[int, tuple[Any, ...]] = {}  # of tuples that are kept in `shapes`
    types: dict[tuple[str, int], Any] = {}

    def shape_of(shape: Any) -> tuple[Any, ...]:
        """The same tuple of Triton's for the same sides, the number of entries, and both as constants."""
        found = known.get(id(shape))
        if found is not None:
            return found
        sides = tuple([core._unwrap_if_constexpr(side) for side in getattr(shape, "values", shape)])
        if sides not in shapes:
            if not sides:
                raise TypeError("0d block_type is forbidden")
            numel = core.validate_block_shape(sides)
            constants = core.tuple([core.constexpr(side) for side in sides])
            made = (core.tuple(list(sides)), numel, constants, core.constexpr(numel))
            shapes[sides] = known[id(made[0])] = known[id(constants)] = made
        return shapes[sides]

    def block_type(cls: Any, element_ty: Any, shape: Any) -> Any:
        remembered = shape_of(shape)
        is_plain = type(element_ty) is core.dtype
        found = types.get((element_ty.name, id(remembered))) if is_plain else None
        if found is None:
            found = object.__new__(cls)
            found.element_ty, found.remembered = element_ty, remembered
            found.shape, found.numel = remembered[:2]
            if is_plain:
                types[element_ty.name, id(remembered)] = found
        return found

    scalar_shape, scalar_numel = core.tuple([]), core.constexpr(1)

    def make_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        remembered = getattr(type, "remembered", None)
        self.shape, self.numel = (scalar_shape, scalar_numel) if remembered is None else remembered[2:]

    core.block_type.__new__ = block_type
    core.block_type.__init__ = lambda self, element_ty, shape: None
    core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    core.tensor.__init__ = make_tensor

    equal = core.dtype.__eq__
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    integers = frozenset(core.dtype.SINT_TYPES + core.dtype.UINT_TYPES)
    core.dtype.is_int = lambda self: self.name in integers

    broadcast = TritonSemantic.broadcast_impl_value

    def broadcast_impl_value(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.shape is rhs.shape:  # the same shape is one object
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    TritonSemantic.broadcast_impl_value = broadcast_impl_value

    numpy_dtype = interpreter._get_np_dtype
    dtypes: dict[str, Any] = {}

    def get_np_dtype(dtype: Any) -> Any:
        scalar = dtype.scalar
        if isinstance(scalar, core.pointer_type):
            return numpy_dtype(dtype)
        if scalar.name not in dtypes:
            dtypes[scalar.name] = numpy_dtype(scalar)
        return dtypes[scalar.name]

    interpreter._get_np_dtype = get_np_dtype


def _take_operands() -> None:
    """Take the operands of an operation as they are where they have one type, and constants by NumPy's broadcasting."""
    import numpy as np
    from triton import language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    tensor, handle = tl.core.tensor, interpreter.TensorHandle
    plain = {"int1", "int32", "int64", "fp32"}  # nothing is promoted between two of one of these
    integers, limit = {"int32", "int64"}, 2**31
    decide = TritonSemantic.binary_op_type_checking_impl

    @functools.lru_cache(maxsize=4096)
    def constant(value: float, name: str) -> Any:
        dtype = tl.dtype(name)
        array = np.array([value or 0], dtype=interpreter._get_np_dtype(dtype))  # Triton's zero has no sign
        array.setflags(write=False)
        return handle(array, dtype)

    def operand(value: Any, other: Any) -> Any:
        """A number as an operand of a tensor, or None where Triton must decide."""
        name, kind = other.dtype.name, type(value)
        if kind is int and name in integers:
            is_plain = -limit <= value < limit
        else:
            is_plain = name == "fp32" and kind in (int, float)
        return tensor(constant(value, name), other.type) if is_plain else None

    shapes: dict[tuple[int, int], Any] = {}

    def joined(left: Any, right: Any) -> Any:
        """The shape of two that are broadcast; None where Triton must decide."""
        if left is right or not right:
            return left
        if not left:
            return right
        if (id(left), id(right)) not in shapes:  # tuples that are kept for ever
            found, sides = None, [(one.value, other.value) for one, other in zip(left, right, strict=False)]
            if len(left) == len(right) and all(one == other or 1 in (one, other) for one, other in sides):
                found = tl.block_type(tl.int32, [max(pair) for pair in sides]).remembered[2]
            shapes[id(left), id(right)] = found
        return shapes[id(left), id(right)]

    def typed(one: Any, shape: Any) -> Any:
        """A tensor of this shape, whose numbers NumPy will broadcast."""
        return one if one.shape is shape else tensor(one.handle, tl.block_type(one.dtype, shape))

    def binary_op_type_checking_impl(self: Any, lhs: Any, rhs: Any, *rest: Any, **options: Any) -> Any:
        is_left, is_right = type(lhs) is tensor, type(rhs) is tensor
        if is_left and is_right:
            left, right = lhs.dtype.name, rhs.dtype.name
            is_address = rest[:1] == (True,) and type(lhs.dtype) is tl.pointer_type and right in integers
            if is_address or (left == right and left in plain):
                shape = joined(lhs.shape, rhs.shape)
                if shape is not None:
                    return typed(lhs, shape), typed(rhs, shape)
        elif is_left and (other := operand(rhs, lhs)) is not None:
            return lhs, other
        elif is_right and (other := operand(lhs, rhs)) is not None:
            return other, rhs
        return decide(self, lhs, rhs, *rest, **options)

    TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl

    fits = interpreter._validate_np_data_size

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        output, dtype = op(lhs.data, rhs.data), lhs.dtype.scalar
        if output.dtype is not lhs.data.dtype and not fits(output, dtype):
            output = output.astype(interpreter._get_np_dtype(dtype))
        return handle(output, dtype)

    def make_handle(self: Any, data: Any, dtype: Any, attr: Any = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr

    interpreter.InterpreterBuilder.binary_op = binary_op
    handle.__init__ = make_handle
