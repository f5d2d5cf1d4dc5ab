"""A model of one block, of a user's own: compiled in a second or two."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from shiftaddvit_jax.nn import Block, Primitives

CHANNELS, HEADS, SIDE = 16, 2, 8


class Tiny(nn.Module):
    attention: str = "msa"
    mlp: str = "dense"
    primitives: Primitives = Primitives()
    image_size: int = SIDE

    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Dense(CHANNELS, name="embed")(images.reshape(len(images), -1, 3))
        settings = {"sr_ratio": 2, "primitives": self.primitives}
        block = Block(HEADS, self.attention, self.mlp, **settings, name="block1")
        return nn.Dense(3, name="head")(jnp.mean(block(x, (SIDE, SIDE), train), axis=1))


def make_tiny(**kinds):
    """A model and its variables."""
    model = Tiny(**kinds)
    keys = {"params": jax.random.key(0), "router": jax.random.key(1)}
    return model, jax.jit(model.init)(keys, jnp.zeros((1, SIDE, SIDE, 3)))


def make_images(count=2):
    return np.random.default_rng(1).standard_normal((count, SIDE, SIDE, 3), np.float32)
