"""Triton kernels (CUDA, ROCm), one file per op; :mod:`bcos_rt.kernels.ops` is the only caller besides tests."""
