"""A mixture of a multiplication expert and a shift expert, and the loss that balances it by latency."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, Int, PyTree

from shiftaddvit_jax.nn.dense import Dense
from shiftaddvit_jax.nn.plan import mixture_kernel
from shiftaddvit_jax.nn.primitives import KERNEL_INIT, Primitives
from shiftaddvit_jax.nn.shift import ShiftDense
from shiftaddvit_jax.ops import dispatch
from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.implementation import Implementation
from shiftaddvit_jax.ops.precision import DOT_GENERAL, Precision

EXPERTS = ("dense", "shift")
# The share of tokens on shift experts: of all MoE layers, or by the layer's name.
ShiftShare = float | Mapping[str, float]
# From so many tokens, in a layer whose products are so many for each number read and written, XLA takes less
# time to sort tokens by their experts than to let both experts compute all (measured on two cores).
DISPATCHED_TOKENS, DISPATCHED_PRODUCTS = 512, 100


class MoEDense(nn.Module):
    """A linear layer with two experts, ``dense`` and ``shift``, and a router that picks by token.

    y = sum over the ``top_k`` most probable experts of p_i(x) E_i(x), where p = softmax(router(x)). The
    router is a linear layer. Its bias, which the paper does not have, lets it share out tokens of any
    distribution in any ratio. In training, Gaussian noise of standard deviation 1 / E is added to the
    router's logits, and both experts compute all tokens. In inference a token's chosen experts alone compute
    it, on kernels; and on XLA where `dispatch` takes less time than all products do.

    If the collection ``"routing"`` is mutable, the layer stores three arrays in it, [experts] float32:
    ``importance`` (the sum over tokens of p_i, without noise), ``load`` (the sum over tokens of q_i, see
    `load_probabilities`) and ``tokens`` (how many tokens each expert computed).

    Attributes:
      features: number of outputs.
      use_bias: whether the experts have biases; the router always has one.
      top_k: experts a token, 1 or 2.
      weight_bits: see `ShiftDense`.
      weight_terms: likewise.
      activations: the shift expert's number format.
      implementation: see `shiftaddvit_jax.ops`.
      dtype: dtype of the experts; the router always computes in float32.
      precision: number format of the dense expert's factors.
      kernel_init: what both experts' kernels are drawn by.
    """

    features: int
    use_bias: bool = True
    top_k: int = 1
    weight_bits: int = 5
    weight_terms: int = 1
    activations: Activations = "float"
    implementation: Implementation = None
    dtype: Any = None
    precision: Precision = "float32"
    kernel_init: nn.initializers.Initializer = KERNEL_INIT

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch inputs"], train: bool = False
    ) -> Float[Array, "*batch outputs"]:
        """Apply the layer; ``train`` adds noise, from the stream ``"router"``.

        Raises:
          ValueError: ``top_k`` other than 1 or 2.
        """
        if not 1 <= self.top_k <= len(EXPERTS):
            raise ValueError(f"top_k must be between 1 and {len(EXPERTS)}, got {self.top_k}")
        tokens = x.reshape(-1, x.shape[-1])
        router = nn.Dense(len(EXPERTS), dtype=jnp.float32, kernel_init=_init_router, name="router")
        dense, shift = self.experts()

        clean = router(tokens)
        if self.is_initializing():  # only to make parameters
            shift(tokens)
            return dense(tokens).reshape(*x.shape[:-1], self.features)
        logits = clean
        if train:
            noise = jax.random.normal(self.make_rng("router"), clean.shape, clean.dtype)
            logits = clean + noise / len(EXPERTS)
        probabilities = jax.nn.softmax(logits)
        _, chosen = jax.lax.top_k(logits, self.top_k)
        self._report(clean, chosen)

        if train:
            y = self.compute_all(tokens, probabilities, chosen, dense, shift)
        elif (kernel := mixture_kernel(self, tokens)) is not None:
            y = kernel(tokens, self.variables["params"])
        else:
            y = self.compute_chosen(tokens, probabilities, chosen, dense, shift)
        return y.reshape(*x.shape[:-1], self.features)

    def compute_all(
        self,
        tokens: Float[Array, "tokens inputs"],
        probabilities: Float[Array, "tokens experts"],
        chosen: Int[Array, "tokens top_k"],
        dense: Dense,
        shift: ShiftDense,
    ) -> Float[Array, "tokens outputs"]:
        """The chosen experts' weighed sum, where both experts compute all tokens."""
        counts = jnp.sum(jax.nn.one_hot(chosen, len(EXPERTS), dtype=jnp.float32), axis=1)
        outputs = dense(tokens), shift(tokens)
        # What an expert makes of others' tokens is cut off, were it infinite.
        weighed = [
            jnp.where(counts[:, at : at + 1] > 0, probabilities[:, at : at + 1] * output, 0)
            for at, output in enumerate(outputs)
        ]
        return (weighed[0] + weighed[1]).astype(outputs[0].dtype)

    def compute_chosen(
        self,
        tokens: Float[Array, "tokens inputs"],
        probabilities: Float[Array, "tokens experts"],
        chosen: Int[Array, "tokens top_k"],
        dense: Dense,
        shift: ShiftDense,
    ) -> Float[Array, "tokens outputs"]:
        """The chosen experts' weighed sum for inference, by `dispatch` or from what both experts compute."""
        if not self.dispatches(*tokens.shape):
            return self.compute_all(tokens, probabilities, chosen, dense, shift)
        dense_expert, dense_variables = dense.clone(parent=None), dense.variables
        experts: list[Callable[[Array], Any]] = [
            lambda rows: dense_expert.apply(dense_variables, rows),
            shift.on_xla(tokens.shape[-1]),
        ]
        outputs = dispatch(jnp.repeat(tokens, self.top_k, axis=0), chosen.reshape(-1), experts).reshape(
            -1, self.top_k, self.features
        )
        gates = jnp.take_along_axis(probabilities, chosen, axis=1)
        return jnp.sum(gates[..., None].astype(outputs.dtype) * outputs, axis=1)

    @nn.nowrap
    def dispatches(self, tokens: Any, inputs: int) -> bool:
        """Whether inference on XLA sorts so many tokens by their experts; not if their number is symbolic."""
        products = inputs * self.features / (inputs + self.features)
        return isinstance(tokens, int) and tokens >= DISPATCHED_TOKENS and products >= DISPATCHED_PRODUCTS

    @property
    def primitives(self) -> Primitives:
        """The layer's settings, as a model has them."""
        return Primitives(
            self.weight_bits,
            self.activations,
            implementation=self.implementation,
            dtype=self.dtype,
            precision=self.precision,
            weight_terms=self.weight_terms,
        )

    @nn.nowrap
    def experts(self) -> tuple[Dense, ShiftDense]:
        """Both experts, in the order of `EXPERTS`."""
        dense = Dense(
            self.features,
            self.use_bias,
            self.dtype,
            kernel_init=self.kernel_init,
            dot_general=DOT_GENERAL[self.precision],
            implementation=self.implementation,
            name="dense",
        )
        shift = ShiftDense(
            self.features,
            self.use_bias,
            weight_bits=self.weight_bits,
            weight_terms=self.weight_terms,
            activations=self.activations,
            implementation=self.implementation,
            dtype=self.dtype,
            kernel_init=self.kernel_init,
            name="shift",
        )
        return dense, shift

    def _report(self, clean, chosen):
        if not self.is_mutable_collection("routing"):
            return
        stats = {
            "importance": jnp.sum(jax.nn.softmax(clean), axis=0),
            "load": jnp.sum(load_probabilities(clean, self.top_k), axis=0),
            "tokens": jnp.sum(jax.nn.one_hot(chosen, len(EXPERTS), dtype=jnp.float32), axis=(0, 1)),
        }
        for name, value in stats.items():
            self.sow("routing", name, value, init_fn=lambda: None, reduce_fn=_newest)


