"""TVM kernels for inference: what each computes, how it is scheduled for each target, and its compilation.

This floor knows TVM and NumPy, and nothing of models. It holds no kernel yet: every op runs on XLA.
"""
