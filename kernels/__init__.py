"""Triton kernels and their PyTorch references, one operation a file."""
