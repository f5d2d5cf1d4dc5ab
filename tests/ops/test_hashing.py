import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.ops import KernelHash, hash_codes, learn_hash
from shiftaddvit_jax.ops.hashing import SIMILAR_PAIRS

BATCH, HEADS, TOKENS, HEAD_DIM = 2, 2, 24, 6
BITS, ANCHORS = 8, 5


def clustered_tokens(batch=BATCH, tokens=TOKENS, seed=0):
    """Unit tokens around four directions and their opposites, as normalised queries are."""
    rng = np.random.default_rng(seed)
    centres = np.concatenate([np.eye(4, HEAD_DIM), -np.eye(4, HEAD_DIM)])
    x = centres[rng.integers(0, 8, (batch, HEADS, tokens))] + rng.normal(
        0, 0.1, (batch, HEADS, tokens, HEAD_DIM)
    )
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def random_hash(seed=0):
    rng = np.random.default_rng(seed)
    shapes = (HEADS, ANCHORS, HEAD_DIM), (HEADS, ANCHORS), (HEADS, BITS, ANCHORS)
    return KernelHash(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def reference_projection(x, kernel_hash):
    anchors, kernel_mean, projection = (np.asarray(part, np.float64) for part in kernel_hash)
    distance = ((x[:, :, :, None].astype(np.float64) - anchors[None, :, None]) ** 2).sum(-1)
    bandwidth = distance.mean(axis=(-2, -1), keepdims=True)
    features = np.exp(-distance / (2 * bandwidth)) - kernel_mean[None, :, None]
    return features @ projection.swapaxes(-1, -2)


def reference_similarity(x):
    """+1 for each token's most similar tokens, -1 for its least similar."""
    tokens = x.shape[-2]
    pairs = min(SIMILAR_PAIRS, tokens // 2)
    order = np.argsort(x @ x.swapaxes(-1, -2), axis=-1, kind="stable")
    similarity = np.zeros(order.shape)
    np.put_along_axis(similarity, order[..., :pairs], -1, axis=-1)
    np.put_along_axis(similarity, order[..., -pairs:], 1, axis=-1)
    return similarity


def binary_loss(x, kernel_hash):
    """How far the codes' inner products are from ``bits`` times the similarity."""
    codes = np.where(reference_projection(x, kernel_hash) > 0, 1, -1)
    return np.sum((codes @ codes.swapaxes(-1, -2) - BITS * reference_similarity(x)) ** 2)


def learned(x, seed=0):
    return learn_hash(jax.random.key(seed), jnp.asarray(x), BITS, ANCHORS)


def test_codes_are_the_signs_of_the_projected_kernel_in_float64():
    x, kernel_hash = clustered_tokens(), random_hash()
    projection = reference_projection(x, kernel_hash)
    codes = np.asarray(hash_codes(x, kernel_hash))
    assert codes.shape == (BATCH, HEADS, TOKENS, BITS)
    clear = np.abs(projection) > 1e-5
    assert clear.mean() > 0.99
    np.testing.assert_array_equal(codes[clear], (projection > 0)[clear])


def test_codes_need_no_batch_axis():
    x, kernel_hash = clustered_tokens(), random_hash()
    np.testing.assert_array_equal(hash_codes(x[0], kernel_hash), hash_codes(x, kernel_hash)[0])


def test_the_codes_of_an_image_do_not_depend_on_the_other_images():
    x, kernel_hash = clustered_tokens(batch=3), random_hash()
    x[1:] *= np.float32([3, 10])[:, None, None, None]
    one_by_one = np.concatenate([hash_codes(image[None], kernel_hash) for image in x])
    np.testing.assert_array_equal(hash_codes(x, kernel_hash), one_by_one)


def test_tokens_equal_to_every_anchor_have_finite_codes_and_gradients():
    kernel_hash = random_hash()._replace(anchors=jnp.zeros((HEADS, ANCHORS, HEAD_DIM)))
    x = jnp.zeros((1, HEADS, 3, HEAD_DIM))
    codes, pull_back = jax.vjp(lambda x: hash_codes(x, kernel_hash), x)
    assert set(np.unique(codes)) <= {0, 1}
    assert np.all(np.isfinite(pull_back(jnp.ones_like(codes))[0]))


def test_the_gradient_to_the_tokens_is_that_of_the_projection_where_it_is_between_0_and_1():
    x, kernel_hash = clustered_tokens(), random_hash()
    cotangent = np.random.default_rng(1).normal(size=(BATCH, HEADS, TOKENS, BITS)).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda x: jnp.vdot(hash_codes(x, kernel_hash), cotangent)))(x)

    def masked(x):
        projection = reference_projection(x, kernel_hash)
        return projection, (projection >= 0) & (projection <= 1)

    # Central differences of the real projection in float64, masked where it is now.
    passes = masked(x)[1]
    direction = np.random.default_rng(2).normal(size=x.shape)
    step = 1e-6 * direction
    slope = (
        reference_projection(x.astype(np.float64) + step, kernel_hash)
        - reference_projection(x.astype(np.float64) - step, kernel_hash)
    ) / 2e-6
    np.testing.assert_allclose(np.vdot(gradient, direction), np.sum(slope * cotangent * passes), rtol=1e-3)


