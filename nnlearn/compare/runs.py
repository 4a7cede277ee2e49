"""Two ways to train one optimizer over seeds and learning rates: one vmapped program, and optax's usual loop."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnlearn import optimizers
from nnlearn.compare.options import CompareOptions
from nnlearn.compare.problem import Problem, first_params
from nnlearn.data import batch_count, epoch_indices
from nnlearn.sums import long_sum
from nnlearn.train import init_state, make_epoch, make_step
from nnlearn.types import ArrayLike, Key


class Curves(NamedTuple):
    """The curves of one optimizer of one library over the grid; ``s`` seeds, ``r`` learning rates, ``e`` epochs.

    Attributes:
      train_sre: mean training loss over the batches of each epoch.
      validation_sre: validation loss after each epoch.
      test_sre: test accuracy or mean squared error after each epoch.
      seconds_e: seconds from the start of training to the end of each epoch, for the whole grid, without compilation.
      compile_seconds: seconds to trace and compile.
      steps: number of optimizer steps over the whole grid.
    """

    train_sre: np.ndarray
    validation_sre: np.ndarray
    test_sre: np.ndarray
    seconds_e: np.ndarray
    compile_seconds: float
    steps: int


Tick = Callable[[], None]


def epoch_key(seed: ArrayLike, epoch: ArrayLike) -> Key:
    """The key that shuffles one epoch of one seed, for every optimizer and both libraries."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), epoch)


def _curves(measured: list, clock: list[float], compile_seconds: float, steps: int) -> Curves:
    train, validation, test = (np.stack(column, axis=-1) for column in zip(*measured, strict=True))
    return Curves(train, validation, test, np.array(clock), compile_seconds, steps)


def _grid_steps(options: CompareOptions, problem: Problem) -> int:
    per_epoch = batch_count(len(problem.bundle.train.inputs), options.batch_size)
    return per_epoch * options.epochs * options.seeds * len(options.learning_rates)


def run_nnlearn(name: str, problem: Problem, options: CompareOptions, tick: Tick) -> Curves:
    """Train all seeds and learning rates together: one program computes an epoch of the whole grid."""
    train, validation, test = (jax.tree.map(jnp.asarray, part) for part in problem.bundle.parts)
    make_tx = getattr(optimizers, name)

    def loss_fn(params, batch, key):
        del key
        examples_b, where_b = batch
        losses_b = problem.example_loss(problem.model.apply(params, examples_b.inputs), examples_b.targets)
        return jnp.mean(losses_b, where=where_b)

    def one_epoch(state, rate, seed, epoch):
        run_epoch = make_epoch(make_step(loss_fn, make_tx(rate)), train, options.batch_size)
        state, infos = run_epoch(state, epoch_key(seed, epoch))
        validation_loss, _ = problem.evaluate(state.params, validation)
        _, metric = problem.evaluate(state.params, test)
        return state, (long_sum(infos.loss) / len(infos.loss), validation_loss, metric)

    over_rates = jax.vmap(one_epoch, in_axes=(0, 0, None, None))
    grid_epoch = jax.vmap(over_rates, in_axes=(0, None, 0, None))
    rates, seeds = jnp.array(options.learning_rates), jnp.arange(options.seeds)
    starts = first_params(problem, options.seeds)
    states = jax.vmap(lambda p: jax.vmap(lambda rate: init_state(p, make_tx(rate)))(rates))(starts)

    began = time.perf_counter()
    program = jax.jit(grid_epoch, donate_argnums=0).lower(states, rates, seeds, jnp.int32(0)).compile()
    compile_seconds = time.perf_counter() - began

    measured, clock, began = [], [], time.perf_counter()
    for epoch in range(options.epochs):
        states, results = program(states, rates, seeds, jnp.int32(epoch))
        measured.append(jax.device_get(results))
        clock.append(time.perf_counter() - began)
        tick()
    return _curves(measured, clock, compile_seconds, _grid_steps(options, problem))


def run_optax(name: str, problem: Problem, options: CompareOptions, tick: Tick) -> Curves:
    """Train the same grid as users of optax do: a Python loop over runs and batches calls a jitted step.

    The learning rate is an argument of the step, so that one compilation serves all rates. A rate in a closure, as in
    most tutorials, would compile once for each rate.
    """
    train, validation, test = problem.bundle.parts
    make_tx = getattr(optax, name)

    def train_step(rate, params, opt_state, inputs, targets, where):
        def loss_fn(params):
            return jnp.mean(problem.optax_loss(problem.model.apply(params, inputs), targets), where=where)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = make_tx(rate).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    def measure(params):
        validation_loss, _ = problem.evaluate(params, jax.tree.map(jnp.asarray, validation))
        _, metric = problem.evaluate(params, jax.tree.map(jnp.asarray, test))
        return validation_loss, metric

    rates = [jnp.float32(rate) for rate in options.learning_rates]
    starts = first_params(problem, options.seeds)
    grid = [(seed, index) for seed in range(options.seeds) for index in range(len(rates))]
    params = {run: jax.tree.map(lambda leaf, seed=run[0]: leaf[seed], starts) for run in grid}
    states = {run: make_tx(rates[run[1]]).init(params[run]) for run in grid}
    size, batch = len(train.inputs), options.batch_size
    shuffle = jax.jit(lambda seed, epoch: epoch_indices(epoch_key(seed, epoch), size, batch))

    began = time.perf_counter()
    first = jax.tree.map(np.asarray, (train.inputs[np.arange(batch) % size], train.targets[np.arange(batch) % size]))
    where = np.ones(batch, bool)
    step = jax.jit(train_step).lower(rates[0], params[grid[0]], states[grid[0]], *first, where).compile()
    evaluate = jax.jit(measure).lower(params[grid[0]]).compile()
    compile_seconds = time.perf_counter() - began
    shuffle(0, 0)

    shape = (options.seeds, len(rates))
    measured, clock, began = [], [], time.perf_counter()
    for epoch in range(options.epochs):
        results = tuple(np.zeros(shape) for _ in range(3))
        for seed in range(options.seeds):
            batches = [np.asarray(array) for array in shuffle(seed, epoch)]
            batches = [(train.inputs[rows], train.targets[rows], where) for rows, where in zip(*batches, strict=True)]
            for index, rate in enumerate(rates):
                run, losses = (seed, index), []
                for inputs, targets, where in batches:
                    params[run], states[run], loss = step(rate, params[run], states[run], inputs, targets, where)
                    losses.append(loss)
                for array, value in zip(
                    results, (np.mean(jax.device_get(losses)), *evaluate(params[run])), strict=True
                ):
                    array[run] = float(value)  # NumPy would convert an interrupt during the wait into a ValueError
        measured.append(results)
        clock.append(time.perf_counter() - began)
        tick()
    return _curves(measured, clock, compile_seconds, _grid_steps(options, problem))


RUNNERS: dict[str, Callable[[str, Problem, CompareOptions, Tick], Curves]] = {
    "nnlearn": run_nnlearn,
    "optax": run_optax,
}