def _newest(_: Any, new: Array) -> Any:
    return new


def _init_router(key, shape, dtype):
    bound = 1 / math.sqrt(shape[0])
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)


def load_probabilities(
    logits: Float[Array, "*batch experts"], top_k: int = 1
) -> Float[Array, "*batch experts"]:
    """q_i(x): the probability that expert i is among the ``top_k`` under the router's noise.

    The noise is Gaussian, independent for each expert, of standard deviation 1 / E (as the authors' code
    and V-MoE read the paper's N(0, 1/E)). Given expert i's own noise t, each rival j wins with
    probability Phi((l_j - l_i) E - t), independently of the others; so q_i is the integral over t of the
    probability that fewer than ``top_k`` rivals win. With two experts and top-1 it is
    Phi((l_1 - l_2) E / sqrt 2). Differentiable, and sums to ``top_k`` over the experts.
    """
    experts = logits.shape[-1]
    if experts == 2 and top_k == 1:
        difference = logits[..., 0] - logits[..., 1]
        first = jax.scipy.stats.norm.cdf(difference * experts / math.sqrt(2))
        return jnp.stack([first, 1 - first], axis=-1)
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    nodes, weights = np.float32(nodes), np.float32(weights / weights.sum())
    q = []
    for i in range(experts):
        rivals = jnp.delete(logits, i, axis=-1)
        margin = (rivals - logits[..., i : i + 1]) * experts
        wins = jax.scipy.stats.norm.cdf(margin[..., None] - nodes)
        # counts[c]: the probability that c of the rivals seen so far win.
        counts: list[Any] = [jnp.ones_like(wins[..., 0, :])]
        for j in range(experts - 1):
            p = wins[..., j, :]
            counts = [
                (counts[c] * (1 - p) if c < len(counts) else 0) + (counts[c - 1] * p if c else 0)
                for c in range(len(counts) + 1)
            ]
        q.append(sum(counts[1:top_k], counts[0]) @ weights)
    return jnp.stack(q, axis=-1)


