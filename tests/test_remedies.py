"""What a refusal tells the user to do works: for every sentence, the network or rule after its remedy, which is served.

Whether it is served is seen by tracing gradients: nothing is compiled. What the numbers of a remedy are, the tests of
what is served say.
"""

import contextlib
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import lrules

KEY = jax.random.key(0)
X = jax.random.normal(KEY, (4, 5))
W = {"a": jnp.ones((5, 6)), "b": jnp.ones((6, 6)), "c": jnp.ones((6, 3))}
FA, DFA, BACKMAN = lrules.feedback_alignment(), lrules.direct_feedback_alignment(), lrules.backman()
PLAIN = lrules.backprop()
NODES = lrules.node_perturbation(0.1)
DUAL = lrules.dual_propagation()
TARGETS = lrules.difference_target_propagation()
CODING, EQUILIBRIUM = lrules.predictive_coding(), lrules.equilibrium_propagation()
RULES = {  # every family
    "feedback_alignment": FA,
    "kolen_pollack": lrules.kolen_pollack(),
    "sign_symmetry": lrules.sign_symmetry(),
    "backman": BACKMAN,
    "direct": DFA,
    "monotone": lrules.monotone_dfa(),
    "targets": lrules.random_target_projection(),
    "skipped": lrules.skipped_backprop(),
    "last_layer_only": lrules.last_layer_only(),
    "nodes": NODES,
    "direct nodes": lrules.node_perturbation(0.1, direct=True),
    "forward": lrules.forward_gradient("activations"),
    "local": lrules.local_losses(),
    "difference targets": TARGETS,
    "dual": DUAL,
    "dual with feedback": lrules.dual_propagation(feedback_rule=FA),
    "coding": CODING,
    "modified": lrules.quantize_error(FA, 3),
    "modified direct": lrules.sign_error(DFA),
}


def served(net, rule, params=W, inputs=X):
    """Gradients of all parameters can be traced."""
    feedback = rule.init(KEY, net, params, inputs)
    out = jax.eval_shape(net if callable(net) else net.__call__, params, inputs)
    targets = jnp.zeros((out[0] if isinstance(out, tuple) else out).shape)
    step = lrules.value_and_grad(net, lambda y, t: jnp.sum((y - t) ** 2, -1), rule)
    rng = {"rng": KEY} if rule.stochastic else {}
    grads = jax.eval_shape(lambda p: step(p, feedback, inputs, targets, **rng)[1].params, params)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


def refusal(net, rule, params=W, inputs=X, error=(NotImplementedError, ValueError)):
    """The sentence."""
    with pytest.raises(error) as caught:
        served(net, rule, params, inputs)
    message = str(caught.value)
    assert "\n" not in message
    return message


H = lambda p, x: jnp.tanh(x @ p["a"])  # noqa: E731


@jax.custom_vjp
def twice(w, x):
    return jnp.tanh(x @ w) @ w


def _twice(w, x):
    return jnp.tanh(x @ w) @ w


twice.defvjp(lambda w, x: (_twice(w, x), (w, x)), lambda r, d: jax.vjp(_twice, *r)[1](d))


@jax.custom_vjp
def looped(w, x):
    return lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ w), x)


def _looped(w, x):
    return lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ w), x)


looped.defvjp(lambda w, x: (_looped(w, x), (w, x)), lambda r, d: jax.vjp(_looped, *r)[1](d))


def in_a_while_loop(p, x):
    turn = lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["b"]))  # noqa: E731
    h = lax.while_loop(lambda s: s[0] < 2, turn, (0, H(p, x)))[1]
    return h @ p["c"]


def in_a_carry(p, x):
    step = lambda c, _: ((jnp.tanh(c[0] @ c[1]), 0.9 * c[1]), None)  # noqa: E731
    return lax.scan(step, (H(p, x), p["b"]), None, length=2)[0][0] @ p["c"]


