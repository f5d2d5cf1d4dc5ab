"""A traced function as expressions, and the search for one trace in another."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun
from jaxtyping import PyTree

from shiftaddvit_jax.models.variables import COMPILE_QUICKLY


@dataclass(eq=False)
class Expression:
    """One equation of a trace, or one of its inputs (``"input"``) or constants (``"constant"``).

    Attributes:
      primitive: the equation's primitive, or the name of a jit that is kept whole.
      inputs: the equation's inputs.
      shape: the output's.
      params: the primitive's.
      value: a constant's array, or an equation's JAX primitive.
      where: the names of the modules and methods that the equation belongs to.
      dtype: the output's.
      output: which of the equation's outputs this is.
    """

    primitive: str
    inputs: tuple["Expression", ...] = field(default=(), repr=False)  # a graph's would be exponentially long
    shape: tuple[int, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    value: Any = None
    where: str = ""
    dtype: Any = None
    output: int = 0


_SAME = {"copy", "stop_gradient"}
_CALLS = {"jit": "jaxpr", "custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
# Jits whose equations are not looked at.
DEPTHWISE, HADAMARD, MATSHIFT = "_depthwise_conv", "_hadamard", "_matshift"
_KEPT_WHOLE = (DEPTHWISE, HADAMARD, MATSHIFT)


def trace(function: Callable, *shapes: PyTree) -> list[Expression]:
    """The function's equations in order, calls inlined: the inputs come first, the one output last.

    ``shapes`` are those of its arguments, with dtypes.
    """
    closed = jax.make_jaxpr(function)(*shapes)
    order = []

    def add(*arguments, **keywords):
        order.append(Expression(*arguments, **keywords))
        return order[-1]

    def constant(value):
        return add("constant", shape=np.shape(value), value=np.asarray(value))

    def walk(jaxpr, consts, arguments):
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

        def read(variable):
            if isinstance(variable, Literal):
                aval: Any = variable.aval
                return constant(np.asarray(variable.val, aval.dtype))
            return known[variable]

        for equation in jaxpr.eqns:
            inputs = [read(variable) for variable in equation.invars]
            name, params = equation.primitive.name, equation.params
            if name in _CALLS and params.get("name") not in _KEPT_WHOLE:
                inner = params[_CALLS[name]]
                if all(expression.primitive == "constant" for expression in inputs):
                    values = _compute(inner)(*(expression.value for expression in inputs))
                    outputs = [constant(value) for value in values]
                else:
                    outputs = walk(inner.jaxpr, map(constant, inner.consts), inputs)
            elif name in _SAME:
                outputs = inputs
            else:
                outputs = [
                    add(
                        params["name"] if name in _CALLS else name,
                        tuple(inputs),
                        variable.aval.shape,
                        params,
                        equation.primitive,
                        str(equation.source_info.name_stack),
                        variable.aval.dtype,
                        output,
                    )
                    for output, variable in enumerate(equation.outvars)
                ]
            known |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    inputs = [add("input", shape=variable.aval.shape) for variable in closed.jaxpr.invars]
    (output,) = walk(closed.jaxpr, [constant(value) for value in closed.consts], inputs)
    return order[: order.index(output) + 1]


@functools.lru_cache(maxsize=256)
def _compute(call: ClosedJaxpr) -> Callable[..., list]:
    """The function that a call makes of its inputs. It runs as often as a model has layers of one shape."""
    return jax.jit(jaxpr_as_fun(call), compiler_options=COMPILE_QUICKLY)


def find(
    pattern: Expression, expression: Expression, found: dict[Expression, Expression], captured: dict
) -> bool:
    """Whether ``expression`` computes ``pattern``; ``found`` receives an expression for each input.

    A NaN in the pattern stands for any number, which ``captured`` receives.
    """
    if pattern.primitive == "input":
        return found.setdefault(pattern, expression) is expression
    if pattern.primitive != expression.primitive or pattern.shape != expression.shape:
        return False
    if pattern.primitive == "constant":
        if np.isnan(pattern.value).all():
            captured["number"] = float(expression.value)
            return True
        return np.array_equal(pattern.value, expression.value)
    return pattern.params == expression.params and all(
        find(*pair, found, captured) for pair in zip(pattern.inputs, expression.inputs, strict=True)
    )
