"""What a rotation does to activations in int8, and to weights that are powers of two, layer by layer.

python docs/rotated_layers.py [CHECKPOINT --data digits [--path DIR]]

Each linear layer's inputs and weights are a checkpoint's on test images; without one, those of a `deit_tiny`
with random weights, heavy tails and outlier channels, see `shiftaddvit_jax.bench.synthetic`. Inputs x and
weights become x R and R^T W, which have the same product in exact arithmetic.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import shiftaddvit_jax as sav
from shiftaddvit_jax.bench.synthetic import natural_images, trained_like_variables
from shiftaddvit_jax.checkpoints.source import open_source
from shiftaddvit_jax.data import load_dataset, preprocess
from shiftaddvit_jax.models.inspect import capture
from shiftaddvit_jax.nn import Dense
from shiftaddvit_jax.ops import dynamic_int8, power_of_two, rotate, two_powers_of_two

IMAGES = 16


def layers(model, variables, images):
    """Each dense layer of a block: inputs [tokens, inputs] and kernel, by its name."""
    kept = {}

    def look(module, method, arguments, result):
        if method != "__call__" or not isinstance(module, Dense) or "block" not in "/".join(module.path):
            return None
        return arguments[0], module.variables["params"]["kernel"]

    for name, [(x, kernel)] in capture(model, variables, images, look).items():
        kept[name] = x.reshape(-1, x.shape[-1]), kernel
    return kept


def in_int8(x):
    """Numbers as int8 with a scale for each row."""
    whole, scale = dynamic_int8(x, axes=(-1,))
    return whole * scale


# What is rounded: activations and weights as they are multiplied.
ROUNDED = {
    "int8 activations": lambda x, kernel: (in_int8(x), kernel),
    "one power of two a weight": lambda x, kernel: (x, power_of_two(kernel)),
    "two powers of two a weight": lambda x, kernel: (x, two_powers_of_two(kernel)),
}


@jax.jit
def decibels(x, kernel, signs):
    """Signal to noise of a layer's outputs with each of `ROUNDED`, without and with a rotation."""
    wanted = x @ kernel
    wanted_power = jnp.var(wanted)
    found = []
    for rounded in ROUNDED.values():
        for inputs, weights in ((x, kernel), (rotate(x, signs), rotate(kernel.T, signs).T)):
            inputs, weights = rounded(inputs, weights)
            found.append(10 * jnp.log10(wanted_power / jnp.mean((inputs @ weights - wanted) ** 2)))
    return jnp.stack(found)


def outliers(x):
    """How much larger the largest channel's deviation is than the median channel's."""
    deviations = jnp.sqrt(jnp.mean(x**2, axis=0))
    return float(jnp.max(deviations) / jnp.median(deviations))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", metavar="CHECKPOINT")
    parser.add_argument("--data", help="digits, folder, idx, ...")
    parser.add_argument("--path", default="", help="where the data lies")
    arguments = parser.parse_args()
    if arguments.checkpoint:
        source = open_source(arguments.checkpoint)
        model, variables = source.model, source.variables
        examples = load_dataset(arguments.data, arguments.path).test
        images = np.stack([preprocess(examples[i]["image"], source.preprocessing) for i in range(IMAGES)])
    else:
        model = sav.create_model("deit_tiny", attention="msa")
        variables, images = trained_like_variables(model, seed=0), natural_images(IMAGES, 224, seed=1)
    rows = {}
    for name, (x, kernel) in layers(model, variables, images).items():
        signs = jax.random.rademacher(jax.random.key(0), (1, 2, x.shape[-1]), jnp.int8)
        figures = rows.setdefault(name.rpartition("/")[2], [])
        figures.append([outliers(x), *np.asarray(decibels(x, kernel, signs))])
    pairs = " | ".join(f"{name}, dB: plain, rotated" for name in ROUNDED)
    print(f"| layers | outliers | {pairs} |\n|---|---|{'---|' * len(ROUNDED)}")
    for name, figures in rows.items():
        outlier, *found = np.mean(figures, axis=0)
        cells = " | ".join(f"{a:.1f}, {b:.1f}" for a, b in zip(found[::2], found[1::2], strict=True))
        print(f"| `{name}` | {outlier:.1f} | {cells} |")