# Uses of `b` that no rule serves; what the sentence says; what it tells to write in their place.
CONSTRUCTS = {
    "while": (
        in_a_while_loop,
        r"inside a while loop, .* \(rules serve a loop with numbers as bounds: lax.fori_loop, or lax.scan\)",
        [
            lambda p, x: lax.fori_loop(0, 2, lambda _, h: jnp.tanh(h @ p["b"]), H(p, x)) @ p["c"],
            lambda p, x: lax.scan(lambda h, _: (jnp.tanh(h @ p["b"]), None), H(p, x), None, length=2)[0] @ p["c"],
        ],
    ),
    "carry": (
        in_a_carry,
        r"a scan's carry .*: scan over it \(xs\), or use it from outside the loop",
        [
            lambda p, x: lax.scan(lambda h, w: (jnp.tanh(h @ w), None), H(p, x), jnp.stack([p["b"]] * 2))[0] @ p["c"],
            lambda p, x: lax.scan(lambda h, _: (jnp.tanh(h @ p["b"]), None), H(p, x), None, length=2)[0] @ p["c"],
        ],
    ),
    "own derivative": (
        lambda p, x: jnp.tanh(twice(p["b"], H(p, x))) @ p["c"],
        "inside a custom_vjp function, .*: move the multiplication out of the custom_vjp function",
        [lambda p, x: jnp.tanh(_twice(p["b"], H(p, x))) @ p["c"]],
    ),
    "loop with its own derivative": (
        lambda p, x: looped(p["b"], H(p, x)) @ p["c"],
        "inside a loop inside a custom_vjp function, .*: move the multiplication out of the loop",
        [lambda p, x: _looped(p["b"], H(p, x)) @ p["c"]],
    ),
    "unknown primitive": (
        lambda p, x: lax.linalg.triangular_solve(p["b"], H(p, x), left_side=False) @ p["c"],
        "'triangular_solve', which lrules does not know: write it with dot_general",
        [lambda p, x: (H(p, x) @ jnp.linalg.inv(jnp.tril(p["b"]) + jnp.eye(6))) @ p["c"]],
    ),
    "by hand": (
        lambda p, x: jnp.tanh((H(p, x)[:, :, None] * p["b"][None]).sum(1)) @ p["c"],
        "a layer written by hand: write it as a dot product or convolution",
        [
            lambda p, x: jnp.tanh(jnp.dot(H(p, x), p["b"])) @ p["c"],
            lambda p, x: jnp.tanh(jnp.einsum("bi,ij->bj", H(p, x), p["b"])) @ p["c"],
        ],
    ),
    "distances": (
        lambda p, x: jnp.tanh(((H(p, x)[:, None] - p["b"][None]) ** 2).sum(-1)) @ p["c"],
        r"a distance for example, .*: write it with a dot product \(\|h\|\^2 - 2 h.m \+ \|m\|\^2\)",
        [
            lambda p, x: (
                jnp.tanh((H(p, x) ** 2).sum(1, keepdims=True) - 2 * H(p, x) @ p["b"].T + (p["b"] ** 2).sum(1)[None])
                @ p["c"]
            )
        ],
    ),
}


def all_at_once(p, x):
    """No parameter meets data in a dot product."""
    h = jnp.tanh((x[:, :, None] * p["a"][None]).sum(1))
    h = jnp.tanh((h[:, :, None] * p["b"][None]).sum(1))
    return (h[:, :, None] * p["c"][None]).sum(1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CONSTRUCTS)
def test_constructs(name, rule):
    net, words, remedies = CONSTRUCTS[name]
    rule = RULES[rule]
    if rule in ACTIVATIONS_FIRST and name in ("while", "own derivative", "loop with its own derivative"):
        pytest.skip("its own sentence comes first: see below")
    message = refusal(net, rule, error=NotImplementedError)
    assert "'b'" in message and re.search(words, message), message
    for remedy in remedies:
        served(remedy, rule)
    offered = taken_by_a_partition(rule) and name != "while"  # of which JAX has no gradient
    assert ("'b' backprop() in a partition" in message) == offered, message
    if offered and rule.description.layer is not None:
        served(net, lrules.partition({"^b$": PLAIN, ".*": rule}))


def taken_by_a_partition(rule):
    return rule.description.layer is not None or rule.description.modified


ACTIVATIONS_FIRST = [DUAL, RULES["dual with feedback"], RULES["skipped"]]


MODIFIERS = {
    "modified": (FA, lambda rule: lrules.quantize_error(rule, 3)),
    "modified direct": (DFA, lrules.sign_error),
}


