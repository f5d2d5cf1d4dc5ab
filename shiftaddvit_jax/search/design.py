"""Which configurations to run: the first bits of a digital net's coordinates, as a fractional factorial.

On a net's first ``2 ** m`` points a bit of a coordinate is a linear function of the point's number, so that
its sign is one Walsh function of it: its column. Where columns differ, main effects do not mix. A first bit's
column always begins with a one, and the sum of two does not: no main effect mixes with a pair's.
"""

from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int, UInt32

from shiftaddvit_jax.qmc import DigitalNet, sobol
from shiftaddvit_jax.qmc.points import BITS

MOST_RUNS = 2**20


class Design(NamedTuple):
    """Configurations, and where their contrasts lie in the Walsh transform of what is measured on them.

    Attributes:
      levels: each factor's level, [runs, factors].
      columns: the Walsh function of each factor's each bit, the first bit first, [factors, bits].
      flipped: whether a bit is one where its Walsh function is +1, [factors, bits].
    """

    levels: Int[np.ndarray, "runs factors"]
    columns: Int[np.ndarray, "factors bits"]
    flipped: Int[np.ndarray, "factors bits"]


def make_design(factors: int, choices: int, runs: int, seed: int = 0) -> Design:
    """A design of ``runs`` configurations.

    Args:
      factors: how many groups of layers there are.
      choices: levels of each, 2 or 4.
      runs: configurations, a power of two.
      seed: of the net's randomization, and of which factor takes which of its coordinates.

    Raises:
      ValueError: another number of levels, or too few runs to tell the factors apart.
    """
    bits = level_bits(choices)
    least = fewest_runs(factors, choices)
    if runs & (runs - 1) or runs < least:
        raise ValueError(
            f"{factors} groups of {choices} choices take {least} runs, or a larger power of two, so that no "
            f"two of them change together; got {runs}; give more, or larger groups"
        )
    order, randomization = jax.random.split(jax.random.key(seed))
    net = sobol(factors).randomize(randomization)
    places = np.asarray(jax.random.permutation(order, factors))
    net = DigitalNet(net.matrices[places], net.shift[places])
    shifts = np.asarray(net.shift)[:, None] >> (BITS - 1 - np.arange(bits, dtype=np.uint32)) & 1
    levels = np.asarray(net.integers(runs)) >> np.uint32(BITS - bits)
    columns = _columns(np.asarray(net.matrices), bits, runs.bit_length() - 1)
    return Design(levels.astype(int), columns, shifts.astype(int))


def level_bits(choices: int) -> int:
    """Bits of a level of so many choices."""
    if choices not in (2, 4):
        raise ValueError(f"a layer has 2 or 4 choices in a search, got {choices}; add or leave out some")
    return choices.bit_length() - 1


def fewest_runs(factors: int, choices: int) -> int:
    """The least power of two at which no two contrasts of the factors' levels are the same Walsh function.

    With two choices a factor has one contrast, its first bit; with four it has three: its two first bits and
    their sum.
    """
    bits, matrices = level_bits(choices), np.asarray(sobol(factors).matrices)
    runs = 2
    while runs < MOST_RUNS:
        columns = _columns(matrices, bits, runs.bit_length() - 1)
        contrasts = [columns[:, 0]] if bits == 1 else [*columns.T, columns[:, 0] ^ columns[:, 1]]
        found = np.concatenate(contrasts)
        if found.all() and len(set(found.tolist())) == len(found):
            return runs
        runs *= 2
    raise ValueError(f"{factors} factors are too many for {MOST_RUNS:,} runs; take larger groups")


def _columns(matrices: UInt32[np.ndarray, "factors 32"], bits, levels) -> Int[np.ndarray, "factors bits"]:
    """For each of the first rows of generating matrices its first entries, as the bits of a number."""
    places = BITS - 1 - np.arange(bits, dtype=np.uint32)
    rows = matrices[:, None, :levels] >> places[:, None] & 1
    return rows.astype(int) @ (1 << np.arange(levels))
