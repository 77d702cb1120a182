"""Triton kernels of the ops, one file per op, importable without the runtime. There are none yet."""
