"""How near binary codes come to trained softmax attention without training, with and without rotations.

python docs/rotated_codes.py CHECKPOINT... --data digits [--path DIR]

Queries and keys are those of the checkpoints' own softmax attention, on test images. Numbers are means over
checkpoints, and where signs are drawn, over `DRAWS` of them.
"""

import argparse
import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from shiftaddvit_jax.checkpoints.source import open_source
from shiftaddvit_jax.data import load_dataset, preprocess
from shiftaddvit_jax.models.inspect import capture
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.names import ROTATIONS
from shiftaddvit_jax.nn import attention
from shiftaddvit_jax.ops import binarize, code_similarity, l2_normalize, rotate

KINDS = ("hamming_quadratic", "binary_softmax", "hamming_linear")
DRAWS = 2
MOST = max(attention.ROTATIONS.values())
COMPARED, SCORED = 64, 400  # images: of queries and keys, and of top-1
STEP = 100  # images at once


def evenly(examples, count, pixels):
    """As many images, evenly, as a model gets them, and their labels."""
    places = np.linspace(0, len(examples) - 1, min(count, len(examples))).astype(int)
    images = np.stack([preprocess(examples[int(place)]["image"], pixels) for place in places])
    return images, np.asarray(examples.labels)[places]


def queries_and_keys(model, variables, images):
    """Those of every softmax attention that becomes one of codes: all but the last stage of a pyramid."""

    def look(module, method, arguments, result):
        return result[:2] if method == "qkv" else None

    seen = capture(model, variables, images, look)
    last = f"stage{len(model.attention)}/" if len(model.attention) > 1 else "none"
    return [pair for name, (pair,) in seen.items() if not name.startswith(last)]


def code_weights(kind, q, k, signs):
    """How much each token attends to each by codes; rows sum to 1."""
    head_dim, stacked = q.shape[-1], len(signs)
    if kind == "hamming_linear":
        q, k = l2_normalize(q), l2_normalize(k)
    q, k = rotate(q, signs), rotate(k, signs)
    if kind == "hamming_linear":
        products = binarize(q) @ binarize(k).swapaxes(-1, -2) / stacked
        weights = jnp.eye(products.shape[-1]) / 2 + products / jnp.pi
        return weights / jnp.sum(weights, axis=-1, keepdims=True)
    scores = code_similarity(q, k, "zero" if kind == "binary_softmax" else "sample") / stacked
    if kind == "binary_softmax":
        scores *= jnp.mean(jnp.abs(q), (-2, -1), keepdims=True) * jnp.mean(
            jnp.abs(k), (-2, -1), keepdims=True
        )
    return jax.nn.softmax(scores * head_dim**-0.5)


@functools.partial(jax.jit, static_argnames="kind")
def compare(q, k, signs, kind):
    """The error of codes' weights to softmax's, relative to theirs, and their correlation with them.

    The error is a root mean square. The correlation is that of the logarithms of a query's weights, a mean
    over queries: whether the same keys come first, whatever the temperature.
    """
    wanted = jax.nn.softmax(q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5)
    if kind == "uniform":
        found = jnp.full(wanted.shape, 1 / wanted.shape[-1])
    else:
        found = code_weights(kind, q, k, signs)
    error = jnp.sqrt(jnp.sum((found - wanted) ** 2) / jnp.sum(wanted**2))
    found, wanted = (jnp.log(weights + 1e-9) for weights in (found, wanted))
    found, wanted = (x - jnp.mean(x, axis=-1, keepdims=True) for x in (found, wanted))
    squares = jnp.sum(found**2, axis=-1) * jnp.sum(wanted**2, axis=-1)
    return error, jnp.mean(jnp.sum(found * wanted, axis=-1) / jnp.sqrt(squares + 1e-20))


