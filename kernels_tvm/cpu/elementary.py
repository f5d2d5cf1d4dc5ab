"""Elementary functions of vectors, made of additions, multiplications and table lookups."""

import math

import numpy as np
from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import constant, splat
from kernels_tvm.cpu.targets import Target
from kernels_tvm.descriptions import LANES


def polynomial(x, coefficients):
    """A polynomial of ``x`` by Horner's rule; ``coefficients`` start with that of the lowest power."""
    result = constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = T.bind(result * x + constant(coefficient))
    return result


def exp(x):
    """e^x for vectors, to 2 units in the last place; results that would be denormal are 2^-126."""
    x = T.bind(T.max(T.min(x, constant(88.0)), constant(-87.0)))
    whole = T.bind(T.nearbyint(x * constant(1 / math.log(2))))
    # ln 2 is the sum of two parts, the first exact in few bits (Cody and Waite).
    rest = T.bind(x - whole * constant(0.693359375) - whole * constant(-2.12194440e-4))
    power = polynomial(rest, [1, 1, 0.5, 1 / 6, 1 / 24, 1 / 120, 1 / 720])
    bits = T.shift_left(T.Cast(f"int32x{LANES}", whole) + splat(T.int32(127)), splat(T.int32(23)))
    return T.bind(power * T.reinterpret(f"float32x{LANES}", bits))


def sigmoid(x):
    """1 / (1 + e^-x) for vectors."""
    return T.bind(constant(1) / (constant(1) + exp(constant(0) - x)))


def gelu(target: Target, x):
    """Return x Phi(x) for vectors, to 3e-6, without an exponential or a division."""
    return _gelu_by_table(x) if target.tables else _gelu_by_polynomial(x)


def _half_erf(x: np.ndarray) -> np.ndarray:
    """Phi(x) - 1/2."""
    return np.array([math.erf(value / math.sqrt(2)) / 2 for value in x])


def _normal_cdf_coefficients(bound: float, degree: int) -> list[float]:
    """Powers of u = 2 x^2 / bound^2 - 1 that sum to (Phi(x) - 1/2) / x for |x| <= bound."""
    u = np.cos(np.pi * (np.arange(400) + 0.5) / 400)
    x = bound * np.sqrt((u + 1) / 2)
    return list(
        np.polynomial.chebyshev.cheb2poly(np.polynomial.chebyshev.chebfit(u, _half_erf(x) / x, degree))
    )


# The largest error is 2.1e-6, at the bound. Beyond the bound Phi is 0 or 1 to 4e-7.
_GELU_BOUND = 5.0
_GELU_COEFFICIENTS = _normal_cdf_coefficients(_GELU_BOUND, 12)


def _gelu_by_polynomial(x):
    clipped = T.bind(T.max(T.min(x, constant(_GELU_BOUND)), constant(-_GELU_BOUND)))
    u = T.bind(clipped * clipped * constant(2 / _GELU_BOUND**2) - constant(1))
    return T.bind(x * (clipped * polynomial(u, _GELU_COEFFICIENTS) + constant(0.5)))


# The table has a cubic polynomial of |x| around each multiple of bound / 31; the last one is nearly 0. The
# largest error is 1e-6.
_TABLE_BOUND, _TABLE_SIZE = 5.2, 32


def _gelu_table() -> np.ndarray:
    """The coefficients of |x|^3 to |x|^0, a row for each multiple, that sum to |x| (Phi(|x|) - 1)."""
    step = _TABLE_BOUND / (_TABLE_SIZE - 1)
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    rows = []
    for index in range(_TABLE_SIZE):
        first, last = step * max(index - 0.5, 0), step * min(index + 0.5, _TABLE_SIZE - 1)
        x = (first + last) / 2 + (last - first) / 2 * nodes
        # The polynomial around 0 has no constant, so that 0 becomes 0.
        powers = x[:, None] ** np.arange(3, 0 if index == 0 else -1, -1)
        fitted = np.linalg.lstsq(powers, x * (_half_erf(x) - 0.5), rcond=None)[0]
        rows.append(np.pad(fitted, (0, 4 - len(fitted))))
    return np.array(rows)


_GELU_TABLE = _gelu_table()


def _gelu_by_table(x):
    magnitude = _clipped_magnitude(x, _TABLE_BOUND)
    # Adding 2^23 rounds a small number to a whole one, which is in the lowest bits of the sum.
    place = magnitude * constant((_TABLE_SIZE - 1) / _TABLE_BOUND) + constant(2**23)
    index = T.bind(T.reinterpret(f"int32x{LANES}", place))
    total = None
    for coefficients in _GELU_TABLE.T:
        value = look_up(coefficients, index)
        total = T.bind(value if total is None else total * magnitude + value)
    # In this order of arguments a NaN stays a NaN: no comparison with it is true.
    return T.bind(T.max(constant(0), x) + total)


def _clipped_magnitude(x, bound: float):
    """The smaller of |x| and ``bound``, in one instruction that targets with ``tables`` have."""
    smaller_magnitude, without_sign = 0b0010, 0b1000
    bounds, all_lanes, no_rounding = constant(bound), T.uint16(0xFFFF), T.int32(4)
    operation = T.int32(smaller_magnitude | without_sign)
    return T.bind(
        T.call_llvm_pure_intrin(
            f"float32x{LANES}",
            "llvm.x86.avx512.mask.range.ps.512",
            x,
            bounds,
            operation,
            bounds,
            all_lanes,
            no_rounding,
        )
    )


def look_up(table: np.ndarray, index):
    """The entries of a table of 32 at the lowest 5 bits of each lane, on targets with ``tables``."""
    low, high = (
        T.Shuffle([T.float32(float(value)) for value in half], list(range(LANES)))
        for half in np.split(table, 2)
    )
    return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.vpermi2var.ps.512", low, index, high)
