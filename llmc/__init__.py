"""llmc: an ahead-of-time compiler for language models.

import llmc

llmc.compile("path/to/model", out="model.so")
for piece in llmc.load("model.so").generate("Once upon a time", max_tokens=64):
    print(piece, end="", flush=True)
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LlmcError", "__version__", "compile", "load"]

if TYPE_CHECKING:
    from llmc.compiler.driver import compile_model as compile
    from llmc.runtime import LlmcError, load
else:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        """Import on first use: running an artifact must not pay for torch and TVM."""
        if name == "compile":
            from llmc.compiler.driver import compile_model

            return compile_model
        if name in ("LlmcError", "load"):
            from llmc import runtime

            return getattr(runtime, name)
        raise AttributeError(f"module 'llmc' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
