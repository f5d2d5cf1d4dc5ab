"""A shift model without training: power-of-two weights fitted to what a dense model does on some images."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from shiftaddvit_jax.models.inspect import Images, module_variables, on_xla
from shiftaddvit_jax.models.kinds import stage_kinds
from shiftaddvit_jax.models.variables import stage_of
from shiftaddvit_jax.nn import Block, ShiftDense
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.ops import power_of_two
from shiftaddvit_jax.pack import shift_layers
from shiftaddvit_jax.progress import progress_bar
from shiftaddvit_jax.reparameterize import reparameterize
from shiftaddvit_jax.validation import check_images

logger = logging.getLogger(__name__)

BATCH = 16  # images at a time
DAMPING = 0.01  # added to a Hessian's diagonal, as a share of its mean; GPTQ's authors take the same
LAZY = 128  # inputs of a layer that are rounded before all later ones learn of the errors
# `power_of_two` rounds up from sqrt(2) * 2^exponent on; the upper power is nearer from 1.5 * 2^exponent on.
TO_NEARER = 2**0.5 / 1.5
# The methods of a block that are ``x`` plus a branch.
SUMS = ("add_attention", "add_mlp")


class CalibratedLayer(NamedTuple):
    """How near a shift layer comes to the dense layer that it replaces, on the calibration images.

    Both ratios are in decibels, over all tokens: the variance of what the layer should put out, over the mean
    square of what is missing, while the layers before it are shift layers already.

    Attributes:
      name: such as ``stage1/block1/mlp/fc1``.
      rounded: signal to noise with the kernel and the bias that `reparameterize` makes.
      calibrated: signal to noise with those that `calibrate` makes.
    """

    name: str
    rounded: float
    calibrated: float


class Moments(NamedTuple):
    """Of one layer, sums over all tokens of all calibration images.

    Attributes:
      count: the tokens.
      inputs: sum of what goes in.
      outputs: sum of what should come out.
      squares: sum of inputs times inputs.
      products: sum of inputs times outputs.
      power: sum of squared outputs.
    """

    count: Float[Array | np.ndarray, ""]
    inputs: Float[Array | np.ndarray, "inputs"]
    outputs: Float[Array | np.ndarray, "outputs"]
    squares: Float[Array | np.ndarray, "inputs inputs"]
    products: Float[Array | np.ndarray, "inputs outputs"]
    power: Float[Array | np.ndarray, ""]

    def centred(
        self,
    ) -> tuple[
        Float[Array | np.ndarray, "inputs inputs"], Float[Array | np.ndarray, "inputs outputs"], float
    ]:
        """``squares``, ``products`` and ``power`` of inputs and outputs less their means."""
        squares = self.squares - np.outer(self.inputs, self.inputs) / self.count
        products = self.products - np.outer(self.inputs, self.outputs) / self.count
        return squares, products, float(self.power - np.sum(np.square(self.outputs)) / self.count)

    def bias(
        self, kernel: Float[Array | np.ndarray, "inputs outputs"]
    ) -> Float[Array | np.ndarray, "outputs"]:
        """The bias with which the mean output of a layer with ``kernel`` is what it should be."""
        return (self.outputs - self.inputs @ kernel) / self.count

    def signal_to_noise(
        self, kernel: Float[Array | np.ndarray, "inputs outputs"], bias: Float[Array | np.ndarray, "outputs"]
    ) -> float:
        """Variance of what should come out over the mean square of what is missing, in decibels."""
        squares, products, power = self.centred()
        noise = power - 2 * np.sum(kernel * products) + np.sum(kernel * (squares @ kernel))
        noise += self.count * np.sum(np.square(self.bias(kernel) - bias))
        return float(10 * np.log10(power / noise))


def calibrate(
    model: nn.Module,
    variables: PyTree,
    images: Images,
    *,
    attention: str | Sequence[str] | None = None,
    mlp: str | Sequence[str] | None = None,
    projections: str | Sequence[str] | None = None,
) -> tuple[nn.Module, PyTree]:
    """``model`` with shift layers that come near its dense layers on ``images``, and their variables.

    Where `reparameterize` rounds each weight for itself, here the errors of a layer's weights make up for one
    another, for the tokens of ``images``: weights are rounded input by input, those with the largest variance
    first, and each error is spread over the weights not rounded yet by second-order compensation (GPTQ, arXiv
    2210.17323). Layers come in the order of the forward pass. Each gets what the shift layers before it put
    out, and is fitted to what the dense model has in its place (GPTAQ, arXiv 2504.02692); the last layer of
    a branch also to what the residual stream lacks. Biases take up the mean error.

    The new kernels are exactly powers of two, so that `pack` loses nothing with float activations. All other
    parameters stay the same. The result depends on the arguments alone. The log counts decibels, and at level
    DEBUG those of each layer; `calibrate_with_report` returns them.

    Args:
      model: from `create_model`, with dense linear layers.
      variables: its variables, not packed.
      images: float32 [batch, size, size, 3], the model's inputs; a few hundred, without labels.
      attention: as in `reparameterize`, which changes it first; it is not calibrated, and what is new in it
        is drawn at random.
      mlp: ``"shift"`` or ``"dense"`` for the MLPs' linear layers: one kind, or one a stage; by default dense.
      projections: the same for the attentions' linear layers.

    Raises:
      ValueError: no layer to convert, other kinds, a model that is converted or variables that are packed
        already, no images or images of another size, numbers that are not finite.
    """
    return calibrate_with_report(
        model, variables, images, attention=attention, mlp=mlp, projections=projections
    )[:2]


def calibrate_with_report(
    model: nn.Module,
    variables: PyTree,
    images: Images,
    *,
    attention: str | Sequence[str] | None = None,
    mlp: str | Sequence[str] | None = None,
    projections: str | Sequence[str] | None = None,
) -> tuple[nn.Module, PyTree, tuple[CalibratedLayer, ...]]:
    """What `calibrate` returns, and how near each layer comes, in the order of the forward pass."""
    _check_dense(model, variables)
    mlp, projections = _kinds(model, mlp, projections)
    _check_pixels(model, images)
    if attention is not None:
        model, variables = reparameterize(model, variables, attention=attention)
        logger.warning(
            "attention %s is not calibrated: finetune it", ", ".join(dict.fromkeys(model.attention))
        )
    student, rounded = reparameterize(model, variables, mlp=mlp, projections=projections)
    weight_bits = student.primitives.weight_bits
    fitted, report, few = {}, [], []

    def convert(call, arguments, keywords, context):
        block = context.module
        if context.method_name not in SUMS or not isinstance(block, Block) or not block.path:
            return call(*arguments, **keywords)
        both, grid = arguments
        dense, shifted = np.split(np.asarray(both), 2)
        stage, place = stage_of(("params", *block.path)), "/".join(block.path)
        alone = block.clone(parent=None, name=None, dropout=0.0, drop_path=0.0)
        changed = alone.clone(mlp=student.mlp[stage], projections=student.projections[stage])
        teacher, learner = (_Sum(one, context.method_name, grid) for one in (alone, changed))
        old, new = module_variables(place, variables), module_variables(place, rounded)
        layers = _shift_layers(learner, new, shifted[:1])
        for path in layers:
            name = "/".join((place, *path))
            bar.update(task, note=name)
            moments = _measure(teacher, learner, path, path == layers[-1], (old, new), (dense, shifted))
            if not all(np.isfinite(total).all() for total in moments):
                raise ValueError(f"what goes into {name} overflows on these images; expected finite numbers")
            if moments.count <= len(moments.inputs):
                few.append(name)
            before, fit = _layer(new, path), fit_layer(moments, _layer(old, path)["kernel"], weight_bits)
            report.append(
                CalibratedLayer(name, moments.signal_to_noise(**before), moments.signal_to_noise(**fit))
            )
            logger.debug("%s: %.1f dB rounded, %.1f dB calibrated", *report[-1])
            fit = {("params", *path, leaf): jnp.asarray(value) for leaf, value in fit.items()}
            new = unflatten_dict(flatten_dict(new) | fit)
            fitted.update({("params", *block.path, *leaf[1:]): value for leaf, value in fit.items()})
            bar.advance(task)
        return np.concatenate([_run(teacher, old, dense), _run(learner, new, shifted)])

    # One forward pass of all images converts each branch when its input arrives. The first half of the batch
    # is the dense model's, the second half the shift model's.
    with progress_bar() as bar:
        task = bar.add_task("calibrating", total=len(shift_layers(student)), note="")
        with nn.intercept_methods(convert):
            on_xla(model).apply(variables, np.concatenate([images, images]))
    if few:
        logger.warning(
            "%d layers, such as %s, have no more tokens than inputs, which damping makes up for; give more",
            len(few),
            few[0],
        )
    means = (np.mean([layer[column] for layer in report]) for column in (1, 2))
    logger.info("%d layers: %.1f dB rounded, %.1f dB calibrated, on average", len(report), *means)
    return student, unflatten_dict(flatten_dict(rounded) | fitted), tuple(report)


def fit_layer(
    moments: Moments, kernel: Float[Array | np.ndarray, "inputs outputs"], weight_bits: int = 5
) -> dict[str, Float[Array | np.ndarray, "..."]]:
    """The power-of-two ``kernel`` and the ``bias`` of a layer, float32, for the outputs it should have.

    The kernel that is rounded is the ridge regression of outputs on inputs that is drawn to the dense
    ``kernel``, and is that kernel where inputs and outputs are the dense layer's own.
    """
    squares, products, _ = moments.centred()
    damping = DAMPING * np.mean(np.diag(squares)) or 1.0  # inputs that are constant tell nothing
    hessian = squares + damping * np.eye(len(squares))
    wanted = np.linalg.solve(hessian, products + damping * np.asarray(kernel, np.float64))
    rounded = compensated_rounding(wanted, hessian, weight_bits)
    return {"kernel": rounded, "bias": moments.bias(rounded).astype(np.float32)}


def compensated_rounding(
    weight: Float[Array | np.ndarray, "inputs outputs"],
    hessian: Float[Array | np.ndarray, "inputs inputs"],
    weight_bits: int = 5,
) -> Float[Array | np.ndarray, "inputs outputs"]:
    """``weight`` as powers of two Q, float32, with a small (weight - Q)^T hessian (weight - Q).

    GPTQ's order and algebra: the input with the largest entry on the diagonal of ``hessian`` first, and the
    Cholesky factor of the inverse for what each error adds to later inputs, in float64; the rounding itself
    is in float32. A weight goes to the nearest power, not to the nearest logarithm as in `power_of_two`.

    Raises:
      numpy.linalg.LinAlgError: a ``hessian`` that is not positive definite.
    """
    order = np.argsort(-np.diag(hessian), kind="stable")
    inverse = np.linalg.inv(np.asarray(hessian, np.float64)[np.ix_(order, order)])
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    rounded = np.empty(weight.shape, np.float32)
    rounded[order] = _round_in_turn(
        *(np.asarray(given, np.float32) for given in (weight[order], factor)), weight_bits
    )
    return rounded


@partial(jax.jit, static_argnums=2)
def _round_in_turn(weight, factor, weight_bits):
    """``weight`` rounded row by row, with the upper ``factor`` of the Hessian's inverse."""
    inputs, outputs = weight.shape
    size = min(LAZY, inputs)
    padding = -inputs % size
    weight = jnp.pad(weight, ((0, padding), (0, 0)))
    factor = jnp.pad(factor, (0, padding)) + jnp.diag(jnp.arange(inputs + padding) >= inputs)

    def round_block(block, weight):
        first = block * size
        rows = jax.lax.dynamic_slice_in_dim(factor, first, size)
        inside = jax.lax.dynamic_slice_in_dim(rows, first, size, axis=1)

        def round_row(row, state):
            block, errors = state
            rounded = power_of_two(block[row] * TO_NEARER, weight_bits)
            error = (block[row] - rounded) / inside[row, row]
            block = (block - inside[row][:, None] * error).at[row].set(rounded)
            return block, errors.at[row].set(error)

        rounded = jax.lax.dynamic_slice_in_dim(weight, first, size)
        rounded, errors = jax.lax.fori_loop(0, size, round_row, (rounded, jnp.zeros((size, outputs))))
        weight -= jnp.matmul(rows.T, errors, precision="highest")
        return jax.lax.dynamic_update_slice_in_dim(weight, rounded, first, axis=0)

    return jax.lax.fori_loop(0, (inputs + padding) // size, round_block, weight)[:inputs]


class _Sum(NamedTuple):
    """``x`` plus a branch of a block, on a grid of tokens."""

    block: Block
    method: str
    grid: tuple[int, int]

    def apply(self, variables: PyTree, x: Array) -> Any:
        return self.block.apply(variables, x, self.grid, method=self.method)


def _calls(sum_, variables, x, look: Callable[[nn.Module, Array, Array], Any]) -> list:
    """What ``look`` says, unless None, of each call of a module in a sum: of the module, input and output."""
    seen = []

    def note(call, arguments, keywords, context):
        y = call(*arguments, **keywords)
        if context.method_name == "__call__" and (found := look(context.module, arguments[0], y)) is not None:
            seen.append(found)
        return y

    with nn.intercept_methods(note):
        sum_.apply(variables, x)
    return seen


def _shift_layers(sum_, variables, x) -> list[tuple[str, ...]]:
    """The paths of a sum's shift layers, in the order of their calls."""
    found = []

    def look(module, x, y):
        if isinstance(module, ShiftDense):
            found.append(module.path)

    jax.eval_shape(lambda: _calls(sum_, variables, x, look))
    return found


def _measure(teacher, learner, path, is_last, variables, tokens) -> Moments:
    """The moments of the layer at ``path``, in float64, of pairs of variables and tokens."""
    batches = ((tokens[0][batch], tokens[1][batch]) for batch in _batches(len(tokens[0])))
    found = (_moments(teacher, learner, path, is_last, variables, batch) for batch in batches)
    sums = [np.asarray(total, np.float64) for total in next(found)]
    for moments in found:
        sums = [total + np.asarray(more) for total, more in zip(sums, moments, strict=True)]
    return Moments(*sums)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _moments(teacher, learner, path, is_last, variables, tokens):
    def look(module, x, y):
        return tuple(z.reshape(-1, z.shape[-1]) for z in (x, y)) if module.path == path else None

    ((_, outputs),) = _calls(teacher, variables[0], tokens[0], look)
    ((inputs, _),) = _calls(learner, variables[1], tokens[1], look)
    inputs, outputs = inputs.astype(jnp.float32), outputs.astype(jnp.float32)
    if is_last:  # its output is added to the shift model's tokens, not to the dense model's
        outputs += (tokens[0] - tokens[1]).astype(jnp.float32).reshape(outputs.shape)
    multiply = partial(jnp.matmul, precision="highest")
    return Moments(
        jnp.float32(len(inputs)),
        jnp.sum(inputs, axis=0),
        jnp.sum(outputs, axis=0),
        multiply(inputs.T, inputs),
        multiply(inputs.T, outputs),
        jnp.sum(jnp.square(outputs)),
    )


def _run(sum_, variables, x):
    return np.concatenate([_apply(sum_, variables, x[batch]) for batch in _batches(len(x))])


@partial(jax.jit, static_argnums=0)
def _apply(sum_, variables, x):
    return sum_.apply(variables, x)


def _batches(count):
    return [slice(first, first + BATCH) for first in range(0, count, BATCH)]


def _layer(variables: PyTree, path) -> Mapping[str, Any]:
    return module_variables("/".join(path), variables)["params"]


def _kinds(model, mlp, projections):
    """The kinds of the shift model's linear layers, one a stage."""
    mlp, projections = (
        stage_kinds(name, kind or "dense", ("dense", "shift"), len(model.attention))
        for name, kind in (("mlp", mlp), ("projections", projections))
    )
    if "shift" not in mlp + projections:
        raise ValueError("nothing to calibrate: give mlp='shift', projections='shift' or both")
    return mlp, projections


def _check_dense(model, variables):
    if is_packed(variables["params"]):
        raise ValueError("the variables are packed; expected a dense model's as they were trained")
    for name in ("mlp", "projections"):
        others = sorted(set(getattr(model, name)) - {"dense"})
        if others:
            raise ValueError(
                f"{model.variant} is converted already: its {name} has {', '.join(others)} layers; "
                "expected the dense model that it was made from"
            )
    for name, leaf in flatten_dict(variables, sep="/").items():
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            raise ValueError(f"{name} has numbers that are not finite; expected trained weights")


def _check_pixels(model, images):
    check_images(images)
    if not len(images):
        raise ValueError("there are no images to calibrate on; give a few hundred")
    if images.shape[1:3] != (model.image_size,) * 2:
        raise ValueError(
            f"images must be {model.image_size} x {model.image_size} pixels for {model.variant}, got "
            f"{images.shape[1]} x {images.shape[2]}"
        )
    if not np.isfinite(images).all():
        raise ValueError("images have pixels that are not finite; expected numbers")
