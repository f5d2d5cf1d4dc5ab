"""Quasi-Monte Carlo: low-discrepancy points, and kernels that are fast on them."""

from shiftaddvit_jax.qmc.distributions import Distribution, sample
from shiftaddvit_jax.qmc.kernels import (
    Gram,
    digitally_shift_invariant_kernel,
    fftbr,
    gram,
    ifftbr,
    shift_invariant_kernel,
)
from shiftaddvit_jax.qmc.points import DigitalNet, Halton, Lattice, from_unit, halton, lattice, sobol, to_unit

__all__ = [
    "DigitalNet",
    "Distribution",
    "Gram",
    "Halton",
    "Lattice",
    "digitally_shift_invariant_kernel",
    "fftbr",
    "from_unit",
    "gram",
    "halton",
    "ifftbr",
    "lattice",
    "sample",
    "shift_invariant_kernel",
    "sobol",
    "to_unit",
]
