"""Packing: trees to a few large buffers and back, bit for bit, under all transformations of JAX."""

import io
import re
from collections import Counter
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nnlearn
from nnlearn.packing import Layout, is_packed, make_layout, pack, pack_like, stack_values, unpack, worth_packing

few = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array | None


def filled(shape, dtype, seed=0):
    """Numbers of any dtype, all different if the dtype permits."""
    size = int(np.prod(shape))
    numbers = np.random.default_rng(seed).permutation(size).reshape(shape) + 1 + seed
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_:
        return jnp.asarray(numbers % 2 == 0)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        numbers = numbers - 0.5j * numbers
    return jnp.asarray(numbers, dtype)


def every_kind():
    """A tree of every container and kind of leaf."""
    return {
        "pair": Pair(filled((2, 3), jnp.float32, 1), None),
        "list": [filled((4,), jnp.bfloat16, 2), filled((), jnp.float32, 3), filled((1,), jnp.float32, 4)],
        "tuple": (filled((0, 3), jnp.float32), filled((2, 1, 2), jnp.float16, 5), None, {}),
        "deep": {"er": {"complex": filled((3,), jnp.complex64, 6), "int": filled((2, 2), jnp.int32, 7)}},
        "flags": filled((5,), jnp.bool_, 8),
        "more": Pair(filled((2, 3), jnp.float32, 9), filled((0,), jnp.int32)),
    }


