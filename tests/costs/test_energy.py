import json
from pathlib import Path

import numpy as np
import pytest

from shiftaddvit_jax.costs import Product, accelerator_cost, compute_energy

AUTHORS = json.loads((Path(__file__).parents[1] / "data" / "authors_energy.json").read_text())
PRIMITIVES = {"FC": "macs", "Shift": "shifts", "Add": "adds"}
FORMATS = {32: "float32", 8: "int8"}


def authors_product(case):
    return Product("", PRIMITIVES[case["type"]], case["tokens"], case["in_features"], case["out_features"])


@pytest.mark.parametrize("case", AUTHORS, ids=str)
def test_the_authors_figures_are_reproduced(case):
    cost = accelerator_cost(authors_product(case), FORMATS[case["bits"]], "authors")
    found = [cost.energy_mj, cost.latency_s, cost.min_energy_mj, cost.min_latency_s]
    expected = [case[name] for name in ("energy_mJ", "latency_s", "min_energy_mJ", "min_latency_s")]
    dram, buffer, network, registers = np.sum(cost.access_mj, axis=1)
    found += [cost.compute_mj, dram, 0, buffer, network, registers, *np.sum(cost.access_mj, axis=0)]
    np.testing.assert_allclose(found, [*expected, *case["breakdown"]], rtol=1e-9)


# 2 x 3 x 5 x 7 = 210 operations, by hand from the table of unit energies.
@pytest.mark.parametrize(
    ("primitive", "number_format", "picojoules"),
    [
        ("macs", "float32", 210 * (3.7 + 0.9)),
        ("macs", "float16", 210 * (1.1 + 0.4)),
        ("macs", "int32", 210 * (3.1 + 0.1)),
        ("macs", "int8", 210 * (0.2 + 0.1)),
        ("adds", "float32", 210 * 0.9),
        ("adds", "int32", 210 * 0.1),
        ("shifts", "float32", 210 * (0.03 + 0.9)),
        ("shifts", "int32", 210 * (0.13 + 0.1)),
        ("shifts", "int8", 210 * (0.024 + 0.1)),
        ("popcounts", "float32", 210 * 0.1 / 32),
    ],
)
def test_arithmetic_costs_what_the_table_says(primitive, number_format, picojoules):
    product = Product("", primitive, rows=3, inputs=5, outputs=7, groups=2)
    assert compute_energy(product, number_format) == pytest.approx(picojoules * 1e-9)


def test_bits_that_the_table_lacks_are_refused():
    with pytest.raises(ValueError, match="no energy is known of float64 add"):
        compute_energy(Product("", "macs", 3, 5, 7, input_bits=64, weight_bits=64, output_bits=64))


# A convolution so small that all of it fits the buffer.
def test_a_convolutions_traffic_equals_a_hand_count():
    conv = Product("", "macs", 1, 4, 8, image=(8, 8), kernel=(3, 3), grid=(8, 8), stride=(1, 1))
    dram, _, _, registers = accelerator_cost(conv).access_mj
    np.testing.assert_allclose(dram, [8 * 8 * 4 * 400e-9, 9 * 4 * 8 * 400e-9, 8 * 8 * 8 * 400e-9])
    # Each multiplication reads a number of the image, at 2 pJ, and of a kernel, at 4 pJ.
    np.testing.assert_allclose(registers[:2], [conv.count * 2e-9, conv.count * 4e-9])


# A product so small that every way to tile it fits: 2 tokens by a 2 x 2 weight, float32.
def test_the_smallest_traffic_equals_a_hand_count():
    cost = accelerator_cost(Product("", "macs", 2, 2, 2))
    dram, *_ = cost.access_mj
    # Each of the 4 numbers of each operand comes from, or goes to, DRAM once, at 400 pJ.
    np.testing.assert_allclose(dram, [4 * 400e-9] * 3)
    # Four elements each multiply for both tokens.
    assert cost.min_latency_s == pytest.approx(2 / 250e6)


