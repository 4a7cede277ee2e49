"""A whole training step, gradient and optimizer, with nnlearn and with the usual ways to use optax.

    python benchmarks/train_step.py                      # three models
    python benchmarks/train_step.py --quick              # small ones, writes nothing
    python benchmarks/train_step.py --problems mlp

All rivals train the same pure model from the same parameters on the same batch with clip + AdamW + schedule. Each step
is one jitted program with donated state, and all must reach the same loss. ``gradient only`` is the lower bound: loss
and gradient, without an optimizer. nnlearn's step also returns the gradient norm and the learning rate, unlike the
others. The perceptron also has a version in flax's nnx, in the functional form that its performance guide recommends.
"""

import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from harness import Report, argument_parser, compile_timed, race, ratios_to, show, summarize
from jax.flatten_util import ravel_pytree
from problems import PROBLEMS, QUICK_PROBLEMS, Problem
from recipes import RECIPES

import nnlearn

RECIPE = "clip+adamw+schedule"
FLOOR, OURS = "gradient only", "nnlearn, packed"
CHECKED_STEPS = 3
DIFFERENT = 1e-4  # relative


class Training:
    """A rival whose step is ``state, result = step(state, batch)``; with ``keeps`` every step starts from one state."""

    def __init__(self, jitted: Any, state: Any, batch: Any, keeps: bool = False):
        self.compiled, self.compile = compile_timed(jitted, state, batch)
        self.state, self.batch, self.keeps = state, batch, keeps
        self.result: Any = None

    def run(self, calls: int) -> None:
        for _ in range(calls):
            state, self.result = self.compiled(self.state, self.batch)
            self.state = self.state if self.keeps else state
        jax.tree.leaves(self.result)[0].block_until_ready()

    @property
    def loss(self) -> float:
        return float(jax.tree.leaves(self.result)[0])


def gradient_only(problem: Problem) -> Training:
    def step(params, batch):
        loss, grads = jax.value_and_grad(problem.loss_fn)(params, batch, None)
        return grads, loss

    return Training(jax.jit(step), problem.params, problem.batch, keeps=True)


def with_optax(problem: Problem, wrap: Callable = lambda tx: tx) -> Training:
    """The step of optax's documentation."""
    tx = wrap(RECIPES[RECIPE].make(optax))

    def step(state, batch):
        params, opt_state = state
        loss, grads = jax.value_and_grad(problem.loss_fn)(params, batch, None)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    params = jax.tree.map(jnp.copy, problem.params)
    return Training(jax.jit(step, donate_argnums=0), (params, tx.init(params)), problem.batch)


def with_ravel(problem: Problem) -> Training:
    """optax on one flat vector from jax's ``ravel_pytree``."""
    flat, unravel = ravel_pytree(problem.params)
    return with_optax(Problem(flat, problem.batch, lambda flat, batch, key: problem.loss_fn(unravel(flat), batch, key)))


def with_train_state(problem: Problem) -> Training:
    """flax's ``TrainState`` in the style of its documentation, with donation."""
    from flax.training.train_state import TrainState

    def step(state, batch):
        loss, grads = jax.value_and_grad(state.apply_fn)(state.params, batch, None)
        return state.apply_gradients(grads=grads), loss

    params = jax.tree.map(jnp.copy, problem.params)
    state = TrainState.create(apply_fn=problem.loss_fn, params=params, tx=RECIPES[RECIPE].make(optax))
    return Training(jax.jit(step, donate_argnums=0), state.replace(step=jnp.zeros([], jnp.int32)), problem.batch)


