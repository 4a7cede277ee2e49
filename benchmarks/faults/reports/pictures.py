"""Digits, shapes and masks: small dense and convolutional networks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import nnlearn
from benchmarks.faults.reports.case import Case, Report, report
from nnlearn.datasets import load

REPORTS: list[Report] = []


def evaluate_classes(logits, data):
    def metrics(params, batch):
        x, y = batch.examples
        return {"accuracy": jnp.mean(logits(params, x).argmax(-1) == y, where=batch.where)}

    return nnlearn.evaluation(metrics, data)


@report(
    REPORTS,
    "https://github.com/keras-team/keras/issues/13815 (and tensorflow#32950, udacity/private-ai#17): mnist_cnn with "
    "Adadelta, whose default rate became 0.001 instead of 1, does not get far in twelve epochs",
    "learning_rate_too_low",
)
def mnist_cnn_adadelta(mended):
    digits = load_digits()
    order = np.random.RandomState(0).permutation(1797)
    images, labels = digits.images.astype("float32")[order, :, :, None] / 16, digits.target[order]
    x_train, y_train, x_test, y_test = images[:1437], labels[:1437], images[1437:], labels[1437:]

    class MnistCnn(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(12, (3, 3), padding="VALID")(x))
            x = nn.relu(nn.Conv(16, (3, 3), padding="VALID")(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.relu(nn.Dense(48)(x.reshape(len(x), -1)))
            return nn.Dense(10)(x)

    model = MnistCnn()

    def loss(params, batch, key):
        x, y = batch.examples
        return nnlearn.cross_entropy(model.apply(params, x), y, where=batch.where)

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.adadelta(hp["learning_rate"], rho=0.95, eps=1e-7),
        nnlearn.shuffled((x_train, y_train), 64),
        lambda key: model.init(key, x_train[:1]),
        epochs=12,
        evaluate=evaluate_classes(model.apply, (x_test, y_test)),
    )
    return Case(train, {"learning_rate": 1.0 if mended else 0.001}, model.apply, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://e-com-net.com/article/1281957349447188480.htm: MNIST in TensorFlow, truncated_normal with its default "
    "stddev of 1 and relu gives 10-20 %, stddev=0.1 the expected accuracy",
    "bad_initialisation",
    "exploding_gradients",
    "dead_units",
)
def truncated_normal_of_stddev_1(mended):
    mnist = load("mnist", seed=4)
    train_data = {"image": mnist.train.inputs.reshape(-1, 784), "digit": np.eye(10)[mnist.train.targets]}
    x_test, y_test = mnist.validation.inputs.reshape(-1, 784), mnist.validation.targets

    def weight_variable(key, shape):
        return jax.random.truncated_normal(key, -2.0, 2.0, shape) * (0.1 if mended else 1.0)

    def init(key):
        k = jax.random.split(key, 4)
        shapes = [(784, 100), (100, 60), (60, 60), (60, 10)]
        return {f"layer{i}": {"W": weight_variable(k[i], s), "b": jnp.full(s[1], 0.1)} for i, s in enumerate(shapes)}

    def inference(params, x):
        for i in range(3):
            x = jax.nn.relu(x @ params[f"layer{i}"]["W"] + params[f"layer{i}"]["b"])
        return x @ params["layer3"]["W"] + params["layer3"]["b"]

    def loss(params, batch, key):
        return optax.softmax_cross_entropy(inference(params, batch["image"]), batch["digit"]).mean()

    train = nnlearn.make_train(
        loss,
        lambda hp: optax.sgd(hp["lr"]),
        nnlearn.shuffled(train_data, 50, remainder="drop"),
        init,
        epochs=15,
        evaluate=evaluate_classes(inference, (x_test, y_test)),
    )
    return Case(train, {"lr": 0.05}, inference, (x_test, y_test), "accuracy")


@report(
    REPORTS,
    "https://github.com/MicrosoftDocs/pytorchfundamentals/issues/4: LogSoftmax(dim=0) in the dense network of the "
    "computer vision tutorial normalises over the minibatch instead of over the classes",
    "wrong_axis_or_reduction",
)
def log_softmax_dim_0(mended):
    bundle = load("digits", seed=5)

    def init(key):
        k1, k2 = jax.random.split(key)
        uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return ((uniform(k1, (64, 40)), jnp.zeros(40)), (uniform(k2, (40, 10)), jnp.zeros(10)))

    def net(params, x):
        (w1, b1), (w2, b2) = params
        x = jax.nn.relu(x @ w1 + b1)
        return jax.nn.log_softmax(x @ w2 + b2, axis=1 if mended else 0)

    def nll_loss(params, batch, key):
        log_p = net(params, batch.inputs)
        return -jnp.mean(log_p[jnp.arange(len(log_p)), batch.targets])

    validation = bundle.validation.inputs, bundle.validation.targets

    def test(params):
        accuracy = jnp.mean(net(params, validation[0]).argmax(1) == validation[1])
        return {"loss": nll_loss(params, bundle.validation, None), "accuracy": accuracy}

    train = nnlearn.make_train(
        nll_loss,
        lambda hp: optax.sgd(hp["lr"], momentum=0.9),
        nnlearn.shuffled(bundle.train, 8, remainder="drop"),
        init,
        epochs=8,
        evaluate=test,
    )
    return Case(train, {"lr": 0.01}, net, validation, "loss", mode="min")


@report(
    REPORTS,
    "https://github.com/pytorch/tutorials/pull/1644 (issue 1526; also pytorch/examples#117): a ReLU after the last "
    "linear layer, right before the cross entropy",
    "loss_output_mismatch",
    "dead_units",
)
def relu_before_cross_entropy(mended):
    mnist = load("mnist", seed=6)
    data = (np.float32(mnist.train.inputs), mnist.train.targets)
    test = (np.float32(mnist.validation.inputs), mnist.validation.targets)

    def linear(key, n_in, n_out):
        bound = 1 / np.sqrt(n_in)
        k1, k2 = jax.random.split(key)
        w = jax.random.uniform(k1, (n_in, n_out), minval=-bound, maxval=bound)
        return {"weight": w, "bias": jax.random.uniform(k2, (n_out,), minval=-bound, maxval=bound)}

    def init(key):
        keys = jax.random.split(key)
        return [linear(k, *size) for k, size in zip(keys, [(784, 128), (128, 10)], strict=True)]

    def linear_relu_stack(params, x):
        x = x.reshape(len(x), -1)
        for i, p in enumerate(params):
            x = x @ p["weight"] + p["bias"]
            if i == 0 or not mended:
                x = jax.nn.relu(x)
        return x

    def loss_fn(params, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(linear_relu_stack(params, batch[0]), batch[1]).mean()

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled(data, 64, remainder="drop"),
        init,
        epochs=10,
        evaluate=evaluate_classes(linear_relu_stack, test),
    )
    return Case(train, {"lr": 0.001}, linear_relu_stack, test, "accuracy")


def conv(x, w, b):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + b


@report(
    REPORTS,
    "https://github.com/jakeret/tf_unet/issues/234 (and 243; milesial/Pytorch-UNet#370): the network always predicts "
    "no mask, everything is black, since nearly all pixels are background; the answer weighs the classes",
    "class_imbalance",
)
def everything_is_background(mended):
    rng = np.random.RandomState(9)
    images = rng.normal(0.0, 1.0, (300, 20, 20, 1)).astype(np.float32)
    masks = np.zeros((300, 20, 20), np.float32)
    for image, mask in zip(images, masks, strict=True):  # one faint lesion of about four pixels
        r, c = rng.randint(1, 17, size=2)
        mask[r : r + 2, c : c + 2] = 1
        image[r : r + 2, c : c + 2, 0] += 1.7
    train_set, test_set = (images[:240], masks[:240]), (images[240:], masks[240:])

    def init(key):
        k = jax.random.split(key, 3)
        he = jax.nn.initializers.he_normal()
        shapes = [(3, 3, 1, 8), (3, 3, 8, 8), (1, 1, 8, 1)]
        return [(he(key, shape), jnp.zeros(shape[-1])) for key, shape in zip(k, shapes, strict=True)]

    def segment(params, x):
        for w, b in params[:-1]:
            x = jax.nn.relu(conv(x, w, b))
        return conv(x, *params[-1])[..., 0]

    def loss_fn(params, batch, key):
        x, mask = batch
        pixels = optax.sigmoid_binary_cross_entropy(segment(params, x), mask)
        if mended:
            pixels = jnp.where(mask == 1, 50.0, 1.0) * pixels / 2
        return jnp.mean(pixels)

    def metrics(params, batch):
        x, mask = batch.examples
        said = segment(params, x) > 0
        weight = batch.where[:, None, None]
        recall = jnp.sum(said * mask * weight) / jnp.sum(mask * weight)
        specificity = jnp.sum(~said * (1 - mask) * weight) / jnp.sum((1 - mask) * weight)
        pixel_accuracy = jnp.mean(said == mask, where=weight)
        return {"recall": recall, "balanced": (recall + specificity) / 2, "pixel_accuracy": pixel_accuracy}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: optax.adam(hp["lr"]),
        nnlearn.shuffled(train_set, 16, remainder="drop"),
        init,
        epochs=20,
        evaluate=nnlearn.evaluation(metrics, test_set),
    )
    return Case(train, {"lr": 0.003}, segment, test_set, "balanced")


@report(
    REPORTS,
    "https://github.com/wassname/pipe-segmentation/issues/1 (also keras#3059): images and masks come from two "
    "ImageDataGenerators that do not draw the same flips and shifts",
    "misaligned_labels",
    "augmentation_breaks_labels",
)
def two_generators_two_seeds(mended):
    rng = np.random.RandomState(10)
    rows, columns = np.mgrid[:16, :16]
    masks = np.zeros((240, 16, 16), np.float32)
    for mask in masks:
        r, c = rng.randint(3, 13, size=2)
        mask[...] = (rows - r) ** 2 + (columns - c) ** 2 <= rng.randint(4, 16)
    images = np.clip(0.3 + 0.4 * masks + rng.normal(0, 0.15, masks.shape), 0, 1)[..., None]
    test_set = (images[200:], masks[200:])

    def init(key):
        k = jax.random.split(key, 3)
        glorot = jax.nn.initializers.glorot_normal()
        shapes = {"enc": (5, 5, 1, 6), "dec": (3, 3, 6, 6), "out": (1, 1, 6, 1)}
        names = zip(k, shapes.items(), strict=True)
        return {name: {"w": glorot(key, shape), "b": jnp.zeros(shape[-1])} for key, (name, shape) in names}

    def unet(params, x):
        x = jax.nn.relu(conv(x, **params["enc"]))
        x = jax.nn.relu(conv(x, **params["dec"]))
        return conv(x, **params["out"])[..., 0]

    def datagen(key, pictures):  # flips and shifts each picture at random
        def augment(key, picture):
            k1, k2, k3 = jax.random.split(key, 3)
            picture = jnp.where(jax.random.bernoulli(k1), picture[:, ::-1], picture)
            picture = jnp.where(jax.random.bernoulli(k2), picture[::-1], picture)
            return jnp.roll(picture, jax.random.randint(k3, (2,), -3, 4), axis=(0, 1))

        return jax.vmap(augment)(jax.random.split(key, len(pictures)), pictures)

    def loss_fn(params, batch, key):
        image_seed, mask_seed = (key, key) if mended else jax.random.split(key)
        x, y = datagen(image_seed, batch[0]), datagen(mask_seed, batch[1])
        return jnp.mean(optax.sigmoid_binary_cross_entropy(unet(params, x), y))

    def metrics(params, batch):
        x, y = batch.examples
        said = unet(params, x) > 0
        weight = batch.where[:, None, None]
        return {"dice": 2 * jnp.sum(said * y * weight) / (jnp.sum(said * weight) + jnp.sum(y * weight))}

    train = nnlearn.make_train(
        loss_fn,
        lambda hp: nnlearn.adam(hp["lr"]),
        nnlearn.shuffled((images[:200], masks[:200]), 10, remainder="drop"),
        init,
        epochs=20,
        evaluate=nnlearn.evaluation(metrics, test_set),
    )
    return Case(train, {"lr": 0.01}, unet, test_set, "dice")
