"""Which rule serves which network of the tests, by tracing its gradients: nothing is compiled."""

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

import lrules
from docs.generate.markdown import table

RULES: dict[str, lrules.Rule] = {
    "FA": lrules.feedback_alignment(),
    "KP": lrules.kolen_pollack(),
    "WM": lrules.weight_mirror(),
    "sign": lrules.sign_symmetry(),
    "BackMAN": lrules.backman(),
    "DFA": lrules.direct_feedback_alignment(),
    "DKP": lrules.direct_kolen_pollack(),
    "mDFA": lrules.monotone_dfa(),
    "DRTP": lrules.random_target_projection(),
    "SBP": lrules.skipped_backprop(),
    "last": lrules.last_layer_only(),
    "DP": lrules.dual_propagation(),
    "PC": lrules.predictive_coding(),
    "EP": lrules.equilibrium_propagation(),
    "NP": lrules.node_perturbation(0.1),
    "FG": lrules.forward_gradient("activations"),
    "local": lrules.local_losses(),
    "DTP": lrules.difference_target_propagation(),
}
KINDS = {"linen_": "Flax Linen", "nnx_": "Flax NNX", "equinox_": "Equinox", "": "bare functions of JAX"}


def networks() -> Iterator[tuple[str, str, Callable[[], tuple[Any, Any, Any]]]]:
    """Kind, name and builder of each network of the tests."""
    # Imported here: only the tests have all the libraries.
    zoo, served, diffrax = map(importlib.import_module, ("tests.zoo", "tests.test_served", "diffrax"))

    def there(*found: Any) -> Callable[[], Any]:
        return lambda: found

    for name, entry in zoo.ZOO.items():
        prefix = next(p for p in KINDS if name.startswith(p))
        yield KINDS[prefix], name.removeprefix(prefix).replace("_", " "), entry.build
    for name, net in served.MIXTURES.items():
        yield "mixtures of experts", name, there(net, served.EXPERTS, served.TOKENS)
    for name, (dot, *_) in served.DOTS.items():
        yield "quantised products", name, there(served.quantised(dot), served.DENSE_LAYERS, served.TOKENS)
    for name, (net, inputs) in served.GRAPHS.items():
        yield "graphs", name, there(net, served.GRAPH, inputs)
    for name in served.FOURIER:
        yield "Fourier layers", name, there(*served.fourier(name)[:3])
    for adjoint in (diffrax.DirectAdjoint(), *served.ADJOINTS):
        yield "neural ODEs (diffrax)", type(adjoint).__name__, there(served.ode(adjoint), served.FIELD, served.STARTS)


def serves(rule: lrules.Rule, net: Any, params: Any, inputs: Any) -> str:
    """An empty text if the gradients of all parameters can be traced; else the sentence of the refusal."""

    def loss(outputs: Any, targets: Any) -> jax.Array:
        leaves = [leaf.astype(jnp.float32) for leaf in jax.tree.leaves(outputs)]
        return sum((jnp.sum(jnp.abs(leaf).reshape(leaf.shape[0], -1) ** 2, 1) for leaf in leaves), jnp.zeros(()))

    try:
        feedback = jax.eval_shape(lambda key: rule.init(key, net, params, inputs), jax.random.key(0))
        outputs = jax.eval_shape(net, params, inputs)
        if isinstance(net, lrules.Network) and net.has_aux:
            outputs = outputs[0]
        targets = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), outputs)
        step = lrules.value_and_grad(net, loss, rule)
        rng = {"rng": jax.random.key(1)} if rule.stochastic else {}
        jax.eval_shape(lambda p, f: step(p, f, inputs, targets, **rng)[1].params, params, feedback)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return ""


@functools.cache
def measured() -> list[tuple[str, str, dict[str, str]]]:
    """For each network the sentence of each rule."""
    found = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for kind, name, build in networks():
            net, params, inputs = build()
            found.append((kind, name, {short: serves(rule, net, params, inputs) for short, rule in RULES.items()}))
            jax.clear_caches()
    return found


def full() -> str:
    """The table of all networks, and the sentences of all refusals."""
    rows, notes = [], []
    for kind, name, found in measured():
        cells = []
        for sentence in found.values():
            if sentence and sentence not in notes:
                notes.append(sentence)
            cells.append(f"no ({notes.index(sentence) + 1})" if sentence else "yes")
        rows.append([kind, name, *cells])
    text = table(("kind", "network", *RULES), rows)
    return text + "\n\n" + "\n".join(f"{i}. {note}" for i, note in enumerate(notes, 1))


def short() -> str:
    """For each kind, how many of its networks each rule serves."""
    rows = []
    for kind in dict.fromkeys(kind for kind, *_ in measured()):
        own = [found for k, _, found in measured() if k == kind]
        rows.append([kind, str(len(own)), *(str(sum(not found[s] for found in own)) for s in RULES)])
    return table(("networks of the tests", "all", *RULES), rows, 1)
