"""The two ways to train one optimizer over seeds and learning rates: one vmapped program, and optax's usual loop."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nnlearn import optimizers
from nnlearn.compare.problem import Problem, first_params
from nnlearn.compare.settings import Settings
from nnlearn.data import batch_count, epoch_indices
from nnlearn.sums import long_sum
from nnlearn.train import init_state, make_epoch, make_step


class Curves(NamedTuple):
    """One optimizer of one library, trained over the grid; ``s`` seeds, ``r`` learning rates, ``e`` epochs.

    Attributes:
      train_sre: mean training loss over the batches of each epoch.
      validation_sre: validation loss after each epoch.
      test_sre: test accuracy or mean squared error after each epoch.
      seconds_e: seconds from the start of training to the end of each epoch, of the whole grid, without compiling.
      compile_seconds: seconds to trace and compile.
      steps: optimizer steps made, over the whole grid.
    """

    train_sre: np.ndarray
    validation_sre: np.ndarray
    test_sre: np.ndarray
    seconds_e: np.ndarray
    compile_seconds: float
    steps: int


Tick = Callable[[], None]


def epoch_key(seed, epoch):
    """The key that shuffles one epoch of one seed; the same for every optimizer and both libraries."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(1), seed), epoch)


def _curves(measured: list, clock: list[float], compile_seconds: float, steps: int) -> Curves:
    train, validation, test = (np.stack(column, axis=-1) for column in zip(*measured, strict=True))
    return Curves(train, validation, test, np.array(clock), compile_seconds, steps)


def _grid_steps(settings: Settings, problem: Problem) -> int:
    per_epoch = batch_count(len(problem.bundle.train.inputs), settings.batch_size)
    return per_epoch * settings.epochs * settings.seeds * len(settings.learning_rates)


def run_nnlearn(name: str, problem: Problem, settings: Settings, tick: Tick) -> Curves:
    """All seeds and learning rates at once: one program makes an epoch of the whole grid."""
    train, validation, test = (jax.tree.map(jnp.asarray, part) for part in problem.bundle.parts)
    make_tx = getattr(optimizers, name)

    def loss_fn(params, batch, key):
        del key
        examples_b, where_b = batch
        losses_b = problem.example_loss(problem.model.apply(params, examples_b.inputs), examples_b.targets)
        return jnp.mean(losses_b, where=where_b)

    def one_epoch(state, rate, seed, epoch):
        run_epoch = make_epoch(make_step(loss_fn, make_tx(rate)), train, settings.batch_size)
        state, infos = run_epoch(state, epoch_key(seed, epoch))
        validation_loss, _ = problem.evaluate(state.params, validation)
        _, metric = problem.evaluate(state.params, test)
        return state, (long_sum(infos.loss) / len(infos.loss), validation_loss, metric)

    over_rates = jax.vmap(one_epoch, in_axes=(0, 0, None, None))
    grid_epoch = jax.vmap(over_rates, in_axes=(0, None, 0, None))
    rates, seeds = jnp.array(settings.learning_rates), jnp.arange(settings.seeds)
    starts = first_params(problem, settings.seeds)
    states = jax.vmap(lambda p: jax.vmap(lambda rate: init_state(p, make_tx(rate)))(rates))(starts)

    began = time.perf_counter()
    program = jax.jit(grid_epoch, donate_argnums=0).lower(states, rates, seeds, jnp.int32(0)).compile()
    compile_seconds = time.perf_counter() - began

    measured, clock, began = [], [], time.perf_counter()
    for epoch in range(settings.epochs):
        states, results = program(states, rates, seeds, jnp.int32(epoch))
        measured.append(jax.device_get(results))
        clock.append(time.perf_counter() - began)
        tick()
    return _curves(measured, clock, compile_seconds, _grid_steps(settings, problem))


def run_optax(name: str, problem: Problem, settings: Settings, tick: Tick) -> Curves:
    """The same grid as users of optax run it: a jitted step, called from a Python loop over runs and batches.

    The learning rate is an argument of the step, so that one compilation serves all of them; a rate bound outside, as
    in most tutorials, would compile anew for each.
    """
    train, validation, test = problem.bundle.parts
    make_tx = getattr(optax, name)

    @jax.jit
    def step(rate, params, opt_state, inputs, targets, where):
        def loss_fn(params):
            return jnp.mean(problem.optax_loss(problem.model.apply(params, inputs), targets), where=where)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = make_tx(rate).update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    @jax.jit
    def evaluate(params):
        validation_loss, _ = problem.evaluate(params, jax.tree.map(jnp.asarray, validation))
        _, metric = problem.evaluate(params, jax.tree.map(jnp.asarray, test))
        return validation_loss, metric

    rates = [jnp.float32(rate) for rate in settings.learning_rates]
    starts = first_params(problem, settings.seeds)
    grid = [(seed, index) for seed in range(settings.seeds) for index in range(len(rates))]
    params = {run: jax.tree.map(lambda leaf, seed=run[0]: leaf[seed], starts) for run in grid}
    states = {run: make_tx(rates[run[1]]).init(params[run]) for run in grid}
    size, batch = len(train.inputs), settings.batch_size
    shuffle = jax.jit(lambda seed, epoch: epoch_indices(epoch_key(seed, epoch), size, batch))

    began = time.perf_counter()
    first = jax.tree.map(np.asarray, (train.inputs[np.arange(batch) % size], train.targets[np.arange(batch) % size]))
    step = step.lower(rates[0], params[grid[0]], states[grid[0]], *first, np.ones(batch, bool)).compile()
    evaluate = evaluate.lower(params[grid[0]]).compile()
    compile_seconds = time.perf_counter() - began
    shuffle(0, 0)

    shape = (settings.seeds, len(rates))
    measured, clock, began = [], [], time.perf_counter()
    for epoch in range(settings.epochs):
        results = tuple(np.zeros(shape) for _ in range(3))
        for seed in range(settings.seeds):
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
                    array[run] = float(value)  # NumPy would turn an interrupt while it waits into a ValueError
        measured.append(results)
        clock.append(time.perf_counter() - began)
        tick()
    return _curves(measured, clock, compile_seconds, _grid_steps(settings, problem))


RUNNERS: dict[str, Callable[[str, Problem, Settings, Tick], Curves]] = {"nnlearn": run_nnlearn, "optax": run_optax}
