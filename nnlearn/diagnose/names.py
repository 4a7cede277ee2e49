"""The names of findings: for each why it matters, and what to change."""

from typing import NamedTuple


class Fault(NamedTuple):
    """A cause of a run that does not learn.

    Attributes:
      meaning: why it matters, one or two sentences.
      remedies: changes of the code, the most likely one first.
    """

    meaning: str
    remedies: tuple[str, ...]


FAULTS: dict[str, Fault] = {
    "learning_rate_too_high": Fault(
        "Each step overshoots the minimum along steep directions, so the loss diverges, jumps or stays high.",
        ("divide the learning rate by 3 to 10", "add a warm-up: nnlearn.warmup_constant_schedule(0.0, rate, steps)"),
    ),
    "learning_rate_too_low": Fault(
        "The steps are so small that this run ends long before it has learned what it could.",
        ("multiply the learning rate by 3 to 10", "train for more steps"),
    ),
    "schedule_mistimed": Fault(
        "The schedule makes the learning rate nearly zero for most of the run, so most steps change nothing.",
        ("give the lengths of the schedule in steps, not in epochs: steps = epochs * batches per epoch",),
    ),
    "vanishing_gradients": Fault(
        "The gradient shrinks on its way back, so the early layers or time steps hardly change.",
        (
            "use relu or gelu instead of sigmoid or tanh, with He initialisation",
            "add residual connections or normalisation between the layers; in time, use an LSTM or a GRU",
        ),
    ),
    "exploding_gradients": Fault(
        "The gradient grows on its way back through layers or time, so single steps destroy what was learned.",
        (
            "clip the gradient: nnlearn.chain(nnlearn.clip_by_global_norm(1.0), tx)",
            "start from smaller weights: standard deviation sqrt(2 / inputs); in time, an orthogonal recurrent matrix",
        ),
    ),
    "dead_units": Fault(
        "These units are 0 for every input, so their weights receive no gradient and never recover.",
        (
            "lower the learning rate, and start biases at 0",
            "use nnlearn's gelu or a leaky relu, which have a gradient below 0",
        ),
    ),
    "saturated_activations": Fault(
        "The units sit in the flat parts of their function, where the gradient is almost 0.",
        ("start from smaller weights: standard deviation 1 / sqrt(inputs)", "normalise the inputs of the layer"),
    ),
    "bad_initialisation": Fault(
        "The scale of the initial weights makes signals grow or fade from layer to layer, so training starts badly.",
        ("draw the weights with standard deviation sqrt(2 / inputs) for relu, 1 / sqrt(inputs) for tanh",),
    ),
    "symmetric_initialisation": Fault(
        "Units that start equal receive equal gradients and stay equal, so the layer acts like a single unit; factors "
        "that are all zero hold each other at zero.",
        ("draw the weights at random: jax.random.normal(key, shape) * sqrt(2 / inputs); only biases may be zero",),
    ),
    "unnormalised_inputs": Fault(
        "Inputs far from unit scale make the loss steep in some directions and flat in others: no learning rate suits "
        "all weights.",
        ("standardise: (train, validation), statistics = nnlearn.data.standardize(train, validation)",),
    ),
    "unnormalised_targets": Fault(
        "Targets far from unit scale make the loss and its gradients huge or tiny, and the offset must be learned by "
        "the last bias alone.",
        ("train on (targets - mean) / std, and undo it for predictions: statistics.invert(outputs)",),
    ),
    "loss_output_mismatch": Fault(
        "The loss expects another kind of output than the network gives, so its minimum is wrong or out of reach.",
        (
            "give the loss raw logits: no softmax or sigmoid before a cross-entropy that applies its own",
            "use one output per class with a softmax, one output with a sigmoid, and a linear output for regression",
        ),
    ),
    "wrong_axis_or_reduction": Fault(
        "A softmax, mean or sum runs over the wrong axis, or shapes broadcast silently, so the loss measures something "
        "else.",
        (
            "give the axis of the classes or features: axis=-1, and squeeze outputs of shape (n, 1) to (n,)",
            "take the mean of the loss over the examples, not the sum",
        ),
    ),
    "sign_error": Fault(
        "The steps go uphill: the loss, the update or the weight decay has the wrong sign.",
        ("minimise: loss = -mean(log likelihood), params = params - rate * gradient",),
    ),
    "label_encoding": Fault(
        "The class numbers do not fit the outputs, so some examples have no correct answer or another one's.",
        ("number the classes 0 to k - 1, the same in all parts: classes, y = numpy.unique(y, return_inverse=True)",),
    ),
    "misaligned_labels": Fault(
        "The targets do not belong to their inputs, so there is nothing to learn but single examples by heart.",
        ("shuffle inputs and targets with one permutation: inputs[order], targets[order]; check joins and offsets",),
    ),
    "label_noise": Fault(
        "A large share of the labels contradicts the inputs, so the network learns wrong answers by heart.",
        (
            "inspect the examples with the largest losses and correct their labels",
            "smooth the labels or stop early: nnlearn.patience('loss', 5)",
        ),
    ),
    "class_imbalance": Fault(
        "Predicting the frequent class alone already gives a small loss, so the rare classes are not learned.",
        ("weight the losses by 1 / class frequency, or draw batches with equal classes",),
    ),
    "unshuffled_data": Fault(
        "Neighbouring batches hold the same classes, so each step undoes what the last ones learned.",
        ("shuffle: nnlearn.shuffled(examples, batch_size, shuffle=True)",),
    ),
    "augmentation_breaks_labels": Fault(
        "The augmentation changes what the right label is, so a share of the training examples is wrong.",
        ("leave out the augmentation, or only use changes under which the label stays the same",),
    ),
    "preprocessing_mismatch": Fault(
        "Training and validation inputs are prepared differently, so the network is evaluated on inputs it never saw.",
        ("apply the statistics of the training part to all parts: statistics.apply(validation)",),
    ),
    "leaky_validation": Fault(
        "Validation shares examples with training, so its result says nothing about new examples.",
        ("split before augmenting or oversampling, and drop duplicates: numpy.unique(inputs, axis=0)",),
    ),
    "target_leak": Fault(
        "The inputs contain the answer, so the result is too good and will not hold where the answer is unknown.",
        ("drop the features that are computed from the target; in a sequence, mask the future",),
    ),
    "mask_ignored": Fault(
        "Padding counts in the loss or in the features, so the network is trained on values that mean nothing.",
        ("pass the mask: jnp.mean(losses, where=mask), and mask padded positions in pooling and attention",),
    ),
    "frozen_parameters": Fault(
        "The optimizer never changes these parameters, so the network trains without them.",
        ("give all parameters to the optimizer, and check its mask and labels",),
    ),
    "blocked_gradient": Fault(
        "An operation without a derivative (stop_gradient, argmax, round, a comparison) cuts the gradient, so what "
        "lies before it is not trained.",
        ("remove it from the path of the loss, or replace it by a smooth version such as softmax",),
    ),
    "evaluation_in_training_mode": Fault(
        "Dropout, noise or batch statistics are still active when the network is evaluated, so its outputs are worse "
        "than they could be and differ from call to call.",
        ("evaluate without a key: model.apply(params, inputs), or deterministic=True",),
    ),
    "excessive_regularisation": Fault(
        "Weight decay, dropout or a prior term is stronger than the data, so the network cannot fit.",
        ("divide the weight decay or the factor of the penalty by 10, or lower the dropout rate",),
    ),
    "clipping_too_tight": Fault(
        "The clipping threshold is far below the usual gradient norm, so it sets the length of every step.",
        ("raise the threshold to about the 90th percentile of info.grad_norm",),
    ),
    "optimizer_state_reset": Fault(
        "Momentum and moments are thrown away again and again, so the optimizer never adapts.",
        ("call tx.init once, before the loop, and pass the state on from step to step",),
    ),
    "gradient_accumulation": Fault(
        "Accumulated gradients are not divided by their number or never cleared, so the steps are far too long.",
        ("average over the mini-steps: nnlearn.MultiSteps(tx, k), or make_train(microbatches=k)",),
    ),
    "batch_too_small": Fault(
        "The gradient of so few examples is mostly noise at this learning rate, or batch statistics are too rough.",
        ("use larger batches, or a smaller learning rate with them; LayerNorm instead of BatchNorm",),
    ),
    "numerical_precision": Fault(
        "Rounding, overflow or an unguarded log, square root or division destroys the values or the gradient.",
        (
            "compute from logits: nnlearn.cross_entropy; guard with jnp.maximum(x, eps) before log, sqrt and division",
            "keep parameters and sums in float32, and scale the loss in float16: nnlearn.dynamic_loss_scale",
        ),
    ),
    "underfitting": Fault(
        "The model or the training is too small for the data: even the training examples are not fitted.",
        ("add a hidden layer or units, biases, or positions", "train for more epochs"),
    ),
    "overfitting": Fault(
        "The network learns the training examples by heart: it is good on them and bad on others, and gets worse.",
        ("stop early: stop=nnlearn.patience('loss', 5)", "add data, weight decay or dropout, or use fewer units"),
    ),
}

__all__ = ["FAULTS", "Fault"]
