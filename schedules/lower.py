"""TIR to object code: a PrimFunc in, the bytes of an ELF object out.

The object defines one function, `int32_t name(void *operand…, int32_t task, int32_t n_tasks)`, and needs nothing but
libc and libm: no packed calling convention, no TVM runtime.  The pass list is TVM's own for S-TIR on CPU, with
`_raw_pointers` where `MakePackedAPI` stands there.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
from typing import Any

from llmc.compiler.kernel import Kernel
from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError

_MATH = """
    acos acosh asin asinh atan atan2 atanh ceil copysign cos cosh erf exp exp2 expm1 fabs floor fma fmax fmin fmod hypot
    ldexp log log10 log1p log2 nearbyint nextafter pow rint round sin sinh sqrt tan tanh trunc
"""
LIBRARY_FUNCTIONS = frozenset(
    ["memcpy", "memmove", "memset", *(name + suffix for name in _MATH.split() for suffix in ("", "f"))]
)
"""What a kernel may call: these are in libc and libm."""

LOOSE = "llmc.loose"
"""Marks a function whose buffers may be larger than what it touches, so that TVM has to compact them.  Our own kernels
have none, and to find that out takes TVM up to seconds: a third of the time that a kernel of attention is compiled in.
"""

_LLVM_FEATURES = {
    "avx512_bf16": "+avx512bf16",
    "avx512_vnni": "+avx512vnni",
    "amx_tile": "+amx-tile",
    "amx_bf16": "+amx-bf16",
    "amx_int8": "+amx-int8",
    "asimddp": "+dotprod",
    "i8mm": "+i8mm",
}


def compile_kernel(kernel: Kernel, target: Target) -> bytes:
    """The kernel's object file.  Raises LlmcError when the code would need more than libc and libm."""
    import tvm

    llvm = tvm.target.Target(llvm_target(target))
    with llvm:
        function = kernel.build()
    function = function.with_attr("global_symbol", kernel.name).with_attr("tirx.noalias", True)
    module = _lower(tvm.IRModule({kernel.name: function}), llvm)
    library = tvm.get_global_func("target.build.llvm")(module, llvm)
    with os.fdopen(os.memfd_create("kernel.o"), "rb") as file:  # a file in memory: on a full disk LLVM ends the process
        library.write_to_file(f"/proc/self/fd/{file.fileno()}", "o")
        code = file.read()
    if foreign := sorted(foreign_symbols(code)):
        raise LlmcError(
            f"the compiled code needs {', '.join(foreign)}, which an artifact does not have",
            place=f"kernel {kernel.name}",
            hint="a local buffer of 1 KiB or more goes to the heap: use scratch memory",
        )
    return code


def llvm_target(target: Target) -> dict[str, Any]:
    """TVM's description of a target: its psABI level, the features above it, and whole 512-bit vectors."""
    features = [_LLVM_FEATURES[name] for name in target.features if name in _LLVM_FEATURES]
    if target.architecture == "aarch64":
        cpu = {"mtriple": "aarch64-unknown-linux-gnu", "mcpu": "generic", "mattr": ["+v8.2a", *features]}
        return {"kind": "llvm", **cpu}
    level = target.level.partition("+")[0]
    if target.has("avx512f"):
        features.append("-prefer-256-bit")
    return {"kind": "llvm", "mtriple": "x86_64-unknown-linux-gnu", "mcpu": level, "mattr": features}


def _lower(module: Any, llvm: Any) -> Any:
    """PrimFuncs as written, to PrimFuncs that LLVM code is generated from."""
    import tvm
    from tvm import s_tir, tirx

    is_loose = any(LOOSE in (function.attrs or {}) for function in module.functions.values())
    to_loops = [
        tirx.transform.BindTarget(llvm.with_host(llvm)),
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        *([s_tir.transform.CompactBufferAllocation()] if is_loose else []),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
    ]
    to_vectors = [
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        tirx.transform.StorageRewrite(),
        s_tir.transform.HoistIfThenElse(),
        tirx.transform.UnrollLoop(),
        tirx.transform.StmtSimplify(),
        tirx.transform.RemoveNoOp(),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.CommonSubexprElim(),
    ]
    to_intrinsics = [
        tirx.transform.BF16StorageLegalize(),
        tirx.transform.LowerTVMBuiltin(),
        tirx.transform.LowerIntrin(),
    ]
    module = tvm.ir.transform.Sequential([*to_loops, *to_vectors])(module)
    functions = {name: _raw_pointers(function) for name, function in module.functions.items()}
    return tvm.ir.transform.Sequential(to_intrinsics)(tvm.IRModule(functions, attrs=module.attrs))


def _raw_pointers(function: Any) -> Any:
    """The function with plain pointers for its buffers, returning 0."""
    import tvm
    from tvm import tirx

    parameters, declarations = [], []
    for parameter in function.params:
        if tirx.buffer.is_buffer_var(parameter):
            pointer = tirx.Var(f"{parameter.name}_p", tirx.buffer.buffer_data_pointer_type(parameter))
            declarations.append(tirx.DeclBuffer(parameter, data=pointer))
            parameter = pointer
        parameters.append(parameter)
    body = tirx.SeqStmt([*declarations, function.body, tirx.stmt.Return(tirx.const(0, "int32"))])
    for attribute, value in (("device_type", 1), ("device_id", 0)):  # the CPU, where LowerTVMBuiltin asks
        body = tirx.AttrStmt(tvm.ir.StringImm("default"), attribute, tirx.const(value, "int32"), body)
    return tirx.PrimFunc(parameters, body, tvm.ir.PrimType("int32"), function.attrs)


def foreign_symbols(code: bytes) -> set[str]:
    """Symbols of an ELF64 object that neither it nor libc and libm define, and TVM's runtime hooks."""
    table_offset, n_sections = struct.unpack_from("<Q", code, 40)[0], struct.unpack_from("<H", code, 60)[0]
    sections = [struct.unpack_from("<IIQQQQIIQQ", code, table_offset + 64 * i) for i in range(n_sections)]
    foreign = set()
    for _, kind, _, _, offset, n_bytes, link, *_ in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = sections[link][4]
        for entry in range(offset + 24, offset + n_bytes, 24):
            name_at, info, _, section = struct.unpack_from("<IBBH", code, entry)
            name = code[names + name_at : code.index(b"\0", names + name_at)].decode()
            is_undefined = section == 0 and name not in LIBRARY_FUNCTIONS
            if info >> 4 and (is_undefined or "TVM" in name):  # info >> 4: 0 is a local symbol
                foreign.add(name)
    return foreign


def serve() -> None:
    """A compiling process: pickled (kernels, target) on standard input; on standard output, for each kernel in
    order, a pickled object file or the exception that stood in its way."""
    output = sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever prints must not end up among the answers
    kernels, target = pickle.load(sys.stdin.buffer)
    for kernel in kernels:
        try:
            answer: bytes | Exception = compile_kernel(kernel, target)
        except Exception as error:  # told to the parent, which raises it
            answer = error if isinstance(error, LlmcError) else RuntimeError(f"kernel {kernel.name}: {error}")
        pickle.dump(answer, output)
        output.flush()