def assert_same(left, right):
    """Assert that two trees have equal structure, dtypes, shapes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), strict=True)


def small():
    return {"w": filled((3, 4), jnp.float32), "b": filled((4,), jnp.float32, 20), "s": filled((), jnp.float32, 40)}


def test_every_kind_of_tree_is_unpacked_bit_for_bit():
    params = every_kind()
    packed = pack(params)
    assert_same(unpack(packed), params)
    assert len(packed.buffers) == 6 == len({buffer.dtype for buffer in packed.buffers})
    assert len(packed) == len(jax.tree.leaves(params))
    assert sum(buffer.size for buffer in packed.buffers) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_leaves_of_equal_shape_are_adjacent_in_tree_order():
    packed = pack([filled((2,), jnp.float32), filled((3,), jnp.float32, 10), filled((2,), jnp.float32, 20)])
    np.testing.assert_array_equal(packed.buffers[0], jnp.concatenate([packed["0"], packed["2"], packed["1"]]))


@pytest.mark.parametrize("params", [{}, (), None, {"a": None, "b": [{}]}], ids=str)
def test_a_tree_without_leaves(params):
    packed = pack(params)
    assert (len(packed), packed.buffers, repr(packed)) == (0, (), "Packed(0 leaves)")
    assert unpack(packed) == params
    assert jax.jit(unpack)(packed) == params
    assert list(packed) == []


def test_a_single_array_is_a_tree():
    packed = pack(filled((2, 2), jnp.float32))
    assert_same(unpack(packed), filled((2, 2), jnp.float32))
    assert_same(packed["(root)"], filled((2, 2), jnp.float32))


def test_only_zero_size_leaves():
    params = {"a": jnp.zeros((0, 2)), "b": jnp.zeros(0)}
    assert_same(unpack(pack(params)), params)
    assert_same(jax.jit(jax.grad(lambda packed: jnp.sum(unpack(packed)["a"])))(pack(params)), pack(params))


def test_python_and_numpy_numbers_become_arrays_of_their_dtype():
    params = {"float": 1.5, "int": 3, "bool": True, "complex": 1j, "numpy": np.ones(2, np.float16), "np": np.int32(4)}
    assert_same(unpack(pack(params)), jax.tree.map(jnp.asarray, params))


# few shapes and dtypes, as each costs a compilation
shapes = st.sampled_from([(), (1,), (0,), (3,), (2, 2), (1, 2, 1)])
leaves = st.builds(filled, shapes, st.sampled_from([jnp.float32, jnp.bfloat16, jnp.bool_]), st.integers(0, 9))
trees = st.recursive(
    leaves | st.none(),
    lambda children: (
        st.lists(children, max_size=4)
        | st.tuples(children, children)
        | st.dictionaries(st.sampled_from("abcde"), children, max_size=4)
        | st.builds(Pair, children, children)
    ),
    max_leaves=12,
)


@few
@hypothesis.given(trees, st.data())
def test_any_tree_with_any_labels_is_unpacked_exactly(params, data):
    label = st.sampled_from(["x", "y", 0, 1, True, False])
    marks = [data.draw(label) for _ in jax.tree.leaves(params)]
    packed = pack(params, jax.tree.structure(params).unflatten(marks))
    assert_same(unpack(packed), params)
    assert list(packed.keys()) == [nnlearn.tree.path_name(path) for path, _ in jax.tree.leaves_with_path(params)]
    kinds = {(leaf.dtype, type(mark), mark) for leaf, mark in zip(jax.tree.leaves(params), marks, strict=True)}
    assert len(packed.buffers) == len(kinds)
    assert make_layout(params, packed.layout.labels) == packed.layout


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [("word", "str"), (object(), "object"), (len, "builtin_function_or_method"), (np.array(["a"]), "<U1")],
    ids=["str", "object", "function", "array of str"],
)
def test_the_error_for_a_non_numeric_leaf_names_its_path(leaf, kind):
    with pytest.raises(TypeError, match=rf"'outer/1'.*{kind}.*remove it from params"):
        pack({"outer": [jnp.ones(1), leaf]})


def test_random_keys_are_refused():
    with pytest.raises(TypeError, match=r"'key' has dtype key<.*is not numeric"):
        pack({"key": jax.random.key(0)})


class TestLabels:
    params = {"enc": {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}, "dec": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}}

    def test_a_tree_a_prefix_and_a_function_give_equal_labels(self):
        tree = {"enc": {"w": "e", "b": "e"}, "dec": {"w": "d", "b": "d"}}
        layouts = [
            pack(self.params, tree).layout,
            pack(self.params, {"enc": "e", "dec": "d"}).layout,
            pack(self.params, lambda params: {"enc": "e", "dec": "d"}).layout,
        ]
        assert layouts[0] == layouts[1] == layouts[2]
        assert layouts[0].labels == tree
        assert [buffer.name for buffer in layouts[0].buffers] == ["float32/d", "float32/e"]

    @pytest.mark.parametrize("truth", [bool, np.bool_])
    def test_a_boolean_mask_as_labels(self, truth):
        mask = jax.tree.map(lambda leaf: truth(leaf.ndim > 1), self.params)
        packed = pack(self.params, mask)
        assert {buffer.label for buffer in packed.layout.buffers} == {True, False}
        assert all(type(buffer.label) is bool for buffer in packed.layout.buffers)
        assert_same(unpack(packed), self.params)

    def test_one_label_for_all_is_one_buffer(self):
        assert repr(pack(self.params, "all")) == "Packed(4 leaves: float32/all[15])"

    def test_labels_of_different_types_are_distinct(self):
        packed = pack({"a": jnp.ones(1), "b": jnp.ones(2)}, {"a": 1, "b": True})
        assert [(type(buffer.label), buffer.label) for buffer in packed.layout.buffers] == [(int, 1), (bool, True)]

    def test_buffers_have_different_names(self):
        packed = pack({"a": jnp.ones(1), "b": jnp.ones(2), "c": jnp.ones(3)}, {"a": True, "b": "True", "c": "x"})
        assert [buffer.name for buffer in packed.layout.buffers] == ["float32/True", "float32/'True'", "float32/x"]

    def test_labels_separate_leaves_of_one_dtype(self):
        params = {"a": jnp.ones(1), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(3), "d": jnp.ones(4, jnp.bfloat16)}
        packed = pack(params, {"a": "x", "b": "x", "c": "y", "d": "x"})
        assert repr(packed) == "Packed(4 leaves: float32/x[1], bfloat16/x[6], float32/y[3])"

    def test_none_without_labels(self):
        assert pack(self.params).layout.labels is None

    @pytest.mark.parametrize("bad", [1.5, b"x", jnp.array(True), np.float32(1)], ids=repr)
    def test_labels_must_be_strings_booleans_or_integers(self, bad):
        with pytest.raises(TypeError, match="labels must be strings, booleans or integers"):
            pack({"a": jnp.ones(1)}, {"a": bad})

    @pytest.mark.parametrize("bad", [{"a": "x"}, ["x", "y"], {"a": "x", "b": None}, {"a": {"deep": "x"}, "b": "y"}])
    def test_labels_of_the_wrong_structure_are_refused(self, bad):
        for labels in (bad, lambda params: bad):
            with pytest.raises(ValueError, match="labels must be a tree like the parameters"):
                pack({"a": jnp.ones(1), "b": jnp.ones(2)}, labels)


class TestByPath:
    packed = pack(every_kind())

    def test_every_leaf_by_its_path_in_the_trees_order(self):
        paths = [nnlearn.tree.path_name(path) for path, _ in jax.tree.leaves_with_path(every_kind())]
        assert list(self.packed.keys()) == list(self.packed) == paths
        assert "deep/er/complex" in self.packed and "deep/er" not in self.packed
        for path, leaf in zip(paths, jax.tree.leaves(every_kind()), strict=True):
            assert_same(self.packed[path], leaf)

    def test_conversion_to_a_dict(self):
        found = dict(self.packed)
        assert list(found) == list(self.packed.keys())
        assert_same(list(found.values()), jax.tree.leaves(every_kind()))

    def test_the_error_for_an_unknown_path_names_similar_ones(self):
        with pytest.raises(KeyError, match=r"no leaf at 'deep/er/complx'; there are 11, such as .*'deep/er/complex'"):
            self.packed["deep/er/complx"]
        with pytest.raises(KeyError, match=r"no leaf at 0; there are 11, such as 'deep/er/complex', "):
            self.packed[0]

    def test_a_path_of_two_leaves_is_ambiguous(self):
        packed = pack({"a": {"b": jnp.ones(2)}, "a/b": jnp.zeros(2), "c": jnp.ones(3)})
        with pytest.raises(KeyError, match="several leaves have the path 'a/b'"):
            packed["a/b"]
        assert "a/b" in packed and packed["c"].shape == (3,)

    def test_a_buffer_of_the_wrong_shape_is_refused(self):
        sums = jax.tree.map(jnp.sum, pack(small()))
        for read in (unpack, lambda packed: packed["w"]):
            with pytest.raises(ValueError, match=r"buffer 'float32' holds an array of shape \(\), .*packed as \(17,\)"):
                read(sums)

    def test_leaves_can_be_read_inside_jit_and_with_leading_axes(self):
        packed = pack(small())
        assert_same(jax.jit(lambda packed: packed["w"])(packed), small()["w"])
        stacked = jax.tree.map(lambda buffer: jnp.stack([buffer, 2 * buffer]), packed)
        assert_same(stacked["w"], jnp.stack([small()["w"], 2 * small()["w"]]))
        assert_same(stacked["s"], jnp.stack([small()["s"], 2 * small()["s"]]))

    def test_repr_shows_buffers_dtypes_and_other_values(self):
        params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3, jnp.bfloat16)}
        packed = pack(params)
        assert repr(packed) == "Packed(2 leaves: float32[4], bfloat16[3])"
        assert repr(packed.layout) == "Layout(2 leaves: float32[4] of 1, bfloat16[3] of 1)"
        moments = jax.tree.map(lambda buffer: buffer.astype(jnp.float32), packed)
        assert repr(moments) == "Packed(2 leaves: float32[4], float32 for bfloat16[3])"
        assert repr(jax.tree.map(lambda buffer: True, packed)) == "Packed(2 leaves: float32: True, bfloat16: True)"


class TestLayout:
    def test_equal_layouts_are_one_object(self):
        one, other = pack(every_kind()).layout, pack(every_kind()).layout
        assert one == other and hash(one) == hash(other)
        copy = Layout(one.treedef, one.leaves, one.buffers)
        assert copy is not one and copy == one and hash(copy) == hash(one)
        assert make_layout(jax.eval_shape(every_kind)) == one
        assert jax.tree.structure(pack(small())) == jax.tree.structure(pack(small()))

    @pytest.mark.parametrize(
        "other",
        [
            {"a": jnp.ones((2, 3)), "c": jnp.ones(2)},
            {"a": jnp.ones((3, 2)), "b": jnp.ones(2)},
            {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.ones(2)},
            [jnp.ones((2, 3)), jnp.ones(2)],
            {"a": jnp.ones((2, 3))},
            {"a": jnp.ones((2, 3)), "b": jnp.ones(2), "none": None},
        ],
        ids=["path", "shape", "dtype", "container", "fewer", "none"],
    )
    def test_layouts_of_different_trees_differ(self, other):
        assert pack({"a": jnp.ones((2, 3)), "b": jnp.ones(2)}).layout != pack(other).layout

    def test_layouts_with_different_labels_differ(self):
        layouts = [None, "x", "y", 1, True, {"a": "x", "b": "y"}]
        made = [make_layout({"a": jnp.ones(1), "b": jnp.ones(2)}, labels) for labels in layouts]
        assert len(set(made)) == len(made)
        assert made[0] != "a layout"

    def test_the_tree_of_shapes(self):
        assert make_layout(every_kind()).tree() == jax.eval_shape(every_kind)

    def test_an_equal_layout_does_not_trigger_recompilation(self):
        traces = Counter()

        @jax.jit
        def double(packed):
            traces["double"] += 1
            return jax.tree.map(lambda buffer: buffer + buffer, packed)

        first, second = double(pack(small())), double(pack(small()))
        double(first)
        double(pack({name: np.asarray(leaf) for name, leaf in small().items()}))
        assert traces["double"] == 1 and double._cache_size() == 1
        assert_same(unpack(second), jax.tree.map(lambda leaf: leaf + leaf, small()))
        double(pack(small(), labels="other"))
        assert traces["double"] == 2

    def test_packing_in_the_layout_of_another_tree(self):
        layout = pack(small()).layout
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), small())
        assert_same(unpack(pack_like(layout, wide)), wide)
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), small())
        packed = pack_like(layout, stacked)
        assert packed.buffers[0].shape == (2, 17)
        assert_same(unpack(packed), stacked)

    def test_packing_a_tree_that_does_not_match_is_refused(self):
        layout = pack(small()).layout
        with pytest.raises(ValueError, match="the tree does not have the structure"):
            pack_like(layout, {"w": jnp.ones((3, 4))})
        with pytest.raises(ValueError, match=r"leaf 'w' has shape \(4, 3\), but \(3, 4\) was packed"):
            pack_like(layout, small() | {"w": jnp.ones((4, 3))})
        with pytest.raises(ValueError, match=r"leaf 'b' has shape \(\), but \(4,\) was packed"):
            pack_like(layout, small() | {"b": jnp.ones(())})

    def test_trees_of_two_layouts_do_not_mix(self):
        with pytest.raises(ValueError, match="Layout"):
            jax.tree.map(jnp.add, pack(small()), pack(small(), labels="x"))


class TestAsAPytree:
    """Every transformation of JAX sees buffers, and ``unpack`` still finds the leaves."""

    def test_tree_map_keeps_the_layout(self):
        packed = pack(every_kind())
        assert is_packed(packed) and not is_packed(every_kind())
        doubled = jax.tree.map(lambda buffer: buffer + buffer, packed)
        assert_same(unpack(doubled), jax.tree.map(lambda leaf: leaf + leaf, every_kind()))
        assert jax.tree.structure(doubled) == jax.tree.structure(packed)

    def test_all_packed_trees_in_a_larger_tree_are_unpacked(self):
        state = {"count": jnp.zeros(()), "moments": (pack(small()), [pack(small(), labels="x")]), "none": None}
        assert_same(unpack(state), {"count": jnp.zeros(()), "moments": (small(), [small()]), "none": None})
        assert unpack(3) == 3 and unpack(None) is None

    def test_jit_packs_and_unpacks(self):
        packed = jax.jit(pack)(every_kind())
        assert packed.layout == pack(every_kind()).layout
        assert_same(jax.jit(unpack)(packed), every_kind())
        jax.tree.map(np.testing.assert_array_equal, packed, pack(every_kind()))

    def test_vmap_with_unpacking_inside_and_outside(self):
        stack = lambda tree: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf * 2, leaf * 3]), tree)  # noqa: E731
        stacked = stack(pack(small()))
        assert_same(unpack(stacked), stack(small()))
        assert_same(jax.vmap(unpack)(stacked), stack(small()))
        together = jax.vmap(pack)(stack(small()))
        assert together.layout == pack(small()).layout
        assert_same(together.buffers[0], stacked.buffers[0])
        total = jax.vmap(lambda packed, x: unpack(packed)["w"].sum() * x, in_axes=(0, None))
        np.testing.assert_array_equal(total(stacked, 2.0), jnp.array([2.0, 4.0, 6.0]) * small()["w"].sum())
        last = jax.tree.map(lambda buffer: jnp.moveaxis(buffer, 0, -1), stacked)
        assert_same(jax.vmap(unpack, in_axes=-1)(last), stack(small()))
        twice = jax.tree.map(lambda buffer: jnp.stack([buffer, buffer]), stacked)
        assert_same(unpack(twice), jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), stack(small())))

    def test_scan_can_carry_and_stack_packed_trees(self):
        def body(packed, x):
            packed = jax.tree.map(lambda buffer: buffer * x, packed)
            return packed, packed

        xs = jnp.array([2.0, 3.0])
        last, trace = jax.lax.scan(body, pack(small()), xs)
        assert_same(unpack(last), jax.tree.map(lambda leaf: leaf * 6, small()))
        assert_same(unpack(trace), jax.tree.map(lambda leaf: jnp.stack([leaf * 2, leaf * 6]), small()))
        xs, taken = jax.lax.scan(lambda carry, packed: (carry, unpack(packed)), None, trace)
        assert_same(taken, unpack(trace))

    def test_cond_while_and_checkpoint_accept_packed_trees(self):
        def body(packed):
            double = lambda packed: jax.tree.map(lambda buffer: 2 * buffer, packed)  # noqa: E731
            return jax.lax.cond(packed["s"] < 100, double, lambda packed: packed, packed)

        done = jax.lax.while_loop(lambda packed: packed["s"] < 100, jax.checkpoint(body), pack(small()))
        assert_same(unpack(done), jax.tree.map(lambda leaf: 4 * leaf, small()))

    def test_donation_consumes_the_buffers(self):
        packed, params = pack(small()), small()
        add = jax.jit(lambda packed: jax.tree.map(lambda buffer: buffer + 1, packed), donate_argnums=0)
        result = add(packed)
        assert all(buffer.is_deleted() for buffer in packed.buffers)
        assert_same(unpack(result), jax.tree.map(lambda leaf: leaf + 1, params))

    def test_eval_shape_gives_a_packed_tree_of_shapes(self):
        shapes = jax.eval_shape(pack, every_kind())
        assert shapes.layout == pack(every_kind()).layout
        assert [(s.shape, s.dtype) for s in shapes.buffers] == [(b.shape, b.dtype) for b in pack(every_kind()).buffers]
        assert jax.eval_shape(unpack, shapes) == jax.eval_shape(every_kind)

    def test_buffers_may_be_numpy_arrays(self):
        host = jax.device_get(pack(every_kind()))
        assert all(isinstance(buffer, np.ndarray) for buffer in host.buffers)
        assert_same(unpack(host), every_kind())
        assert_same(host["list/0"], every_kind()["list"][0])
        assert_same(unpack(jax.device_put(host)), every_kind())

    def test_saved_by_names_and_restored_without_pickle(self):
        params = {key: every_kind()[key] for key in ("pair", "deep", "flags", "tuple")}
        packed = pack(params, lambda params: jax.tree.map(lambda leaf: "m" if leaf.ndim > 1 else "v", params))
        named, treedef = jax.tree.flatten_with_path({"step": jnp.array(3), "params": packed})
        file = io.BytesIO()
        np.savez(file, **{nnlearn.tree.path_name(path): leaf for path, leaf in named})
        file.seek(0)
        saved = np.load(file, allow_pickle=False)
        assert len(saved.files) == len(named) == 1 + len(packed.buffers)
        assert "params/float32/m" in saved.files
        restored = treedef.unflatten([saved[nnlearn.tree.path_name(path)] for path, _ in named])
        assert_same(unpack(restored["params"]), params)

    def test_a_value_in_place_of_a_buffer_applies_to_its_leaves(self):
        packed = pack(small(), labels={"w": "m", "b": "v", "s": "v"})
        mask = jax.tree.map(lambda buffer: buffer.size > 5, packed)
        assert unpack(mask) == {"w": True, "b": False, "s": False}
        part = optax.masked(optax.identity(), mask)
        taken = jax.tree.map(lambda keep, buffer: buffer if keep else optax.MaskedNode(), mask, packed)
        tree = {"w": small()["w"], "b": optax.MaskedNode(), "s": optax.MaskedNode()}
        assert_same(unpack(taken), tree)
        assert_same(pack_like(packed.layout, tree), taken)
        assert_same(part.update(packed, part.init(packed))[0], packed)


def primitives(function, *arguments):
    """Count each primitive in a program, including nested ones."""
    found = Counter()

    def count(jaxpr):
        for equation in jaxpr.eqns:
            found[equation.primitive.name] += 1
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                count(inner)

    count(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


class TestDerivatives:
    params = {
        "w": filled((3, 4), jnp.float32) / 10,
        "v": filled((3, 4), jnp.float32, 3) / 10,
        "b": filled((4,), jnp.float32, 2) / 10,
        "s": jnp.float32(0.3),
        "one": jnp.ones(1) / 3,
        "half": filled((4,), jnp.float16) / 8,
        "unit": jnp.ones((), jnp.float16),
        "none": jnp.zeros((0, 2)),
    }
    labels = {name: "v" if name == "v" else "rest" for name in params}

    @staticmethod
    def loss(params):
        hidden = jnp.tanh(params["w"] + params["v"] * params["s"]) @ params["b"]
        half = jnp.sum(params["half"] * params["unit"]).astype(jnp.float32)
        return jnp.sum(hidden**2) + half**3 + jnp.sum(params["one"] ** 2) + jnp.sum(params["none"])

    def packed_loss(self, packed):
        return self.loss(unpack(packed))

    def test_the_gradient_is_one_concatenation_per_buffer(self):
        packed = pack(self.params, self.labels)
        counts = primitives(jax.grad(self.packed_loss), packed)
        assert len(packed.buffers) == 3 and len(packed.layout.buffers[1].leaves) > 1
        assert counts["concatenate"] == sum(len(buffer.leaves) > 1 for buffer in packed.layout.buffers) == 2
        extra = counts - primitives(jax.grad(self.loss), self.params)
        assert set(extra) == {"concatenate", "split", "reshape"}
        assert extra["split"] == extra["concatenate"]

    def test_slicing_has_the_transpose_that_unpacking_avoids(self):
        counts = primitives(jax.grad(lambda p: p["w"].sum() + p["b"].sum() + p["s"]), pack(small()))
        assert counts["pad"] and counts["add_any"]

    def test_unused_leaves_have_zero_gradients(self):
        gradient = jax.grad(lambda packed: jnp.sum(unpack(packed)["b"]))(pack(small()))
        assert_same(unpack(gradient), jax.tree.map(jnp.zeros_like, small()) | {"b": jnp.ones(4)})

    def test_gradients_and_hessian_vector_products_equal_those_of_the_leaves(self):
        packed = pack(self.params, self.labels)
        tangents = jax.tree.map(lambda leaf: jnp.cos(leaf), self.params)
        value, gradient = jax.jit(jax.value_and_grad(self.packed_loss))(packed)
        expected, expected_gradient = jax.jit(jax.value_and_grad(self.loss))(self.params)
        np.testing.assert_array_equal(value, expected)
        assert_same(unpack(gradient), expected_gradient)
        packed_tangents = pack_like(packed.layout, tangents)
        both = jax.jit(lambda p, t: jax.jvp(jax.grad(self.packed_loss), (p,), (t,)))(packed, packed_tangents)
        expected = jax.jit(lambda p, t: jax.jvp(jax.grad(self.loss), (p,), (t,)))(self.params, tangents)
        close = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)  # noqa: E731
        jax.tree.map(close, unpack(both), expected)
        assert any(float(jnp.abs(leaf).max(initial=0)) > 0.1 for leaf in jax.tree.leaves(both[1]))

    def test_forward_mode_and_linear_transpose(self):
        packed = pack(small())
        primal, tangent = jax.jvp(unpack, (packed,), (jax.tree.map(jnp.ones_like, packed),))
        assert_same((primal, tangent), (small(), jax.tree.map(jnp.ones_like, small())))
        (back,) = jax.linear_transpose(unpack, packed)(small())
        assert_same(back, packed)
        (leaves,) = jax.vjp(pack, small())[1](packed)
        assert_same(leaves, small())

    def test_complex_and_integer_leaves(self):
        params = {"c": filled((2, 2), jnp.complex64), "d": filled((2,), jnp.complex64), "i": filled((2,), jnp.int32)}
        loss = lambda params: jnp.sum(jnp.abs(params["c"] @ params["d"]) ** 2) * params["i"][0]  # noqa: E731
        gradient = jax.grad(lambda packed: loss(unpack(packed)), allow_int=True)(pack(params))
        expected = jax.grad(loss, allow_int=True)(params)
        found = unpack(gradient)
        np.testing.assert_allclose(found["c"], expected["c"], rtol=1e-6)
        np.testing.assert_allclose(found["d"], expected["d"], rtol=1e-6)
        assert found["i"].dtype == expected["i"].dtype == jax.dtypes.float0

    def test_derivatives_under_vmap_and_scan(self):
        xs = jnp.array([0.5, 1.0, 2.0])
        loss = lambda params, x: self.loss(params | {"s": params["s"] * x})  # noqa: E731
        packed = pack(self.params, self.labels)
        together = jax.jit(jax.vmap(jax.grad(lambda p, x: loss(unpack(p), x)), in_axes=(None, 0)))(packed, xs)
        expected = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))(self.params, xs)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), unpack(together), expected)
        scanned = lambda p: jax.lax.scan(lambda total, x: (total + loss(p, x), None), 0.0, xs)[0]  # noqa: E731
        gradient = jax.jit(jax.grad(lambda packed: scanned(unpack(packed))))(packed)
        expected = jax.jit(jax.grad(scanned))(self.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), unpack(gradient), expected)


def make_mesh(shape, names, kind):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def spread(mesh, leaves):
    """A tree of arrays of the given shapes and placements."""
    return {
        name: jax.device_put(filled(shape, dtype, seed), NamedSharding(mesh, spec))
        for seed, (name, (shape, dtype, spec)) in enumerate(leaves.items())
    }


LINE = {
    "rows": ((8, 3), jnp.float32, P("x", None)),
    "short": ((8, 3), jnp.float32, P("x")),
    "columns": ((3, 8), jnp.float32, P(None, "x")),
    "middle": ((2, 4, 3), jnp.float32, P(None, "x", None)),
    "vector": ((4,), jnp.float32, P("x")),
    "half": ((8,), jnp.bfloat16, P("x")),
    "whole": ((5,), jnp.float32, P()),
    "scalar": ((), jnp.float32, P()),
}
ONE_AXIS = {
    "x": ((4, 3), jnp.float32, P("x", None)),
    "y": ((3, 4), jnp.float32, P(None, "y")),
    "y vector": ((2,), jnp.float32, P("y")),
    "both on one": ((8, 3), jnp.float32, P(("x", "y"), None)),
    "both the other way": ((4,), jnp.float32, P(("y", "x"))),
    "whole": ((3, 2), jnp.float32, P()),
}
TWO_AXES = ONE_AXIS | {
    "xy": ((4, 8), jnp.float32, P("x", "y")),
    "yx": ((4, 8), jnp.float32, P("y", "x")),
    "apart": ((2, 3, 4), jnp.float32, P("y", None, "x")),
}
PLACED = [
    pytest.param((4,), ("x",), AxisType.Auto, LINE, 3, id="line-auto"),
    pytest.param((4,), ("x",), AxisType.Explicit, LINE, 3, id="line-explicit"),
    pytest.param((2, 2), ("x", "y"), AxisType.Auto, TWO_AXES, 6, id="square-auto"),
    pytest.param((2, 2), ("x", "y"), AxisType.Explicit, TWO_AXES, 6, id="square-explicit"),
]
COLLECTIVES = re.compile(r"all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter|collective-broadcast")


@pytest.mark.parametrize(("shape", "names", "kind", "leaves", "buffers"), PLACED)
class TestSharded:
    def test_each_device_keeps_its_parts(self, shape, names, kind, leaves, buffers):
        params = spread(make_mesh(shape, names, kind), leaves)
        packed = pack(params)
        assert len(packed.buffers) == buffers, packed
        parts = jax.tree.map(lambda leaf: {s.device: np.asarray(s.data) for s in leaf.addressable_shards}, params)
        for buffer, array in zip(packed.layout.buffers, packed.buffers, strict=True):
            held = [list(parts.values())[position] for position in buffer.leaves]
            if buffer.sharding is not None:
                assert array.sharding == buffer.sharding
            for shard in array.addressable_shards:
                mine = np.concatenate([part[shard.device].reshape(-1) for part in held])
                np.testing.assert_array_equal(np.sort(np.asarray(shard.data).reshape(-1)), np.sort(mine))

    def test_leaves_are_unpacked_bit_for_bit_with_their_sharding(self, shape, names, kind, leaves, buffers):
        params = spread(make_mesh(shape, names, kind), leaves)
        packed = pack(params)
        compiled = jax.jit(unpack).lower(packed).compile()
        assert not COLLECTIVES.findall(compiled.as_text())
        for back in (unpack(packed), compiled(packed)):
            assert_same(back, params)
            for name, leaf in back.items():
                assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim), name

    def test_gradients_and_moments_are_sharded_like_the_parameters(self, shape, names, kind, leaves, buffers):
        params = spread(make_mesh(shape, names, kind), leaves)
        packed, tx = pack(params), nnlearn.adam(1.0)

        def step(packed, opt_state):
            gradient = jax.grad(lambda packed: sum(jnp.sum(leaf**2) for leaf in unpack(packed).values()))(packed)
            return gradient, *tx.update(gradient, opt_state, packed)

        compiled = jax.jit(step).lower(packed, tx.init(packed)).compile()
        assert not COLLECTIVES.findall(compiled.as_text())
        gradient, updates, state = compiled(packed, tx.init(packed))
        assert_same(unpack(gradient), jax.tree.map(lambda leaf: 2 * leaf, params))
        for tree in (gradient, updates, state[0].mu):
            for one, other in zip(tree.buffers, packed.buffers, strict=True):
                assert one.sharding.is_equivalent_to(other.sharding, one.ndim)

    def test_stacks_of_sharded_leaves_and_leading_axes(self, shape, names, kind, leaves, buffers):
        params = spread(make_mesh(shape, names, kind), leaves)
        packed = pack(params)

        @jax.jit
        def work(packed):
            shares = nnlearn.map_stacks(jax.vmap(lambda leaf: leaf / (1 + jnp.sum(jnp.abs(leaf)))), packed)
            stacked = jax.tree.map(lambda buffer: jnp.stack([buffer, buffer + buffer]), packed)
            return nnlearn.leaf_norms(packed), shares, unpack(stacked), jax.vmap(unpack)(stacked)

        found, shares, *back = work(packed)
        for one, other in zip(shares.buffers, packed.buffers, strict=True):
            assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
        exact = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
        norms = [np.linalg.norm(leaf.ravel()) for leaf in jax.tree.leaves(exact)]
        np.testing.assert_allclose(found, norms, rtol=1e-6)
        shares = jax.device_get(unpack(shares))
        for name, leaf in exact.items():
            rtol = 1e-2 if name == "half" else 1e-6
            np.testing.assert_allclose(shares[name].astype(np.float64), leaf / (1 + np.abs(leaf).sum()), rtol=rtol)
        host = jax.device_get(params)
        for tree in jax.device_get(back):
            jax.tree.map(
                lambda one, leaf: np.testing.assert_array_equal(one, np.stack([leaf, leaf + leaf])), tree, host
            )


def test_layouts_of_sharded_trees_made_twice_are_equal():
    params = spread(make_mesh((2, 2), ("x", "y"), AxisType.Auto), TWO_AXES)
    one = make_layout(params)
    other = make_layout(spread(make_mesh((2, 2), ("x", "y"), AxisType.Auto), TWO_AXES))
    assert one == other and hash(one) == hash(other)
    assert one != make_layout(jax.device_get(params))
    assert one != make_layout(spread(make_mesh((2, 2), ("y", "x"), AxisType.Auto), TWO_AXES))


@pytest.mark.parametrize("spec", [P("x"), P(None, ("y", "x")), P("x", "y")])
def test_a_mesh_of_auto_and_explicit_axes_is_refused_where_packing_is_impossible(spec):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto, AxisType.Explicit))
    with pytest.raises(ValueError, match=r"leaf 'bad' is sharded .*Auto and Explicit.*leave the parameters unpacked"):
        pack(spread(mesh, {"fine": ((4,), jnp.float32, P("y")), "bad": ((4, 4), jnp.float32, spec)}))
    fine = spread(mesh, {"fine": ((4,), jnp.float32, P("y"))})
    assert_same(unpack(pack(fine)), fine)


def test_a_mesh_axis_of_one_device():
    params = spread(make_mesh((4, 1), ("x", "y"), AxisType.Auto), TWO_AXES)
    packed = pack(params)
    assert {str(buffer.sharding) for buffer in packed.layout.buffers} > {"None"}
    for name, leaf in jax.jit(unpack)(packed).items():
        np.testing.assert_array_equal(leaf, params[name])
        assert leaf.sharding.is_equivalent_to(params[name].sharding, leaf.ndim)


def test_an_explicit_mesh_of_one_device():
    """Its axes are in the type of an array, so leaves that name them share no buffer with others."""
    params = spread(make_mesh((1,), ("x",), AxisType.Explicit), LINE)
    packed = pack(params)
    for name, leaf in unpack(packed).items():
        np.testing.assert_array_equal(leaf, params[name])
        assert jax.typeof(leaf) == jax.typeof(params[name])


def test_inside_jit_an_explicit_mesh_shows_the_sharding_of_leaves():
    params = spread(make_mesh((4,), ("x",), AxisType.Explicit), LINE)
    packed = jax.jit(pack)(params)
    assert [b.shape for b in packed.buffers] == [b.shape for b in pack(params).buffers]
    for one, other in zip(packed.buffers, pack(params).buffers, strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)
    assert_same(unpack(packed), params)


def test_a_leaf_on_one_of_several_devices_is_not_split():
    there = jax.device_put(jnp.arange(4.0), jax.devices()[1])
    packed = pack({"a": there, "b": there + 1})
    assert packed.layout.buffers[0].sharding is None
    assert packed.buffers[0].devices() == {jax.devices()[1]}


class TestStacks:
    params = {
        "a": filled((2, 3), jnp.float32, 1),
        "b": filled((3,), jnp.float32, 2),
        "c": filled((2, 3), jnp.float32, 3),
        "half": filled((2, 3), jnp.bfloat16, 4),
        "s": filled((), jnp.float32, 5),
        "t": filled((), jnp.float32, 6),
        "one": filled((1,), jnp.float32, 7),
        "empty": filled((0, 2), jnp.float32),
        "d": filled((2, 3), jnp.float32, 8),
    }

    def test_a_function_on_stacks_runs_once_per_shape(self):
        seen = []

        def scale(leaf, other):
            return (leaf / (1 + jnp.sum(leaf)) + jnp.max(other, initial=0)).astype(leaf.dtype)

        def on_stack(stack, others):
            assert stack.shape == others.shape
            seen.append(stack.shape)
            return jax.vmap(scale)(stack, others)

        packed = pack(self.params)
        others = jax.tree.map(lambda buffer: -buffer, packed)
        mapped = jax.jit(lambda *trees: nnlearn.map_stacks(on_stack, *trees))(packed, others)
        assert sorted(seen) == [(1, 0, 2), (1, 1), (1, 2, 3), (1, 3), (2,), (3, 2, 3)]
        expected = jax.jit(lambda params: jax.tree.map(lambda leaf: scale(leaf, -leaf), params))(self.params)
        jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), unpack(mapped), expected)
        assert mapped.layout is packed.layout

    def test_labels_separate_stacks(self):
        seen = []
        packed = pack({"a": jnp.ones(2), "b": jnp.ones(2)}, {"a": 0, "b": 1})
        nnlearn.map_stacks(lambda stack: seen.append(stack.shape) or stack, packed)
        assert seen == [(1, 2), (1, 2)]

    def test_values_of_leaves_are_in_tree_order(self):
        total = lambda leaf: jnp.sum(leaf.astype(jnp.float32))  # noqa: E731
        values = stack_values(jax.vmap(total), pack(self.params))
        np.testing.assert_array_equal(values, [total(leaf) for leaf in jax.tree.leaves(self.params)])
        two = stack_values(jax.vmap(lambda x, y: total(x) * total(y)), pack(self.params), pack(self.params))
        np.testing.assert_array_equal(two, values**2)
        assert stack_values(jax.vmap(total), pack({})).shape == (0,)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64])
    def test_norms_of_leaves(self, dtype):
        params = [filled(leaf.shape, dtype, 3 * seed) for seed, leaf in enumerate(self.params.values())]
        wide = [np.asarray(leaf.astype(jnp.promote_types(dtype, jnp.float32))) for leaf in params]
        expected = np.array([np.linalg.norm(leaf.ravel()) for leaf in wide], np.float32)
        for tree in (params, pack(params), pack(params, list("abcabcabc"))):
            norms = jax.jit(nnlearn.leaf_norms)(tree)
            assert norms.dtype == jnp.float32
            np.testing.assert_allclose(norms, expected, rtol=1e-6)

    def test_norms_under_vmap_and_their_derivative_at_zero(self):
        packed = pack(small())
        stacked = jax.tree.map(lambda buffer: jnp.stack([buffer, 2 * buffer]), packed)
        norms = jax.jit(jax.vmap(nnlearn.leaf_norms))(stacked)
        np.testing.assert_allclose(norms[1], 2 * norms[0], rtol=1e-6)
        np.testing.assert_allclose(norms[0], nnlearn.leaf_norms(small()), rtol=1e-6)
        zeros = jax.tree.map(jnp.zeros_like, packed)
        gradient = jax.jit(jax.grad(lambda packed: jnp.sum(nnlearn.leaf_norms(packed))))(zeros)
        assert_same(gradient, zeros)

    def test_norms_of_bfloat16_are_summed_in_float32(self):
        """In bfloat16, the sum of 4,096 ones is 256."""
        norms = nnlearn.leaf_norms(pack([jnp.ones(4096, jnp.bfloat16), jnp.ones(4096, jnp.bfloat16)]))
        np.testing.assert_array_equal(norms, [64.0, 64.0])

    def test_norms_take_one_reduction_per_shape(self):
        tree = [jnp.ones((3, 2))] * 20 + [jnp.ones(5)] * 20
        sums = 3  # one for plain squares, one for norms whose squares overflow or underflow
        assert primitives(nnlearn.leaf_norms, pack(tree))["reduce_sum"] == 2 * sums
        assert primitives(nnlearn.leaf_norms, tree)["reduce_sum"] == 40 * sums


class TestPerBuffer:
    params = {"w": jnp.ones((2, 2)), "v": jnp.ones((3, 2)), "b": jnp.zeros(2), "s": jnp.zeros(())}

    @staticmethod
    def matrices(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    def test_unpacked_parameters_get_the_rule_itself(self):
        assert nnlearn.per_buffer(self.matrices)(self.params) == self.matrices(self.params)
        assert nnlearn.per_buffer({"w": True})(self.params) == {"w": True}

    def test_uniform_buffers_get_one_answer(self):
        packed = pack(self.params, self.matrices)
        answer = nnlearn.per_buffer(self.matrices)(packed)
        assert unpack(answer) == self.matrices(self.params)
        assert jax.tree.structure(answer) == jax.tree.structure(packed)
        assert unpack(nnlearn.per_buffer(self.matrices(self.params))(packed)) == self.matrices(self.params)
        assert set(nnlearn.per_buffer(True)(packed).buffers) == {True}

    def test_a_rule_by_path(self):
        rule = lambda params: {name: "w" if name in "wv" else "rest" for name in params}  # noqa: E731
        packed = pack(self.params, rule)
        assert unpack(nnlearn.per_buffer(rule)(packed)) == rule(self.params)
        assert unpack(nnlearn.per_buffer({"w": "w", "v": "w", "b": "rest", "s": "rest"})(packed)) == rule(self.params)

    @pytest.mark.parametrize("as_tree", [True, False])
    def test_a_rule_that_divides_a_buffer_is_refused(self, as_tree):
        rule = self.matrices(self.params) if as_tree else self.matrices
        with pytest.raises(ValueError, match=r"the rule says False for 's' and True for 'w'.*'float32'.*labels=rule"):
            nnlearn.per_buffer(rule)(pack(self.params))

    def test_a_rule_accepts_shapes(self):
        shapes = jax.eval_shape(lambda: pack(self.params, self.matrices))
        assert unpack(nnlearn.per_buffer(self.matrices)(shapes)) == self.matrices(self.params)

    @pytest.mark.parametrize("make", ["masked", "partition"])
    def test_masks_and_partitions_of_optax(self, make):
        if make == "masked":
            of = lambda rule: optax.masked(optax.add_decayed_weights(0.5), rule)  # noqa: E731
            rule = self.matrices
        else:
            rule = lambda params: jax.tree.map(lambda leaf: "m" if leaf.ndim > 1 else "v", params)  # noqa: E731
            of = lambda rule: optax.partition({"m": optax.adam(0.1), "v": optax.sgd(0.2, 0.9)}, rule)  # noqa: E731
        tx, plain = of(nnlearn.per_buffer(rule)), of(rule)
        packed, params = pack(self.params, rule), self.params
        state, plain_state = tx.init(packed), plain.init(params)
        assert_same(unpack(state), plain_state)
        for seed in range(2):
            grads = jax.tree.map(lambda leaf, seed=seed: jnp.cos(leaf + seed), params)
            expected = updates, plain_state = plain.update(grads, plain_state, params)
            found = changes, state = tx.update(pack_like(packed.layout, grads), state, packed)
            assert jax.tree.structure(unpack(found)) == jax.tree.structure(expected)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), unpack(found), expected)


@pytest.mark.parametrize(
    ("count", "size", "worth"),
    [(16, 10, True), (15, 10, False), (1000, 10, True), (16, 100_000, True), (16, 100_001, False), (1, 10, False)],
)
def test_many_small_leaves_are_worth_packing(count, size, worth):
    assert worth_packing([jax.ShapeDtypeStruct((size,), jnp.float32)] * count) is worth


def test_the_average_size_decides_whether_leaves_are_small():
    large = [jax.ShapeDtypeStruct((1000, 1000), jnp.float32)]
    small = [jax.ShapeDtypeStruct((4,), jnp.float32)]
    assert worth_packing(large + small * 20) and not worth_packing(large * 4 + small * 20)
    assert worth_packing([0.5] * 16) and not worth_packing({})
