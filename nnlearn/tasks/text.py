"""Character language models of the works of Shakespeare and of the King James Bible."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from optax import chain

from nnlearn.checks import check_count
from nnlearn.data import MaskedBatch
from nnlearn.datasets import texts
from nnlearn.datasets.texts import Characters, windows
from nnlearn.losses.arguments import weighted_mean
from nnlearn.losses.classification import softmax_cross_entropy_with_integer_labels
from nnlearn.losses.metrics import accuracy
from nnlearn.models.generation import generate
from nnlearn.models.transformer import LanguageModel, transformer
from nnlearn.optimizers.adam import adamw
from nnlearn.schedules.warmup import warmup_cosine_decay_schedule
from nnlearn.settings import comparable
from nnlearn.tasks.ngram import gzip_bits, ngram_bits, uniform_bits
from nnlearn.tasks.task import Task
from nnlearn.transforms.clipping import clip_by_global_norm
from nnlearn.types import GradientTransformation, Params, PyTree, Scalar

HELD_OUT = 0.05  # fraction of the text in the validation part, and in the test part after it
ORDERS = (5, 7)  # orders of the n-gram models; on these texts 7 is about the best


def shakespeare(
    *,
    seed: int = 0,
    text: str | None = None,
    layers: int = 5,
    width: int = 128,
    heads: int = 4,
    context: int = 128,
    batch_size: int = 16,
    epochs: int = 2,
) -> Task:
    """Predict the next character of Shakespeare's works from the 128 characters before it.

    The training part is the first 90 % of the text, the validation part the next 5 % (most of *Troilus and Cressida*,
    *Twelfth Night*), and the test part the last 5 % (*The Two Gentlemen of Verona*, *The Winter's Tale*). The model is
    a transformer with a million parameters. ``bits_per_character`` counts each character of a held-out part once, with
    at least half a context before it.

    Args:
      seed: offset of the training windows.
      text: another text; None for the works of Shakespeare, which are fetched.
      layers, width, heads: arguments of ``transformer``.
      context: number of characters in a window.
      batch_size: number of windows in a batch.
      epochs: passes over the text.

    Returns:
      A ``Task`` whose ``target`` is the best of its ``baselines`` on the same characters: gzip, n-gram models and a
      uniform distribution.

    Raises:
      OSError: if the text cannot be fetched.
      ValueError: if the text is too short for the context.

    >>> task = shakespeare(text="to be or not to be, " * 60, layers=1, width=8, heads=2, context=8)
    >>> sorted(task.baselines), task.metric
    (['5-gram', '7-gram', 'gzip', 'uniform'], 'bits_per_character')
    """
    text = texts.shakespeare() if text is None else text
    source, licence = texts.SHAKESPEARE_SOURCE, texts.SHAKESPEARE_LICENCE
    return _characters("shakespeare", text, source, licence, seed, layers, width, heads, context, batch_size, epochs)


def king_james(
    *,
    seed: int = 0,
    text: str | None = None,
    layers: int = 5,
    width: int = 128,
    heads: int = 4,
    context: int = 128,
    batch_size: int = 16,
    epochs: int = 2,
) -> Task:
    """Predict the next character of the King James Bible from the 128 characters before it.

    The task is the same as ``shakespeare`` otherwise. The test part begins in the letter to the Colossians.

    Args:
      text: another text; None for the Bible, which is fetched.
      seed, layers, width, heads, context, batch_size, epochs: see ``shakespeare``.

    Returns:
      A ``Task``.

    Raises:
      OSError: if the text cannot be fetched.
      ValueError: if the text is too short for the context.

    >>> king_james(text="in the beginning was the word, " * 60, layers=1, width=8, heads=2, context=8).name
    'king-james'
    """
    text = texts.king_james() if text is None else text
    source, licence = texts.KING_JAMES_SOURCE, texts.KING_JAMES_LICENCE
    return _characters("king-james", text, source, licence, seed, layers, width, heads, context, batch_size, epochs)


def squared_relu(x: jax.Array) -> jax.Array:
    """``max(x, 0) ** 2``, which learns as well as GELU here and makes a step on a CPU a fifth faster.

    Source: So et al. 2021, "Primer", arXiv:2109.08668.

    >>> print(squared_relu(jnp.array([-1.0, 2.0])))
    [0. 4.]
    """
    return jnp.square(jax.nn.relu(x))


def _bytes(text: str, characters: Characters) -> bytes:
    """One byte per character: its ASCII code, or its index if the text is not ASCII."""
    return text.encode() if text.isascii() else characters.encode(text).astype(np.uint8).tobytes()


def _characters(
    name: str,
    text: str,
    source: str,
    licence: str,
    seed: int,
    layers: int,
    width: int,
    heads: int,
    context: int,
    batch_size: int,
    epochs: int,
) -> Task:
    characters, half = Characters.of(text), check_count("context", context) // 2
    indices, vocabulary = characters.encode(text), len(characters.alphabet)
    if vocabulary > 256:
        raise ValueError(f"text must have at most 256 different characters, for the baselines; got {vocabulary}")
    first, second = (round(len(text) * (1 - share)) for share in (2 * HELD_OUT, HELD_OUT))
    learned = indices[seed % context : first]
    # The first half of a held-out window is context only: the previous window, or the text before the part, scores it.
    held_out = [indices[start - half - 1 : end] for start, end in ((first, second), (second, len(text)))]
    train = windows(learned, context)
    validation, test = (windows(part, 2 * half, half) for part in held_out)
    scored = half * len(test)
    model = transformer(
        vocabulary, layers=layers, width=width, heads=heads, max_length=context, activation=squared_relu
    )
    baselines = {
        "uniform": uniform_bits(vocabulary),
        "gzip": gzip_bits(_bytes(text[:second], characters), _bytes(text[second : second + scored], characters)),
    } | {
        f"{order}-gram": ngram_bits(indices[:first], held_out[1][: half + 1 + scored], vocabulary, order, half + 1)
        for order in ORDERS
    }
    return Task(
        name=name,
        train=train,
        validation=validation,
        test=test,
        model=model,
        loss_fn=_loss_fn(model),
        metrics_fn=_metrics_fn(model, half),
        metric="bits_per_character",
        mode="min",
        target=min(baselines.values()),
        baselines=baselines,
        make_tx=functools.partial(_make_tx, steps=epochs * -(-len(train) // batch_size)),
        hparams={"learning_rate": 3e-3, "weight_decay": 0.1},
        batch_size=batch_size,
        epochs=epochs,
        source=source,
        licence=licence,
        show=functools.partial(_show, model, characters, text[second : second + half]),
    )


def _character_losses(model: LanguageModel, params: Params, batch: MaskedBatch, key=None):
    """The logits and labels of a batch of windows, and the loss of each character in nats."""
    windows_bt = batch.examples.astype(jnp.int32)
    logits_btv, labels_bt = model.apply(params, windows_bt[:, :-1], key), windows_bt[:, 1:]
    return logits_btv, labels_bt, softmax_cross_entropy_with_integer_labels(logits_btv, labels_bt)


@comparable
def _loss_fn(model: LanguageModel) -> Callable:
    def loss_fn(params, batch, key):
        *_, losses_bt = _character_losses(model, params, batch, key)
        return weighted_mean(jnp.mean(losses_bt, axis=1), None, batch.where)

    return loss_fn


@comparable
def _metrics_fn(model: LanguageModel, half: int) -> Callable:
    """Metrics of the second half of each window."""

    def metrics_fn(params: Params, batch: MaskedBatch) -> dict[str, Scalar]:
        logits_btv, labels_bt, losses_bt = _character_losses(model, params, batch)
        where_b = jnp.asarray(batch.where)
        nats = weighted_mean(jnp.mean(losses_bt[:, -half:], axis=1), None, where_b)
        where_bt = jnp.broadcast_to(where_b[:, None], (len(labels_bt), half))
        right = accuracy(logits_btv[:, -half:], labels_bt[:, -half:], where_bt)
        return {"loss": nats, "bits_per_character": nats / np.log(2), "accuracy": right}

    return metrics_fn


def _make_tx(hparams: Mapping[str, Any], steps: int) -> GradientTransformation:
    """AdamW with a linear warmup over a twentieth of the run and a cosine decay to a hundredth of the peak rate."""
    rate = hparams["learning_rate"]
    schedule = warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 20), steps, 0.01 * rate)
    decays = functools.partial(jax.tree.map, lambda leaf: jnp.ndim(leaf) >= 2)
    tx = adamw(schedule, b2=0.99, weight_decay=hparams["weight_decay"], mask=decays)
    return chain(clip_by_global_norm(1.0), tx)


def _show(model: LanguageModel, characters: Characters, prompt: str, params: Params, model_state: PyTree = None) -> str:
    """The beginning of the test part, and about 300 generated characters.

    The context has the length of two prompts, so each stretch continues from the last half of the text so far.
    """
    del model_state
    written, length = characters.encode(prompt), len(prompt)
    for stretch in range(max(1, -(-300 // length))):
        key = jax.random.fold_in(jax.random.key(0), stretch)
        added = generate(model, params, jnp.asarray(written[None, -length:]), length, key, temperature=0.8)
        written = np.concatenate([written, np.asarray(added[0])])
    return f"{prompt}|{characters.decode(written[length:])}"
