"""NVIDIA's driver through ctypes: as much of libcuda.so.1 as running and timing kernels takes.

    with Device() as device:
        kernel = device.kernel(cubin, "name", n_threads=256, shared_bytes=0, dependent=True)
        x = device.upload(array)
        device.launch(kernel, 132, [x])
        device.wait()

Functions are asked of cuGetProcAddress in pinned versions, the same ones that llmc's runtime uses
(runtime/src/cuda_driver.h).
"""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

POINTER, ADDRESS, SIZE, INT, UNSIGNED = c.c_void_p, c.c_uint64, c.c_size_t, c.c_int, c.c_uint
FUNCTIONS: dict[str, tuple[int, tuple[Any, ...]]] = {
    "cuInit": (2000, (UNSIGNED,)),
    "cuDriverGetVersion": (2020, (POINTER,)),
    "cuGetErrorName": (6000, (INT, POINTER)),
    "cuDeviceGetCount": (2000, (POINTER,)),
    "cuDeviceGet": (2000, (POINTER, INT)),
    "cuDeviceGetName": (2000, (POINTER, INT, INT)),
    "cuDeviceGetAttribute": (2000, (POINTER, INT, INT)),
    "cuDevicePrimaryCtxRetain": (7000, (POINTER, INT)),
    "cuDevicePrimaryCtxRelease": (11000, (INT,)),
    "cuCtxPushCurrent": (4000, (POINTER,)),
    "cuCtxPopCurrent": (4000, (POINTER,)),
    "cuMemGetInfo": (3020, (POINTER, POINTER)),
    "cuMemAlloc": (3020, (POINTER, SIZE)),
    "cuMemFree": (3020, (ADDRESS,)),
    "cuMemcpyHtoDAsync": (3020, (ADDRESS, POINTER, SIZE, POINTER)),
    "cuMemcpyDtoHAsync": (3020, (POINTER, ADDRESS, SIZE, POINTER)),
    "cuMemcpyDtoDAsync": (3020, (ADDRESS, ADDRESS, SIZE, POINTER)),
    "cuMemsetD8Async": (3020, (ADDRESS, c.c_ubyte, SIZE, POINTER)),
    "cuModuleLoadData": (2000, (POINTER, POINTER)),
    "cuModuleUnload": (2000, (POINTER,)),
    "cuModuleGetFunction": (2000, (POINTER, POINTER, c.c_char_p)),
    "cuFuncSetAttribute": (9000, (POINTER, INT, INT)),
    "cuStreamCreate": (2000, (POINTER, UNSIGNED)),
    "cuStreamDestroy": (4000, (POINTER,)),
    "cuStreamSynchronize": (2000, (POINTER,)),
    "cuStreamBeginCapture": (10010, (POINTER, INT)),
    "cuStreamEndCapture": (10000, (POINTER, POINTER)),
    "cuGraphInstantiateWithFlags": (11040, (POINTER, POINTER, c.c_ulonglong)),
    "cuGraphUpload": (11010, (POINTER, POINTER)),
    "cuGraphLaunch": (10000, (POINTER, POINTER)),
    "cuGraphExecDestroy": (10000, (POINTER,)),
    "cuGraphDestroy": (10000, (POINTER,)),
    "cuLaunchKernelEx": (11060, (POINTER, POINTER, POINTER, POINTER)),
    "cuEventCreate": (2000, (POINTER, UNSIGNED)),
    "cuEventDestroy": (4000, (POINTER,)),
    "cuEventRecord": (2000, (POINTER, POINTER)),
    "cuEventSynchronize": (2000, (POINTER,)),
    "cuEventElapsedTime": (2000, (POINTER, POINTER, POINTER)),
}
"""Version and parameters of each; where a handle is given back, a pointer to it."""

NON_BLOCKING, THREAD_LOCAL, SERIALIZATION, MOST_SHARED, CARVEOUT = 1, 1, 6, 8, 9
ALL_SHARED = 100
"""Of CARVEOUT: kernels overlap only where they divide L1 and shared memory alike, as the runtime has them do."""
ATTRIBUTES = {"multiprocessors": 16, "clock_khz": 13, "memory_clock_khz": 36, "bus_bits": 37, "l2_bytes": 38}
MAJOR, MINOR = 75, 76


class CudaError(RuntimeError):
    """The driver refused something."""


class _Attribute(c.Structure):
    _fields_ = (("id", INT), ("pad", c.c_char * 4), ("value", INT), ("rest", c.c_char * 60))