def brute_force(rows, inputs, outputs):
    """The lowest energy times latency of float32 macs, by loops over all tilings; in joules and seconds."""
    best = np.inf, None
    divisors = {n: [d for d in range(1, n + 1) if n % d == 0] for n in range(1, max(inputs, outputs) + 1)}
    for m0 in divisors[outputs]:
        for m1 in divisors[outputs // m0]:
            for m2 in divisors[outputs // m0 // m1]:
                m3 = outputs // m0 // m1 // m2
                for c0 in divisors[inputs]:
                    for c1 in divisors[inputs // c0]:
                        c2 = inputs // c0 // c1
                        if m1 * c1 > 192 or m0 > 16 or c0 > 12 or m0 * c0 > 960:
                            continue
                        room = 65536 // (c0 * c1 + m0 * m1 * m2)
                        if room < 1:
                            continue
                        n3 = -(-rows // room)
                        ifmap, weight, ofmap = rows * inputs, inputs * outputs, rows * outputs
                        units = 0.5 * 4.6 * rows * inputs * outputs
                        units += 200 * (m3 * ifmap + n3 * weight + ofmap)
                        units += 6 * (m3 * m2 * ifmap + max(2 * (c2 - 1), 1) * ofmap)
                        units += 2 * (m3 * m2 * m1 * ifmap + n3 * weight) + max(c2 * (c1 - 1), 1) * ofmap
                        units += outputs * ifmap + 2 * rows * weight + max(c2 * c1 * (c0 - 1) * 2, 1) * ofmap
                        energy, latency = 2e-12 * units, rows * m3 * m2 * m0 * c2 * c0 / 250e6
                        best = min(best, (energy * latency, (energy, latency)))
    return best[1]


@pytest.mark.parametrize("shape", [(49, 30, 24), (3136, 32, 64), (50, 512, 100)])
def test_the_search_finds_what_loops_find(shape):
    cost = accelerator_cost(Product("", "macs", *shape))
    assert (cost.energy_mj / 1e3, cost.latency_s) == pytest.approx(brute_force(*shape))


@pytest.mark.parametrize("case", [case for case in AUTHORS if case["bits"] == 8], ids=str)
def test_fewer_bits_are_neither_slower_nor_dearer(case):
    narrow, wide = (accelerator_cost(authors_product(case), bits) for bits in ("int8", "int32"))
    assert narrow.latency_s <= wide.latency_s
    assert narrow.energy_mj < wide.energy_mj


def test_additions_move_their_operands():
    add = accelerator_cost(Product("", "adds", 196, 160, 160, input_bits=1))
    assert np.all(np.array(add.access_mj)[0] > 0)


def test_groups_cost_as_many_times_as_much():
    one, four = (accelerator_cost(Product("", "macs", 49, 64, 32, groups=groups)) for groups in (1, 4))
    assert (four.energy_mj, four.latency_s) == pytest.approx((4 * one.energy_mj, 4 * one.latency_s))


def test_windows_that_do_not_overlap_cost_what_the_product_of_patches_does():
    conv = Product("", "macs", 1, 3, 64, image=(224, 224), kernel=(16, 16), grid=(14, 14), stride=(16, 16))
    assert accelerator_cost(conv) == accelerator_cost(Product("", "macs", 196, 768, 64))


def test_tokens_of_which_no_expert_computes_any_cost_nothing():
    assert accelerator_cost(Product("", "shifts", 196, 64, 64, share=0.0)).energy_mj == 0


def test_a_product_of_codes_costs_less_than_one_of_numbers():
    codes = accelerator_cost(Product("", "popcounts", 197, 64, 197, 3, input_bits=1, weight_bits=1))
    numbers = accelerator_cost(Product("", "macs", 197, 64, 197, 3))
    assert codes.energy_mj < numbers.energy_mj / 3
    assert codes.latency_s < numbers.latency_s / 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("float16", "authors"), "knows float32 and int8, not float16"),
        (("float31", "own"), "did you mean 'float32'"),
        (("float32", "auhtors"), "did you mean 'authors'"),
    ],
)
def test_unknown_formats_and_modes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        accelerator_cost(Product("", "macs", 4, 4, 4), *arguments)
