"""Routers that send as many tokens to shift experts as the experts' latencies ask for, without training.

The balancing loss counts probabilities, and in training noise decides between experts that are nearly as
probable. Without noise all tokens of such a layer go to the one that is a little more probable: shares of a
trained model's layers lie far around the loss's aim. And a machine's latencies are not those that a model was
trained for. A router's bias moves its share, and leaves the order of tokens as the training made it.
"""

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from shiftaddvit_jax.models.inspect import Examples, Images, natural_order, on_xla, run
from shiftaddvit_jax.names import PAPER_LATENCIES
from shiftaddvit_jax.nn.moe import EXPERTS, ShiftShare, aimed_shift_share, layer_shift_share, shift_shares
from shiftaddvit_jax.pack import inference_variables
from shiftaddvit_jax.progress import progress_bar

SHIFT = EXPERTS.index("shift")
CLEARLY = 1.0  # how far above the other expert's logit the logit of an expert is that gets all tokens


def balance_routers(
    model: nn.Module,
    variables: PyTree,
    images: Examples,
    latencies: Sequence[float] | Mapping[str, Sequence[float]] = PAPER_LATENCIES,
) -> PyTree:
    """``variables`` whose routers send to each expert the tokens that it computes in the time of the other.

    Args:
      model: with MoE layers.
      variables: its variables, packed or not.
      images: float32 [batch, size, size, 3], as the model takes them, or samples of rays; on them the shares
        are met to the nearest token. All pass through the model at once.
      latencies: of the dense and the shift expert, in any unit; or, as `measure-latency` finds them, by the
        layer's name.

    Raises:
      ValueError: a model without MoE layers, a layer without latencies, or latencies that are not positive.
    """
    shares: ShiftShare
    if isinstance(latencies, Mapping):
        shares = {name: aimed_shift_share(pair) for name, pair in latencies.items()}
    else:
        shares = aimed_shift_share(latencies)
    biases = router_biases(model, variables, images, shares)
    if not biases:
        raise ValueError("the model has no mixtures of experts, so no routers to balance")
    return with_router_biases(variables, biases)


def router_biases(
    model: nn.Module,
    variables: PyTree,
    images: Examples,
    shift_share: ShiftShare,
) -> dict[str, float]:
    """What to add to each router's bias for the shift expert, so that it gets ``shift_share`` of the tokens.

    A share counts a layer's tokens over all ``images``, or samples of rays, and is met to the nearest token.

    Returns:
      Biases by the router's name, as in ``"stage1/block1/mlp/fc1/router"``; none without MoE layers.

    Raises:
      ValueError: a layer without a share, or a share outside 0 to 1.
    """
    if not isinstance(shift_share, Mapping):
        layer_shift_share(shift_share, "all layers")  # refuses a wrong number without MoE layers too
    routers = sorted({"/".join(path[:-1]) for path in flatten_dict(variables["params"]) if "router" in path})
    shares = {name: layer_shift_share(shift_share, name.removesuffix("/router")) for name in routers}
    if not shares:
        return {}

    def biases(variables, images):
        found = {}

        def balance(call, arguments, keywords, context):
            logits = call(*arguments, **keywords)
            name = "/".join(context.module.path)
            if name not in shares:
                return logits
            behind = jnp.sort(logits[:, 1 - SHIFT] - logits[:, SHIFT])
            # The bias lies between the last token that goes to the shift expert and the first that does not.
            bounds = jnp.concatenate([behind[:1] - 2 * CLEARLY, behind, behind[-1:] + 2 * CLEARLY])
            count = round(shares[name] * behind.size)
            bias = (bounds[count] + bounds[count + 1]) / 2
            found[name] = bias
            return logits.at[:, SHIFT].add(bias)

        with nn.intercept_methods(balance):
            run(on_xla(model), variables, images)
        return found

    with progress_bar() as bar:  # XLA compiles for some seconds
        task = bar.add_task("balancing routers", total=1, note="")
        unpacked = inference_variables(model, variables, for_kernels=False)
        found = jax.device_get(jax.jit(biases)(unpacked, images))
        bar.advance(task)
    return {name: float(bias) for name, bias in found.items()}


def with_router_biases(variables: PyTree, biases: Mapping[str, float]) -> PyTree:
    """The variables with the biases of `router_biases` added."""
    params = flatten_dict(variables["params"], sep="/")
    for name, bias in biases.items():
        params[f"{name}/bias"] = params[f"{name}/bias"] + bias * np.eye(len(EXPERTS), dtype=np.float32)[SHIFT]
    return variables | {"params": unflatten_dict(params, sep="/")}


def measured_shares(model: nn.Module, variables: PyTree, images: Images) -> dict[str, float]:
    """The share of the images' tokens on each shift expert, by the MoE layer's name."""
    unpacked = inference_variables(model, variables, for_kernels=False)
    apply = jax.jit(lambda *arguments: on_xla(model).apply(*arguments, mutable=["routing"])[1])
    shares = shift_shares(apply(unpacked, images).get("routing", {}))
    return {
        name: float(share) for name, share in sorted(shares.items(), key=lambda each: natural_order(each[0]))
    }