@pytest.mark.parametrize("name", MODIFIERS)
def test_a_modifier_goes_around_the_partition(name):
    rule, modify = MODIFIERS[name]
    net = CONSTRUCTS["by hand"][0]
    assert "'b' backprop() in a partition" in refusal(net, modify(rule))
    with pytest.raises(ValueError, match="put modifiers around the partition"):
        lrules.partition({"^b$": PLAIN, ".*": modify(rule)})
    served(net, modify(lrules.partition({"^b$": PLAIN, ".*": rule})))


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.description.layer is not None])
def test_all_layers_refused_at_once(rule):
    """One message names them all; a partition may give them backprop, though no layer is left for the rule."""
    rule = RULES[rule]
    message = refusal(all_at_once, rule, error=NotImplementedError)
    assert "the rule cannot serve 3 things: (1) " in message and "'a', 'b', 'c' backprop() in a partition" in message
    served(all_at_once, lrules.partition({"^[abc]$": PLAIN, ".*": rule}))
    one_left = lrules.partition({"^b$": PLAIN, ".*": rule})
    assert "'a', 'c' backprop() in a partition" in refusal(all_at_once, one_left)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.description.layer is not None])
@pytest.mark.parametrize("name", [*(name for name in CONSTRUCTS if name != "while"), "all"])
def test_a_partition_made_of_the_refusals(name, rule):
    net, rule = all_at_once if name == "all" else CONSTRUCTS[name][0], RULES[rule]
    if rule in ACTIVATIONS_FIRST and name in ("own derivative", "loop with its own derivative"):
        pytest.skip("its own sentence comes first: see below")
    found = lrules.refusals(net, rule, W, X)
    assert set(found) == (set("abc") if name == "all" else {"b"})
    assert all(sentence in refusal(net, rule) for sentence in found.values())
    made = lrules.partition({f"^{re.escape(n)}$": PLAIN for n in found} | {".*": rule})
    assert lrules.refusals(net, made, W, X) == {}
    served(net, made)


def test_refusals_of_what_is_served_are_none():
    for rule in RULES.values():
        assert lrules.refusals(lambda p, x: jnp.tanh(H(p, x) @ p["b"]) @ p["c"], rule, W, X) == {}


# --------------------------------------------------------------------------------------------- where a layer stands


def branch(p, x):
    h = H(p, x)
    return lax.cond(h.sum() > 0, lambda h: jnp.tanh(h @ p["b"]), lambda h: h, h) @ p["c"]


def no_branch(p, x):
    h = H(p, x)
    return lax.cond(h.sum() > 0, lambda h, above: above, lambda h, above: h, h, jnp.tanh(h @ p["b"])) @ p["c"]


DIRECT = ["direct", "monotone", "targets", "skipped", "direct nodes", "modified direct"]


@pytest.mark.parametrize("rule", DIRECT)
def test_direct_rules_in_a_branch(rule):
    rule = RULES[rule]
    message = refusal(branch, rule, error=NotImplementedError)
    assert re.search("layer 'b' lies inside a cond, .* or move the layer out of the cond", message), message
    served(no_branch, rule)
    assert ("partition" in message) == ("sequential rule for it" in message) == taken_by_a_partition(rule), message
    served(branch, FA)
    if rule.description.layer is not None:
        for other in (FA, PLAIN):
            served(branch, lrules.partition({"^b$": other, ".*": rule}))


@pytest.mark.parametrize("rule", [NODES, DUAL, EQUILIBRIUM])
def test_rules_of_the_whole_network_in_a_branch(rule):
    message = refusal(branch, rule, error=NotImplementedError)
    assert "inside a cond" in message and "move" in message and "partition" not in message
    served(no_branch, rule)
    served(branch, FA)
    if "passing" in message:
        (names,) = re.findall(r"passing=(\{.*?\})", message)
        served(branch, lrules.dual_propagation(passing=eval(names)))  # noqa: S307


@pytest.mark.parametrize("axes", ["unchecked", "split"])
def test_backman_inside_a_shard_map(axes):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def net(check, weight):
        def apply(p, x):
            inner = lambda w, h: lax.psum(h @ w, "d") if weight else h @ w  # noqa: E731
            specs = (P("d"), P(None, "d")) if weight else (P(), P("d"))
            out = P() if weight else P("d")
            mapped = jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check)
            return jnp.tanh(mapped(p["b"], H(p, x))) @ p["c"]

        return apply

    refused = net(False, False) if axes == "unchecked" else net(True, True)
    message = refusal(refused, BACKMAN)
    assert "use another rule for it" in message and "'b' backprop() in a partition" in message
    for other in (FA, PLAIN):
        served(refused, lrules.partition({"^b$": other, ".*": BACKMAN}))
    if axes == "unchecked":
        assert "set check_vma=True" in message
        served(net(True, False), BACKMAN)


