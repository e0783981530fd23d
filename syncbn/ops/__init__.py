"""Autograd functions over all replicas, made of kernels and an exchange."""
