"""Triton kernels; imported only with a GPU or with Triton's interpreter."""