def draw(rotation, head_dim, key):
    """Signs of four rotations that stand for any choice, so that one program serves all of them.

    Four times the same rotation are one rotation, and without signs the two transforms undo each other.
    """
    count = attention.ROTATIONS[rotation]
    if not count:
        return jnp.ones((MOST, 2, head_dim), jnp.int8)
    signs = jax.random.rademacher(key, (count, 2, head_dim), jnp.int8)
    return jnp.tile(signs, (MOST // count, 1, 1))


def compare_all(pairs, kind, rotation, seed):
    """The mean error and correlation of all attentions."""
    keys = jax.random.split(jax.random.key(seed), len(pairs))
    signs = [draw(rotation, q.shape[-1], key) for key, (q, _) in zip(keys, pairs, strict=True)]
    return np.mean([compare(*pair, s, kind) for pair, s in zip(pairs, signs, strict=True)], axis=0)


@functools.cache
def shapes(model):
    """Those of a model's variables, by their paths."""
    return flatten_dict(variable_shapes(model))


@functools.cache
def compiled(model):
    """One program for all variables of a model."""
    return jax.jit(model.apply)


def top1(model, variables, images, labels):
    """The share of the images, in percent, whose class is right."""
    steps = range(0, len(images), STEP)
    chosen = [np.argmax(compiled(model)(variables, images[at : at + STEP]), axis=-1) for at in steps]
    return 100 * float(np.mean(np.concatenate(chosen) == labels))


def swapped(source, kind, rotation, key):
    """The model with codes in its attention, and the checkpoint's variables; what is new beside them is 0.

    New are convolutions of values and biases of positions. Signs are drawn.
    """
    stages = len(source.model.attention)
    kinds = (kind,) if stages == 1 else (*[kind] * (stages - 1), source.model.attention[-1])
    primitives = dataclasses.replace(source.model.primitives, rotation="hadamard_4x")
    model = source.model.clone(attention=kinds, primitives=primitives)
    own = flatten_dict(source.variables)
    variables = {}
    for path, leaf in shapes(model).items():
        if path[0] == "rotation":
            key, used = jax.random.split(key)
            variables[path] = draw(rotation, leaf.shape[-1], used)
        else:
            variables[path] = own.get(path, np.zeros(leaf.shape, leaf.dtype))
    return model, unflatten_dict(variables)


def without_attention(source):
    """The checkpoint with queries and keys of 0, whose softmax is uniform, where `swapped` has codes."""
    last = f"stage{len(source.model.attention)}" if len(source.model.attention) > 1 else None
    flat = {}
    for path, leaf in flatten_dict(source.variables).items():
        is_qkv = "qkv" in path and path[1] != last
        blank = np.arange(leaf.shape[-1]) < leaf.shape[-1] * 2 // 3 if is_qkv else False
        flat[path] = jnp.where(blank, 0, leaf)
    return source.model, unflatten_dict(flat)


def spread(values):
    """A mean and a range of percentages."""
    return f"{np.mean(values):.1f} ({np.min(values):.1f} to {np.max(values):.1f})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--data", required=True, help="digits, folder, idx, ...")
    parser.add_argument("--path", default="", help="where the data lies")
    arguments = parser.parse_args()
    data = load_dataset(arguments.data, arguments.path)
    sources = [open_source(checkpoint) for checkpoint in arguments.checkpoints]
    tests = [evenly(data.test, SCORED, source.preprocessing) for source in sources]
    pairs = [
        queries_and_keys(source.model, source.variables, images[:COMPARED])
        for source, (images, _) in zip(sources, tests, strict=True)
    ]
    dense = [top1(s.model, s.variables, *test) for s, test in zip(sources, tests, strict=True)]
    uniform = np.mean([compare_all(each, "uniform", "none", 0) for each in pairs], axis=0)
    none = [top1(*without_attention(s), *test) for s, test in zip(sources, tests, strict=True)]
    print(f"dense: top-1 {spread(dense)} %; uniform weights: error {uniform[0]:.3f}, top-1 {spread(none)} %")
    print("| attention | rotation | error | correlation | top-1 |\n|---|---|---|---|---|")
    for kind, rotation in itertools.product(KINDS, ROTATIONS):
        draws = range(DRAWS if rotation != "none" else 1)
        figures = [compare_all(each, kind, rotation, seed) for each in pairs for seed in draws]
        scores = [
            top1(*swapped(source, kind, rotation, jax.random.key(seed)), *test)
            for source, test in zip(sources, tests, strict=True)
            for seed in draws
        ]
        error, agreement = np.mean(figures, axis=0)
        print(
            f"| `{kind}` | {rotation} | {error:.3f} | {agreement:.3f} | {spread(scores)} |",
            flush=True,
        )