def test_weights_chosen_for_each_example():
    params = {"a": W["a"], "e": jnp.ones((3, 6, 3))}
    inputs = (X, jnp.arange(4) % 3)
    gathered = lambda p, i: jnp.einsum("bi,bio->bo", H(p, i[0]), p["e"][i[1]])  # noqa: E731
    message = refusal(gathered, BACKMAN, params, inputs)
    assert "multiply by every choice and select among the products, or use another rule" in message
    choices = lambda p, i: jnp.einsum("bi,eio,be->bo", H(p, i[0]), p["e"], jax.nn.one_hot(i[1], 3))  # noqa: E731
    served(choices, BACKMAN, params, inputs)
    for other in (FA, PLAIN):
        served(gathered, lrules.partition({"^e$": other, ".*": BACKMAN}), params, inputs)


# ------------------------------------------------------------------------------------------------ where the batch lies


def summed(p, x):
    return (jnp.tanh(H(p, x) @ p["b"]) @ p["c"]).sum(0)


def reversed_inside(p, x):
    return (jnp.tanh(H(p, x)[::-1] @ p["b"])[::-1]) @ p["c"]


def microbatches(p, x):
    return jnp.concatenate([H(p, x[i : i + 2]) @ p["c"] for i in range(0, len(x), 2)])


IN_ORDER = lambda p, x: jnp.tanh(H(p, x) @ p["b"]) @ p["c"]  # noqa: E731
SENDERS, RECEIVERS = jnp.array([0, 1, 2, 3, 0]), jnp.array([1, 2, 3, 0, 2])
GRAPH = lambda p, x: jax.ops.segment_sum(H(p, x)[SENDERS], RECEIVERS, num_segments=4) @ p["c"]  # noqa: E731


@pytest.mark.parametrize("rule", ["direct", "monotone", "targets", "direct nodes"])
def test_where_the_batch_lies(rule):
    rule = RULES[rule]
    params = {"a": W["a"], "c": W["c"]}
    with pytest.raises(ValueError, match=r"axis of an output .*return outputs \[batch, ...\], or .* \(has_aux=True\)"):
        rule.init(KEY, summed, W, X)
    served(lambda p, x: IN_ORDER(p, x), rule)
    aux = lrules.Network(lambda p, x: (IN_ORDER(p, x), summed(p, x)), has_aux=True)
    assert any(rule.init(KEY, aux, W, X)[:2])

    message = refusal(GRAPH, rule, params)
    said = {}
    while "give Network(apply, signal_axes=" in message:  # each sentence followed in its turn
        ((pattern, axis),) = re.findall(r"signal_axes=\{'([^']*)': (\d)\}", message)
        said[pattern] = int(axis)
        net = lrules.Network(GRAPH, signal_axes=dict(said))
        try:
            served(net, rule, params)
            break
        except ValueError as error:
            message = str(error)
    assert said == {"outputs": 0, "^c$": 0}

    net = lrules.Network(reversed_inside, signal_axes={"outputs": 0, "^c$": 0})
    message = refusal(net, rule, error=ValueError)
    if "partition" in message:
        served(net, lrules.partition({"^b$": FA, ".*": rule}))
        served(net, lrules.direct_feedback_alignment(at="^c$"))
    assert ("partition" in message) == ("at=" in message) == (rule is DFA)
    assert ("write the network so that the batch is a separate axis" in message) == (rule is not DFA)

    assert "only an axis (vmap, scan), or use a sequential rule" in refusal(microbatches, rule, params)
    served(lambda p, x: H(p, x) @ p["c"], rule, params)
    served(microbatches, FA, params)


def test_where_the_batch_lies_under_node_perturbation():
    net = lambda p, x: jnp.tanh(H(p, x)[::-1] @ p["b"])[::-1] @ p["c"]  # noqa: E731
    assert "in the order of the inputs, or use another rule" in refusal(net, NODES)
    served(IN_ORDER, NODES)
    served(net, FA)


def test_where_the_batch_lies_under_quantised_updates():
    rule = lrules.quantize_update(FA, 3)
    net = lambda p, x: jnp.tanh(jnp.concatenate([H(p, x)[2:], H(p, x)[:2]]) @ p["b"]) @ p["c"]  # noqa: E731
    message = refusal(net, rule)
    assert "write the network so that the batch is a separate axis, in the order of the inputs" in message
    served(IN_ORDER, rule)


