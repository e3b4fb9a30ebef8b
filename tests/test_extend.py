"""What rules of one's own are made of: the worked rule of the page, and ours made again from the same parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from lrules import extend
from tests.bridge import close
from tests.small import half_square

KEY = jax.random.key(0)
X, Y = jax.random.normal(KEY, (6, 4)), jnp.zeros((6, 2))
P = {name: jax.random.normal(jax.random.key(i), shape) / 2 for i, (name, shape) in enumerate(
    {"a": (4, 5), "b": (3, 5, 5), "c": (5, 2)}.items())}  # fmt: skip


def scanned(p, x):
    h = jnp.tanh(x @ p["a"])
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p["b"])
    return h @ p["c"]


def examples():
    """What the worked example of the docstring defines."""
    lines = [line.strip() for line in extend.__doc__.splitlines()]
    source = "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... ")))
    names = {}
    exec(source, names)
    return names


def test_the_worked_rule():
    """Its weights descend the loss on average, in a loop too; and it passes the test of all rules."""
    perturbed = examples()["perturbed"]
    lrules.testing.check_rule(perturbed(0.5))
    rule = perturbed(0.01)
    step = lrules.value_and_grad(scanned, half_square, rule)
    keys = jax.random.split(jax.random.key(1), 3000)
    found = jax.jit(jax.vmap(lambda k: step(P, lrules.Feedback({}, {}), X, Y, rng=k)[1].params))(keys)
    mean = jax.tree.map(lambda g: g.mean(0), found)
    wanted = jax.grad(lambda p: half_square(scanned(p, X), Y).mean())(P)
    for name in P:
        a, b = np.ravel(mean[name]), np.ravel(wanted[name])
        assert a @ b > 0.9 * np.linalg.norm(a) * np.linalg.norm(b), name
    assert all(not np.allclose(found["b"][0, 0], found["b"][0, i]) for i in (1, 2))  # each iteration its own noise
    by_hand = lambda p, x: jnp.sum(x[:, :, None] * p["w"][None], 1)  # noqa: E731
    with pytest.raises(NotImplementedError, match="'w'"):
        rule.init(KEY, by_hand, {"w": jnp.ones((4, 2))}, X)


class _Wide(extend.Handler):
    """Adds what is given at each place, and records what was there."""

    activations, affines = True, True

    def layer(self, layer, op, w, b, x, frame):
        frame.records[layer.at_output] = y = op(w, x)
        return y + frame.inputs.get(layer.at_output, 0)

    def hidden(self, hidden, value, frame):
        frame.records[hidden.name] = value
        return value + frame.inputs.get(hidden.name, 0)

    def activation(self, activation, fn, x, frame):
        frame.records[activation.site] = x
        return fn(x)


def test_running_with_handlers():
    """Records and what is given have the length of the loop in front; without a handler it is the network."""
    outputs, aux, records = extend.run(scanned, P, X, [_Wide()])
    close(outputs, scanned(P, X), 1e-5)
    assert aux is None
    shapes = {name: value.shape for name, value in records.items()}
    assert shapes == {
        "a output": (6, 5), "b output": (3, 6, 5), "c output": (6, 2), "b": (3, 6, 5), "c": (6, 5), "tanh": (3, 6, 5),
        "tanh#2": (6, 5),
    }  # fmt: skip
    graph = extend.as_network(scanned).graph(P, X)
    (layer,) = [layer for layer in graph.layers if layer.name == "b"]
    probe = extend.zeros_at(layer.output)
    assert probe.shape == (3, 6, 5)

    def probed(given):
        return extend.run(scanned, P, X, [_Wide()], given=given)[0].sum()

    slopes = jax.grad(probed)({"b output": probe})["b output"]
    h = jnp.tanh(X @ P["a"])
    for i in range(3):
        rest = lambda z, i=i: scanned({"a": jnp.eye(5), "b": P["b"][i + 1 :], "c": P["c"]}, z).sum()  # noqa: E731
        z = h @ P["b"][i]
        close(slopes[i], jax.grad(rest)(z), 1e-5)
        h = jnp.tanh(z)
    net = lrules.Network(lambda p, x: (scanned(p, x), x.sum()), has_aux=True)
    close(extend.run(net, P, X)[:2], (scanned(P, X), X.sum()), 1e-5)


@pytest.mark.parametrize("handlers", [_Wide(), [_Wide], "handlers", [1]])
def test_handlers_are_a_list_of_handlers(handlers):
    with pytest.raises(TypeError, match="handlers must be a list of handlers, such as"):
        extend.run(lambda p, x: x @ p, jnp.eye(2), jnp.ones((3, 2)), handlers)


def test_ours_made_again():
    """Feedback alignment and direct feedback alignment from `layerwise`, direct feedback's gradient by `correlate`."""

    def backward(op, w, b, x, d, layer):
        return op.weight_gradient(w, x, d), op.passed_down(b, x, d), None

    normal = jax.nn.initializers.glorot_normal()
    for ours, spec in [
        (lrules.feedback_alignment(), extend.Sequential(backward, normal)),
        (lrules.direct_feedback_alignment(), extend.Direct(lambda e, b, t, name: extend.project(e, b), normal)),
        (
            lrules.direct_feedback_alignment(adaptive=True),
            extend.Direct(lambda e, b, t, name: extend.project(e, b), normal, extend.correlate),
        ),
        (lrules.backprop(), extend.Backprop()),
    ]:
        mine = extend.layerwise(lambda graph, spec=spec: lambda name: spec, [spec], layer=spec)
        feedback = mine.init(KEY, scanned, P, X)
        close(feedback, ours.init(KEY, scanned, P, X), 0)
        got, want = (lrules.value_and_grad(scanned, half_square, r)(P, feedback, X, Y)[1] for r in (mine, ours))
        close(got, want, 1e-6)
        within = lrules.partition({"a": lrules.backman(), ".*": mine}) if mine.additive else mine
        within.init(KEY, scanned, P, X)


def test_a_plan_runs_with_probes():
    """The error that a rule sends to a layer, as the gradient of a probe there."""
    rule = lrules.feedback_alignment()
    net = extend.as_network(scanned)
    feedback = rule.init(KEY, net, P, X)
    graph = net.graph(P, X)
    plan = extend.require_description(rule, "the test").plan(net, graph, P, X)
    assert isinstance(plan, extend.Plan)

    def sent(probes):
        frame = extend.Frame(probes)
        outputs, _ = extend.evaluate(plan, net.parameters(P), feedback.fixed, [X], graph.consts, [_Wide()], frame)
        return half_square(outputs, Y).mean()

    (first,) = [layer for layer in graph.layers if layer.name == "a"]
    arriving = jax.grad(sent)({first.at_output: extend.zeros_at(first.output)})[first.at_output]
    grads = lrules.value_and_grad(net, half_square, rule)(P, feedback, X, Y)[1].params
    close(grads["a"], X.T @ arriving, 1e-5)


def test_keys():
    frame = extend.Frame()
    keys = [
        extend.key_at(KEY, "a", X, frame),
        extend.key_at(KEY, "b", X, frame),
        extend.key_at(KEY, "a", X, extend.Frame(index=(jnp.asarray(0),))),
        extend.key_at(KEY, "a", X, extend.Frame(index=(jnp.asarray(1),))),
        KEY,
    ]
    assert len({jax.random.key_data(k).tobytes() for k in keys}) == 5
    again = extend.key_at(KEY, "a", {"several": X}, extend.Frame())
    assert (jax.random.key_data(again) == jax.random.key_data(keys[0])).all()
