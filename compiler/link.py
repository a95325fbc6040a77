"""Link the runtime and the kernels into one shared object that needs libc alone and exports one symbol."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from llmc.runtime.errors import LlmcError

RUNTIME = Path(__file__).resolve().parent.parent / "runtime"
COMPILE_FLAGS = ("-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-ffunction-sections", "-Wall", "-Wextra")
LINK_FLAGS = ("-shared", "-Wl,--gc-sections", "-Wl,-Bsymbolic", "-Wl,-z,relro,-z,now", "-Wl,-z,noexecstack", "-s")
LIBRARIES = ("-Wl,--as-needed", "-lm", "-lpthread", "-ldl")
"""libm only where a kernel calls it."""
OLDEST_GLIBC = "2.28"
"""The oldest glibc that artifacts run with which Zig links for another architecture: Debian 10, RHEL 8, Ubuntu
20.04."""
EXPORTS = "{ global: llmc_get_api; local: *; };\n"


def c_compiler(architecture: str | None = None) -> list[str]:
    """The command that compiles C: $CC, cc, gcc, clang, or Zig's from pip.  architecture: of another CPU than this
    machine's: the compiler that Linux distributions have for it, or Zig's."""
    if architecture is not None and architecture != platform.machine():
        return cross_compiler(architecture)
    named = os.environ.get("CC", "").strip()
    for command in [named] if named else ["cc", "gcc", "clang"]:
        if shutil.which(command.split()[0]):
            return command.split()
    if named:
        raise LlmcError(f"the C compiler {named!r} was not found", place="$CC", hint="unset CC, or set it to one")
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise LlmcError(
        "no C compiler was found to link the artifact",
        place="cc, gcc, clang on PATH",
        hint="install one (Debian: apt-get install gcc), or: pip install ziglang",
    )


def cross_compiler(architecture: str) -> list[str]:
    gcc = f"{architecture.replace('_', '-')}-linux-gnu-gcc"
    if shutil.which(gcc):
        return [gcc]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc", "-target", f"{architecture}-linux-gnu.{OLDEST_GLIBC}"]
    hint = f"pip install ziglang, or install {gcc}"
    raise LlmcError(f"no C compiler was found that links for {architecture}", place=f"{gcc} on PATH", hint=hint)


def runtime_sources() -> list[Path]:
    return sorted((RUNTIME / "src").glob("*.c"))


def kernel_table(kernels: Sequence[tuple[str, int]]) -> str:
    """C source of llmc_kernel_table: (name, number of pointers) of each kernel, in the plan's order."""
    declarations = "".join(f"int32_t {name}(void);\n" for name, _ in kernels)
    entries = "".join(f'    {{"{name}", {name}, {n_pointers}u}},\n' for name, n_pointers in kernels) or "    {0},\n"
    return (
        '#include "format.h"\n\n'
        f"{declarations}\n"
        f"const llmc_kernel_entry llmc_kernel_table[] = {{\n{entries}}};\n"
        f"const uint32_t llmc_kernel_count = {len(kernels)}u;\n"
    )


def link(
    kernels: Sequence[tuple[str, int]],
    objects: Sequence[Path | bytes],
    cache: Path | None,
    architecture: str | None = None,
) -> bytes:
    """The ELF image of an artifact.  objects: compiled kernels, as files or as bytes.  architecture: of the CPU, this
    machine's when None."""
    compiler = c_compiler(architecture)
    with work_folder() as work:
        (work / "table.c").write_text(kernel_table(kernels))
        (work / "exports.map").write_text(EXPORTS)
        inputs = [runtime_object(compiler, work, cache)]
        for index, item in enumerate(objects):
            path = item if isinstance(item, Path) else work / f"kernels{index}.o"
            if isinstance(item, bytes):
                path.write_bytes(item)
            inputs.append(path)
        run([*compiler, *COMPILE_FLAGS, f"-I{RUNTIME}/src", "-c", "table.c", "-o", "table.o"], work)
        version_script = "-Wl,--version-script=exports.map"
        run([*compiler, *LINK_FLAGS, version_script, "table.o", *map(str, inputs), "-o", "code.so", *LIBRARIES], work)
        return (work / "code.so").read_bytes()


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """A temporary folder; what the file system refuses there becomes one clear line."""
    try:
        with tempfile.TemporaryDirectory(prefix="llmc-link-") as folder:
            yield Path(folder)
    except OSError as error:
        fact = f"linking cannot write its temporary files: {error.strerror}"
        hint = "free some space there, or choose another folder with TMPDIR"
        raise LlmcError(fact, place=tempfile.gettempdir(), hint=hint) from error


def runtime_object(compiler: list[str], work: Path, cache: Path | None) -> Path:
    """The runtime as one relocatable object, compiled once for each compiler and source."""
    sources = runtime_sources()
    headers = sorted([*(RUNTIME / "src").glob("*.h"), *(RUNTIME / "include").glob("*.h")])
    command = " ".join([*compiler, *COMPILE_FLAGS]).encode()
    content = b"\0".join([command, *(path.read_bytes() for path in [*sources, *headers])])
    kept = cache / f"runtime-{hashlib.sha256(content).hexdigest()}.o" if cache else None
    if kept and kept.exists():
        return kept
    made = []
    for source in sources:
        made.append(work / f"{source.stem}.o")
        includes = (f"-I{RUNTIME}/include", f"-I{RUNTIME}/src")
        run([*compiler, *COMPILE_FLAGS, *includes, "-c", str(source), "-o", str(made[-1])], work)
    whole = work / "runtime.o"
    run([*compiler, "-r", "-nostdlib", *map(str, made), "-o", str(whole)], work)
    if kept:
        keep(whole, kept)
    return whole


def keep(made: Path, kept: Path) -> None:
    """Copy a file into the cache, whole or not at all; without a cache it is compiled again next time."""
    fresh = kept.with_name(f".{kept.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, fresh)
        fresh.replace(kept)
    with contextlib.suppress(OSError):
        fresh.unlink(missing_ok=True)


def run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        lines = lines or [f"exit code {done.returncode}"]
        if any(os.strerror(errno.ENOSPC) in line for line in lines):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # work_folder says where
        said = next((line for line in lines if "error" in line or "undefined" in line), lines[0])
        raise LlmcError(
            f"the C compiler failed: {said}", place=" ".join(command[:6]), hint="check the compiler with: cc --version"
        )
