"""The table of shapes is that of the models which it names."""

import pytest

from shiftaddvit_jax.costs import count_products
from shiftaddvit_jax.costs.shapes import ATTENTIONS, DEPTHWISE, LAYERS, PAPER_CONTEXTS, PAPER_LAYERS
from shiftaddvit_jax.models import create_model
from shiftaddvit_jax.models.variables import variable_shapes


def products(name, **kinds):
    model = create_model(name, **kinds)
    return count_products(model, variable_shapes(model))


@pytest.mark.parametrize(("name", "shapes"), [("pvt_v2_b0", LAYERS), ("pvt_v2_b1", PAPER_LAYERS)])
def test_linear_layers_are_those_of_the_mlps(name, shapes):
    found = {(each.rows, each.inputs, each.outputs) for each in products(name) if "/mlp/fc" in each.module}
    assert set(shapes) <= found


def test_depthwise_convolutions_are_those_of_the_mlps():
    found = {
        (each.grid[0], each.groups)
        for each in products("pvt_v2_b0")
        if each.kernel == (3, 3) and each.inputs == 1
    }
    assert found == set(DEPTHWISE)


@pytest.mark.parametrize(
    ("kind", "contexts"),
    [
        ("hamming_linear", {(tokens, head_dim, head_dim, heads) for tokens, heads, head_dim in ATTENTIONS}),
        ("ecoformer", set(PAPER_CONTEXTS)),
    ],
)
def test_contexts_are_those_of_the_attentions(kind, contexts):
    sums = [each for each in products("pvt_v2_b0", attention=kind) if each.primitive == "adds"]
    # The context k^T v sums over all tokens.
    found = {(each.inputs, each.outputs, each.rows, each.groups) for each in sums}
    assert contexts <= found
