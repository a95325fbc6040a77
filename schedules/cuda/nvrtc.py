"""NVIDIA's compiler as a library (NVRTC), and the headers that it wants, from PyPI's packages."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from llmc.compiler.target import Target
from llmc.runtime.errors import LlmcError
from llmc.schedules.cuda.compile import INCLUDE, OPTIONS, refused

FOLDER = Path("nvidia", "cu13")
"""Where CUDA 13's packages for Python lie in a folder of sys.path."""


class Nvrtc:
    """Makes cubins in this process.  `root`: the packages' folder; `path`: the library in it."""

    def __init__(self, root: Path, path: Path) -> None:
        self._include = root / "include"
        for needed in path.parent.glob("libnvrtc-builtins.so.*"):  # it asks for this by name: have it loaded
            ctypes.CDLL(str(needed))
        self._library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
        self.version = f"NVRTC {major.value}.{minor.value}"

    def compile(self, name: str, source: str, target: Target) -> tuple[bytes, str]:
        program = ctypes.c_void_p()
        handle = ctypes.byref(program)
        headers = ctypes.c_int(0), None, None
        self._call("nvrtcCreateProgram", handle, source.encode(), f"{name}.cu".encode(), *headers)
        try:
            includes = [f"-I{folder}" for folder in (INCLUDE, self._include, self._include / "cccl")]
            options = [f"-arch={target.level}", *OPTIONS, "--ptxas-options=-v", *includes]
            listed = (ctypes.c_char_p * len(options))(*map(str.encode, options))
            status = self._library.nvrtcCompileProgram(program, ctypes.c_int(len(options)), listed)
            said = self._bytes(program, "nvrtcGetProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            if status:
                raise refused(said or self._error(status), name, "NVRTC")
            return self._bytes(program, "nvrtcGetCUBIN"), said
        finally:
            self._call("nvrtcDestroyProgram", handle)

    def _bytes(self, program: ctypes.c_void_p, getter: str) -> bytes:
        """What a getter and its …Size give."""
        size = ctypes.c_size_t()
        self._call(f"{getter}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(size.value)
        self._call(getter, program, content)
        return content.raw

    def _call(self, function: str, *arguments: object) -> None:
        if status := getattr(self._library, function)(*arguments):
            raise LlmcError(f"{function} failed: {self._error(status)}", place="NVRTC")

    def _error(self, status: int) -> str:
        describe = self._library.nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        return str(describe(ctypes.c_int(status)).decode())


def find() -> tuple[Path, Path] | None:
    """The packages' folder and the library in it, where they are installed."""
    for entry in sys.path:
        root = Path(entry, FOLDER)
        libraries = sorted(root.glob("lib/libnvrtc.so.*"))
        if libraries and (root / "include" / "cuda_bf16.h").exists():
            return root, libraries[-1]
    return None
