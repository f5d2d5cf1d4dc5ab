"""Every kind of attention, from softmax to codes in Hamming space.

All share one call, ``(x [batch, tokens, channels], grid (height, width), train=False) -> [batch, tokens,
channels]``; ``train`` turns on dropout and the routers' noise. Their base class has heads, projections and
dropout. Inside, queries, keys and values are [batch, heads, tokens, head_dim].
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from shiftaddvit_jax.names import ATTENTION_KINDS
from shiftaddvit_jax.nn.linear import make_linear, make_patch_conv
from shiftaddvit_jax.nn.norm import PATCH_EPSILON, make_layer_norm
from shiftaddvit_jax.nn.position import bias_rows, relative_positions, resize_position_biases
from shiftaddvit_jax.nn.primitives import AttentionPrecision, Primitives
from shiftaddvit_jax.ops import (
    KernelHash,
    binarize,
    code_similarity,
    depthwise_conv_1d,
    dynamic_int8,
    hadamard,
    hash_codes,
    l2_normalize,
    learn_hash,
    matadd,
    rotate,
)
from shiftaddvit_jax.ops.activations import straight_through
from shiftaddvit_jax.ops.implementation import Implementation
from shiftaddvit_jax.validation import check_choice

Tokens = Float[Array, "batch tokens channels"]
Grid = tuple[int, int]  # height and width; tokens are its rows, one after the other

HASH_BITS, HASH_ANCHORS = 16, 20  # EcoFormer's code length and number of anchors
VALUE_KERNEL_SIZE = 9  # tokens that the depthwise convolution of V spans
POOLED_SIDE = 7  # side of the grid that "linear_sra" pools keys and values to
ROTATIONS = {"none": 0, "hadamard": 1, "hadamard_2x": 2, "hadamard_4x": 4}  # rotations side by side
VALUE_LIMIT = 2.0  # of BinaryAttention's values, which it trains clipped


class Attention(nn.Module):
    """The base of every kind of attention: heads, projections and dropout.

    Attributes:
      num_heads: heads; must divide the channels.
      projections: kind of the linear layers, see `make_linear`.
      sr_ratio: by how much ``"sra"`` reduces each side of the grid; the other kinds ignore it.
      layer_norm_eps: epsilon of the LayerNorm after a spatial reduction; by default the original's 1e-5.
      dropout: rate on the output.
      trained_grid: the grid that ``"binary_softmax"`` learns its biases for; by default that of its tokens.
      primitives: how shifts and additions are computed.
    """

    num_heads: int
    projections: str = "dense"
    sr_ratio: int = 1
    layer_norm_eps: float | None = None
    dropout: float = 0.0
    trained_grid: Grid | None = None
    primitives: Primitives = Primitives()

    def linear(self, features: int, name: str) -> nn.Module:
        """One of the attention's linear layers."""
        return make_linear(self.projections, features, self.primitives, name=name)

    def heads(
        self, x: Float[Array, "batch tokens parts_channels"], parts: int = 1
    ) -> list[Float[Array, "batch heads tokens head_dim"]]:
        """``x`` cut into ``parts`` equal parts of its channels, each split into heads.

        Raises:
          ValueError: channels that the heads do not divide.
        """
        batch, tokens, width = x.shape
        channels = width // parts
        if channels % self.num_heads:
            raise ValueError(
                f"{channels} channels do not split into {self.num_heads} heads; choose a divisor as num_heads"
            )
        x = x.reshape(batch, tokens, parts, self.num_heads, channels // self.num_heads)
        return list(x.transpose(2, 0, 3, 1, 4))

    def output(
        self, x: Float[Array, "batch heads tokens head_dim"], train: bool
    ) -> Float[Array, "batch tokens channels"]:
        """Heads joined, projected and dropped out."""
        batch, heads, tokens, head_dim = x.shape
        x = x.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * head_dim)
        x = self.linear(heads * head_dim, "proj")(x, train)
        return nn.Dropout(self.dropout, deterministic=not train)(x)

    def qkv(self, x: Float[Array, "batch tokens channels"], train: bool) -> list[Array]:
        """Queries, keys and values of the same tokens, from one linear layer."""
        return self.heads(self.linear(3 * x.shape[-1], "qkv")(x, train), parts=3)

    def rotated(
        self,
        q: Float[Array, "batch heads tokens head_dim"],
        k: Float[Array, "batch heads tokens head_dim"],
        implementation: Implementation,
    ) -> tuple[Float[Array, "batch heads tokens code"], Float[Array, "batch heads tokens code"]]:
        """Queries and keys as they are binarized: in the model's random rotations, if it has any.

        Their signs are in the collection ``"rotation"``, one set for all heads, and are not trained.
        """
        count = ROTATIONS[self.primitives.rotation]
        if not count:
            return q, k
        shape = (count, 2, q.shape[-1])
        signs = self.variable(
            "rotation", "signs", lambda: jax.random.rademacher(self.make_rng("params"), shape, jnp.int8)
        ).value
        return rotate(q, signs, implementation), rotate(k, signs, implementation)

    def add_value_conv(
        self,
        x: Float[Array, "batch heads tokens head_dim"],
        values: Float[Array, "batch heads tokens head_dim"],
        implementation: Implementation,
    ) -> Float[Array, "batch heads tokens head_dim"]:
        """``x`` plus a depthwise convolution of the values over the tokens, one kernel a head."""
        heads, head_dim = values.shape[1], values.shape[-1]
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform", in_axis=0, out_axis=())
        kernel = self.param("dconv", init, (VALUE_KERNEL_SIZE, heads), jnp.float32)
        # [batch, tokens, heads * head_dim]: the channels of one head share their kernel.
        channels = values.transpose(0, 2, 1, 3).reshape(values.shape[0], values.shape[2], heads * head_dim)
        y = depthwise_conv_1d(channels, jnp.repeat(kernel, head_dim, axis=1), implementation)
        return x + y.reshape(*y.shape[:2], heads, head_dim).transpose(0, 2, 1, 3)

    def linear_angular(
        self,
        q: Float[Array, "batch heads tokens code"],
        k: Float[Array, "batch heads tokens code"],
        v: Float[Array, "batch heads tokens head_dim"],
        implementation: Implementation,
        stacked: int = 1,
    ) -> Float[Array, "batch heads tokens head_dim"]:
        """Linear-angular attention (Castling-ViT, arXiv 2211.10526) of binary codes, by additions.

        v / 2 + q (k^T v) / pi, divided by its norm along head_dim, plus the convolution of V over tokens.
        Products of ``stacked`` codes side by side count as their mean.
        """
        context = matadd(k.swapaxes(-1, -2), v, implementation)
        x = v / 2 + matadd(q, context, implementation) / (math.pi * stacked)
        return self.add_value_conv(l2_normalize(x), v, implementation)


