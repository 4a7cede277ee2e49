"""The optimizer's part of a step as one pass over each array, in a C kernel, in a program for one CPU.

The program of the update is read backwards from its results. Elementwise operations on arrays of a result's shape, back
to the arguments and to scalars such as a learning rate or a norm, become one loop for all results that share an
argument. XLA computes the rest, above all the norms, which must be known before the first element is updated.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun

from nnlearn.native.codes import DecodeKernel, EncodeKernel, kernel_of
from nnlearn.native.elementwise import ElementwiseKernel, can_compute, form, is_scalar, make_kernel
from nnlearn.programs.read import bind, called_program, interpret, is_large, makers, variables
from nnlearn.programs.slices import read, values_of
from nnlearn.types import OptState, Params, Updates

Update = Callable[[Updates, OptState, Params], tuple[Params, OptState]]


def in_one_pass(update: Update, otherwise: Update) -> Update:
    """Compute ``update(grads, opt_state, params) -> (params, opt_state)`` in one pass over each large array.

    Args:
      update: the update.
      otherwise: an equal function, called where one pass gains nothing.
    """

    def passing(grads, opt_state, params):
        program, shapes = jax.make_jaxpr(update, return_shape=True)(grads, opt_state, params)
        arguments = jax.tree.leaves((grads, opt_state, params))
        flat = _inlined(program, arguments)
        first, last = len(jax.tree.leaves(grads)), len(arguments) - len(jax.tree.leaves(params))
        read = flat.jaxpr.invars[len(program.consts) :]
        carried = read[last:] + read[first:last]  # in the order of the results
        kernels = [] if flat.effects else find_kernels(flat.jaxpr, carried)
        if not kernels:
            return otherwise(grads, opt_state, params)
        results = _with_derivative(program, flat, kernels)(program.consts, arguments)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return passing


def find_kernels(program: Jaxpr, carried: Sequence[Var]) -> list[ElementwiseKernel]:
    """Find kernels that compute results of a program, at least two results each.

    Args:
      program: a program without calls of other programs.
      carried: the arguments whose memory the results take, in the order of the results.
    """
    maker = makers(program)
    coded = {  # arrays that leave the program as 8-bit codes alone
        equation.invars[0]: equation
        for equation in program.eqns
        if isinstance(kernel_of(equation), EncodeKernel) and equation.invars[0] not in program.outvars
    }
    cones = {}
    for result in [*program.outvars, *coded]:
        if isinstance(result, Var) and result in maker and is_large(result.aval):
            cones[result] = _cone(result, maker)
    kernels = []
    for group in _groups({result: cone for result, cone in cones.items() if cone is not None}):
        if len(group) < 2:  # XLA also computes one result in one loop
            continue
        kernels.append(_kernel([cones[result] for result in group], group, program, carried, coded))
    return kernels


def _kernel(cones, group: Sequence[Var], program: Jaxpr, carried: Sequence[Var], coded: dict) -> ElementwiseKernel:
    """Make the kernel of a group of results, with the decoding of arrays that it reads and the encoding of results."""
    members = frozenset().union(*(cone.members for cone in cones))
    arrays = frozenset().union(*(cone.arrays for cone in cones))
    written = [coded[result] for result in group if result in coded]
    equations = [
        equation
        for equation in program.eqns
        if not members.isdisjoint(equation.outvars)
        or equation in written
        or (isinstance(kernel_of(equation), DecodeKernel) and not arrays.isdisjoint(equation.outvars))
    ]
    made = {var for equation in equations for var in equation.outvars}
    read = dict.fromkeys(var for equation in equations for var in variables(equation.invars) if var not in made)
    inputs = sorted(read, key=is_scalar)
    outputs = [var for result in group for var in (coded[result].outvars if result in coded else [result])]
    replaced = {  # each result takes the memory of one input
        outputs.index(new): inputs.index(old)
        for old, new in zip(carried, program.outvars, strict=False)
        if new in outputs and old in inputs and form(old) == form(new)
    }
    return make_kernel(equations, inputs, outputs, {old: new for new, old in replaced.items()})


class _Cone(NamedTuple):
    """The variables that lead elementwise to a result, and the arrays that they are computed from."""

    members: frozenset[Var]
    arrays: frozenset[Var]


def _cone(result: Var, maker: dict) -> _Cone | None:
    """Return the cone of a result; None if the result is not elementwise in arguments and scalars."""
    members, arrays, ahead = set(), set(), [result]
    while ahead:
        var = ahead.pop()
        if var in members or var in arrays:
            continue
        if var not in maker or isinstance(kernel_of(maker[var]), DecodeKernel):
            arrays.add(var)
            continue
        equation = maker[var]
        operands = [atom for atom in equation.invars if not is_scalar(atom)]
        if len(variables(operands)) < len(operands):  # a constant array
            return None
        spread = equation.primitive.name == "broadcast_in_dim" and not operands
        fits = all(form(atom)[0] == form(result)[0] for atom in operands)
        if not spread and not (fits and can_compute(equation)):
            return None
        members.add(var)
        ahead += variables(operands)
    return _Cone(frozenset(members), frozenset(arrays))


def _groups(cones: dict[Var, _Cone]) -> list[list[Var]]:
    """Group the results that share an array."""
    groups: list[tuple[set[Var], list[Var]]] = []
    for result, cone in cones.items():
        together = [group for group in groups if not group[0].isdisjoint(cone.arrays)]
        arrays = set(cone.arrays).union(*(arrays for arrays, _ in together))
        results = [each for _, others in together for each in others] + [result]
        groups = [group for group in groups if group not in together] + [(arrays, results)]
    return [results for _, results in groups]


def _with_derivative(program: ClosedJaxpr, flat: ClosedJaxpr, kernels: Sequence[ElementwiseKernel]) -> Callable:
    """Return ``function(consts, arguments) -> results``, computed by the kernels; its derivative is the program's."""

    @jax.custom_jvp
    def fast(consts, arguments):
        computed = {var for kernel in kernels for var in kernel.outputs}
        wanted = [var for kernel in kernels for var in kernel.inputs]
        wanted += [var for var in variables(flat.jaxpr.outvars) if var not in computed]
        known = values_of(flat, [*consts, *arguments], wanted)
        for kernel in kernels:
            results = kernel(*(known[var] for var in kernel.inputs))
            known |= dict(zip(kernel.outputs, results, strict=True))
        return [read(known, atom) for atom in flat.jaxpr.outvars]

    @fast.defjvp
    def derivative(primals, tangents):
        def as_written(consts, arguments):
            return jaxpr_as_fun(ClosedJaxpr(program.jaxpr, consts))(*arguments)

        return jax.jvp(as_written, primals, tangents)

    return fast


def _inlined(program: ClosedJaxpr, arguments: Sequence[jax.Array]) -> ClosedJaxpr:
    """Inline the programs that a program calls; its constants become the first arguments."""

    def apply(equation, operands):
        inner = called_program(equation)
        return bind(equation, operands) if inner is None else interpret(inner, operands, apply)

    def run(consts, arguments):
        return interpret(ClosedJaxpr(program.jaxpr, consts), arguments, apply)

    return jax.make_jaxpr(run)(program.consts, arguments)


__all__ = ["Update", "find_kernels", "in_one_pass"]
