"""TVM kernels for inference: what each computes, how it is scheduled for each target, and its compilation.

`library.load` makes a kernel's function from its description. This floor knows TVM and NumPy, and nothing of
models.
"""
