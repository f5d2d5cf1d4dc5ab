import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.costs import Operations, count_operations, count_products, sum_operations, weight_bytes
from shiftaddvit_jax.costs.counting import trace_products
from shiftaddvit_jax.nn import Primitives
from shiftaddvit_jax.pack import packed_shapes


def shapes(model):
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images))


# Published by the paper's Table 1 and timm, in billions, with the original attention at 224 x 224.
@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("pvt_v2_b0", 0.57),
        ("pvt_v2_b1", 2.12),
        ("pvt_v2_b2", 4.05),
        ("pvt_v2_b2_li", 3.9),
        ("pvt_tiny", 1.93),
        ("deit_tiny", 1.26),
    ],
)
def test_macs_are_the_published_ones(name, billions):
    model = sav.create_model(name)
    assert count_operations(model, shapes(model)).macs / 1e9 == pytest.approx(billions, rel=0.03)


class OneLayer(nn.Module):
    """A user's own model: one linear layer of the kind asked for, over all pixels."""

    kind: str
    image_size: int = 4
    primitives: sav.nn.Primitives = sav.nn.Primitives()

    @nn.compact
    def __call__(self, images, train=False):
        return sav.nn.make_linear(self.kind, 5, self.primitives, name="layer")(images, train)


@pytest.mark.parametrize(
    ("kind", "share", "macs", "shifts"),
    [
        ("dense", {}, 16 * 3 * 5, 0),
        ("shift", {}, 0, 16 * 3 * 5),
        # A quarter of the tokens on the shift expert; the router multiplies for all of them.
        ("moe", {"layer": 0.25}, 0.75 * 16 * 3 * 5 + 16 * 3 * 2, 0.25 * 16 * 3 * 5),
    ],
)
def test_counts_equal_hand_counts(kind, share, macs, shifts):
    model = OneLayer(kind)
    counts = count_operations(model, shapes(model), share)
    assert (counts.macs, counts.shifts, counts.adds) == (macs, shifts, 0)


def test_hamming_attention_adds_what_linear_attention_multiplies():
    counts = {}
    for attention in ("linear", "hamming_linear"):
        model = sav.create_model("pvt_v2_nano", num_classes=10, attention=attention)
        counts[attention] = count_operations(model, shapes(model))
    # k^T v and q (k^T v), at 64, 16 and 4 tokens with 1, 2 and 4 heads.
    products = 2 * (64 * 1 * 32**2 + 16 * 2 * 24**2 + 4 * 4 * 16**2)
    value_convolutions = 9 * (64 * 32 + 16 * 48 + 4 * 64)
    assert counts["hamming_linear"].adds == products
    difference = counts["linear"].macs - counts["hamming_linear"].macs
    assert difference == products - value_convolutions


TOKENS, CHANNELS, HEADS, HEAD_DIM = 9, 16, 2, 8
PROJECTIONS = 4 * TOKENS * CHANNELS**2  # of queries, keys, values and the output
SCORES = HEADS * TOKENS**2 * HEAD_DIM
CONTEXT = HEADS * TOKENS * HEAD_DIM**2  # k^T v, and q (k^T v)
VALUE_CONV = 9 * TOKENS * CHANNELS
# Shared queries and keys are one projection less; distances to 20 anchors become 16 bits.
HASHED, HASH = 3 * TOKENS * CHANNELS**2, HEADS * TOKENS * 20 * (HEAD_DIM + 16)
CODE_CONTEXT = HEADS * TOKENS * 16 * HEAD_DIM
FEATURES = int(HEAD_DIM * math.log(HEAD_DIM))  # of a performer
FEATURE_MAPS = HEADS * TOKENS * HEAD_DIM * FEATURES


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("msa", Operations(macs=PROJECTIONS + 2 * SCORES)),
        # One window of 3 x 3 tokens: a convolution to one token, two of whose projections make k and v.
        (
            "sra",
            Operations(
                macs=2 * TOKENS * CHANNELS**2
                + 9 * CHANNELS**2
                + 2 * CHANNELS**2
                + 2 * HEADS * TOKENS * HEAD_DIM
            ),
        ),
        ("linear", Operations(macs=PROJECTIONS + 2 * CONTEXT)),
        # Features of q and k, then k^T v, q (k^T v), and q times the sum of k.
        (
            "performer",
            Operations(macs=PROJECTIONS + 4 * FEATURE_MAPS + HEADS * TOKENS * FEATURES),
        ),
        ("hamming_linear", Operations(macs=PROJECTIONS + VALUE_CONV, adds=2 * CONTEXT)),
        ("hamming_quadratic", Operations(macs=PROJECTIONS + SCORES, popcounts=SCORES)),
        ("binary_softmax", Operations(macs=PROJECTIONS + SCORES, popcounts=SCORES)),
        ("hamming_ksh", Operations(macs=HASHED + HASH + VALUE_CONV, adds=2 * CODE_CONTEXT)),
        ("ecoformer", Operations(macs=HASHED + HASH, adds=2 * CODE_CONTEXT)),
    ],
)
def test_every_attention_counts_what_it_does(kind, expected):
    attention = sav.nn.make_attention(kind, num_heads=HEADS, sr_ratio=3)
    tokens = jnp.zeros((1, TOKENS, CHANNELS))
    variables = jax.eval_shape(lambda: attention.init(jax.random.key(0), tokens, (3, 3)))
    products = trace_products(lambda variables: attention.apply(variables, tokens, (3, 3)), variables)
    assert sum_operations(products) == expected