def squared_coefficient_of_variation(x: Float[Array, "values"]) -> Float[Array, ""]:
    """SCV: the unbiased variance over the squared mean; 0 for equal values."""
    return jnp.var(x, ddof=1) / (jnp.square(jnp.mean(x)) + 1e-10)


def latency_aware_loss(
    importance: Float[Array, "experts"],
    load: Float[Array, "experts"],
    latencies: Sequence[float] | Float[Array, "experts"],
) -> Float[Array, ""]:
    """The latency-aware load-balancing loss: SCV(a * importance) + SCV(a * load), a = latency / sum.

    It is 0 where each expert's share of the tokens is inversely proportional to its latency, so that
    both take the same time.

    Args:
      importance: sum over tokens of p_i(x).
      load: sum over tokens of q_i(x).
      latencies: each expert's latency, in any unit; only their ratios count.

    Raises:
      ValueError: not one positive, finite latency for each expert.
    """
    _check_latencies(latencies, importance.shape[0])
    a = jnp.asarray(latencies, jnp.float32) / jnp.sum(jnp.asarray(latencies, jnp.float32))
    return squared_coefficient_of_variation(a * importance) + squared_coefficient_of_variation(a * load)


def aimed_shift_share(latencies: Sequence[float]) -> float:
    """The share of tokens on the shift expert for which `latency_aware_loss` is 0.

    Args:
      latencies: of the dense and of the shift expert, in any unit.

    Raises:
      ValueError: not one positive, finite latency for each expert.
    """
    _check_latencies(latencies, len(EXPERTS))
    dense, shift = latencies
    return dense / (dense + shift)


def layer_shift_share(shift_share: ShiftShare | None, layer: str) -> float:
    """The share of tokens on the shift expert of the MoE layer named ``layer``.

    Args:
      shift_share: one for all MoE layers, or one for each by its name (as `evaluate` measures it).
      layer: its name, as in ``stage1/block1/mlp/fc1``.

    Raises:
      ValueError: no share for that layer, or one outside 0 to 1.
    """
    share = shift_share.get(layer) if isinstance(shift_share, Mapping) else shift_share
    if share is None:
        raise ValueError(f"shift_share lacks the MoE layer {layer}; pass shares of this very model")
    if not 0 <= share <= 1:
        raise ValueError(f"shift_share is a share from 0 to 1, got {share} for {layer}")
    return share


def _check_latencies(latencies, experts):
    concrete = not isinstance(latencies, jax.core.Tracer)
    if np.shape(latencies) != (experts,) or (
        concrete and not all(math.isfinite(latency) and latency > 0 for latency in np.asarray(latencies))
    ):
        raise ValueError(
            f"latencies must be {experts} positive numbers, one for each expert "
            f"({', '.join(EXPERTS)}), got {latencies}"
        )


def routing_loss(
    routing: PyTree, latencies: Sequence[float] | Float[Array, "experts"] | Mapping[str, Sequence[float]]
) -> Float[Array, ""]:
    """The mean of `latency_aware_loss` over the MoE layers in a ``"routing"`` collection; 0 if none.

    Args:
      routing: the collection.
      latencies: both experts' latencies, the same for all layers, or by the layer's name.

    Raises:
      ValueError: a layer without latencies, or latencies that `latency_aware_loss` refuses.
    """
    layers = routing_layers(routing)
    by_layer = latencies if isinstance(latencies, Mapping) else dict.fromkeys(layers, latencies)
    missing = layers.keys() - by_layer.keys()
    if missing:
        raise ValueError(f"no latencies for the MoE layer {min(missing)}; measure them for this model")
    losses = [
        latency_aware_loss(layer["importance"], layer["load"], by_layer[name])
        for name, layer in layers.items()
    ]
    return jnp.mean(jnp.stack(losses)) if losses else jnp.zeros((), jnp.float32)


def routing_layers(routing: PyTree) -> dict[str, dict[str, Float[Array, "experts"]]]:
    """The statistics in a ``"routing"`` collection by the layer's name, as in ``stage1/block1/mlp/fc1``."""
    layers: dict[str, dict[str, Array]] = {}
    leaves: dict[tuple[str, ...], Any] = flatten_dict(routing)
    for path, value in leaves.items():
        layers.setdefault("/".join(path[:-1]), {})[path[-1]] = value
    return layers


def shift_shares(routing: PyTree) -> dict[str, Float[Array, ""]]:
    """The share of tokens that each MoE layer's shift expert computed, by the layer's name."""
    return {
        name: layer["tokens"][EXPERTS.index("shift")] / jnp.sum(layer["tokens"])
        for name, layer in routing_layers(routing).items()
    }
