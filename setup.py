"""The user's folders stand at the top level; here they become the package `llmc`."""

from setuptools import find_packages, setup

TOP = ("compiler", "passes", "schedules", "runtime", "cli", "bench")
FOLDERS = [folder for top in TOP for folder in (top, *(f"{top}.{inner}" for inner in find_packages(top)))]

setup(
    packages=["llmc", *(f"llmc.{folder}" for folder in FOLDERS)],
    package_dir={f"llmc.{folder}": folder.replace(".", "/") for folder in FOLDERS},
    package_data={
        "llmc": ["py.typed"],
        "llmc.runtime": ["include/*.h", "src/*.c", "src/*.h"],
        "llmc.cli.html": ["*.css"],
        "llmc.schedules": ["tuned/*.json"],
        "llmc.schedules.cuda": ["include/*.cuh"],
        "llmc.schedules.tuning": ["*.c"],
        "llmc.bench": ["*.c", "gpu/micro/*.cu", "peers/requirements/*.txt"],
    },
    include_package_data=False,
)