def with_nnx(problem: Problem) -> Training:
    """flax's nnx: a module and ``nnx.Optimizer``, split outside the step and merged inside it."""
    from flax import nnx

    class Perceptron(nnx.Module):
        def __init__(self, layers):
            self.layers = nnx.List([])
            for params in layers:
                linear: Any = nnx.Linear(*params["kernel"].shape, rngs=nnx.Rngs(0))
                linear.kernel[...], linear.bias[...] = jnp.copy(params["kernel"]), jnp.copy(params["bias"])
                self.layers.append(linear)

        def __call__(self, x):
            for linear in self.layers[:-1]:
                x = jax.nn.relu(linear(x))
            return self.layers[-1](x)

    model = Perceptron([*problem.params["hidden"], problem.params["output"]])
    optimizer = nnx.Optimizer(model, RECIPES[RECIPE].make(optax), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    def step(state, batch):
        model, optimizer = nnx.merge(graph, state)
        loss, grads = nnx.value_and_grad(lambda model: nnlearn.cross_entropy(model(batch[0]), batch[1]))(model)
        optimizer.update(model, grads)
        return nnx.state((model, optimizer)), loss

    return Training(jax.jit(step, donate_argnums=0), jax.tree.map(jnp.copy, state), problem.batch)


def with_nnlearn(problem: Problem, packed: bool) -> Training:
    tx = RECIPES[RECIPE].make(nnlearn)
    state = nnlearn.init_state(problem.params, tx, 0, packed=packed)
    return Training(nnlearn.jit_step(nnlearn.make_step(problem.loss_fn, tx)), state, problem.batch)


def makers(name: str, problem: Problem) -> dict[str, Callable[[], Training]]:
    rivals = {
        FLOOR: lambda: gradient_only(problem),
        "optax": lambda: with_optax(problem),
        "optax.flatten": lambda: with_optax(problem, optax.flatten),
        "optax, ravel_pytree": lambda: with_ravel(problem),
        "flax TrainState": lambda: with_train_state(problem),
        "nnlearn": lambda: with_nnlearn(problem, False),
        OURS: lambda: with_nnlearn(problem, True),
    }
    return rivals | ({"flax nnx": lambda: with_nnx(problem)} if name == "mlp" else {})


def measure(name: str, problem: Problem, rounds: int, wanted: list[str] | None) -> tuple[list[dict], list[dict]]:
    """For one model, a row for each rival, and the ratios of its time to those of the gradient alone and of nnlearn."""
    rivals = {}
    for rival, make in makers(name, problem).items():
        if wanted and rival not in (FLOOR, OURS, *wanted):
            continue
        try:
            rivals[rival] = make()
        except ModuleNotFoundError as error:
            print(f"  {rival}: left out, {error}")
            continue
        print(f"  {rival}: compiled in {rivals[rival].compile['total_seconds']:.1f} s", flush=True)
    for rival in rivals.values():
        rival.run(CHECKED_STEPS)
    losses = {rival: training.loss for rival, training in rivals.items()}
    for rival, loss in losses.items():
        if rival != FLOOR and abs(loss / losses[OURS] - 1) > DIFFERENT:
            print(f"  DIFFERENT STEP: {rival} reaches {loss}, {OURS} {losses[OURS]}", flush=True)
    seconds, calls = race(rivals, rounds=rounds)
    leaves = jax.tree.leaves(problem.params)
    head = {"problem": name, "leaves": len(leaves), "parameters": sum(leaf.size for leaf in leaves)}
    head |= {"recipe": RECIPE, "calls": calls}
    floor = statistics.median(seconds[FLOOR])
    rows = []
    for rival, training in rivals.items():
        above = statistics.median(seconds[rival]) - floor
        facts = {"rival": rival, **summarize(seconds[rival]), "ms_above_gradient": above * 1e3}
        rows.append(head | facts | {"loss_after_3": losses[rival], "compile": training.compile})
    found = ratios_to(seconds, FLOOR, rivals) | ratios_to(seconds, OURS, rivals)
    return rows, [head | {"ratios": found}]


def print_rows(rows: list[dict], ratios: dict) -> None:
    def cells(row):
        compiling, to_floor = row["compile"], ratios.get(f"{row['rival']} / {FLOOR}")
        return (
            row["rival"],
            f"{row['median_ms']:.3f}",
            "{:.3f}-{:.3f}".format(*row["quartiles_ms"]),
            f"{to_floor['median']:.2f}" if to_floor else "",
            *(f"{compiling[part + '_seconds']:.2f}" for part in ("trace", "lower", "compile")),
            f"{compiling['temp_bytes'] / 1e6:.2f}",
            f"{row['loss_after_3']:.6f}",
        )

    first = rows[0]
    title = f"{first['problem']}: {first['leaves']} leaves, {first['parameters']:,} parameters"
    headings = ("rival", "ms", "quartiles", "/ gradient", "trace s", "lower s", "compile s", "temp MB", "loss")
    show(title, headings, map(cells, rows))


def main() -> None:
    parser = argument_parser(__doc__, "train_step")
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    parser.add_argument("--rivals", nargs="*", default=None, help="names, besides the gradient and nnlearn, packed")
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 40)
    report = Report(options)
    for name in options.problems:
        print(name, flush=True)
        rows, ratios = measure(name, (QUICK_PROBLEMS if options.quick else PROBLEMS)[name](), rounds, options.rivals)
        report.add(rows, ratios)
        print_rows(rows, ratios[0]["ratios"])
    report.close()


if __name__ == "__main__":
    main()
