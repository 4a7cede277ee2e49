"""How good the rates of find_learning_rate are, and what they cost.

    python benchmarks/find_learning_rate.py                 # six tasks
    python benchmarks/find_learning_rate.py --quick         # one, writes nothing
    python benchmarks/find_learning_rate.py --tasks digits-adam

For each task a grid of 40 rates over six decades is trained to the end, from three seeds that the search does not see,
and then the rate of the search, from the same seeds. ``excess`` is the loss at that rate over the best of the grid. The
loss is that of held-out data at the end of the run. The search minimizes the same loss. Cost counts steps, against one
seed of the grid. Rivals: the last rate before the loss of a ramp is lowest, divided by 4, and the steepest point of the
ramp (Smith 2017), with as many steps as the search.
"""

import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from harness import Report, argument_parser, show

import nnlearn
from nnlearn.datasets import load
from nnlearn.models import mlp

LOW, HIGH, GRID, SEEDS = 1e-5, 10.0, 40, (101, 102, 103)
STEPS = 880
OURS, LOWEST, STEEPEST = "find_learning_rate", "ramp, minimum / 4", "ramp, steepest"


class Setting(NamedTuple):
    """A task and an optimizer: ``make_tx(rate, steps)``."""

    loss: Callable[..., jax.Array]
    make_tx: Callable[[Any, int], Any]
    batches: Any
    init: Callable[..., Any]
    held_out: Any

    def train(self, steps: int = STEPS, make_tx: Any = None):
        def loss_fn(params, batch, key):
            return self.loss(params, batch)

        make_tx = make_tx or (lambda rate: self.make_tx(rate, STEPS))
        evaluate = lambda params: {"held_out": self.loss(params, self.held_out)}  # noqa: E731
        return nnlearn.make_train(loss_fn, make_tx, self.batches, self.init, steps=steps, evaluate=evaluate)


def cosine(tx: Callable) -> Callable:
    return lambda rate, steps: tx(nnlearn.cosine_decay_schedule(rate, steps))


def digits(make_tx: Callable, sizes=(64, 32, 10), activation="relu", autoencode=False) -> Setting:
    parts, model = load("digits"), mlp(sizes, activation=activation)

    def loss(params, batch):
        out = model.apply(params, batch.inputs)
        return jnp.mean((out - batch.inputs) ** 2) if autoencode else nnlearn.cross_entropy(out, batch.targets)

    return Setting(loss, make_tx, nnlearn.shuffled(parts.train, 32, remainder="drop"), model.init, parts.validation)


def waves(make_tx: Callable) -> Setting:
    """Regression of a sum of sines in two variables, with noise."""
    model = mlp((2, 64, 64, 1), activation="gelu")

    def draw(key, count=64):
        place, noise = jax.random.split(key)
        x = jax.random.uniform(place, (count, 2), minval=-1.0, maxval=1.0)
        y = jnp.sin(4 * x[:, :1]) * jnp.cos(3 * x[:, 1:]) + 0.3 * jax.random.normal(noise, (count, 1))
        return x, y

    def loss(params, batch):
        return jnp.mean((model.apply(params, batch[0]) - batch[1]) ** 2)

    return Setting(
        loss, make_tx, nnlearn.generated(lambda key, step: draw(key)), model.init, draw(jax.random.key(7), 2000)
    )


def chain_of_words(make_tx: Callable) -> Setting:
    """The next symbol of a second-order Markov chain, from the embeddings of the last two."""
    table = 2.0 * jax.random.normal(jax.random.key(3), (12, 12, 12))
    model = mlp((32, 48, 12))

    def draw(key, count=64):
        first, last = jax.random.split(key)
        pair = jax.random.randint(first, (count, 2), 0, 12)
        return pair, jax.random.categorical(last, table[pair[:, 0], pair[:, 1]])

    def init(key):
        keys = jax.random.split(key)
        return {"table": jax.random.normal(keys[0], (12, 16)), "mlp": model.init(keys[1])}

    def loss(params, batch):
        hidden = params["table"][batch[0]].reshape(-1, 32)
        return nnlearn.cross_entropy(model.apply(params["mlp"], hidden), batch[1])

    return Setting(loss, make_tx, nnlearn.generated(lambda key, step: draw(key)), init, draw(jax.random.key(8), 4000))