def softmax_attention(
    q: Float[Array, "batch heads tokens head_dim"],
    k: Float[Array, "batch heads other head_dim"],
    v: Float[Array, "batch heads other head_dim"],
) -> Float[Array, "batch heads tokens head_dim"]:
    """softmax(q k^T / sqrt(head_dim)) v; the softmax is computed in float32 at least."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    scores = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=dtype) * q.shape[-1] ** -0.5
    return jnp.einsum("bhnm,bhmd->bhnd", jax.nn.softmax(scores).astype(v.dtype), v)


class SoftmaxAttention(Attention):
    """``"msa"``: multi-head self-attention."""

    @nn.compact
    def __call__(self, x: Tokens, grid: Grid, train: bool = False) -> Tokens:
        return self.output(softmax_attention(*self.qkv(x, train)), train)


class SpatialReductionAttention(Attention):
    """``"sra"``: keys and values come from a grid that a strided convolution made smaller (PVT).

    Tokens before the grid, such as a class token, give keys and values without reduction.
    """

    @nn.compact
    def __call__(self, x: Tokens, grid: Grid, train: bool = False) -> Tokens:
        batch, tokens, channels = x.shape
        (q,) = self.heads(self.linear(channels, "q")(x, train))
        others = tokens - math.prod(grid)
        reduced = self.reduce(x[:, others:].reshape(batch, *grid, channels))
        reduced = reduced.reshape(batch, math.prod(reduced.shape[1:3]), channels)
        if others:
            reduced = jnp.concatenate([x[:, :others], reduced], axis=1)
        k, v = self.heads(self.linear(2 * channels, "kv")(reduced, train), parts=2)
        return self.output(softmax_attention(q, k, v), train)

    def reduce(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns channels"]:
        """The smaller grid."""
        if self.sr_ratio == 1:
            return x
        return self.convolve(x, self.sr_ratio)

    def convolve(
        self, x: Float[Array, "batch height width channels"], window: int
    ) -> Float[Array, "batch rows columns channels"]:
        """A convolution over windows that do not overlap, then a LayerNorm."""
        x = make_patch_conv(x.shape[-1], window, self.primitives, name="sr")(x)
        norm = make_layer_norm(self.layer_norm_eps, self.primitives, name="norm", default=PATCH_EPSILON)
        return norm(x)


class PooledReductionAttention(SpatialReductionAttention):
    """``"linear_sra"``: as ``"sra"``, but the grid is averaged to 7 x 7, for a cost linear in tokens."""

    def reduce(self, x):
        """The smaller grid."""
        rows, columns = (_pooling_matrix(side, POOLED_SIDE) for side in x.shape[1:3])
        pooled = jnp.einsum("rh,bhwc,sw->brsc", rows.astype(x.dtype), x, columns.astype(x.dtype))
        return jax.nn.gelu(self.convolve(pooled, 1), approximate=False)


def _pooling_matrix(side: int, pooled: int) -> np.ndarray:
    """[pooled, side]: row i averages from floor(i side / pooled) to ceil((i + 1) side / pooled)."""
    start = np.arange(pooled)[:, None] * side // pooled
    end = -(-(np.arange(pooled)[:, None] + 1) * side // pooled)
    inside = (np.arange(side) >= start) & (np.arange(side) < end)
    return inside / (end - start)


class LinearAttention(Attention):
    """``"linear"``: q (k^T v) / sqrt(head_dim), without a softmax."""

    @nn.compact
    def __call__(self, x: Tokens, grid: Grid, train: bool = False) -> Tokens:
        q, k, v = self.qkv(x, train)
        context = jnp.einsum("bhnd,bhne->bhde", k, v) * q.shape[-1] ** -0.5
        return self.output(jnp.einsum("bhnd,bhde->bhne", q, context), train)


class PerformerAttention(Attention):
    """``"performer"``: FAVOR+ (arXiv 2009.14794), an estimate of softmax attention that is linear in tokens.

    Its random features are in the collection ``"features"``, one set for all heads; see
    `shiftaddvit_jax.reparameterize.redraw_features`.
    """

    @nn.compact
    def __call__(self, x: Tokens, grid: Grid, train: bool = False) -> Tokens:
        q, k, v = self.qkv(x, train)
        head_dim = q.shape[-1]
        shape = (max(1, int(head_dim * math.log(head_dim))), head_dim)
        projection = self.variable(
            "features",
            "projection",
            lambda: DRAW_FEATURES[self.primitives.performer_features](self.make_rng("params"), *shape),
        ).value
        q = softmax_features(q, projection, across=(-1,))
        k = softmax_features(k, projection, across=(-2, -1))
        context = jnp.einsum("bhnf,bhnd->bhfd", k, v.astype(jnp.float32))
        normalizer = jnp.einsum("bhnf,bhf->bhn", q, jnp.sum(k, axis=-2))
        y = jnp.einsum("bhnf,bhfd->bhnd", q, context) / normalizer[..., None]
        return self.output(y.astype(v.dtype), train)


def orthogonal_features(key: PRNGKeyArray, features: int, head_dim: int) -> Float[Array, "features head_dim"]:
    """Gaussian vectors, orthogonal within each block of ``head_dim`` consecutive ones."""
    direction_key, length_key = jax.random.split(key)
    blocks = -(-features // head_dim)
    directions = jax.random.orthogonal(direction_key, head_dim, (blocks,), jnp.float32)
    directions = directions.reshape(-1, head_dim)[:features]
    gaussian = jax.random.normal(length_key, (features, head_dim), jnp.float32)
    return jnp.linalg.norm(gaussian, axis=-1, keepdims=True) * directions


def hadamard_features(key: PRNGKeyArray, features: int, head_dim: int) -> Float[Array, "features head_dim"]:
    """Vectors of length sqrt(head_dim), orthogonal within each block of ``head_dim`` consecutive ones.

    A block is the matrix H S H S' times sqrt(head_dim), with `hadamard`'s H and random signs S and S'.

    Raises:
      ValueError: a head_dim without a Hadamard matrix.
    """
    blocks = -(-features // head_dim)
    first, last = jax.random.rademacher(key, (2, blocks, 1, head_dim), jnp.float32)
    directions = hadamard(hadamard(jnp.eye(head_dim), "xla") * first, "xla") * last
    return math.sqrt(head_dim) * directions.reshape(-1, head_dim)[:features]


DRAW_FEATURES = {"gaussian": orthogonal_features, "hadamard": hadamard_features}


def softmax_features(
    x: Float[Array, "batch heads tokens head_dim"],
    projection: Float[Array, "features head_dim"],
    across: tuple[int, ...],
) -> Float[Array, "batch heads tokens features"]:
    """Positive features whose inner products estimate exp(q k^T / sqrt(head_dim)), in float32.

    The largest projection along the axes ``across`` is subtracted before the exponential, against overflow.
    This cancels out in the attention: for queries, across features; for keys, across tokens and features.
    """
    x = x.astype(jnp.float32) * x.shape[-1] ** -0.25
    projected = jnp.einsum("bhnd,fd->bhnf", x, projection)
    largest = jax.lax.stop_gradient(jnp.max(projected, axis=across, keepdims=True))
    return jnp.exp(projected - jnp.sum(jnp.square(x), axis=-1, keepdims=True) / 2 - largest) + 1e-4


class HammingLinearAttention(Attention):
    """``"hamming_linear"``: linear-angular attention of normalised queries and keys as codes {0, 1}."""

    @nn.compact
    def __call__(self, x: Tokens, grid: Grid, train: bool = False) -> Tokens:
        implementation = self.primitives.implementation_of_ops(train)
        q, k, v = self.qkv(x, train)
        q, k = self.rotated(l2_normalize(q), l2_normalize(k), implementation)
        q, k = (binarize(part, self.primitives.threshold, (0, 1), implementation) for part in (q, k))
        stacked = q.shape[-1] // v.shape[-1]
        return self.output(self.linear_angular(q, k, v, implementation, stacked), train)


class HammingQuadraticAttention(Attention):
    """``"hamming_quadratic"``: softmax attention whose queries and keys are codes {-1, 1}.

    A product of two codes is their length less twice their Hamming distance, and a score its mean over the
    code times sqrt(head_dim).
    """

    @nn.compact
    def __call__(self, x: Tokens, grid: Grid, train: bool = False) -> Tokens:
        q, k, v = self.qkv(x, train)
        implementation = self.primitives.implementation_of_ops(train)
        q, k = self.rotated(q, k, implementation)
        similarity = code_similarity(q, k, self.primitives.threshold, implementation)
        scores = similarity.astype(jnp.promote_types(q.dtype, jnp.float32)) * code_scale(q, v.shape[-1])
        return self.output(jnp.einsum("bhnm,bhmd->bhnd", jax.nn.softmax(scores).astype(v.dtype), v), train)


class BinarySoftmaxAttention(Attention):
    """``"binary_softmax"``: BinaryAttention (arXiv 2603.09582), a softmax of scaled products of codes.

    With the codes -1 and 1 of queries and keys, a score is s_q s_k sign(q) sign(k)^T / sqrt(head_dim) plus a
    bias. The sign is `binarize`'s at the threshold zero, so that 0 counts as negative; s is the mean
    magnitude over an image's tokens and the channels of a head. With a rotation, all that is of the rotated
    queries and keys, and products of codes side by side count as their mean. The biases are
    ``position_bias``, float32 [rows, heads], zeros at first, in the order of `relative_positions`. They are
    learned for ``trained_grid`` and interpolated for another one. Gradients of the signs are
    straight-through, within -1 and 1.
    """

    @nn.compact
    def __call__(self, x: Tokens, grid: Grid, train: bool = False) -> Tokens:
        q, k, v = self.qkv(x, train)
        trained_grid = self.trained_grid or grid
        shape = bias_rows(trained_grid), self.num_heads
        table = self.param("position_bias", nn.initializers.zeros, shape, jnp.float32)
        table = resize_position_biases(table, trained_grid, grid)
        others = x.shape[1] - math.prod(grid)
        bias = table[relative_positions(grid, others)].transpose(2, 0, 1)
        weights = self.weights(q, k, bias, train)
        return self.output(weigh_values(weights, v, self.primitives.attention_precision), train)

    def weights(
        self,
        q: Float[Array, "batch heads tokens head_dim"],
        k: Float[Array, "batch heads tokens head_dim"],
        bias: Float[Array, "heads tokens tokens"],
        train: bool = False,
    ) -> Float[Array, "batch heads tokens tokens"]:
        """How much each token attends to each, in float32 at least; rows sum to 1."""
        dtype, head_dim = jnp.promote_types(q.dtype, jnp.float32), q.shape[-1]
        implementation = self.primitives.implementation_of_ops(train)
        q, k = self.rotated(q, k, implementation)
        similarity = code_similarity(q, k, "zero", implementation).astype(dtype)
        s_q, s_k = (jnp.mean(jnp.abs(part.astype(dtype)), axis=(-2, -1), keepdims=True) for part in (q, k))
        return jax.nn.softmax(similarity * (s_q * s_k * code_scale(q, head_dim)) + bias)


def code_scale(codes: Float[Array, "*batch code"], head_dim: int) -> float:
    """By how much a product of two codes is scaled to a score: 1 / sqrt(head_dim) where they are as long."""
    return head_dim**0.5 / codes.shape[-1]


def weigh_values(
    weights: Float[Array, "batch heads tokens others"],
    v: Float[Array, "batch heads others head_dim"],
    precision: AttentionPrecision = "float32",
) -> Float[Array, "batch heads tokens head_dim"]:
    """The mean of the values by ``weights``, whose rows sum to 1.

    With ``"int8"``, weights and values are whole numbers, with straight-through gradients. Weights go from 0
    to 255, which is the largest one of a row, and the mean is divided by their own sum: rounding changes no
    sum of weights. Values go from -127 to 127, which is the largest magnitude in an image and head. With
    ``"clipped_int8"`` it is `VALUE_LIMIT` for all, and values beyond it are clipped. The sums of products are
    whole numbers too, which float32 holds exactly for up to 518 tokens.
    """
    if precision == "float32":
        return jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v)
    dtype = weights.dtype
    largest = jax.lax.stop_gradient(jnp.max(weights, axis=-1, keepdims=True))
    weights = weights * (255 / largest)
    weights = straight_through(weights, jnp.round(weights))
    values = v.astype(dtype)
    if precision == "clipped_int8":
        scale = VALUE_LIMIT / 127
        values = jnp.clip(values, -VALUE_LIMIT, VALUE_LIMIT) / scale
        whole = jnp.round(values)
    else:
        whole, scale = jax.lax.stop_gradient(dynamic_int8(values, axes=(-2, -1)))
        values = values / scale
    sums = jnp.einsum("bhnm,bhmd->bhnd", weights, straight_through(values, whole))
    return (sums * (scale / jnp.sum(weights, axis=-1, keepdims=True))).astype(v.dtype)


class HashedAttention(Attention):
    """Attention with one set of tokens as queries and keys, hashed to codes {0, 1} by learned KSH.

    The hash is in the collection ``"hash"``. Applying a model with ``mutable=["hash"]`` and a random
    stream ``"hash"`` learns it from the tokens of that call, layer after layer.
    """

    def codes_and_values(
        self, x: Float[Array, "batch tokens channels"], train: bool
    ) -> tuple[Float[Array, "batch heads tokens bits"], Float[Array, "batch heads tokens head_dim"]]:
        """Codes [batch, heads, tokens, HASH_BITS] and values [batch, heads, tokens, head_dim]."""
        channels = x.shape[-1]
        (shared,) = self.heads(self.linear(channels, "qk")(x, train))
        (values,) = self.heads(self.linear(channels, "v")(x, train))
        shared = l2_normalize(shared)
        heads, head_dim = shared.shape[1], shared.shape[-1]
        init = nn.initializers.normal(1.0)

        def variable(name, shape):
            return self.variable("hash", name, lambda: init(self.make_rng("params"), shape, jnp.float32))

        anchors = variable("anchors", (heads, HASH_ANCHORS, head_dim))
        kernel_mean = variable("kernel_mean", (heads, HASH_ANCHORS))
        projection = variable("projection", (heads, HASH_BITS, HASH_ANCHORS))
        if self.is_mutable_collection("hash") and not self.is_initializing():
            tokens = jax.lax.stop_gradient(shared.astype(jnp.float32))
            learned = learn_hash(self.make_rng("hash"), tokens, HASH_BITS, HASH_ANCHORS)
            anchors.value, kernel_mean.value, projection.value = learned
        kernel_hash = jax.tree.map(
            lambda leaf: jax.lax.stop_gradient(leaf.astype(shared.dtype)),
            KernelHash(anchors.value, kernel_mean.value, projection.value),
        )
        return hash_codes(shared, kernel_hash), values


class HammingKSHAttention(HashedAttention):
    """``"hamming_ksh"``: linear-angular attention of hashed, shared queries and keys."""

    @nn.compact
    def __call__(self, x: Tokens, grid: Grid, train: bool = False) -> Tokens:
        codes, values = self.codes_and_values(x, train)
        implementation = self.primitives.implementation_of_ops(train)
        return self.output(self.linear_angular(codes, codes, values, implementation), train)


class EcoformerAttention(HashedAttention):
    """``"ecoformer"``: linear attention of hashed, shared queries and keys (arXiv 2209.09004).

    With codes q of b bits, q_i^T k_j + b + 1 is positive: token i becomes
    (sum_j (q_i^T k_j) v_j + (b + 1) v_i) / sum_j (q_i^T k_j + b + 1), as in the authors' code.
    """

    @nn.compact
    def __call__(self, x: Tokens, grid: Grid, train: bool = False) -> Tokens:
        codes, values = self.codes_and_values(x, train)
        tokens, bias = codes.shape[-2], codes.shape[-1] + 1
        implementation = self.primitives.implementation_of_ops(train)
        context = matadd(codes.swapaxes(-1, -2), values, implementation)
        numerator = matadd(codes, context, implementation) + bias * values
        denominator = jnp.sum(codes * jnp.sum(codes, axis=-2, keepdims=True), axis=-1, keepdims=True)
        return self.output(numerator / (denominator + tokens * bias), train)


_KINDS = {
    "msa": SoftmaxAttention,
    "sra": SpatialReductionAttention,
    "linear_sra": PooledReductionAttention,
    "linear": LinearAttention,
    "performer": PerformerAttention,
    "ecoformer": EcoformerAttention,
    "hamming_linear": HammingLinearAttention,
    "hamming_ksh": HammingKSHAttention,
    "hamming_quadratic": HammingQuadraticAttention,
    "binary_softmax": BinarySoftmaxAttention,
}


def make_attention(kind: str, **arguments) -> Attention:
    """An attention of one of `ATTENTION_KINDS`; the arguments are `Attention`'s.

    Raises:
      ValueError: unknown kind.
    """
    check_choice("kind of attention", kind, ATTENTION_KINDS)
    return _KINDS[kind](**arguments)
