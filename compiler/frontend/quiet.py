"""Keep what torch and transformers say to themselves off the terminal."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

RAISED = ("torch._subclasses.fake_tensor",)
"""Loggers of errors that are raised too."""
LOGGERS = (*RAISED, "torch.onnx", "onnxscript", "onnx_ir", "transformers", "accelerate")


@contextmanager
def quiet() -> Iterator[None]:
    """Errors alone are logged inside, those that are raised too not even then, and nothing is warned of."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL if logger.name in RAISED else logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
