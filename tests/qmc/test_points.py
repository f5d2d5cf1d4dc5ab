"""Points against SciPy's and QMCPy's, the definitions in NumPy, and what evenly spread points must do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from shiftaddvit_jax import qmc

SEQUENCES = {"net": qmc.sobol, "lattice": qmc.lattice, "halton": qmc.halton}


@pytest.fixture(params=SEQUENCES, ids=str)
def sequence(request):
    return SEQUENCES[request.param]


def radical_inverse(index, base):
    value, unit = 0.0, 1 / base
    while index:
        index, digit = divmod(index, base)
        value, unit = value + digit * unit, unit / base
    return value


def test_sobol_points_are_scipys_to_the_last_bit():
    theirs = scipy.stats.qmc.Sobol(64, scramble=False, bits=32).random(512) * 2**32
    np.testing.assert_array_equal(qmc.sobol(64).integers(512, order="gray"), theirs)


def test_natural_order_is_the_gray_code_undone():
    net = qmc.sobol(3).randomize(jax.random.key(1))
    index = np.arange(64)
    np.testing.assert_array_equal(
        net.integers(64, order="gray"), np.asarray(net.integers(64))[index ^ index >> 1]
    )


def test_lattice_points_are_multiples_of_the_generating_vector():
    lattice = qmc.lattice(64)
    inverses = np.array([radical_inverse(i, 2) for i in range(100)])
    expected = np.outer(inverses, np.asarray(lattice.vector, np.float64)) % 1
    np.testing.assert_array_equal(np.asarray(lattice.integers(100)) / 2**32, expected)


def test_a_lattice_is_shifted_modulo_1():
    lattice = qmc.lattice(5).randomize(jax.random.key(2))
    plain = np.asarray(qmc.lattice(5).integers(32)) / 2**32
    shifted = (plain + np.asarray(lattice.shift) / 2**32) % 1
    np.testing.assert_array_equal(np.asarray(lattice.integers(32)) / 2**32, shifted)


def test_halton_points_are_radical_inverses():
    halton = qmc.halton(64)
    expected = [[radical_inverse(i, base) for base in (2, 3, 5, 7)] for i in range(200)]
    ours = np.asarray(halton.integers(200)) / halton.denominators
    np.testing.assert_allclose(ours[:, :4], expected, atol=1e-15)
    np.testing.assert_allclose(ours, scipy.stats.qmc.Halton(64, scramble=False).random(200), atol=1e-15)


def test_halton_digits_are_permuted_at_each_place():
    halton = qmc.halton(6).randomize(jax.random.key(3))
    for base, permutations in zip((2, 3, 5, 7, 11, 13), np.asarray(halton.permutations), strict=True):
        np.testing.assert_array_equal(
            np.sort(permutations[:, :base]), np.tile(np.arange(base), (len(permutations), 1))
        )
    digits = [np.asarray(halton.permutations)[1, place] for place in range(20)]  # of base 3
    fraction = sum(digits[place][17 // 3**place % 3] * 3.0 ** -(place + 1) for place in range(20))
    np.testing.assert_allclose(halton.integers(1, 17)[0, 1] / halton.denominators[1], fraction, atol=1e-9)


@pytest.mark.parametrize("start", [0, 256, 768])
def test_each_elementary_interval_of_a_scrambled_net_holds_one_point(start):
    # The first two dimensions of Sobol' points are a (0, 2)-sequence.
    points = np.asarray(qmc.sobol(2).randomize(jax.random.key(4)).points(256, start))
    for level in range(9):
        cells = np.floor(points * [2**level, 2 ** (8 - level)]).astype(int)
        assert len({tuple(cell) for cell in cells}) == 256


def test_all_64_dimensions_are_stratified(sequence):
    points = np.asarray(sequence(64).randomize(jax.random.key(5)).points(1024))
    if sequence is qmc.halton:  # a period of each base
        for base, column in zip((2, 3, 5, 7, 11, 13), points.T, strict=False):
            np.testing.assert_array_equal(np.bincount((column[:base] * base).astype(int)), np.ones(base))
    else:
        for column in points.T:
            assert len(set((column * 1024).astype(int))) >= 1024 - (sequence is qmc.lattice)


def test_points_are_the_integers_truncated_and_never_1(sequence):
    points = np.asarray(sequence(2).randomize(jax.random.key(6)).points(4096))
    assert points.dtype == np.float32
    assert points.min() >= 0
    assert points.max() < 1
    np.testing.assert_array_equal(
        qmc.to_unit(np.array([0, 2**31, 2**32 - 1], np.uint32)), [0, 0.5, 1 - 2**-24]
    )


def test_unit_numbers_come_back_as_integers():
    integers = np.array([0, 2**23, 2**31 + 2**8, 2**32 - 2**8], np.uint32)
    np.testing.assert_array_equal(
        qmc.from_unit(qmc.to_unit(integers)), np.where(integers < 2**24, integers, integers)
    )


def test_later_points_continue_earlier_ones(sequence):
    points = sequence(3).randomize(jax.random.key(7))
    np.testing.assert_array_equal(points.integers(24, 8), points.integers(32)[8:])


def test_keys_are_mapped_and_traced(sequence):
    keys = jax.random.split(jax.random.key(8), 3)
    together = jax.jit(jax.vmap(lambda key: sequence(2).randomize(key).points(16)))(keys)
    np.testing.assert_array_equal(together[1], sequence(2).randomize(keys[1]).points(16))
    assert not np.array_equal(together[0], together[1])


def rms_error(draw, count):
    """Of the mean of a product over three dimensions, periodic, whose mean is 1."""
    keys = jax.random.split(jax.random.key(9), 16)
    points = jax.vmap(lambda key: draw(key, count))(keys)
    means = jnp.prod(1 / 2 + jnp.abs(2 * points - 1), axis=-1).mean(axis=-1)
    return float(jnp.sqrt(jnp.mean((means - 1) ** 2)))


def test_errors_of_integrals_fall_faster_than_those_of_random_points(sequence):
    def draw(key, count):
        return sequence(3).randomize(key).points(count)

    def random(key, count):
        return jax.random.uniform(key, (count, 3))

    assert rms_error(draw, 1024) < rms_error(random, 1024) / 10
    assert rms_error(draw, 1024) < rms_error(draw, 64) / 8  # random points: 4


def test_discrepancy_is_far_below_that_of_random_points(sequence):
    def discrepancy(points):
        return scipy.stats.qmc.discrepancy(np.asarray(points, np.float64), method="L2-star")

    key = jax.random.key(10)
    assert (
        discrepancy(sequence(2).randomize(key).points(256))
        < discrepancy(jax.random.uniform(key, (256, 2))) / 4
    )


@pytest.mark.parametrize("dimensions", [0, 65])
def test_dimensions_out_of_range_are_refused(sequence, dimensions):
    with pytest.raises(ValueError, match=rf"1 to 64 dimensions, got {dimensions}; for more: qmcpy\.\w+"):
        sequence(dimensions)


@pytest.mark.parametrize("count", [0, 2**20])
def test_points_past_the_end_are_refused(count):
    with pytest.raises(ValueError, match="a lattice has points 0 to 1,048,575, got"):
        qmc.lattice(2).integers(count, 1)


def test_another_order_is_refused():
    with pytest.raises(ValueError, match="unknown order of a digital net 'grey'; did you mean 'gray'"):
        qmc.sobol(2).integers(4, order="grey")


def test_nets_are_qmcpys_to_the_last_bit():
    qmcpy = pytest.importorskip("qmcpy")
    plain = qmcpy.DigitalNetB2(64, randomize="FALSE")(256, return_binary=True, warn=False)
    np.testing.assert_array_equal(qmc.sobol(64).integers(256), plain)
    theirs = qmcpy.DigitalNetB2(5, randomize="LMS DS", t=32, seed=7)
    matrices, shift = (jnp.asarray(x[0], jnp.uint32) for x in (theirs.gen_mats, theirs.rshift))
    np.testing.assert_array_equal(
        qmc.DigitalNet(matrices, shift).integers(256), theirs(256, return_binary=True)
    )


def test_lattices_and_halton_points_are_qmcpys():
    qmcpy = pytest.importorskip("qmcpy")
    theirs = qmcpy.Lattice(64, randomize="FALSE")(256, warn=False)
    np.testing.assert_array_equal(np.asarray(qmc.lattice(64).integers(256)) / 2**32, theirs)
    halton = qmc.halton(64)
    theirs = qmcpy.Halton(64, randomize="FALSE")(256, warn=False)
    np.testing.assert_allclose(np.asarray(halton.integers(256)) / halton.denominators, theirs, atol=1e-12)