SETTINGS = {
    "digits-adam": lambda: digits(cosine(nnlearn.adam)),
    "digits-momentum": lambda: digits(cosine(lambda rate: nnlearn.sgd(rate, 0.9))),
    "digits-deep-constant": lambda: digits(lambda rate, steps: nnlearn.adamw(rate), (64, 32, 32, 32, 10), "tanh"),
    "autoencoder-rmsprop": lambda: digits(cosine(nnlearn.rmsprop), (64, 24, 64), autoencode=True),
    "waves-lion": lambda: waves(cosine(nnlearn.lion)),
    "markov-sgd": lambda: chain_of_words(cosine(nnlearn.sgd)),
}


def final_losses(setting: Setting, rates: np.ndarray) -> np.ndarray:
    """The mean over seeds of the final loss at each rate; infinite where a run diverged."""
    train = setting.train()

    def run(rate, seed):
        return train(rate, jax.random.key(seed))[1].metrics["held_out"][-1]

    found = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))(jnp.asarray(rates), jnp.array(SEEDS))
    found = np.asarray(found, np.float64)
    return np.where(np.isfinite(found), found, np.inf).mean(axis=1)


def ramp(setting: Setting, steps: int) -> dict[str, float]:
    """The advice of one run whose rate grows from the lowest to the highest."""
    grow = (HIGH / LOW) ** (1 / (steps - 1))

    def make_tx(_):
        rising = nnlearn.exponential_decay(LOW, 1, grow)
        return nnlearn.chain(setting.make_tx(1.0, 10**9), nnlearn.scale_by_schedule(rising))

    train = setting.train(steps, make_tx)
    loss = np.asarray(jax.jit(train)(1.0, jax.random.key(0))[1].loss, np.float64)
    rates = LOW * grow ** np.arange(steps)
    smooth, weight, mean = [], 0.0, 0.0
    for value in np.where(np.isfinite(loss), loss, 1e9):  # an average with bias correction, as in common tools
        mean, weight = 0.95 * mean + 0.05 * min(value, 1e9), 0.95 * weight + 0.05
        smooth.append(mean / weight)
    smooth = np.array(smooth)
    end = int(np.argmin(smooth))
    skipped = steps // 10  # the average of the first few losses is noise
    part = slice(min(skipped, end - 2), max(end, 2))
    slope = np.gradient(smooth[part], np.log(rates[part]))
    return {LOWEST: float(rates[end] / 4), STEEPEST: float(rates[part][int(np.argmin(slope))])}


def measure(name: str) -> dict[str, Any]:
    setting = SETTINGS[name]()
    grid = np.geomspace(LOW, HIGH, GRID)
    found = nnlearn.find_learning_rate(setting.train(), LOW, HIGH, metric="held_out")
    advice = {OURS: found.rate, **ramp(setting, found.spent)}
    losses = final_losses(setting, np.concatenate([grid, list(advice.values())]))
    best = losses[:GRID].min()
    excess = {rival: float(loss / best - 1) for rival, loss in zip(advice, losses[GRID:], strict=True)}
    return {
        "task": name,
        "steps": STEPS,
        "best_rate": float(grid[np.argmin(losses[:GRID])]),
        "best_loss": float(best),
        "rates": advice,
        "interval": found.interval,
        "diverges_at": found.diverges_at,
        "excess": excess,
        "cost": found.spent / (GRID * STEPS),
        "grid": [float(loss) for loss in losses[:GRID]],
    }


def main() -> None:
    parser = argument_parser(__doc__, "find_learning_rate")
    parser.add_argument("--tasks", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    options = parser.parse_args()
    report = Report(options, low=LOW, high=HIGH, grid=GRID, seeds=SEEDS)
    rows = []
    for name in options.tasks[: 1 if options.quick else None]:
        rows.append(measure(name))
        report.add(rows[-1:])
        print(name, {key: rows[-1][key] for key in ("best_rate", "best_loss", "rates", "excess", "cost")}, flush=True)
    summary = {
        rival: {
            "median": statistics.median(row["excess"][rival] for row in rows),
            "worst": max(row["excess"][rival] for row in rows),
        }
        for rival in (OURS, LOWEST, STEEPEST)
    }
    report.add([], [{"excess": summary, "cost": max(row["cost"] for row in rows)}])
    headings = ("task", "best rate", *(f"{rival}: rate, excess" for rival in summary))
    cells = [
        (row["task"], f"{row['best_rate']:.2g}")
        + tuple(f"{row['rates'][rival]:.2g}  {100 * row['excess'][rival]:.1f} %" for rival in summary)
        for row in rows
    ]
    show(f"excess of the final loss, cost {100 * rows[0]['cost']:.1f} % of the grid", headings, cells)
    print(summary)
    report.close()


if __name__ == "__main__":
    main()