class _Config(c.Structure):
    _fields_ = (
        ("grid", UNSIGNED * 3),
        ("block", UNSIGNED * 3),
        ("shared_bytes", UNSIGNED),
        ("stream", POINTER),
        ("attributes", c.POINTER(_Attribute)),
        ("n_attributes", UNSIGNED),
    )


@dataclass(frozen=True)
class Kernel:
    """A function on the device, and how its blocks are."""

    name: str
    function: int
    n_threads: int
    shared_bytes: int
    dependent: bool


class Driver:
    """The library and its functions: `driver("cuInit", 0)`.  Raises CudaError for an error of the driver's."""

    def __init__(self) -> None:
        name = os.environ.get("LLMC_CUDA_DRIVER") or "libcuda.so.1"
        try:
            self._library = c.CDLL(name)
        except OSError as error:
            raise CudaError(f"this machine has no NVIDIA driver: {error}") from None
        self._functions: dict[str, Callable[..., int]] = {}
        find = self._library.cuGetProcAddress_v2
        find.argtypes = (c.c_char_p, POINTER, INT, c.c_uint64, POINTER)
        for name in ("cuDriverGetVersion", *FUNCTIONS):
            version, parameters = FUNCTIONS[name]
            address, found = POINTER(), INT()
            failed = find(name.encode(), c.byref(address), version, 0, c.byref(found))
            if failed or not address.value:
                raise CudaError(f"the driver has no {name} of version {version} (error {failed})")
            self._functions[name] = c.CFUNCTYPE(INT, *parameters)(address.value)

    def __call__(self, name: str, *arguments: Any) -> None:
        if code := self._functions[name](*arguments):
            said = c.c_char_p()
            self._functions["cuGetErrorName"](code, c.cast(c.byref(said), POINTER))
            raise CudaError(f"{name}: {(said.value or b'error').decode()} ({code})")

    def made(self, name: str, *arguments: Any, kind: Any = POINTER) -> Any:
        """The handle or number that a function gives back through its first parameter."""
        result = kind()
        self(name, c.byref(result), *arguments)
        return result.value