@pytest.mark.parametrize(("head_dim", "additions"), [(8, 3), (24, 1 + 6)])
def test_rotations_are_additions_and_codes_are_as_long_as_they_make_them(head_dim, additions):
    # Queries and keys, each in two rotations of two rounds; a product of Paley's 12 rows takes 6 additions.
    primitives = Primitives(rotation="hadamard_2x")
    attention = sav.nn.make_attention("hamming_quadratic", num_heads=2, primitives=primitives)
    tokens = jnp.zeros((1, TOKENS, 2 * head_dim))
    variables = jax.eval_shape(lambda: attention.init(jax.random.key(0), tokens, (3, 3)))
    products = trace_products(lambda variables: attention.apply(variables, tokens, (3, 3)), variables)
    found = sum_operations(products)
    assert found.adds == 2 * 2 * 2 * 2 * TOKENS * head_dim * additions
    assert found.popcounts == 2 * TOKENS**2 * 2 * head_dim


@pytest.mark.parametrize("mlp", sav.nn.LINEAR_KINDS)
@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_nano", "deit_tiny"])
def test_kinds_of_linear_layers_share_out_the_same_operations(name, mlp):
    dense, other = (sav.create_model(name, mlp=kind, projections=kind) for kind in ("dense", mlp))
    expected = count_operations(dense, shapes(dense)).macs
    products = count_products(other, shapes(other), 0.25)
    found = sum_operations(product for product in products if not product.module.endswith("router"))
    assert found.macs + found.shifts == pytest.approx(expected)


def test_operations_grow_with_the_batch():
    model = sav.create_model("pvt_v2_nano", attention="hamming_linear", mlp="shift")
    one, three = (count_operations(model, shapes(model), batch=batch) for batch in (1, 3))
    assert three == sum((one, one, one), Operations())


def test_packed_variables_count_as_those_they_were_made_from():
    model = sav.create_model("pvt_v2_nano", attention="hamming_linear", mlp="moe", activations="int8")
    packed = packed_shapes(model)
    assert count_products(model, packed, 0.5) == count_products(model, shapes(model), 0.5)


@pytest.mark.parametrize(
    ("activations", "bits"),
    [("float", (32, 5, 32, True)), ("fixed_point", (32, 5, 32, False)), ("int8", (8, 4, 32, False))],
)
def test_shifts_have_the_bits_of_their_layer(activations, bits):
    model = OneLayer("shift", primitives=sav.nn.Primitives(activations=activations))
    (product,) = count_products(model, shapes(model))
    assert (product.input_bits, product.weight_bits, product.output_bits, product.is_float) == bits


@pytest.mark.parametrize(("activations", "bits"), [("float", 32), ("int8", 8)])
def test_weights_of_two_terms_have_two_shifts_of_eight_bits(activations, bits):
    one, two = (
        OneLayer("shift", primitives=sav.nn.Primitives(activations=activations, weight_terms=terms))
        for terms in (1, 2)
    )
    (product,) = count_products(two, shapes(two))
    assert (product.input_bits, product.weight_bits) == (bits, 8)
    assert count_operations(two, shapes(two)).shifts == 2 * count_operations(one, shapes(one)).shifts


