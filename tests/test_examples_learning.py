"""The examples on depth and on regularization print what their docstrings say."""

import re

import numpy as np
import pytest
from test_examples import promised_lines, run


def numbers(lines):
    return [float(number) for number in re.findall(r"\d+\.\d+(?:e[-+]\d+)?", "\n".join(lines))]


def without_numbers(lines):
    return [re.sub(r"\d+\.\d+(e[-+]\d+)?", "#", line).split() for line in lines]


@pytest.mark.slow
def test_a_deep_plain_network_stalls_and_a_residual_one_does_not(capsys, tmp_path):
    module, found, printed = run("depth", capsys, tmp_path / "depth.png")
    (plain_norms, plain), (residual_norms, residual) = found.values()
    assert plain.max() < 0.2 and residual.max() > 0.95
    assert plain_norms.shape == residual_norms.shape == (50,)
    assert np.all(np.asarray(plain_norms[:-1]) < np.asarray(plain_norms[1:]))  # each layer reduces it
    assert 0 < plain_norms[0] < 1e-20 * plain_norms[-1]
    assert residual_norms.max() < 100 * residual_norms.min()
    promised = promised_lines(module)
    assert without_numbers(printed) == without_numbers(promised)
    norms, accuracies = slice(0, 12), slice(12, 14)
    np.testing.assert_allclose(numbers(printed)[norms], numbers(promised)[norms], rtol=0.1)
    np.testing.assert_allclose(numbers(printed)[accuracies], numbers(promised)[accuracies], atol=3.0)
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.slow
def test_each_regularization_narrows_the_gap(capsys):
    module, found, printed = run("regularization", capsys)
    plain, plain_right = (np.asarray(values) for values in found["nothing"])
    assert plain.shape == plain_right.shape == (8,)
    for cure in ("dropout", "weight decay", "early stopping"):
        gap, right = (np.asarray(values) for values in found[cure])
        narrower = plain - gap  # compared by seed, as each seed has other digits
        assert narrower.mean() > 5 * narrower.std(ddof=1) / np.sqrt(8), cure
        assert np.all(narrower > 0) and gap.mean() < 0.8 * plain.mean()
        assert right.mean() > plain_right.mean()
    promised = promised_lines(module)
    assert without_numbers(printed) == without_numbers(promised)
    for measured, said in zip(printed[1:], promised[1:], strict=True):
        np.testing.assert_allclose(numbers([measured])[:2], numbers([said])[:2], atol=0.15)
        np.testing.assert_allclose(numbers([measured])[2], numbers([said])[2], atol=2.0)


@pytest.mark.slow
def test_sharpness_rises_to_the_limit_of_gradient_descent_and_stays_there(capsys, tmp_path):
    module, runs, printed = run("edge_of_stability", capsys, tmp_path / "edge.png")
    assert (tmp_path / "edge.png").stat().st_size > 10_000
    for rate, (losses, sharp) in runs.items():
        assert losses[-1] < losses[0] / 4
        assert np.all(np.asarray(sharp[-20:]) < 1.15 * 2 / rate)
        if rate > 0.05:  # the others are on their way
            np.testing.assert_allclose(np.mean(sharp[-20:]), 2 / rate, rtol=0.1)
            assert np.mean(np.diff(losses[1500:]) > 0) > 0.1
    assert without_numbers(printed)[0] == without_numbers(promised_lines(module))[0]
