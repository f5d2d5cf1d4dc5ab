"""Token dispatch: the expert chosen for a token computes it, and no other expert does."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from shiftaddvit_jax.ops.implementation import Implementation, uses_tvm

Expert = Callable[[Float[Array, "rows inputs"]], Float[Array, "rows outputs"]]


def dispatch(
    x: Float[Array, "tokens inputs"],
    expert: Int[Array, "tokens"],
    experts: Sequence[Expert],
    block_size: int | None = None,
    implementation: Implementation = None,
) -> Float[Array, "tokens outputs"]:
    """Row t of the result is ``experts[expert[t]](x[t])``.

    How many tokens each expert gets is known only at run time, but shapes must be known before. So tokens are
    gathered by expert into blocks of ``block_size`` rows, and each expert's last block is padded. Any split
    fits into tokens / block_size + len(experts) blocks: no token is ever dropped, and the work grows with the
    tokens, not with the experts. Works under jit, grad and vmap.

    Args:
      x: the tokens.
      expert: each token's expert, from 0 to ``len(experts) - 1``.
      experts: pure functions of a block of rows, all with the same outputs.
      block_size: rows a block; by default an eighth of the tokens, at least 8 and at most 512, or 128 if the
        number of tokens is symbolic (see `jax.export`).
      implementation: see `shiftaddvit_jax.ops`.

    Raises:
      ValueError: shapes that do not fit, no expert, or a block size below 1.
    """
    uses_tvm("dispatch", implementation, unsupported="functions of one's own have no kernel; a MoE layer has")
    if x.ndim != 2 or expert.shape != x.shape[:1]:
        raise ValueError(f"dispatch expects [tokens, inputs] and [tokens], got {x.shape} and {expert.shape}")
    if not experts:
        raise ValueError("dispatch needs at least one expert")
    tokens = x.shape[0]
    if block_size is None:
        # In an exported function the number of tokens may be symbolic.
        block_size = max(8, min(512, tokens // 8)) if isinstance(tokens, int) else 128
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")

    count = len(experts)
    chosen = expert[:, None] == jnp.arange(count)
    blocks_of_expert = -(-jnp.sum(chosen, axis=0, dtype=jnp.int32) // block_size)
    last_block = jnp.cumsum(blocks_of_expert)
    first_block = last_block - blocks_of_expert
    rank = jnp.sum(jnp.where(chosen, jnp.cumsum(chosen, axis=0, dtype=jnp.int32) - 1, 0), axis=1)
    row = first_block[expert] * block_size + rank

    blocks = (tokens + count * (block_size - 1)) // block_size
    # The index of a row of padding is out of bounds, where zeros are taken.
    none = jnp.full(blocks * block_size, tokens, jnp.int32)
    token = none.at[row].set(jnp.arange(tokens, dtype=jnp.int32), unique_indices=True)
    gathered = jnp.take(x, token, axis=0, mode="fill", fill_value=0)
    expert_of_block = jnp.searchsorted(last_block, jnp.arange(blocks), side="right")

    outputs = jax.eval_shape(experts[0], jax.ShapeDtypeStruct((block_size, x.shape[1]), x.dtype))
    branches = [*experts, lambda rows: jnp.zeros(outputs.shape, outputs.dtype)]

    def compute(_, block):
        index, rows = block
        return None, jax.lax.switch(index, branches, rows)

    _, computed = jax.lax.scan(
        compute, None, (expert_of_block, gathered.reshape(blocks, block_size, x.shape[1]))
    )
    return computed.reshape(blocks * block_size, *outputs.shape[1:])[row]
