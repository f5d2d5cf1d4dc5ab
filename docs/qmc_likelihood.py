"""Times one likelihood of a Gaussian process by a dense Cholesky factorization and by the Walsh transform.

python docs/qmc_likelihood.py
"""

import math
import time

import jax
import jax.numpy as jnp

from shiftaddvit_jax import qmc

COUNT, DIMENSIONS, SMOOTHNESS, NOISE = 2048, 6, 2, 0.1


@jax.jit
def dense(net, y):
    """The log-likelihood by the whole matrix."""
    points = net.integers(COUNT)
    kernel = qmc.digitally_shift_invariant_kernel(points[:, None], points, SMOOTHNESS)
    factor = jnp.linalg.cholesky(kernel + NOISE * jnp.eye(COUNT))
    whitened = jax.scipy.linalg.solve_triangular(factor, y, lower=True)
    return -0.5 * whitened @ whitened - jnp.log(jnp.diag(factor)).sum() - 0.5 * COUNT * math.log(2 * math.pi)


@jax.jit
def fast(net, y):
    """The log-likelihood by one column and two transforms."""
    return qmc.gram(net, COUNT, SMOOTHNESS, noise=NOISE).log_likelihood(y)


def cpu_seconds(function, *arguments, repeats):
    """The CPU time of a call, which what else runs leaves alone: a mean, after a call that compiles."""
    jax.block_until_ready(function(*arguments))
    start = time.process_time()
    for _ in range(repeats):
        jax.block_until_ready(function(*arguments))
    return (time.process_time() - start) / repeats


if __name__ == "__main__":
    key, noise = jax.random.split(jax.random.key(0))
    net = qmc.sobol(DIMENSIONS).randomize(key)
    y = jax.random.normal(noise, (COUNT,))
    slow, quick = cpu_seconds(dense, net, y, repeats=3), cpu_seconds(fast, net, y, repeats=1000)
    print(f"dense {slow * 1e3:.1f} ms, fast {quick * 1e3:.3f} ms of CPU time: {slow / quick:.0f} times")
    print(f"log-likelihoods {dense(net, y):.3f} and {fast(net, y):.3f}")
