"""The user's folders stand at the top level; here they become the package `llmc`."""

from setuptools import setup

FOLDERS = ["compiler", "compiler.frontend", "passes", "schedules", "schedules.cpu", "runtime", "cli"]

setup(
    packages=["llmc", *(f"llmc.{folder}" for folder in FOLDERS)],
    package_dir={f"llmc.{folder}": folder.replace(".", "/") for folder in FOLDERS},
    package_data={
        "llmc": ["py.typed"],
        "llmc.runtime": ["include/*.h", "src/*.c", "src/*.h"],
        "llmc.schedules": ["*.c", "tuned/*.json"],
    },
    include_package_data=False,
)
