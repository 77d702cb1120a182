"""Triton kernels of the ops, one file per op, importable without the runtime (but not without Triton)."""
