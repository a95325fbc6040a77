"""Schedules for x86-64: kernels written as TIR, compiled by LLVM."""