def test_dense_products_in_int8_have_int8_factors_and_int32_sums():
    model = OneLayer("dense", primitives=sav.nn.Primitives(precision="int8"))
    (product,) = count_products(model, shapes(model))
    assert (product.primitive, product.input_bits, product.weight_bits) == ("macs", 8, 8)
    assert (product.output_bits, product.is_float) == (32, False)
    weights, biases = 3 * 5, 5
    assert weight_bytes(model, shapes(model)) == {"layer": weights + 4 * biases}


@pytest.mark.parametrize(
    ("precision", "bits"), [("float32", (32, 32, 32, True)), ("int8", (8, 8, 32, False))]
)
def test_probabilities_and_values_have_the_bits_of_the_attention(precision, bits):
    model = sav.create_model(
        "pvt_v2_nano", attention=("binary_softmax", "msa", "msa", "msa"), attention_precision=precision
    )
    products = [
        product
        for product in count_products(model, shapes(model))
        if product.module == "stage1/block1/attn" and product.primitive == "macs"
    ]
    found = [(each.input_bits, each.weight_bits, each.output_bits, each.is_float) for each in products]
    assert found == [bits]


class Mine(nn.Module):
    """Nothing that this project knows: a strided convolution in groups, a loop, and a product of its own."""

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(8, (3, 3), (2, 2), "SAME", feature_group_count=2, name="conv")(images)
        x = x.reshape(x.shape[0], -1, 8)
        weight = self.param("weight", nn.initializers.ones, (8, 8))
        with jax.named_scope("loop"):
            x = jax.lax.scan(lambda x, _: (x @ weight, None), x, length=5)[0]
        return jax.vmap(lambda tokens: jnp.einsum("nc,mc->nm", tokens, tokens))(x)


class Yours(nn.Module):
    """One module in another."""

    @nn.compact
    def __call__(self, images):
        return Mine(name="mine")(images)


def test_a_module_of_a_users_own_is_counted_by_its_path():
    model, images = Yours(), jnp.zeros((2, 6, 6, 4))
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    products = trace_products(model.apply, variables, images)
    assert [(product.module, product.count) for product in products] == [
        ("mine/conv", 2 * 9 * 8 * 9 * 2),
        *[("mine", 2 * 9 * 8 * 8)] * 5,
        ("mine", 2 * 9 * 9 * 8),
    ]
    conv = products[0]
    assert (conv.image, conv.kernel, conv.grid, conv.stride) == ((6, 6), (3, 3), (3, 3), (2, 2))
    assert (conv.groups, conv.rows, conv.inputs, conv.outputs) == (2, 2, 2, 4)
    assert conv.output_bytes == 2 * 3 * 3 * 8 * 4


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_share_that_is_none_is_refused(share):
    model = OneLayer("moe")
    with pytest.raises(ValueError, match="a share from 0 to 1"):
        count_operations(model, shapes(model), share)


def test_a_mixture_without_a_measured_share_is_refused():
    model = OneLayer("moe")
    with pytest.raises(ValueError, match="shift_share lacks the MoE layer layer"):
        count_operations(model, shapes(model))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("dense", {"layer": 4 * (15 + 5)}),
        ("shift", {"layer": 15 * 5 / 8 + 4 * 5}),
        (
            "moe",
            {
                "layer/dense": 4 * (15 + 5),
                "layer/shift": 15 * 5 / 8 + 4 * 5,
                "layer/router": 4 * (6 + 2),
            },
        ),
    ],
)
def test_packed_bytes_equal_hand_counts(kind, sizes):
    model = OneLayer(kind)
    assert weight_bytes(model, shapes(model)) == sizes


class SignsAndExponents(nn.Module):
    """A user's own model: a shift layer that trains both."""

    image_size: int = 4

    @nn.compact
    def __call__(self, images, train=False):
        return sav.nn.ShiftDense(5, mode="ps", name="layer")(images)


def test_a_sign_and_an_exponent_are_packed_into_one_weight():
    model = SignsAndExponents()
    assert weight_bytes(model, shapes(model)) == {"layer": 15 * 5 / 8 + 4 * 5}


def test_packed_variables_have_the_bytes_that_they_have():
    model = sav.create_model("pvt_v2_nano", mlp="shift")
    packed = packed_shapes(model)
    expected = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed))
    assert sum(weight_bytes(model, packed).values()) == expected
