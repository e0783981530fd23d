"""The computations of one replica; kernels never communicate."""