def test_learning_gives_a_hash_of_the_asked_shape_with_tokens_as_anchors():
    x = clustered_tokens()
    anchors, kernel_mean, projection = learned(x)
    assert anchors.shape == (HEADS, ANCHORS, HEAD_DIM)
    assert kernel_mean.shape == (HEADS, ANCHORS)
    assert projection.shape == (HEADS, BITS, ANCHORS)
    for head in range(HEADS):
        pool = x[:, head].reshape(-1, HEAD_DIM)
        distance = np.abs(np.asarray(anchors)[head][:, None] - pool).max(axis=-1)
        np.testing.assert_array_equal(distance.min(axis=1), 0)
        assert len(np.unique(distance.argmin(axis=1))) == ANCHORS


def test_learning_centres_the_kernel_over_the_tokens():
    x = clustered_tokens()
    kernel_hash = learned(x)
    one_hot = kernel_hash._replace(projection=np.tile(np.eye(ANCHORS), (HEADS, 1, 1)))
    np.testing.assert_allclose(reference_projection(x, one_hot).mean(axis=(0, 2)), 0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_learning_lowers_the_binary_loss_of_the_random_start(seed):
    x = clustered_tokens(seed=seed)
    kernel_hash = learned(x, seed)
    start = jax.random.normal(jax.random.split(jax.random.key(seed))[1], (BITS, HEADS, ANCHORS))
    assert binary_loss(x, kernel_hash) < binary_loss(x, kernel_hash._replace(projection=start.swapaxes(0, 1)))


def test_similar_tokens_agree_in_more_bits_than_dissimilar_ones():
    x = clustered_tokens()
    codes = 2 * np.asarray(hash_codes(x, learned(x))) - 1
    agreement, similarity = codes @ codes.swapaxes(-1, -2) / BITS, reference_similarity(x)
    assert agreement[similarity > 0].mean() > agreement[similarity < 0].mean() + 0.3


def test_learning_is_deterministic_for_a_key_and_differs_for_another():
    x = clustered_tokens()
    first, again, other = learned(x, 0), learned(x, 0), learned(x, 1)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(np.asarray(first.projection) != np.asarray(other.projection))


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_fewer_tokens_than_anchors_are_enough(tokens):
    x = clustered_tokens(batch=1, tokens=tokens)
    kernel_hash = learned(x)
    assert all(np.all(np.isfinite(part)) for part in kernel_hash)
    assert set(np.unique(hash_codes(x, kernel_hash))) <= {0, 1}
