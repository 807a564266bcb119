"""The host's side of a kernel: LLVM code that makes descriptors and the arguments of a launch."""

import ctypes

import llvmlite.binding as llvm
import numpy as np

from .machine import Launch
from .memory import ITEM_BYTES, TensorMap
from .program import Program

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

_pointer, _i32, _i64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_list = ctypes.POINTER(_i64)
_INIT = ctypes.CFUNCTYPE(None, _pointer, _pointer, _i64, _i64, _list, _list, _i64, _list)
_pointers = ctypes.POINTER(_pointer)
# Before jax 0.12 the host's code starts the kernel, since then it says how it is started.
_START = ctypes.CFUNCTYPE(_i32, _pointer, *[_i32] * 11, _pointer, _pointers)
_SAY = ctypes.CFUNCTYPE(None, _pointer, *[_i32] * 12, _pointers, _pointer)


def launch(module: str, program: Program, arrays: list[np.ndarray]) -> Launch:
    """Executes the host's function of a kernel for buffers of its operands and results."""
    maps, launches, errors = {}, [], []

    @_INIT
    def init(descriptor, address, item, rank, sizes, strides, swizzle, box):
        try:
            sizes, strides, box = (tuple(a[:rank]) for a in (sizes, strides, box))
            maps[descriptor] = TensorMap(address, ITEM_BYTES[item], sizes, strides, swizzle, box)
        except Exception as error:  # cannot pass through the host's code
            errors.append(error)

    def record(grid, cluster, threads, shared, parameters):
        if cluster != (0, 0, 0) or threads[1:] != (1, 1):
            errors.append(NotImplementedError("clusters, or threads in more than one axis"))
        sizes = program.parameters.values()
        data = tuple(ctypes.string_at(parameters[n], size) for n, size in enumerate(sizes))
        # The last parameter has the descriptors, one after the other.
        inside = {address - min(maps): found for address, found in maps.items()}
        launches.append(Launch(grid, threads[0], shared, data, inside))

    @_START
    def start(_, gx, gy, gz, cx, cy, cz, bx, by, bz, shared, __, stream, parameters):
        record((gx, gy, gz), (cx, cy, cz), (bx, by, bz), shared, parameters)
        return 0

    @_SAY
    def say(_, gx, gy, gz, cx, cy, cz, bx, by, bz, shared, __, count, parameters, sizes):
        record((gx, gy, gz), (cx, cy, cz), (bx, by, bz), shared, parameters)

    symbols = dict(init_tma_desc=init, launch_kernel=start, build_kernel_spec=say)
    for symbol, function in symbols.items():
        llvm.add_symbol(f"mosaic_gpu_{symbol}", ctypes.cast(function, _pointer).value)
    machine = llvm.Target.from_default_triple().create_target_machine()
    buffers = (_pointer * len(arrays))(*[a.ctypes.data for a in arrays])
    arguments = [None, ctypes.addressof(buffers)]
    name = program.name.removesuffix("_kernel")
    if f"@{name}(ptr %0, ptr %1, ptr %2)" in module:  # one more: the stream
        arguments.insert(1, None)
    with llvm.create_mcjit_compiler(llvm.parse_assembly(module), machine) as engine:
        engine.finalize_object()
        types = [_pointer] * len(arguments)
        ctypes.CFUNCTYPE(_i32, *types)(engine.get_function_address(name))(*arguments)
    if errors:
        raise errors[0]
    return launches[0]
