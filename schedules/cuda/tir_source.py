"""A PrimFunc with bound blocks and threads as CUDA C++, by TVM's code generator.

TVM orders a kernel's parameters by name and reads the launch from the host's call; here the parameters come in the
order of the PrimFunc's, and those that the kernel does not touch stay.
"""

from __future__ import annotations

import re
from typing import Any

from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError

_ENTRY = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(\d+\) )?(\w+)\(([^)]*)\)')
_SHARED = re.compile(r"extern __shared__ __align__\(\d+\) uchar (\w+)\[\];")


def cuda_source(function: Any, name: str, target: Target) -> tuple[str, int, int]:
    """The source of kernel `name`, the number of blocks, and the number of threads in one.

    Raises LlmcError for a function that is not one kernel over blockIdx.x and threadIdx.x.
    """
    import tvm
    from tvm import tirx
    from tvm.tirx.build import split_host_device_mods

    cuda = tvm.target.Target(_description(target), host={"kind": "c"})
    entry = f"{name}_host"
    module = tvm.IRModule({entry: function.with_attr({"global_symbol": entry, "tirx.noalias": True})})
    with tvm.transform.PassContext():
        module = tirx.transform.BindTarget(cuda)(module)
        pipeline, _, finalize = tirx.get_tir_pipeline("s_tir")
        host, devices = split_host_device_mods(pipeline(module))
        (device_target, device), *more = devices.items() if devices else [(None, None)]
        calls = _calls(host)
        if device is None or more or len(calls) != 1:
            raise LlmcError(f"{len(calls)} kernels where one was expected", place=f"kernel {name}")
        text = tvm.get_global_func("target.build.cuda")(finalize()(device), device_target).inspect_source("cuda")
    arguments, launch = calls[0]
    parameters = [parameter.name for parameter in function.params]
    return _as_ours(text, name, parameters, arguments), launch.get("blockIdx.x", 1), launch.get("threadIdx.x", 1)


def _description(target: Target) -> dict[str, Any]:
    """TVM's description of a GPU. (The numbers bound what a schedule may use; ours choose for themselves.)"""
    return {
        "kind": "cuda",
        "arch": target.level,
        "max_shared_memory_per_block": 99 * 1024,
        "max_threads_per_block": 1024,
        "thread_warp_size": 32,
        "registers_per_block": 65536,
    }


def _calls(host: Any) -> list[tuple[list[str], dict[str, int]]]:
    """For each kernel that the host starts: its parameters' names in order, and the launch's extents."""
    import tvm_ffi

    calls = []

    def visit(node: Any) -> None:
        if getattr(getattr(node, "op", None), "name", None) != "tirx.call_ffi_kernel":
            return
        arguments, tags = list(node.args), [str(tag) for tag in node.attrs.launch_params]
        names, extents = arguments[1 : len(arguments) - len(tags)], arguments[len(arguments) - len(tags) :]
        launch = {tag: int(extent) for tag, extent in zip(tags, extents, strict=True)}
        if foreign := [
            tag for tag, extent in launch.items() if tag not in ("blockIdx.x", "threadIdx.x") and extent != 1
        ]:
            raise LlmcError(f"a kernel is bound to {foreign[0]}", place=str(arguments[0].value))
        calls.append(([str(name).removesuffix(".data") for name in names], launch))

    for function in host.functions.values():
        tvm_ffi.structural_walk(function.body, visit)
    return calls


def _as_ours(text: str, name: str, parameters: list[str], arguments: list[str]) -> str:
    """TVM's text with the kernel's own name, its parameters in our order, dynamic shared memory as in device.cuh."""
    heads = list(_ENTRY.finditer(text))
    declared = dict(zip(arguments, (part.strip() for part in heads[-1].group(2).split(",")), strict=True))
    listed = [declared.get(parameter, f"void *unused_{index}") for index, parameter in enumerate(parameters)]
    bounds = re.search(r"__launch_bounds__\(\d+\)", heads[-1].group(0))
    head = f'extern "C" __global__ void {bounds.group(0) if bounds else ""} {name}({", ".join(listed)})'
    body = text[heads[-1].end() :]
    prelude = text[: heads[0].start()]
    return f'#include "device.cuh"\n{prelude}{head}{_SHARED.sub(_shared_pointer, body)}'


def _shared_pointer(match: re.Match[str]) -> str:
    return f"uchar *{match.group(1)} = dynamic_shared();"