def test_batch_axes():
    for axes, words in ((None, "no input has a batch axis"), (3, "has no batch axis 3")):
        net = lrules.Network(IN_ORDER, batch_axes=axes)
        assert re.search(words + ".*say where the batch lies with Network.apply, batch_axes=", refusal(net, DFA))
    served(lrules.Network(IN_ORDER, batch_axes=0), DFA)
    uneven = lambda p, x: IN_ORDER(p, x[0]) + x[1].sum()  # noqa: E731
    inputs = (X, jnp.ones(3))
    assert "differ in size" in refusal(uneven, DFA, inputs=inputs)
    served(lrules.Network(uneven, batch_axes=(0, None)), DFA, inputs=inputs)
    assert "the batch is empty" in refusal(IN_ORDER, DFA, inputs=X[:0])
    message = refusal(lrules.Network(uneven, batch_axes={"x": 0}), DFA, inputs=inputs)
    assert "give one axis (or None) per input" in message
    wrong = lrules.Network(lambda p, x: IN_ORDER(p, x).T.reshape(-1, 3), signal_axes={"outputs": 1})
    assert "give axes by name, signal_axes={'outputs': ...}" in refusal(wrong, DFA)
    right = lrules.Network(lambda p, x: IN_ORDER(p, x), signal_axes={"outputs": 0})
    served(right, DFA)


# -------------------------------------------------------------------------------------------- which rule is whose


def two_readers(p, x):
    h = H(p, x)
    return jnp.tanh(h @ p["b"]) @ p["c"] + h @ p["c"]


def test_rules_that_disagree_on_one_signal():
    rule = lrules.partition({"b": DFA, ".*": FA})
    message = refusal(two_readers, rule)
    assert "give them the same direct rule, or sequential rules" in message
    served(two_readers, lrules.partition({"b|c": DFA, ".*": FA}))
    served(two_readers, lrules.partition({"b": BACKMAN, ".*": FA}))


def test_one_parameter_under_two_rules():
    params = W | {"u": jnp.ones((6, 6)), "v": jnp.ones((6, 3)), "A": jnp.ones((6, 6))}
    net = lambda p, x: (  # noqa: E731
        jnp.tanh(H(p, x) @ (p["b"] @ p["u"])) @ (p["A"] @ p["u"].T @ p["v"]) + 0 * p["c"].sum()
    )
    other = lrules.feedback_alignment()
    message = refusal(net, lrules.partition({"A": other, ".*": FA}), params)
    (layer,) = re.findall("give the layer '(.*)' the rule of the other", message)
    assert layer in ("A", "b")
    served(net, lrules.partition({"A|b": other, ".*": FA}), params)


def test_marks():
    marked = lambda p, x: jnp.tanh(lrules.hidden(H(p, x) * 2, "m") @ jnp.eye(6)) @ p["c"] * p["b"].sum()  # noqa: E731
    at = lambda *names: lrules.direct_feedback_alignment(at=list(names))  # noqa: E731
    message = refusal(marked, at("nothing"))
    assert "matches no hidden signal and no marked tensor; there are 'm', 'c'" in message
    served(marked, at("^m$"))

    two = lambda p, x: jnp.tanh(lrules.hidden(jnp.tanh(x @ p["a"]), "m") ** 2 @ p["b"]) @ p["c"]  # noqa: E731
    mixed = lrules.partition({"b": at("m|b"), ".*": at("c|m")})
    assert "use one direct rule, or name hidden signals in at=" in refusal(two, mixed)
    served(two, at("m|b|c"))
    served(two, lrules.partition({"b": at("b"), ".*": at("c")}))

    def inside(p, x):
        doubled = lax.cond(x.sum() > 0, lambda h: lrules.hidden(h * 2, "m") * 2, lambda h: h, H(p, x))
        return doubled @ p["c"] * p["b"].sum()

    assert "mark one outside" in refusal(inside, at("m"))

    def outside(p, x):
        doubled = lax.cond(x.sum() > 0, lambda h: h * 4, lambda h: h, H(p, x))
        return lrules.hidden(doubled, "m") ** 2 @ p["c"] * p["b"].sum()

    served(outside, at("m"))

    same = lambda p, x: jnp.tanh(lrules.hidden(x @ p["a"], "c")) @ p["b"] @ p["c"]  # noqa: E731
    assert "give the mark another name" in refusal(same, at("c"))
    served(lambda p, x: jnp.tanh(lrules.hidden(x @ p["a"], "d")) @ p["b"] @ p["c"], at("c|d"))


