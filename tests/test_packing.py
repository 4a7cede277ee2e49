"""Packing: a tree as a few large buffers and back, to the bit, through whatever JAX does with a tree."""

import io
from collections import Counter
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnlearn
from nnlearn.packing import Layout, is_packed, make_layout, pack, pack_like, unpack, worth_packing

few = hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array | None


def filled(shape, dtype, seed=0):
    """Numbers of any dtype, all different where it can hold them."""
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
    """Two trees are the same in structure, dtypes, shapes and bits."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), strict=True)


def small():
    return {"w": filled((3, 4), jnp.float32), "b": filled((4,), jnp.float32, 20), "s": filled((), jnp.float32, 40)}


def test_every_kind_of_tree_comes_back_to_the_bit():
    params = every_kind()
    packed = pack(params)
    assert_same(unpack(packed), params)
    assert len(packed.buffers) == 6 == len({buffer.dtype for buffer in packed.buffers})
    assert len(packed) == len(jax.tree.leaves(params))
    assert sum(buffer.size for buffer in packed.buffers) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_leaves_of_equal_shape_lie_side_by_side_in_the_trees_order():
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


def test_python_and_numpy_numbers_come_back_as_arrays_of_their_dtype():
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
def test_any_tree_comes_back_whatever_its_labels(params, data):
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
def test_what_is_no_array_of_numbers_is_refused_by_its_path(leaf, kind):
    with pytest.raises(TypeError, match=rf"'outer/1'.*{kind}.*keep it out of params"):
        pack({"outer": [jnp.ones(1), leaf]})


def test_random_keys_are_no_parameters():
    with pytest.raises(TypeError, match=r"'key' has dtype key<.*holds no numbers"):
        pack({"key": jax.random.key(0)})


class TestLabels:
    params = {"enc": {"w": jnp.ones((2, 2)), "b": jnp.zeros(2)}, "dec": {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}}

    def test_a_tree_a_prefix_and_a_function_say_the_same(self):
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
    def test_a_mask(self, truth):
        mask = jax.tree.map(lambda leaf: truth(leaf.ndim > 1), self.params)
        packed = pack(self.params, mask)
        assert {buffer.label for buffer in packed.layout.buffers} == {True, False}
        assert all(type(buffer.label) is bool for buffer in packed.layout.buffers)
        assert_same(unpack(packed), self.params)

    def test_one_label_for_all_is_one_buffer(self):
        assert repr(pack(self.params, "all")) == "Packed(4 leaves: float32/all[15])"

    def test_labels_of_different_kinds_stay_apart(self):
        packed = pack({"a": jnp.ones(1), "b": jnp.ones(2)}, {"a": 1, "b": True})
        assert [(type(buffer.label), buffer.label) for buffer in packed.layout.buffers] == [(int, 1), (bool, True)]

    def test_labels_part_within_a_dtype_only(self):
        params = {"a": jnp.ones(1), "b": jnp.ones(2, jnp.bfloat16), "c": jnp.ones(3), "d": jnp.ones(4, jnp.bfloat16)}
        packed = pack(params, {"a": "x", "b": "x", "c": "y", "d": "x"})
        assert repr(packed) == "Packed(4 leaves: float32/x[1], bfloat16/x[6], float32/y[3])"

    def test_none_without_labels(self):
        assert pack(self.params).layout.labels is None

    @pytest.mark.parametrize("bad", [1.5, b"x", jnp.array(True), np.float32(1)], ids=repr)
    def test_only_strings_booleans_and_integers(self, bad):
        with pytest.raises(TypeError, match="labels must be strings, booleans or integers"):
            pack({"a": jnp.ones(1)}, {"a": bad})

    @pytest.mark.parametrize("bad", [{"a": "x"}, ["x", "y"], {"a": "x", "b": None}, {"a": {"deep": "x"}, "b": "y"}])
    def test_labels_that_do_not_fit(self, bad):
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

    def test_a_dict_of_it(self):
        found = dict(self.packed)
        assert list(found) == list(self.packed.keys())
        assert_same(list(found.values()), jax.tree.leaves(every_kind()))

    def test_an_unknown_path_names_near_ones(self):
        with pytest.raises(KeyError, match=r"no leaf at 'deep/er/complx'; there are 11, such as .*'deep/er/complex'"):
            self.packed["deep/er/complx"]
        with pytest.raises(KeyError, match=r"no leaf at 0; there are 11, such as 'deep/er/complex', "):
            self.packed[0]

    def test_it_reads_leaves_inside_of_jit_and_of_buffers_with_axes_in_front(self):
        packed = pack(small())
        assert_same(jax.jit(lambda packed: packed["w"])(packed), small()["w"])
        stacked = jax.tree.map(lambda buffer: jnp.stack([buffer, 2 * buffer]), packed)
        assert_same(stacked["w"], jnp.stack([small()["w"], 2 * small()["w"]]))
        assert_same(stacked["s"], jnp.stack([small()["s"], 2 * small()["s"]]))

    def test_repr_tells_buffers_dtypes_and_what_stands_for_them(self):
        params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3, jnp.bfloat16)}
        packed = pack(params)
        assert repr(packed) == "Packed(2 leaves: float32[4], bfloat16[3])"
        assert repr(packed.layout) == "Layout(2 leaves: float32[4] of 1, bfloat16[3] of 1)"
        moments = jax.tree.map(lambda buffer: buffer.astype(jnp.float32), packed)
        assert repr(moments) == "Packed(2 leaves: float32[4], float32 for bfloat16[3])"
        assert repr(jax.tree.map(lambda buffer: True, packed)) == "Packed(2 leaves: float32: True, bfloat16: True)"


class TestLayout:
    def test_two_made_alike_are_one(self):
        one, other = pack(every_kind()).layout, pack(every_kind()).layout
        assert one is not other and one == other and hash(one) == hash(other)
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
    def test_two_made_of_different_trees_are_not(self, other):
        assert pack({"a": jnp.ones((2, 3)), "b": jnp.ones(2)}).layout != pack(other).layout

    def test_labels_tell_apart(self):
        layouts = [None, "x", "y", 1, True, {"a": "x", "b": "y"}]
        made = [make_layout({"a": jnp.ones(1), "b": jnp.ones(2)}, labels) for labels in layouts]
        assert len(set(made)) == len(made)
        assert made[0] != "a layout"

    def test_the_tree_of_shapes(self):
        assert make_layout(every_kind()).tree() == jax.eval_shape(every_kind)

    def test_a_compiled_function_takes_one_made_anew(self):
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

    def test_packing_as_another_tree_is(self):
        layout = pack(small()).layout
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), small())
        assert_same(unpack(pack_like(layout, wide)), wide)
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 1]), small())
        packed = pack_like(layout, stacked)
        assert packed.buffers[0].shape == (2, 17)
        assert_same(unpack(packed), stacked)

    def test_packing_another_tree_is_refused(self):
        layout = pack(small()).layout
        with pytest.raises(ValueError, match="the tree is not the one that was packed"):
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

    def test_in_a_larger_tree_all_are_unpacked(self):
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

    def test_scan_carries_it_and_stacks_it(self):
        def body(packed, x):
            packed = jax.tree.map(lambda buffer: buffer * x, packed)
            return packed, packed

        xs = jnp.array([2.0, 3.0])
        last, trace = jax.lax.scan(body, pack(small()), xs)
        assert_same(unpack(last), jax.tree.map(lambda leaf: leaf * 6, small()))
        assert_same(unpack(trace), jax.tree.map(lambda leaf: jnp.stack([leaf * 2, leaf * 6]), small()))
        xs, taken = jax.lax.scan(lambda carry, packed: (carry, unpack(packed)), None, trace)
        assert_same(taken, unpack(trace))

    def test_cond_while_and_checkpoint_take_it(self):
        def body(packed):
            double = lambda packed: jax.tree.map(lambda buffer: 2 * buffer, packed)  # noqa: E731
            return jax.lax.cond(packed["s"] < 100, double, lambda packed: packed, packed)

        done = jax.lax.while_loop(lambda packed: packed["s"] < 100, jax.checkpoint(body), pack(small()))
        assert_same(unpack(done), jax.tree.map(lambda leaf: 4 * leaf, small()))

    def test_donation_takes_the_buffers(self):
        packed, params = pack(small()), small()
        add = jax.jit(lambda packed: jax.tree.map(lambda buffer: buffer + 1, packed), donate_argnums=0)
        result = add(packed)
        assert all(buffer.is_deleted() for buffer in packed.buffers)
        assert_same(unpack(result), jax.tree.map(lambda leaf: leaf + 1, params))

    def test_eval_shape_gives_its_shapes_and_back(self):
        shapes = jax.eval_shape(pack, every_kind())
        assert shapes.layout == pack(every_kind()).layout
        assert [(s.shape, s.dtype) for s in shapes.buffers] == [(b.shape, b.dtype) for b in pack(every_kind()).buffers]
        assert jax.eval_shape(unpack, shapes) == jax.eval_shape(every_kind)

    def test_arrays_on_the_host_stand_in_for_the_buffers(self):
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

    def test_what_stands_for_a_buffer_stands_for_its_leaves(self):
        packed = pack(small(), labels={"w": "m", "b": "v", "s": "v"})
        mask = jax.tree.map(lambda buffer: buffer.size > 5, packed)
        assert unpack(mask) == {"w": True, "b": False, "s": False}
        part = optax.masked(optax.identity(), mask)
        taken = jax.tree.map(lambda keep, buffer: buffer if keep else optax.MaskedNode(), mask, packed)
        tree = {"w": small()["w"], "b": optax.MaskedNode(), "s": optax.MaskedNode()}
        assert_same(unpack(taken), tree)
        assert_same(pack_like(packed.layout, tree), taken)
        assert_same(part.update(packed, part.init(packed))[0], packed)