class Device:
    """The first GPU, its primary context, and one stream.  A context manager: everything is given back at the end."""

    def __init__(self) -> None:
        self.driver = driver = Driver()
        driver("cuInit", 0)
        self.number = driver.made("cuDeviceGet", 0, kind=INT)
        self.context = driver.made("cuDevicePrimaryCtxRetain", self.number)
        driver("cuCtxPushCurrent", self.context)
        self.stream = driver.made("cuStreamCreate", NON_BLOCKING)
        self._memory: set[int] = set()
        self._modules: list[int] = []
        self._kernels: dict[str, Kernel] = {}

    def __enter__(self) -> Device:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, CudaError):
            return  # a broken context takes nothing back; the process ends
        self.wait()
        for address in list(self._memory):
            self.free(address)
        for module in self._modules:
            self.driver("cuModuleUnload", module)
        self.driver("cuStreamDestroy", self.stream)
        self.driver("cuCtxPopCurrent", c.byref(POINTER()))
        self.driver("cuDevicePrimaryCtxRelease", self.number)

    def facts(self) -> dict[str, Any]:
        """Name, compute capability, driver, memory, and what else it says of itself."""
        driver, name = self.driver, c.create_string_buffer(256)
        driver("cuDeviceGetName", name, 256, self.number)
        version = driver.made("cuDriverGetVersion", kind=INT)
        free, total = SIZE(), SIZE()
        driver("cuMemGetInfo", c.byref(free), c.byref(total))
        facts: dict[str, Any] = {
            "name": name.value.decode(),
            "capability": 10 * self.attribute(MAJOR) + self.attribute(MINOR),
            "cuda": f"{version // 1000}.{version % 1000 // 10}",
            "memory_bytes": total.value,
            "free_bytes": free.value,
        }
        for fact, number in ATTRIBUTES.items():
            try:
                facts[fact] = self.attribute(number)
            except CudaError:
                facts[fact] = None
        return facts

    def attribute(self, number: int) -> int:
        return int(self.driver.made("cuDeviceGetAttribute", number, self.number, kind=INT))

    # -- memory -------------------------------------------------------------------------------------------------------

    def allocate(self, n_bytes: int) -> int:
        address = int(self.driver.made("cuMemAlloc", max(1, n_bytes), kind=ADDRESS))
        self._memory.add(address)
        return address

    def free(self, address: int) -> None:
        self._memory.remove(address)
        self.driver("cuMemFree", address)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is allocated meanwhile is freed at the end."""
        before = set(self._memory)
        try:
            yield
        except CudaError:
            raise
        except BaseException:
            self._free_all_but(before)
            raise
        else:
            self._free_all_but(before)

    def _free_all_but(self, before: set[int]) -> None:
        self.wait()
        for address in self._memory - before:
            self.free(address)

    def upload(self, array: Array) -> int:
        """A copy of the array's bytes on the device."""
        address = self.allocate(array.nbytes)
        self.write(address, array)
        return address

    def write(self, address: int, array: Array) -> None:
        data = np.ascontiguousarray(array)
        self.driver("cuMemcpyHtoDAsync", address, data.ctypes.data, data.nbytes, self.stream)
        self.wait()

    def read(self, address: int, n_bytes: int) -> Array:
        """Bytes, after everything that was asked for before."""
        data = np.empty(n_bytes, np.uint8)
        self.driver("cuMemcpyDtoHAsync", data.ctypes.data, address, n_bytes, self.stream)
        self.wait()
        return data

    def fill(self, address: int, value: int, n_bytes: int) -> None:
        self.driver("cuMemsetD8Async", address, value, n_bytes, self.stream)

    def copy(self, to: int, source: int, n_bytes: int) -> None:
        self.driver("cuMemcpyDtoDAsync", to, source, n_bytes, self.stream)

    # -- kernels ------------------------------------------------------------------------------------------------------

    def kernel(self, cubin: bytes, name: str, n_threads: int, shared_bytes: int, dependent: bool) -> Kernel:
        """Loaded once for each name."""
        if name not in self._kernels:
            module = self.driver.made("cuModuleLoadData", cubin)
            self._modules.append(module)
            function = self.driver.made("cuModuleGetFunction", module, name.encode())
            if shared_bytes:
                self.driver("cuFuncSetAttribute", function, MOST_SHARED, shared_bytes)
            if dependent:
                self.driver("cuFuncSetAttribute", function, CARVEOUT, ALL_SHARED)
            self._kernels[name] = Kernel(name, function, n_threads, shared_bytes, dependent)
        return self._kernels[name]

    def launch(self, kernel: Kernel, grid: int, pointers: Sequence[int]) -> None:
        values = (ADDRESS * len(pointers))(*pointers)
        each = c.sizeof(ADDRESS)
        parameters = (POINTER * len(pointers))(*(c.addressof(values) + each * i for i in range(len(pointers))))
        attribute = _Attribute(SERIALIZATION, b"", 1)
        config = _Config(
            (grid, 1, 1),
            (kernel.n_threads, 1, 1),
            kernel.shared_bytes,
            self.stream,
            c.pointer(attribute) if kernel.dependent else None,
            int(kernel.dependent),
        )
        self.driver("cuLaunchKernelEx", c.byref(config), kernel.function, parameters, None)

    def wait(self) -> None:
        """Raises CudaError when something that was asked for has failed."""
        self.driver("cuStreamSynchronize", self.stream)

    # -- graphs and time ----------------------------------------------------------------------------------------------

    @contextmanager
    def graph(self, record: Callable[[], None]) -> Iterator[Callable[[], None]]:
        """What `record` launches, as a graph; the function given launches that."""
        driver = self.driver
        driver("cuStreamBeginCapture", self.stream, THREAD_LOCAL)
        try:
            record()
        finally:
            graph = self._end_capture()
        executable = driver.made("cuGraphInstantiateWithFlags", graph, 0)
        driver("cuGraphUpload", executable, self.stream)
        yield lambda: driver("cuGraphLaunch", executable, self.stream)
        self.wait()
        driver("cuGraphExecDestroy", executable)
        driver("cuGraphDestroy", graph)

    def _end_capture(self) -> int:
        graph = POINTER()
        self.driver("cuStreamEndCapture", self.stream, c.byref(graph))
        return int(graph.value or 0)

    def times_ms(self, work: Callable[[], None], n_times: int) -> list[float]:
        """How long each of n_times runs of `work` took, by events."""
        events = [self.driver.made("cuEventCreate", 0) for _ in range(n_times + 1)]
        self.driver("cuEventRecord", events[0], self.stream)
        for event in events[1:]:
            work()
            self.driver("cuEventRecord", event, self.stream)
        self.driver("cuEventSynchronize", events[-1])
        times = []
        for first, second in pairwise(events):
            elapsed = c.c_float()
            self.driver("cuEventElapsedTime", c.byref(elapsed), first, second)
            times.append(elapsed.value)
        for event in events:
            self.driver("cuEventDestroy", event)
        return times
