"""Count the floating-point operations of a program's matrix products and convolutions, including loop iterations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


def of(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the FLOPs of a function as JAX traces it; two for each multiply-add. Arguments may be shapes."""
    return _of_program(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_compiled(function: Callable[..., Any], *arguments: Any) -> float:
    """Return the compiler's count of all operations, after its simplifications. It counts a loop's body only once."""
    cost = jax.jit(function).lower(*arguments).compile().cost_analysis()
    assert cost is not None
    return float(cost["flops"])


def _of_program(program: core.Jaxpr) -> float:
    return sum(_of_equation(equation) for equation in program.eqns)


def _of_equation(equation: core.JaxprEqn) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = _shape(equation.invars[0])
        return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        numbers = equation.params["dimension_numbers"]
        kernel = _shape(equation.invars[1])
        per_output = math.prod(kernel) / kernel[numbers.rhs_spec[0]]
        return 2.0 * math.prod(_shape(equation.outvars[0])) * per_output
    if name == "while":
        raise ValueError("a loop of unknown length has no fixed cost")
    inner = [_of_program(each) for each in _inner(equation)]
    if name == "cond":
        return max(inner)
    return equation.params.get("length", 1) * sum(inner)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner(equation: core.JaxprEqn) -> Iterator[core.Jaxpr]:
    for value in equation.params.values():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, core.ClosedJaxpr):
                yield each.jaxpr
            elif isinstance(each, core.Jaxpr):
                yield each