def test_shared_axes():
    rule = lrules.direct_feedback_alignment(shared_axes=1)
    x = jax.random.normal(KEY, (4, 7, 5))
    assert "outputs that are one array" in refusal(lambda p, x: (IN_ORDER(p, x), H(p, x)), rule, inputs=x)
    served(IN_ORDER, rule, inputs=x)
    wrong = lrules.direct_feedback_alignment(shared_axes=3)
    assert "count from 0, with the batch, as in shared_axes=1" in refusal(IN_ORDER, wrong, inputs=x)
    square = jax.random.normal(KEY, (4, 6, 5))  # as long as the features are many
    pooled = lambda p, x: (jnp.moveaxis(H(p, x), 1, 2) @ p["b"] @ jnp.ones((6, 6))) @ p["c"]  # noqa: E731
    message = refusal(pooled, rule, inputs=square)
    given = re.findall(r"shared_axes=(\[.*?\])", message)
    assert given, message
    for pairs in given:
        served(pooled, lrules.direct_feedback_alignment(shared_axes=eval(pairs)), inputs=square)  # noqa: S307


def test_where_the_error_is_taken():
    rule = lrules.partition({"b": lrules.direct_feedback_alignment(error_at="outputs"), ".*": DFA})
    assert "give all the same error_at" in refusal(IN_ORDER, rule)
    served(IN_ORDER, lrules.partition({"b": lrules.direct_feedback_alignment(), ".*": DFA}))


def test_no_layer():
    weights = W["a"]
    message = refusal(lambda p, x: x @ weights, FA, {"v": jnp.ones(5)})
    assert "check that the parameters and inputs are arguments of the function" in message
    served(lambda p, x: x @ p["a"], FA, {"a": weights})


def test_two_parameters_of_one_name():
    net = lambda p, x: x @ p["v"]["w"] @ p["v/w"]  # noqa: E731
    assert "rename one" in refusal(net, FA, {"v": {"w": W["a"]}, "v/w": W["b"]})
    served(lambda p, x: x @ p["v"]["w"] @ p["w"], FA, {"v": {"w": W["a"]}, "w": W["b"]})


# ------------------------------------------------------------------------------------ rules with sentences of their own


def test_dual_propagation():
    assert "leave damping out" in refusal(two_readers, lrules.dual_propagation(damping=0.5, adjoint=False))
    served(two_readers, lrules.dual_propagation(adjoint=False))
    scaled = lambda p, x: jax.nn.relu(jnp.cumsum(jax.nn.relu(x @ p["a"]) @ p["b"], 1)) @ p["c"]  # noqa: E731
    spectral = lrules.dual_propagation(damping="spectral", adjoint=False)
    assert "give a number, such as damping=0.5" in refusal(scaled, spectral)
    served(scaled, lrules.dual_propagation(damping=0.5, adjoint=False))
    replaced = lrules.without_derivatives(DUAL)
    assert "leave them out" in refusal(IN_ORDER, replaced)
    many = lrules.dual_propagation(order="forward", iterations=1)
    (least,) = re.findall("give at least iterations=([0-9]+)", refusal(IN_ORDER, many))
    served(IN_ORDER, lrules.dual_propagation(order="forward", iterations=int(least)))
    direct = lrules.dual_propagation(feedback_rule=DFA)
    assert "must be a sequential rule" in refusal(IN_ORDER, direct)
    served(IN_ORDER, lrules.dual_propagation(feedback_rule=FA))


@pytest.mark.parametrize("states", ["hidden", "pre_activation"])
def test_predictive_coding(states):
    served(branch, CODING)  # its states lie outside
    deeper = lambda p, x: lax.cond(x[0, 0] > 0, IN_ORDER, lambda p, x: H(p, x) @ p["c"], p, x)  # noqa: E731
    message = refusal(deeper, lrules.predictive_coding(states=states))
    assert "inside a cond, where predictive_coding cannot keep its state: move it out of the cond" in message
    served(lambda p, x: lax.cond(x[0, 0] > 0, lambda a, b: a, lambda a, b: b, IN_ORDER(p, x), H(p, x) @ p["c"]), CODING)
    message = refusal(IN_ORDER, lrules.predictive_coding(1, states=states))
    (least,) = re.findall("would learn nothing: give at least steps=([0-9]+)", message)
    served(IN_ORDER, lrules.predictive_coding(int(least), states=states))
    message = refusal(without_a_batch, lrules.predictive_coding(states=states))
    assert "has no batch, and predictive_coding has one state for each example" in message
    served(without_a_batch, FA)


