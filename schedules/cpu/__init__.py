"""Schedules for CPUs: kernels written as TIR, compiled by LLVM."""
