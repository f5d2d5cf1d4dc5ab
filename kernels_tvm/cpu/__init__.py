"""Kernels for CPUs: loops over tiles that the caches and the vector registers of each target hold."""
