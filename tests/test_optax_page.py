"""``docs/optax.md`` lists every public name of optax; ``python tests/test_optax_page.py`` writes it."""

import importlib
import types
import warnings
from pathlib import Path

import optax
import optax.contrib

import nnlearn

PAGE = Path(__file__).parent.parent / "docs" / "optax.md"
MODULES = (
    "optax", "optax.contrib", "optax.transforms", "optax.schedules", "optax.losses", "optax.tree", "optax.projections",
    "optax.perturbations", "optax.second_order", "optax.assignment",
)  # fmt: skip
ALIAS = "optax's deprecated alias of another name"
NUMERICS = "a helper inside of optax's methods; nnlearn's kernels have their own"
SOLVERS = "line searches and L-BFGS are solvers, not rules of one gradient; optax's work inside nnlearn"
LEFT_OUT = {
    **dict.fromkeys(("optimistic_adam", "inject_stateful_hyperparams", "multi_transform"), "deprecated in optax"),
    **dict.fromkeys(("MultiTransformState", "safe_int32_increment", "tree_utils"), ALIAS),
    **dict.fromkeys(("AdaptiveGradClipState", "AddDecayedWeightsState", "ClipByGlobalNormState", "ClipState"), ALIAS),
    **dict.fromkeys(("bias_correction", "update_moment", "update_infinity_moment", "init_empty_state"), NUMERICS),
    **dict.fromkeys(("update_moment_per_elem_norm", "safe_norm", "safe_root_mean_squares"), NUMERICS),
    **dict.fromkeys(("matrix_inverse_pth_root", "power_iteration", "nnls", "multi_normal"), NUMERICS),
    **dict.fromkeys(("lbfgs", "scale_by_lbfgs", "ScaleByLBFGSState"), SOLVERS),
    **dict.fromkeys(("scale_by_backtracking_linesearch", "scale_by_zoom_linesearch", "ZoomLinesearchInfo"), SOLVERS),
    **dict.fromkeys(("ScaleByBacktrackingLinesearchState", "ScaleByZoomLinesearchState"), SOLVERS),
    "MaskOrFn": "a type alias; nnlearn.types has one",
    "ConditionFn": "a type of a callback; any function is one",
    "StatefulSchedule": "a type of a schedule with state; inject_hyperparams takes functions of the step",
    "ctc_loss_with_forward_probs": "nnlearn's ctc_loss does not compute these arrays",
    "contrib": "its names stand beside the others in nnlearn",
    "experimental": "not a part of optax's promises",
    "microbatching": "its one function, microbatch, is at nnlearn's top",
}
ROOMS = {"optax.losses": "losses", "optax.schedules": "schedules", "optax.transforms": "transforms"}
NAMED = ("optax.tree", "optax.projections", "optax.perturbations", "optax.second_order", "optax.assignment")


def public_names(module):
    names = [name for name in dir(importlib.import_module(module)) if not name.startswith("_")]
    return [name for name in names if name not in ("typing", "functools")]


def ours(module, name):
    """nnlearn's object for a public name of optax, or None."""
    if module in NAMED:
        return getattr(getattr(nnlearn, module.removeprefix("optax.")), name, None)
    places = [nnlearn, *([getattr(nnlearn, ROOMS[module])] if module in ROOMS else [])]
    found = [vars(place)[name] for place in places if name in vars(place)]
    return found[0] if found else None


def stand(module, name):
    """Where nnlearn stands: own, borrowed, or why it is left out."""
    if name in LEFT_OUT:
        return LEFT_OUT[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        theirs, mine = getattr(importlib.import_module(module), name), ours(module, name)
    if mine is None:
        return ""
    borrowed = mine is theirs or (isinstance(theirs, types.ModuleType) and module != "optax")
    return "borrowed" if borrowed else "own"


def lines():
    yield from (
        "# optax's names in nnlearn",
        "",
        f"Every public name of optax {optax.__version__}. *Own* is nnlearn's implementation: same arguments, same",
        "trajectory, checked by `tests/test_contract.py` and the tests of its room. *Borrowed* is optax's own object,",
        "imported, because nnlearn would change nothing. The rest is left out, with the reason. Any of optax's",
        "transformations works inside nnlearn. `python tests/test_optax_page.py` writes this page.",
        "",
    )
    for module in MODULES:
        found = {name: stand(module, name) for name in public_names(module)}
        yield f"## `{module}`"
        yield ""
        for kind in ("own", "borrowed"):
            names = [name for name, where in found.items() if where == kind]
            if names:
                yield f"**{kind.capitalize()}:** " + " ".join(f"`{name}`" for name in names)
                yield ""
        others = {name: where for name, where in found.items() if where not in ("own", "borrowed")}
        if others:
            yield "| left out | why |"
            yield "|---|---|"
            reasons = dict.fromkeys(others.values())
            yield from (f"| {' '.join(f'`{n}`' for n, w in others.items() if w == why)} | {why} |" for why in reasons)
            yield ""


def test_every_public_name_of_optax_has_a_place():
    missing = [f"{module}.{name}" for module in MODULES for name in public_names(module) if not stand(module, name)]
    assert missing == []


def test_the_page_is_up_to_date():
    assert PAGE.read_text() == "\n".join(lines()), "run: python tests/test_optax_page.py"


if __name__ == "__main__":
    PAGE.write_text("\n".join(lines()))
