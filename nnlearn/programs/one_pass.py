"""The optimizer's part of a step as one pass over each array, by a kernel in C, in a program for one CPU.

The program of the update is read backwards from its results. What is elementwise on arrays of a result's shape, down to
the arguments and to single numbers such as a learning rate or a norm, becomes one loop for all results that share an
argument. The rest stays XLA's: the norms above all, which must be known before the first number is updated.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxpr_as_fun

from nnlearn.native.elementwise import ElementwiseKernel, can_compute, form, make_kernel
from nnlearn.programs.read import bind, called_program, interpret, is_large, makers, variables
from nnlearn.programs.slices import read, values_of
from nnlearn.types import OptState, Params, Updates

Update = Callable[[Updates, OptState, Params], tuple[Params, OptState]]


def in_one_pass(update: Update, otherwise: Update) -> Update:
    """``update(grads, opt_state, params) -> (params, opt_state)`` with its large arrays in one pass each.

    Args:
      update: any.
      otherwise: the same, called where nothing would be gained.
    """

    def passing(grads, opt_state, params):
        program, shapes = jax.make_jaxpr(update, return_shape=True)(grads, opt_state, params)
        arguments = jax.tree.leaves((grads, opt_state, params))
        flat = _inlined(program, arguments)
        first, last = len(jax.tree.leaves(grads)), len(arguments) - len(jax.tree.leaves(params))
        read = flat.jaxpr.invars[len(program.consts) :]
        carried = read[last:] + read[first:last]  # in the order of the results
        passes = [] if flat.effects else find_kernels(flat.jaxpr, carried)
        if not passes:
            return otherwise(grads, opt_state, params)
        results = _with_derivative(program, flat, passes)(program.consts, arguments)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return passing


def find_kernels(program: Jaxpr, carried: Sequence[Var]) -> list[ElementwiseKernel]:
    """The passes that make results of a program, at least two results each.

    Args:
      program: without calls of other programs.
      carried: the arguments whose places its results take, in their order.
    """
    maker = makers(program)
    cones = {}
    for result in program.outvars:
        if isinstance(result, Var) and result in maker and is_large(result.aval):
            cones[result] = _cone(result, maker)
    passes = []
    for group in _groups({result: cone for result, cone in cones.items() if cone is not None}):
        if len(group) < 2:  # XLA has one loop for one result, too
            continue
        members = frozenset().union(*(cones[result].members for result in group))
        equations = [equation for equation in program.eqns if not members.isdisjoint(equation.outvars)]
        read = dict.fromkeys(var for equation in equations for var in variables(equation.invars) if var not in members)
        inputs = sorted(read, key=lambda var: var.aval.ndim == 0)
        replaced = {  # each result takes one place
            group.index(new): inputs.index(old)
            for old, new in zip(carried, program.outvars, strict=False)
            if new in group and old in inputs and form(old) == form(new)
        }
        passes.append(make_kernel(equations, inputs, group, {old: new for new, old in replaced.items()}))
    return passes


class _Cone(NamedTuple):
    """The variables that lead elementwise to a result, and the arrays that they begin with."""

    members: frozenset[Var]
    arrays: frozenset[Var]


def _cone(result: Var, maker: dict) -> _Cone | None:
    """What a result is made of; None if not of arguments and numbers alone, elementwise."""
    members, arrays, ahead = set(), set(), [result]
    while ahead:
        var = ahead.pop()
        if var in members or var in arrays:
            continue
        if var not in maker:
            arrays.add(var)
            continue
        equation = maker[var]
        operands = [atom for atom in equation.invars if atom.aval.ndim]
        if len(variables(operands)) < len(operands):  # a constant array
            return None
        spread = equation.primitive.name == "broadcast_in_dim" and not operands
        fits = all(atom.aval.shape == result.aval.shape for atom in operands)
        if not spread and not (fits and can_compute(equation)):
            return None
        members.add(var)
        ahead += variables(operands)
    return _Cone(frozenset(members), frozenset(arrays))


def _groups(cones: dict[Var, _Cone]) -> list[list[Var]]:
    """The results, those together that are made of the same arrays in part."""
    groups: list[tuple[set[Var], list[Var]]] = []
    for result, cone in cones.items():
        together = [group for group in groups if not group[0].isdisjoint(cone.arrays)]
        arrays = set(cone.arrays).union(*(arrays for arrays, _ in together))
        results = [each for _, others in together for each in others] + [result]
        groups = [group for group in groups if group not in together] + [(arrays, results)]
    return [results for _, results in groups]


def _with_derivative(program: ClosedJaxpr, flat: ClosedJaxpr, passes: Sequence[ElementwiseKernel]) -> Callable:
    """``function(consts, arguments) -> results`` by the passes; its derivative is the program's own."""

    @jax.custom_jvp
    def fast(consts, arguments):
        made = {var for work in passes for var in work.outputs}
        wanted = [var for work in passes for var in work.inputs]
        wanted += [var for var in variables(flat.jaxpr.outvars) if var not in made]
        known = values_of(flat, [*consts, *arguments], wanted)
        for work in passes:
            known |= dict(zip(work.outputs, work(*(known[var] for var in work.inputs)), strict=True))
        return [read(known, atom) for atom in flat.jaxpr.outvars]

    @fast.defjvp
    def derivative(primals, tangents):
        def as_written(consts, arguments):
            return jaxpr_as_fun(ClosedJaxpr(program.jaxpr, consts))(*arguments)

        return jax.jvp(as_written, primals, tangents)

    return fast


def _inlined(program: ClosedJaxpr, arguments: Sequence[jax.Array]) -> ClosedJaxpr:
    """The program with the programs that it calls in its own equations; its constants become the first arguments."""

    def apply(equation, operands):
        inner = called_program(equation)
        return bind(equation, operands) if inner is None else interpret(inner, operands, apply)

    def run(consts, arguments):
        return interpret(ClosedJaxpr(program.jaxpr, consts), arguments, apply)

    return jax.make_jaxpr(run)(program.consts, arguments)


__all__ = ["find_kernels", "in_one_pass"]
