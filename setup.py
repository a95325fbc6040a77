"""The user's folders stand at the top level; here they become the package `llmc`."""

from setuptools import setup

FOLDERS = ["compiler", "compiler.frontend", "compiler.frontend.packed"]

FOLDERS += ["passes", "schedules", "schedules.cpu", "runtime", "cli", "cli.html"]

FOLDERS += ["runtime.serve", "bench", "bench.chart", "bench.gpu", "bench.peers", "schedules.cuda"]

setup(
    packages=["llmc", *(f"llmc.{folder}" for folder in FOLDERS)],
    package_dir={f"llmc.{folder}": folder.replace(".", "/") for folder in FOLDERS},
    package_data={
        "llmc": ["py.typed"],
        "llmc.runtime": ["include/*.h", "src/*.c", "src/*.h"],
        "llmc.cli.html": ["*.css"],
        "llmc.schedules": ["*.c", "tuned/*.json"],
        "llmc.schedules.cuda": ["include/*.cuh"],
        "llmc.bench": ["*.c", "gpu/micro/*.cu", "peers/requirements/*.txt"],
    },
    include_package_data=False,
)
