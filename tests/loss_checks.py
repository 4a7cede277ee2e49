"""Checks of every loss: a plain reference in float64, masks, precision of float32 at least, and traced numbers.

A case is ``(function, reference, arrays, options)``. ``function(*arrays, **options)`` is the loss, ``reference`` the
same in NumPy. The leading axis of every array is that of the examples, and ``where`` masks it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

GARBAGE = [np.nan, np.inf, -np.inf, 3e38]


def total(function, *arrays, **options):
    """The sum of the losses with different weights, and the losses."""
    loss = jnp.asarray(function(*arrays, **options))
    return jnp.sum(loss * (1 + jnp.arange(loss.size, dtype=loss.dtype).reshape(loss.shape))), loss


def floating(arrays):
    return tuple(place for place, array in enumerate(arrays) if np.issubdtype(np.asarray(array).dtype, np.floating))


def slope(function, x, step=1e-6):
    """The gradient of a scalar function of one float64 array, by central differences."""
    x = np.asarray(x, np.float64)
    grad = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        move = np.zeros(x.shape)
        move[index] = step
        grad[index] = (function(x + move) - function(x - move)) / (2 * step)
    return grad


def check_reference(function, reference, arrays, options, differentiate=None):
    """Check that values and gradients with respect to all floating arrays equal those of the reference."""
    places = floating(arrays) if differentiate is None else differentiate
    with jax.enable_x64(True):
        run = jax.jit(jax.grad(functools.partial(total, function, **options), places, has_aux=True))
        grads, value = run(*(jnp.asarray(array) for array in arrays))
        assert value.dtype == np.float64
    exact = np.asarray(reference(*arrays, **options))
    np.testing.assert_allclose(value, exact, rtol=1e-11, atol=1e-13)
    weight = 1 + np.arange(exact.size).reshape(exact.shape)
    for place, grad in zip(places, grads, strict=True):

        def moved(x, place=place):
            return np.sum(weight * reference(*arrays[:place], x, *arrays[place + 1 :], **options))

        np.testing.assert_allclose(grad, slope(moved, arrays[place]), rtol=1e-6, atol=1e-7)
        assert np.abs(grad).max() > 1e-5


def check_masks_and_dtypes(function, reference, arrays, options):
    """Check that masked entries have no effect, an empty mask gives 0, and bfloat16 is computed in float32."""
    places, batch = floating(arrays), len(arrays[0])
    keep = np.arange(batch) % 3 != 1
    run = jax.jit(jax.grad(functools.partial(total, function, **options), places, has_aux=True))

    def cast(arrays, dtype):
        return [jnp.asarray(array, dtype if place in places else None) for place, array in enumerate(arrays)]

    spoiled = [np.array(array) for array in arrays]
    for place, array in enumerate(spoiled):
        gone = np.resize(GARBAGE if place in places else [-1, 99], batch)[~keep]
        array[~keep] = gone.reshape((-1,) + (1,) * (array.ndim - 1))
    grads, value = run(*cast(spoiled, jnp.float32), where=keep)
    alone = reference(*(array[keep] for array in arrays), **options)
    np.testing.assert_allclose(value if value.ndim == 0 else value[keep], alone, rtol=2e-5, atol=2e-6)
    assert value.ndim == 0 or not np.any(value[~keep])
    for grad in grads:
        assert np.isfinite(grad).all() and not np.any(grad[~keep]) and np.any(grad[keep])
    grads, value = run(*cast(spoiled, jnp.float32), where=keep & False)
    assert not np.any(value) and not any(np.any(grad) for grad in grads)

    narrow = cast(arrays, jnp.bfloat16)
    low = jax.jit(functools.partial(function, **options))(*narrow)
    wide = run(*cast(narrow, jnp.float32), where=keep | True)[1]
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, wide, rtol=1e-5, atol=1e-6)


def check_number(function, values):
    """Check that a numeric argument can be vmapped and differentiated, and equals a Python number."""
    with jax.enable_x64(True):
        low, middle, high = values
        mapped, slopes = jax.jit(jax.vmap(lambda v: (function(v), jax.jacfwd(function)(v))))(
            np.array([low, middle - 1e-6, middle, middle + 1e-6, high])
        )
        np.testing.assert_allclose(mapped[-1], jax.jit(lambda: function(high))(), rtol=1e-10)
        assert np.isfinite(mapped).all() and np.any(mapped[0] != mapped[-1])
        np.testing.assert_allclose(slopes[2], (mapped[3] - mapped[1]) / 2e-6, rtol=1e-5, atol=1e-8)


def check_torch(ours, theirs, first, *rest):
    """Compare values and gradients of two scalar functions of the first array; the second takes torch tensors."""
    import torch

    with jax.enable_x64(True):
        value, grad = jax.jit(jax.value_and_grad(ours))(first, *rest)
    tensor = torch.tensor(first, requires_grad=True)
    their_value = theirs(tensor, *(torch.tensor(array) for array in rest))
    their_value.backward()
    np.testing.assert_allclose(value, their_value.item(), rtol=1e-10)
    np.testing.assert_allclose(grad, tensor.grad.numpy(), rtol=1e-8, atol=1e-11)
    assert np.abs(grad).max() > 1e-4
