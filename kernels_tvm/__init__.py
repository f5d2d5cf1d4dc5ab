"""TVM kernels for inference: what each computes, how it is scheduled for each target, and its compilation.

`cpu.library.load` and `gpu.library.load` make a kernel's function from its description. This floor knows TVM
and NumPy, and nothing of models.
"""
