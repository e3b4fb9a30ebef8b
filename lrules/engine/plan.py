"""Plans: what a rule does at each layer and each hidden signal of one traced network. They are made before it runs.

At a layer, the plan has a `LayerRule` (see `rule.py`): `Backprop`, `Sequential` or `Direct`. The feedback weights
follow from it: a `SequentialFeedback` for each parameter that sequential feedback replaces, and a `DirectFeedback` for
each place where direct feedback arrives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine.batch import BatchAxis
from lrules.engine.carried import begin
from lrules.engine.graph import Graph
from lrules.engine.handlers import name_number
from lrules.engine.head import Head
from lrules.engine.jaxprs import split_as, varying_axes
from lrules.engine.recomputed import key_words
from lrules.engine.records import Hidden, Layer
from lrules.engine.shardings import (
    Layout,
    known,
    may_lie_on_a_mesh,
    of_parameter,
    of_signal,
    of_weight,
    parts_of_parameter,
    parts_of_signal,
    whole,
)
from lrules.engine.weights import (
    DirectFeedback,
    SequentialFeedback,
    draw_direct,
    draw_reduction,
)
from lrules.options import require_key
from lrules.rule import Direct, Feedback, LayerRule, Sequential
from lrules.typing import Pytree


@dataclasses.dataclass(eq=False)
class Plan:
    """What a rule does at each layer and each hidden signal of one traced network, from `make_plan`.

    Attributes:
      graph: the traced network.
      specs: the rule at each layer, by site.
      sequential_feedback: sequential feedback, by parameter.
      direct_feedback: direct feedback, by hidden signal.
      batch: the number of examples; None without direct feedback.
      output_axes: the batch axis of each output.
      heads: where the output error is taken below an output, see `head.py`.
      reduced: the matrices that reduce the error to a rank, see `Direct`.
      elements: the number of losses in the mean of the objective, if a rule needs it.
      state_layouts: `(plan) -> {site: pytree of Layout}`, where states lie; None: their shapes tell.

    Example:
      >>> import jax.numpy as jnp, lrules
      >>> from lrules import extend
      >>> net, params = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
      >>> net, x = lrules.Network(net), jnp.ones((5, 3))
      >>> spec = extend.Sequential(lambda op, w, b, x, d, layer: (None, None, None), jnp.ones)
      >>> plan = extend.make_plan(net, net.graph(params, x), params, x, lambda name: spec)
      >>> list(plan.specs), list(plan.sequential_feedback)
      (['a', 'b'], ['b'])
    """

    graph: Graph
    specs: dict[str, LayerRule]
    sequential_feedback: dict[str, SequentialFeedback]
    direct_feedback: dict[str, DirectFeedback]
    batch: int | None = None
    output_axes: list[BatchAxis | None] = dataclasses.field(default_factory=list)
    heads: dict[str, Head] = dataclasses.field(default_factory=dict)
    reduced: dict[str, tuple[Direct, tuple[int, int], Any]] = dataclasses.field(default_factory=dict)
    elements: int | None = None
    state_layouts: Callable[[Plan], dict[str, Pytree]] | None = None

    @property
    def marks(self) -> list[Hidden]:
        """The marks where feedback lands."""
        return [landing.hidden for landing in self.direct_feedback.values() if landing.hidden.mark]

    @functools.cached_property
    def asking(self) -> list[Sequential | Direct]:
        """The rules whose functions ask for more arguments, see `calls.py`."""
        specs = dict.fromkeys(s for s in self.specs.values() if isinstance(s, Sequential | Direct))
        return [spec for spec in specs if not spec.plain]

    @functools.cached_property
    def states(self) -> dict[str, tuple[Sequential | Direct, Any, str, tuple[int, ...]]]:
        """The states by site: the rule, the argument for its first state, a name, and the loops around it."""
        found: dict[str, tuple[Sequential | Direct, Any, str, tuple[int, ...]]] = {}
        for layer in self.graph.layers:
            spec = self.specs[layer.site]
            if isinstance(spec, Sequential) and spec.state is not None:
                found[layer.site] = (spec, layer, layer.name, tuple(length for _, length in layer.place[0].loops))
        for name, landing in self.direct_feedback.items():
            if landing.spec.state is not None:
                if name in found:
                    raise ValueError(f"a mark and a layer with a state have the same name {name!r}: rename the mark")
                found[name] = (landing.spec, landing.signal_shape, name, landing.calls)
        return found

    @property
    def shadows(self) -> bool:
        return any(isinstance(s, Sequential) and s.init is not None for s in self.specs.values())

    def feedback_shapes(self, *, redrawn: bool = False) -> dict[str, tuple[tuple[int, ...], Any, bool]]:
        """For each feedback weight (or each that is redrawn at every step): shape, dtype, and whether it learns."""
        shapes = {}
        for name, e in self.sequential_feedback.items():
            if e.spec.redrawn == redrawn:
                shapes[name] = (e.shape, e.dtype, e.spec.learned)
        for name, landing in self.direct_feedback.items():
            if landing.spec.init is not None and landing.spec.redrawn == redrawn:
                shapes[name] = (landing.shape, landing.dtype, landing.spec.learn is not None)
        for name, (spec, shape, dtype) in self.reduced.items():
            if spec.redrawn == redrawn:
                shapes[name] = (shape, dtype, spec.learned_factors)
        return shapes | {name: ((2,), jnp.uint32, False) for name in shapes if self.recomputed(name)}

    def recomputed(self, name: str) -> bool:
        """Whether only the key of a feedback weight is kept."""
        spec = self.direct_feedback[name].spec if name in self.direct_feedback else self.reduced.get(name, (None,))[0]
        return spec is not None and spec.storage == "recomputed"

    def init(self, key: jax.Array, params: Sequence[Any], *, redrawn: bool = False) -> Feedback:
        """Draws the feedback weights, each with a key made from its name."""
        require_key(key, "the first argument of init")
        fixed: dict[str, jax.Array] = {}
        learned: dict[str, jax.Array] = {}
        places = not redrawn and may_lie_on_a_mesh(params)
        lies = [known(p) for p in params] if places else []
        for name, (shape, dtype, is_learned) in sorted(self.feedback_shapes(redrawn=redrawn).items()):
            k = jax.random.fold_in(key, name_number(name))
            for axis in () if redrawn else sorted(self.parts.get(name, ())):  # each device draws its own part
                k = jax.random.fold_in(k, jax.lax.axis_index(axis))
            if self.recomputed(name):
                drawn = key_words(k, name)
                if name in self.direct_feedback:
                    self.direct_feedback[name].check_drawing(drawn)
            elif name in self.sequential_feedback:
                entry = self.sequential_feedback[name]
                drawn = split_as(entry.draw(k, params[entry.index]), *self.graph.param_avals[entry.index].sharding.spec)
            elif name in self.direct_feedback:
                drawn = split_as(draw_direct(self.direct_feedback[name], k), *self.direct_feedback[name].split)
            else:
                drawn = draw_reduction(k, shape, dtype)
            if places:
                drawn = self.layouts[name].place(drawn, params, lies)
            (learned if is_learned else fixed)[name] = drawn
        state = self.placed_state(self._begin(key), params) if self.states and not redrawn else ()
        return Feedback(fixed, learned, state)

    @functools.cached_property
    def layouts(self) -> dict[str, Layout]:
        """Where each feedback weight lies."""
        found = {name: whole(0, len(shape)) for name, (_, shape, _) in self.reduced.items()}
        for name, landing in self.direct_feedback.items():
            if landing.axis is not None:
                found[name] = of_signal(landing)
        found |= {name: whole(0, 1) for name in found if self.recomputed(name)}  # a key
        return found | {name: of_parameter(e.index, len(e.shape)) for name, e in self.sequential_feedback.items()}

    @functools.cached_property
    def parts(self) -> dict[str, frozenset[Any]]:
        """Inside a `shard_map`, the mesh axes along which devices have different parts of a feedback weight."""
        if not any(map(varying_axes, self.graph.param_avals)):
            return {}
        found = {name: parts_of_parameter(self.graph, e.index) for name, e in self.sequential_feedback.items()}
        for name, landing in self.direct_feedback.items():
            if landing.axis is not None:
                found[name] = parts_of_signal(self.graph, landing)
        return found

    def state_layout(self, site: str, shape: tuple[int, ...]) -> Layout:
        """Where an array of a state lies: as what has its shape, among the weights and signals that it belongs to."""
        alike: list[tuple[tuple[int, ...], Layout]] = []
        if site in self.layouts and site in self.feedback_shapes():
            alike.append((self.feedback_shapes()[site][0], self.layouts[site]))
        _, like, _, lengths = self.states.get(site, (None, None, "", ()))
        if isinstance(like, Layer):
            alike += [(tuple(self.graph.param_avals[i].shape), of_parameter(i, len(shape))) for i in like.sources]
            alike.append((tuple(like.weight.aval.shape), of_weight(like)))
        for known_shape, layout in alike:
            if shape == known_shape:
                return layout
            if shape == (*lengths, *known_shape):
                return layout.behind(len(lengths))
        if site in self.direct_feedback:
            signal = self.direct_feedback[site].signal_shape
            if signal and shape[len(shape) - len(signal) :] == signal and site in self.layouts:
                return self.layouts[site].of_last(len(signal)).behind(len(shape) - len(signal))
        home = alike[0][1].home if alike else 0
        return whole(home, len(shape))

    def _state_layouts(self, site: str, state: Pytree) -> Pytree:
        if self.state_layouts is not None:
            return self.state_layouts(self)[site]
        return jax.tree.map(lambda leaf: self.state_layout(site, jnp.shape(leaf)), state)

    def placed_state(self, states: dict[str, Any], params: Sequence[Any]) -> dict[str, Any]:
        """The states, by site, placed on the devices where they belong."""
        if not may_lie_on_a_mesh(params):
            return states
        lies = [known(p) for p in params]

        def place(layout: Layout, leaf: Any) -> Any:
            return layout.place(leaf, params, lies)

        return {site: jax.tree.map(place, self._state_layouts(site, state), state) for site, state in states.items()}

    def shardings(self, feedback: Feedback, params: Sequence[Any]) -> Feedback:
        """The shardings of feedback, from its shapes and the parameters."""
        given = [known(p) for p in params]

        def lies(layout: Layout, leaf: Any) -> Any:
            return layout.sharding(leaf.shape, given)

        fixed, learned = ({name: lies(self.layouts[name], b) for name, b in part.items()} for part in feedback[:2])
        state: Pytree = ()
        if feedback.state != ():
            sites = feedback.state.items()
            state = {site: jax.tree.map(lies, self._state_layouts(site, leaves), leaves) for site, leaves in sites}
        return Feedback(fixed, learned, state)

    def _begin(self, key: jax.Array) -> dict[str, Any]:
        """The first states."""
        states = {}
        for site, (spec, like, name, lengths) in self.states.items():
            assert spec.state is not None
            own = jax.random.fold_in(key, name_number(f"{site} state"))
            states[site] = begin(spec.state, spec.begins_with, like, name, own, lengths)
        return states

    def check(self, feedback: Feedback) -> None:
        """Refuses feedback that was not made for this rule, network and shapes."""
        given = {**feedback.fixed, **feedback.learned}
        wanted = self.feedback_shapes()
        remedy = "make new feedback with rule.init(key, net, params, inputs)"
        if missing := sorted(set(wanted) - set(given)):
            raise ValueError(
                f"the feedback has no entry {missing[0]!r}, so it was made for another rule or network: {remedy}"
            )
        if extra := sorted(set(given) - set(wanted)):
            raise ValueError(f"the feedback has an entry {extra[0]!r} that this rule and network do not use: {remedy}")
        for name, (shape, _, learned) in wanted.items():
            if name in (feedback.fixed if learned else feedback.learned):
                raise ValueError(
                    f"the feedback {name!r} is {'fixed' if learned else 'learned'}, and this rule "
                    f"{'learns it' if learned else 'keeps it fixed'}, so it was made for another rule: {remedy}"
                )
            if self.recomputed(name) and jnp.shape(given[name]) == (2,) and given[name].dtype != jnp.uint32:
                raise ValueError(
                    f"the feedback {name!r} is a key, two words of dtype uint32, and it has dtype "
                    f"{given[name].dtype}: convert only feedback that is stored, and {remedy}"
                )
            if jnp.shape(given[name]) != tuple(shape):
                raise ValueError(
                    f"the feedback {name!r} has shape {jnp.shape(given[name])}, but this network needs "
                    f"{tuple(shape)}: {remedy}"
                )
        if self.states:
            given, wanted_state = jax.eval_shape(lambda: (feedback.state, self._begin(jax.random.key(0))))
            if _described(given) != _described(wanted_state):
                raise ValueError(
                    "feedback.state was made for another rule or network: make it with rule.init, and continue with "
                    "feedback._replace(state=grads.state)"
                )


def _described(tree: Pytree) -> Any:
    return jax.tree.structure(tree), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]


class Refused(NotImplementedError):
    """A network has parameters that the rule cannot serve.

    Args:
      found: parameters, each group with the reason and the remedy.
      offered: the parameters to which a partition can give backprop().

    Attributes:
      refusals: the reason and the remedy, by parameter.
    """

    def __init__(self, found: Sequence[tuple[Sequence[str], str]], offered: Sequence[str]) -> None:
        self.refusals: dict[str, str] = {}
        for names, sentence in found:
            for name in names:
                known = self.refusals.get(name)
                self.refusals[name] = sentence if known in (None, sentence) else f"{known}; {sentence}"
        sentences = list(dict.fromkeys(sentence for _, sentence in found))
        message = sentences[0]
        if len(sentences) > 1:
            message = f"the rule cannot serve {len(sentences)} things: "
            message += "; ".join(f"({i}) {sentence}" for i, sentence in enumerate(sentences, 1))
        if offered:
            message += f", or give {', '.join(map(repr, dict.fromkeys(offered)))} backprop() in a partition"
        super().__init__(message)
