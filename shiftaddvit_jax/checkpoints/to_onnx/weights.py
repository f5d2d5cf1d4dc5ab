"""Power-of-two weights as integers, and the nodes that look their values up.

A weight's code is the place of its value in a table of the layer's values, which are 31 at 5 bits: 0 and
either sign of 15 powers. A code takes 4 bits in a file if the layer has up to 16 values, 5 if up to 32, else
8. Looking a value up is exact in every runtime, and ONNX Runtime and OpenVINO do it once, when they load a
file.

What else the standard has is not as good, as seen with ONNX Runtime 1.32 and OpenVINO 2026.4.
DequantizeLinear of int8 holds 7 octaves, and ONNX Runtime then rounds the tokens to 8 bits too; of wider
integers, it computes it in every call. BitShift of bytes is wrong in OpenVINO, so divisions part the codes of
a byte.
"""

import numpy as np
from jaxtyping import Float, Int, UInt8

from shiftaddvit_jax.checkpoints.to_onnx.nodes import Node, constant, elementwise, reshape
from shiftaddvit_jax.ops.power_of_two import two_power_exponent

_BYTE = 8


def look_up(weight: Float[np.ndarray, "inputs outputs"]) -> Node:
    """The node of a shift layer's weight: codes of its values, up to 256, or numbers of two powers."""
    values = np.unique(weight)
    if len(values) > 256:
        exponent = two_power_exponent(weight, xp=np)
        numbers = constant(np.ldexp(weight, -exponent).astype(np.int8))
        numbers = Node("Cast", (numbers,), weight.shape, {"to": np.dtype(np.float32)})
        return elementwise("Mul", numbers, constant(np.ldexp(np.float32(1), exponent)))
    codes = np.searchsorted(values, weight).reshape(-1)
    if len(values) > 32:
        code = _unpack(codes, 8)
    else:
        code = _unpack(codes % 16, 4)
        if len(values) > 16:
            code = elementwise("Add", code, elementwise("Mul", _unpack(codes // 16, 1), _int32(16)))
    code = code if code.shape == codes.shape else _first(code, codes.size)
    return reshape(Node("Gather", (constant(values), code), codes.shape, {"axis": 0}), weight.shape)


def _unpack(codes: Int[np.ndarray, "codes"], bits: int) -> Node:
    """The codes, each of so many bits, from the bytes that hold them; more codes may follow, all 0."""
    packed = pack_bits(codes, bits)
    code = Node("Cast", (constant(packed),), packed.shape, {"to": np.dtype(np.int32)})
    if bits < _BYTE:
        steps = 2 ** np.arange(0, _BYTE, bits, dtype=np.int32)
        code = elementwise("Div", code, constant(steps[:, None]))
        code = elementwise("Mod", code, _int32(2**bits))
    return reshape(code, (packed.size * _BYTE // bits,))


def pack_bits(codes: Int[np.ndarray, "codes"], bits: int) -> UInt8[np.ndarray, "bytes"]:
    """Codes of so many bits in bytes: the first bits of all bytes have the first codes, and so on."""
    parts = _BYTE // bits
    padded = np.pad(codes, (0, -len(codes) % _BYTE)).reshape(parts, -1)
    shifted = padded << (bits * np.arange(parts))[:, None]
    return shifted.sum(axis=0).astype(np.uint8)


def _first(code: Node, count: int) -> Node:
    bounds = (constant(np.array([bound], np.int64)) for bound in (0, count))
    return Node("Slice", (code, *bounds), (count,))


def _int32(number: int) -> Node:
    return constant(np.array(number, np.int32))
