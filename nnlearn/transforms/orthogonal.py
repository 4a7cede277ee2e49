"""The orthogonal matrix next to a matrix, by polynomials of odd degree: Newton-Schulz and its optimal relatives."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from nnlearn.native.polynomial import polynomials
from nnlearn.tree import array_norm, safe_divide

Preconditioning = Literal["frobenius", "spectral", "aol", "schatten"]

# Tuned for a steep slope at 0: five steps take singular values of 1e-3 to within [0.7, 1.2], not to 1 (Jordan 2024).
JORDAN = (3.4445, -4.7750, 2.0315)
PRESETS: dict[str, Any] = {
    "standard": JORDAN,
    # one row for each step, for singular values of 1e-3 and more (Ahn et al. 2025, arXiv:2504.05295)
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
# the optimal polynomials for singular values from 1e-3 to 1 (Amsel et al. 2025, arXiv:2505.16932); all but the last
# are shrunk by 1.01, so that rounding errors stay in that interval
_POLAR = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
PRESETS["polar_express"] = (*((a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in _POLAR[:-1]), _POLAR[-1])
SMALLEST = 1e-8  # of what the first step of "aol" and "schatten" divides by


def newton_schulz(
    x: jax.Array, coefficients: jax.Array, steps: Any, eps: Any, preconditioning: Preconditioning
) -> jax.Array:
    r"""The orthogonal matrix next to a matrix, roughly: :math:`U V^\top` of :math:`U \Sigma V^\top`.

    .. math:: X \leftarrow a X + (b A + c A^2) X, \quad A = X X^\top, \quad X_0 = G / (\|G\|_F + \epsilon)

    Args:
      x: a matrix.
      coefficients: (3,) for all steps, or (steps, 3).
      steps: how many steps; a Python number lays them out, a traced one makes a loop.
      eps: added to the norm.
      preconditioning: ``"frobenius"`` and ``"spectral"`` divide by that norm; ``"aol"`` and ``"schatten"`` rescale
        within the first step, by the row sums of :math:`|A|` (arXiv:2512.04632) or by the Schatten-4 norm
        (arXiv:2506.10935).
    """
    if x.shape[0] > x.shape[1]:  # the same iteration on the transpose has the smaller product
        return newton_schulz(x.T, coefficients, steps, eps, preconditioning).T

    def first(x, row):
        gram = x @ jnp.conj(x).T
        size = jnp.sum(jnp.abs(gram), axis=1, keepdims=True) if preconditioning == "aol" else array_norm(gram)
        factor = jnp.reshape(jax.lax.rsqrt(jnp.maximum(size, SMALLEST)), (-1, 1))
        x, gram = x * factor, gram * factor * jnp.conj(factor).T
        return row[0] * x + (row[1] * gram + row[2] * (gram @ gram)) @ x

    if preconditioning == "frobenius":
        x = safe_divide(x, array_norm(x) + eps)
    elif preconditioning == "spectral":
        x = safe_divide(x, jnp.linalg.norm(x, ord=2) + eps)
    rescaled = preconditioning in ("aol", "schatten")
    if coefficients.ndim == 2 or isinstance(steps, int):
        rows = coefficients if coefficients.ndim == 2 else jnp.broadcast_to(coefficients[None], (steps, 3))
        if rescaled and len(rows):
            x, rows = first(x, rows[0]), rows[1:]
        return polynomials(x, rows)
    if rescaled:
        x = jnp.where(steps > 0, first(x, coefficients), x)
    return jax.lax.fori_loop(
        int(rescaled), jnp.ceil(steps).astype(jnp.int32), lambda _, x: polynomials(x, coefficients[None]), x
    )


__all__ = ["JORDAN", "PRESETS", "Preconditioning", "newton_schulz"]
