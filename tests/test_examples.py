"""Every example runs, prints what its docstring says, and is short."""

import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
RUN_HERE = {"bowl", "compare_optimizers", "custom_transformation", "digits", "flax_model", "gan", "learn_schedule"}
RUN_HERE |= {"checkpoints", "linear_regression", "sweep_halving", "xor"}
IN_TEST_EXAMPLES_LEARNING = {"depth", "edge_of_stability", "regularization"}


def load_example(name):
    (path,) = (path for path in EXAMPLES if path.stem == name)
    spec = importlib.util.spec_from_file_location(f"example_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def promised_lines(module):
    """The output in the docstring: the indented block after ``prints::``."""
    block = re.search(r"prints::\n\n((?:    .*\n)+)", module.__doc__)
    return [line.removeprefix("    ") for line in block.group(1).splitlines()]


def run(name, capsys, *args):
    module = load_example(name)
    result = module.main(*args)
    return module, result, capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_short_documented_and_tested(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 100
    assert source.startswith('"""') and "prints::\n" in source
    assert "\ndef main(" in source and '\nif __name__ == "__main__":\n' in source
    assert path.stem in RUN_HERE | IN_TEST_EXAMPLES_LEARNING


def test_linear_regression_finds_the_line(capsys):
    module, (learned, exact), printed = run("linear_regression", capsys)
    assert [round(number, 2) for number in learned] == [3.0, 1.0]
    np.testing.assert_allclose(learned, exact, atol=1e-5)
    assert printed == promised_lines(module)

    inputs, targets = (np.asarray(array, np.float64) for array in module.noisy_line(jax.random.key(0)))
    independent = np.linalg.lstsq(np.stack([inputs, np.ones_like(inputs)], axis=1), targets)[0]
    np.testing.assert_allclose(exact, independent, atol=1e-5)


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_bit(capsys):
    module, (killed_at, same, params), printed = run("checkpoints", capsys)
    assert 0 < killed_at < module.STEPS and killed_at % module.EVERY == 0
    assert same
    assert params["output"]["kernel"].shape == (32, 2)
    promised = promised_lines(module)
    assert [line[: len(start)] for line, start in zip(printed, promised, strict=True)] == promised


@pytest.mark.slow
def test_every_one_of_100_seeds_solves_exclusive_or(capsys):
    module, (losses, solved), printed = run("xor", capsys)
    assert solved == 100
    assert losses.shape == (100, 200)
    assert jnp.all(losses[:, -1] < 0.01)  # solved with a clear margin
    assert jnp.unique(losses[:, 0]).size == 100  # a hundred different initialisations
    assert printed == promised_lines(module)


@pytest.mark.slow
def test_digits_reaches_the_documented_accuracy(capsys):
    module, (validation, test, losses), printed = run("digits", capsys)
    assert test.shape == validation.shape == (10,)
    assert test.mean() >= 0.975 and validation.mean() >= 0.975
    assert losses.shape == (10, module.EPOCHS, 20) and jnp.all(jnp.isfinite(losses))
    promised = promised_lines(module)
    assert [line.split(":")[0] for line in printed] == [line.split(":")[0] for line in promised]
    # Another processor adds in another order; after 400 steps one or two digits may be classified differently.
    numbers = [[float(number) for number in re.findall(r"\d+\.\d", "\n".join(lines))] for lines in (printed, promised)]
    np.testing.assert_allclose(*numbers, atol=0.4)
    np.testing.assert_allclose(numbers[0][2:], [100 * test.mean(), 100 * test.std(ddof=1)], atol=0.051)


@pytest.mark.slow
def test_two_networks_and_optimizers_learn_a_ring(capsys):
    module, trace, printed = run("gan", capsys)
    assert trace.metrics["radius"][-1] == pytest.approx(2.0, abs=0.1) and trace.metrics["spread"][-1] < 0.3
    texts = ["\n".join(lines) for lines in (printed, promised_lines(module))]
    assert re.sub(r"\d+\.\d+", "#", texts[0]) == re.sub(r"\d+\.\d+", "#", texts[1])
    last = [[float(number) for number in re.findall(r"\d+\.\d+", text)[-4:]] for text in texts]
    np.testing.assert_allclose(*last, atol=0.1)  # another processor rounds differently, and two players amplify it


def test_the_bowl_converges_as_theory_predicts(capsys, tmp_path):
    module, found, printed = run("bowl", capsys, tmp_path / "bowl.png")
    for predicted, measured, _ in found.values():
        assert measured == pytest.approx(predicted, rel=1e-4)
    low, high = module.CURVATURES.tolist()
    condition = high / low
    assert found["best"][0] == pytest.approx((condition - 1) / (condition + 1), rel=1e-6)
    assert module.RATES["best"] == pytest.approx(2 / (low + high))
    steps = {name: values[2] for name, values in found.items()}
    assert steps["best"] < steps["good"] < steps["too small"] and steps["too large"] is None
    assert printed == promised_lines(module)

    picture = (tmp_path / "bowl.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert 20_000 < len(picture) < 500_000
    width, height = (int.from_bytes(picture[start : start + 4], "big") for start in (16, 20))
    assert width >= 1000 and height >= 600


def test_the_step_counts_of_the_bowl_equal_those_of_a_plain_loop():
    module = load_example("bowl")
    path = jax.jit(module.descend)(module.RATES["best"])
    point = np.asarray(module.START, np.float64)
    for expected in np.asarray(path)[:70]:
        np.testing.assert_allclose(expected, point, rtol=1e-4)
        point = point - module.RATES["best"] * np.asarray(module.CURVATURES) * point


@pytest.mark.slow
def test_a_custom_transformation_learns_in_a_chain(capsys):
    module, (before, after), printed = run("custom_transformation", capsys)
    assert after < 0.1 * before
    assert printed == promised_lines(module)


def test_a_custom_transformation_equals_its_equation_and_can_be_vmapped():
    module = load_example("custom_transformation")
    grads = [{"w": jnp.array([[3.0, 4.0]]), "b": jnp.array([2.0])}, {"w": jnp.array([[-4.0, 3.0]]), "b": jnp.zeros(1)}]

    def updates(decay):
        tx = module.scale_by_normalized_momentum(decay)
        state = tx.init(grads[0])
        for gradient in grads:
            change, state = tx.update(gradient, state)
        return change

    together = jax.jit(jax.vmap(updates))(jnp.array([0.0, 0.5]))
    momentum = 0.5 * (0.5 * np.array([3.0, 4.0])) + 0.5 * np.array([-4.0, 3.0])
    expected = np.stack([np.array([[-0.8, 0.6]]), momentum[None] / np.linalg.norm(momentum)])
    np.testing.assert_allclose(together["w"], expected, rtol=1e-5)
    np.testing.assert_allclose(together["b"], [[0.0], [1.0]], atol=1e-6)  # no gradient, no step


@pytest.mark.slow
def test_optimizers_are_compared_at_their_best_rates(capsys):
    module, best, printed = run("compare_optimizers", capsys)
    promised = promised_lines(module)
    assert [line.split(":")[0].split()[0] for line in printed] == [line.split()[0] for line in promised]
    for rate, accuracies in best.values():
        assert accuracies.shape == (10,) and accuracies.mean() > 0.96 and 1e-4 < rate < 1


@pytest.mark.slow
def test_a_learned_schedule_beats_the_best_constant_rate(capsys):
    module, (rates, losses, (constant, learned)), printed = run("learn_schedule", capsys)
    assert [line.split(":")[0][:13] for line in printed] == [line.split(":")[0][:13] for line in promised_lines(module)]
    assert rates.shape == (8,) and losses[-1] < 0.8 * losses[0]
    assert learned < 0.85 * constant  # on data and seeds that were not used to learn the schedule
    assert rates[-1] < 0.3 * rates.max() and rates[0] < rates.max()


@pytest.mark.slow
def test_a_flax_network_trains_without_changes(capsys):
    module, (found, own, losses), printed = run("flax_model", capsys)
    assert found.shape == (4,) and found.mean() > 0.97 and jnp.all(jnp.isfinite(losses))
    assert own == pytest.approx(float(found[0]), abs=1e-6)
    promised = promised_lines(module)
    assert [line.split(":")[0] for line in printed] == [line.split(":")[0] for line in promised]