def without_a_batch(p, x):
    """A layer reads latents that all examples share."""
    latents = jnp.tanh(jnp.tanh(jnp.eye(5) @ p["a"]) @ p["b"])
    return (H(p, x) + latents[:1]) @ p["c"]


def test_equilibrium_propagation():
    message = refusal(IN_ORDER, lrules.equilibrium_propagation(nudged_steps=1))
    (least,) = re.findall("would learn nothing: give at least nudged_steps=([0-9]+)", message)
    served(IN_ORDER, lrules.equilibrium_propagation(nudged_steps=int(least)))
    between = lambda p, x: H(p, x) @ p["b"] @ p["c"]  # noqa: E731
    assert "put an activation between the two" in refusal(between, EQUILIBRIUM)
    served(lambda p, x: jnp.tanh(H(p, x) @ p["b"]) @ p["c"], EQUILIBRIUM)
    assert "leave the modifier out" in refusal(IN_ORDER, lrules.sign_error(EQUILIBRIUM))
    served(IN_ORDER, EQUILIBRIUM)
    whole = lambda p, x: (jnp.tanh(x.astype(complex) @ p["a"].astype(complex)) @ p["b"].astype(complex)).real  # noqa: E731
    assert "write the network for the real and the imaginary part" in refusal(whole, EQUILIBRIUM)


def test_least_squares_of_node_perturbation():
    tied = lambda p, x: jnp.tanh(jnp.tanh(H(p, x) @ p["b"]) @ p["b"]) @ p["c"]  # noqa: E731
    message = refusal(tied, lrules.node_perturbation(0.1, solver="rls"))
    assert 'give solver="sgd", or direct=True' in message
    served(tied, lrules.node_perturbation(0.1, solver="sgd"))
    served(tied, lrules.node_perturbation(0.1, direct=True, solver="rls"))


def test_nonlinearities_that_are_no_activations():
    """What the sentence offers works for each rule that treats activations apart."""
    net = lambda p, x: jnp.sort(H(p, x) ** 3 + jnp.exp(H(p, x) @ p["b"]), -1) @ p["c"]  # noqa: E731
    unsure = lambda p, x: (jnp.tanh(x @ p["a"]) / (1 + jnp.abs(x @ p["a"] + H(p, x)))) @ p["b"] @ p["c"]  # noqa: E731
    for rule, make in (
        (lrules.without_derivatives(PLAIN), None),
        (DUAL, lrules.dual_propagation),
        (lrules.skipped_backprop(), lrules.skipped_backprop),
    ):
        for apply in (net, unsure):
            try:
                served(apply, rule)
            except NotImplementedError as error:
                message = str(error)
                assert "lrules.not_activation(f)(x)" in message
                if make is not None and "passing=" in message:
                    (names,) = re.findall(r"passing=(\{.*?\})", message)
                    served(apply, make(passing=eval(names)))  # noqa: S307


@contextlib.contextmanager
def turned_on(option):
    """With an option of JAX, if this JAX has it."""
    if not hasattr(jax.config, option):
        pytest.skip(f"this JAX has no {option}")
    jax.config.update(option, True)
    jax.clear_caches()
    try:
        yield
    finally:
        jax.config.update(option, False)
        jax.clear_caches()


def test_new_forms_of_jax():
    """An option of JAX that writes calls in a form which is not known here, until it is turned off."""
    deep = lambda p, x: jax.checkpoint(lambda h: jnp.tanh(h @ p["b"]))(H(p, x)) @ p["c"]  # noqa: E731
    with turned_on("jax_remat3"):
        assert "turn off JAX's options" in refusal(deep, FA)
    served(deep, FA)


def test_new_forms_of_activations():
    net = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]  # noqa: E731
    feedback = FA.init(KEY, net, W, X)
    grads = lambda: jax.grad(lambda p: jnp.sum(jnp.sin(lrules.transform(net, FA)(p, feedback, X))))(W)  # noqa: E731
    plain = grads()
    with turned_on("jax_custom_jvp3"):
        chex.assert_trees_all_equal(grads(), plain)
        assert "turn off JAX's options" in refusal(net, DUAL)
    served(net, DUAL)
