"""The host's side of a kernel: LLVM code that makes descriptors and the arguments of a launch."""

import ctypes

import llvmlite.binding as llvm
import numpy as np

from .machine import Launch
from .memory import ITEM_BYTES, TensorMap

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

_pointer, _i32, _i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_INIT = ctypes.CFUNCTYPE(
    None, _pointer, _pointer, _i64, _i64, *[ctypes.POINTER(_i64)] * 2, _i64, ctypes.POINTER(_i64)
)
_BUILD = ctypes.CFUNCTYPE(
    None, _pointer, *[_i32] * 12, ctypes.POINTER(_pointer), ctypes.POINTER(_i32)
)


def launch(module: str, name: str, arrays: list[np.ndarray]) -> Launch:
    """Executes the host's function of a kernel for buffers of its operands and results."""
    maps, launches, errors = {}, [], []

    @_INIT
    def init(descriptor, address, item, rank, sizes, strides, swizzle, box):
        try:
            lists = (tuple(a[n] for n in range(rank)) for a in (sizes, strides, box))
            sizes, strides, box = lists
            maps[descriptor] = TensorMap(address, ITEM_BYTES[item], sizes, strides, swizzle, box)
        except Exception as error:  # cannot pass through the host's code
            errors.append(error)

    @_BUILD
    def build(_, gx, gy, gz, cx, cy, cz, bx, by, bz, shared, __, count, parameters, sizes):
        # Pointers have size 0; bytes are the scratch with the descriptors.
        data = [ctypes.string_at(parameters[n], sizes[n] or 8) for n in range(count)]
        scratch = parameters[count - 1]
        inside = {a - scratch: m for a, m in maps.items() if 0 <= a - scratch < len(data[-1])}
        if (cx, cy, cz, by, bz) != (0, 0, 0, 1, 1) or len(inside) != len(maps):
            errors.append(NotImplementedError("clusters, or descriptors elsewhere"))
        launches.append(Launch((gx, gy, gz), bx, shared, tuple(data), inside))

    for symbol, function in (("init_tma_desc", init), ("build_kernel_spec", build)):
        llvm.add_symbol(f"mosaic_gpu_{symbol}", ctypes.cast(function, _pointer).value)
    machine = llvm.Target.from_default_triple().create_target_machine()
    with llvm.create_mcjit_compiler(llvm.parse_assembly(module), machine) as engine:
        engine.finalize_object()
        run = ctypes.CFUNCTYPE(None, _pointer, _pointer)(engine.get_function_address(name))
        buffers = (_pointer * len(arrays))(*[a.ctypes.data for a in arrays])
        run(None, ctypes.addressof(buffers))
    if errors:
        raise errors[0]
    return launches[0]
