"""Common mistakes, and errors that name the cure."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnlearn
from nnlearn.models import batch_norm

PARAMS = {"w": jnp.ones(2), "b": jnp.zeros(1)}
BATCH = np.ones((3, 2), np.float32)
ADAM, SGD = nnlearn.adam(1e-3), nnlearn.sgd(0.1)
ROWS = (np.ones((8, 2), np.float32), np.ones(8, np.float32))


def loss_fn(params, batch, key):
    return jnp.mean((batch @ params["w"]) ** 2)


def loss_of_pairs(params, batch, key):
    x, y = batch
    return jnp.mean((x @ params["w"] - y) ** 2)


def loss_with_state(params, batch, key, model_state):
    return jnp.mean(batch), {}, model_state


def train_of(make_tx=ADAM, loss=loss_fn, rows=ROWS[0], **settings):
    return nnlearn.make_train(loss, make_tx, nnlearn.shuffled(rows, 4, **settings), PARAMS, epochs=1)


def step_of(tx, state=None, loss=loss_fn):
    return nnlearn.make_step(loss, tx)(nnlearn.init_state(PARAMS, ADAM) if state is None else state, BATCH)


def fit_with(batches):
    return nnlearn.fit(nnlearn.make_step(loss_fn, ADAM), nnlearn.init_state(PARAMS, ADAM), batches, progress=False)


def by_rule(params):
    return {"w": "a", "b": "b"}


MISTAKES = {
    "gradient of another structure": (
        lambda: ADAM.update({"v": jnp.ones(2)}, ADAM.init(PARAMS), PARAMS),
        (ValueError, "updates must have one structure: params has a leaf at 'b', updates has none"),
    ),
    "no gradient at all": (
        lambda: ADAM.update(None, ADAM.init(PARAMS), PARAMS),
        (ValueError, "must have one structure"),
    ),
    "state of another structure": (
        lambda: nnlearn.scale_by_lion().update(PARAMS, nnlearn.scale_by_lion().init(None)),
        (ValueError, "must have one structure"),
    ),
    "bare parameters": (
        lambda: step_of(ADAM, PARAMS),
        (TypeError, r"takes a TrainState .* got dict as state: make one with nnlearn.init_state\(params, tx\)"),
    ),
    "the pair of a stateful model": (
        lambda: step_of(ADAM, nnlearn.init_state(batch_norm(2).init(jax.random.key(0)), ADAM), loss_with_state),
        (
            ValueError,
            r"model_state=.*The init of a model with running statistics returns both, \(params, model_state\)",
        ),
    ),
    "generator without an epoch": (
        lambda: fit_with(lambda: iter([BATCH])),
        (TypeError, r"batches, if it is a function, must take \(epoch\), but its arguments are \(\): write `def"),
    ),
    "state of another optimizer": (
        lambda: step_of(nnlearn.sgd(0.1, momentum=0.9)),
        (
            ValueError,
            "not one of this optimizer: at '0' it is a ScaleByAdamState, where the optimizer has a TraceState",
        ),
    ),
    "state of another optimizer of optax": (
        lambda: step_of(optax.sgd(0.1, momentum=0.9)),
        (ValueError, r"not one of this optimizer: .* Make it with init_state\(params, tx\)"),
    ),
    "state of another transformation": (
        lambda: nnlearn.scale_by_adam().update(PARAMS, optax.EmptyState(), PARAMS),
        (ValueError, "state must be the ScaleByAdamState .* got EmptyState"),
    ),
    "a factory and a dict": (
        lambda: train_of(nnlearn.adam)({"learning_rate": 0.1}, 0),
        (TypeError, r"with \['learning_rate'\]: write make_tx=lambda hparams: nnlearn.adam\(hparams\[...\]\)"),
    ),
    "make_tx without a result": (
        lambda: train_of(lambda hparams: None)({}, 0),
        (TypeError, "make_tx must be an optimizer, or a function of hparams that returns one; it returned NoneType"),
    ),
    "a list in a space": (
        lambda: nnlearn.sweep(train_of(), {"rate": [0.1, 0.2]}, metric="train_loss"),
        (TypeError, r"space\['rate'\] is a list: to try each value, give choice\(0.1, 0.2\)"),
    ),
    "an array in a space": (
        lambda: nnlearn.sweep(train_of(), {"rate": jnp.ones(2)}, metric="train_loss"),
        (ValueError, r"To try each number of an array, give choice\(\*array.tolist\(\)\)"),
    ),
    "a masked batch unpacked": (
        lambda: train_of(loss=loss_of_pairs, rows=ROWS)({}, 0),
        (TypeError, "MaskedBatch.examples, where.: if the loss expects bare examples, write `examples, where = batch`"),
    ),
    "partition and packing": (
        lambda: nnlearn.init_state(PARAMS, nnlearn.partition({"a": ADAM, "b": SGD}, by_rule), packed=True),
        (ValueError, r"partition\(txs, nnlearn.per_buffer\(rule\)\) and labels=rule"),
    ),
    "a chain that refuses value": (
        lambda: step_of(
            optax.chain(optax.GradientTransformationExtraArgs(lambda p: (), lambda u, s, p=None: (u, s))),
            state_of_chain(),
        ),
        (TypeError, r"a step passes value, grad and value_fn to the optimizer; add \*\*extra_args"),
    ),
    "a name of optax": (lambda: nnlearn.lbfgs, (AttributeError, "use optax.lbfgs, which works inside nnlearn")),
    "a name of optax.tree": (lambda: nnlearn.zeros_like, (AttributeError, "use optax.tree.zeros_like")),
    "a name of a part": (lambda: nnlearn.convnet, (AttributeError, "use nnlearn.models.convnet")),
    "make_tx that asks for another hyper-parameter": (
        lambda: train_of(lambda hparams: nnlearn.sgd(hparams["rate"]))({"lr": 1}, 0),
        (ValueError, r"make_tx asked for 'rate', but hparams has \['lr'\]"),
    ),
    "rules that ask for another hyper-parameter": (
        lambda: nnlearn.make_train(
            loss_fn,
            ADAM,
            nnlearn.generated(lambda key, step: BATCH),
            PARAMS,
            steps=1,
            stop=lambda hparams: nnlearn.patience("train_loss", hparams["wait"]),
        )({"lr": 1}, 0),
        (ValueError, r"stop asked for 'wait', but hparams has \['lr'\]"),
    ),
    "loss that asks for another hyper-parameter": (
        lambda: train_of(loss=lambda params, batch, key, hparams: hparams["decay"])({"lr": 1}, 0),
        (KeyError, r"'decay'.*\n*hparams has \['lr'\]"),
    ),
    "metrics of bare batches": (
        lambda: nnlearn.evaluation(lambda params, batch: {"mean": batch["x"]}, {"x": BATCH})(PARAMS),
        (TypeError, "The batch is a MaskedBatch.*write `examples, where = batch`"),
    ),
    "nearly a name": (lambda: nnlearn.AdamW, (AttributeError, "did you mean nnlearn.adamw?")),
}


def test_the_init_of_a_stateful_model_makes_both_parts_of_a_state():
    model = batch_norm(2)
    params, model_state = model.init(jax.random.key(0))
    for settings in ({}, {"mesh": nnlearn.make_mesh("data=1")}):
        state = nnlearn.init_state(model.init, ADAM, **settings)
        jax.tree.map(np.testing.assert_array_equal, (state.params, state.model_state), (params, model_state))
    assert nnlearn.init_state(model.init, ADAM, model_state=jnp.ones(3)).model_state.shape == (3,)


def state_of_chain():
    return nnlearn.init_state(PARAMS, optax.chain(optax.identity()))._replace(opt_state=((),))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_error_names_the_cure(mistake):
    function, (kind, words) = MISTAKES[mistake]
    with pytest.raises(kind) as raised:
        function()
    said = "\n".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
    assert re.search(words, said, re.DOTALL), said


def test_an_error_of_the_loss_with_a_bare_batch_keeps_its_message():
    def loss_fn(params, batch, key):
        raise ValueError("too few examples")

    tx = nnlearn.sgd(0.1)
    with pytest.raises(ValueError) as raised:
        nnlearn.make_step(loss_fn, tx)(nnlearn.init_state(jnp.zeros(2), tx), jnp.zeros(2))
    assert str(raised.value) == "too few examples"


def test_unknown_names_are_not_attributes():
    assert not hasattr(nnlearn, "nothing_of_this_name") and not hasattr(nnlearn, "__wrapped__")


@pytest.mark.parametrize("refused", [{}, {"value": None}], ids=["all", "all but value"])
def test_a_step_passes_only_arguments_that_the_optimizer_accepts(refused):
    def plain(updates, state, params=None):
        return jax.tree.map(lambda leaf: -0.1 * leaf, updates), state

    def with_value(updates, state, params=None, *, value):
        return jax.tree.map(lambda leaf: -0.1 * value * leaf, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), with_value if refused else plain)
    state, info = step_of(tx, nnlearn.init_state(PARAMS, tx))
    factor = float(info.loss) if refused else 1.0
    np.testing.assert_allclose(state.params["w"], 1 - 0.1 * factor * 4 * np.ones(2), rtol=1e-6)  # of 4 (2 (w1 + w2))


def test_hyperparams_of_equal_names_are_distinguished():
    rate = nnlearn.inject_hyperparams(nnlearn.sgd)
    tx = nnlearn.partition({"a": rate(0.1), "b": nnlearn.chain(nnlearn.clip(1.0), rate(0.001))}, by_rule)
    state = tx.init(PARAMS)
    found = {name: float(value) for name, value in nnlearn.get_hyperparams(state).items()}
    assert found == pytest.approx({"a/learning_rate": 0.1, "b/1/learning_rate": 0.001})
    one = nnlearn.set_hyperparams(state, **{"b/1/learning_rate": 0.5})
    both = nnlearn.set_hyperparams(one, learning_rate=0.25)
    assert [float(value) for value in nnlearn.get_hyperparams(one).values()] == pytest.approx([0.1, 0.5])
    assert [float(value) for value in nnlearn.get_hyperparams(both).values()] == [0.25, 0.25]
    with pytest.raises(ValueError, match=r"no hyper-parameter 'rate'; its hyper-parameters are \['a/learning_rate'"):
        nnlearn.set_hyperparams(state, rate=1.0)
