"""Models as ONNX files, for other runtimes.

The ONNX graph comes from a trace of the model, so the model is defined once: `trace` makes expressions of it,
`translations` a node of each, `weights` integers of power-of-two weights, and `save` a file.
"""

from shiftaddvit_jax.checkpoints.to_onnx.save import save_onnx

__all__ = ["save_onnx"]
