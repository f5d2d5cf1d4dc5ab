"""The suite checks annotations, see annotations.py."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from shiftaddvit_jax.ops import depthwise_conv_gelu, fixed_point

X, KERNEL = np.zeros((1, 4, 4, 8), np.float32), np.zeros((3, 3, 8), np.float32)


def test_a_rank_that_would_broadcast_without_a_word_is_seen():
    depthwise_conv_gelu(X, KERNEL, np.zeros(8, np.float32))
    with pytest.raises(TypeCheckError, match="bias"):
        depthwise_conv_gelu(X, KERNEL, np.zeros((4, 8), np.float32))


def test_a_dtype_that_would_be_converted_without_a_word_is_seen():
    with pytest.raises(TypeCheckError, match="Float"):
        fixed_point(jnp.arange(3))


def test_the_packages_own_errors_come_first():
    with pytest.raises(ValueError, match="one kernel a channel"):
        depthwise_conv_gelu(X, KERNEL[0], np.zeros(8, np.float32))
