"""TVM kernels for CPUs: loops over tiles that fit the caches and the vector registers of each target."""
