"""What a walk writes down: names of sites, what is no layer in the end, and what cannot be served."""

import jax
import jax.numpy as jnp
from jax import lax

import lrules

X = jnp.ones((4, 3))


def graph(apply, params, inputs=X):
    return lrules.Network(apply).graph(params, inputs)


def test_further_uses_of_a_weight_are_numbered():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}
    found = graph(lambda p, x: jnp.tanh(jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["a"]) @ p["a"], params)
    assert [layer.site for layer in found.layers] == ["a", "b", "a#2", "a#3"]
    assert [hidden.name for hidden in found.hidden] == ["b", "a", "a#2"]  # by the first layer that reads it
    assert [activation.site for activation in found.activations] == ["tanh", "tanh#2", "tanh#3"]


def test_a_number_that_a_parameter_has_in_its_name_is_not_taken_twice():
    params = {"a": jnp.ones((3, 3)), "a#2": jnp.ones((3, 3))}
    found = graph(lambda p, x: ((x @ p["a"]) @ p["a#2"]) @ p["a"], params)
    sites = [layer.site for layer in found.layers]
    assert len(set(sites)) == 3 and sites[:2] == ["a", "a#2"]


def test_marks_and_layers_have_names_of_their_own():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}
    found = graph(lambda p, x: lrules.hidden(jnp.sin(x @ p["a"]), "middle") @ p["b"], params)
    assert {(hidden.name, hidden.mark) for hidden in found.hidden} == {("middle", True), ("b", False)}


def test_biases_and_scales_have_sites():
    params = {"a": jnp.ones((3, 3)), "bias": jnp.ones(3), "scale": jnp.ones(3)}
    found = graph(lambda p, x: (x @ p["a"] + p["bias"][None]) * p["scale"][None], params)
    assert [sorted(affine.value.params) for affine in found.affines] == [[1], [2]]
    assert len({affine.site for affine in found.affines}) == 2


def test_a_table_of_rows_that_only_make_a_weight_is_no_layer():
    """The rows of an embedding are a layer's outputs; the rows of a table of experts are weights."""
    ids = jnp.array([0, 1, 1, 0])
    params = {"table": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    found = graph(lambda p, i: jnp.tanh(p["table"][i]) @ p["b"], params, ids)
    assert [layer.name for layer in found.layers] == ["table", "b"]
    params = {"experts": jnp.ones((2, 3, 3)), "b": jnp.ones((3, 2))}

    def mixture(p, inputs):
        x, i = inputs
        return jnp.tanh(jnp.einsum("ni,nio->no", x, p["experts"][i])) @ p["b"]

    found = graph(mixture, params, (X, ids))
    assert [(layer.name, layer.operation) for layer in found.layers] == [
        ("experts", "dot_general"), ("b", "dot_general"),
    ]  # fmt: skip


def test_what_cannot_be_served_is_written_down_once():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}

    def apply(p, x):
        body = lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["a"]) @ p["a"])  # noqa: E731
        return lax.while_loop(lambda c: c[0] < 3, body, (0, x))[1] @ p["b"]

    found = graph(apply, params)
    assert [refusal.parameters for refusal in found.refusals] == [frozenset([0])]
    assert not found.refusals[0].differentiable and "'a'" in found.refusals[0].sentence
    assert [layer.name for layer in found.layers] == ["b"]


def test_walking_a_loop_until_its_classes_settle_writes_nothing_twice():
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones((3, 3))}

    def apply(p, x):
        step = lambda c, _: ((c[1], jnp.tanh(c[0] @ p["a"])), None)  # noqa: E731
        (c, d), _ = lax.scan(step, (x, x), None, length=4)
        return (c + d) @ p["b"]

    found = graph(apply, params)
    assert [layer.site for layer in found.layers] == ["a", "b"]
    assert [activation.site for activation in found.activations] == ["tanh"]
    grads = jax.grad(lambda p: lrules.transform(apply, lrules.backprop())(p, lrules.Feedback({}, {}), X).sum())(params)
    assert grads["a"].shape == (3, 3)


def test_what_is_found_is_shown_in_a_short_line():
    params = {"a": jnp.ones((3, 3)), "bias": jnp.ones(3), "b": jnp.ones((3, 3))}
    found = graph(lambda p, x: jnp.tanh(x @ p["a"] + p["bias"][None]) @ p["b"], params)
    for thing in (*found.layers, *found.hidden, *found.activations, *found.affines):
        assert len(repr(thing)) < 300 and "readers=" not in repr(thing)
