"""CUDA C++ as text: what kernels' sources have in common."""

from __future__ import annotations

C_TYPES = {"f32": "float", "bf16": "bf16", "f16": "f16", "i32": "int", "i64": "long long", "i8": "signed char"}
"""An element type as include/device.cuh spells it."""
