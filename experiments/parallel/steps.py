"""A network whose stages lie on different devices, trained by backpropagation (GPipe) or by a direct rule.

The network is `first`, then P equal stages, then `last`. Device s has the parameters of stage s. The batch is cut into
M microbatches, which go up from device to device (`lax.ppermute`), one stage a tick (`lax.scan`).

- Backpropagation (Huang et al. 2019, GPipe): after all microbatches have gone up, the error goes down the same way.
  A stage waits for the stages above it. In units of f, the time of a stage's forward pass: 3 (M + P - 1).
- A direct rule: the last device has the output error of a microbatch as soon as its outputs are there, and sends it to
  all devices at once, `[microbatch, outputs]`. Then every stage computes its update, in the same tick. Nothing goes
  down from stage to stage: 2 M + P - 1 for direct feedback alignment, if its feedback costs nothing.

    >>> import jax, jax.numpy as jnp, lrules
    >>> from experiments.parallel import stages, steps
    >>> from experiments.parallel.split import split_feedback
    >>> net = stages.mlp(jnp.tanh)
    >>> params = stages.mlp_params(jax.random.key(0), inputs=5, width=8, outputs=3, stages=1, layers=2)
    >>> x, y, rule = jnp.ones((6, 5)), jnp.zeros((6, 3)), lrules.direct_feedback_alignment()
    >>> feedback = rule.init(jax.random.key(1), net.whole, params, x)
    >>> loss = lrules.testing.half_squared_error
    >>> _, grads = lrules.value_and_grad(net.whole, loss, rule)(params, feedback, x, y)
    >>> step = steps.direct(net, loss, rule, stages.make_mesh(1), microbatches=3)
    >>> placed = stages.stacked(params), split_feedback(net, rule, params, feedback, x)
    >>> value, piped, _ = jax.jit(step)(*placed, x, y)
    >>> stages.difference(stages.stacked(grads.params), piped) < 1e-6
    True

What a stage does under a direct rule is what the library does: each device transforms its own stage, followed by `last`
(whose outputs nobody reads there, so XLA leaves them out), and the output error arrives at the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import lrules
from experiments.errors import InputError
from experiments.parallel.stages import AXIS, Params, PyTree, SplitFeedback, Staged

Step = Callable[..., tuple[jax.Array, Params, Any]]


def gpipe(net: Staged, loss: Callable[..., jax.Array], mesh: Mesh, microbatches: int) -> Step:
    """Backpropagation through the pipeline.

    Args:
      net: the network.
      loss: `(outputs, targets) -> [batch]`; the objective is its mean.
      mesh: one device for each stage (`make_mesh`).
      microbatches: the number of parts of the batch.

    Returns:
      `step(params, feedback, inputs, targets) -> (value, gradients, {})`, with `stacked` parameters; the feedback is
      not used.
    """
    count = mesh.shape[AXIS]

    def local(params: Params, feedback: Any, xs: jax.Array, ys: jax.Array) -> tuple[jax.Array, Params, Any]:
        own = _own(params)
        rank = lax.axis_index(AXIS)

        def objective(own: Params) -> jax.Array:
            def up(h: jax.Array, t: Any) -> jax.Array:
                return net.stage(own.stages, _enter(net, own, rank, h, xs, t))

            def fill(h: jax.Array, t: jax.Array) -> tuple[jax.Array, None]:
                return _send(up(h, t), count), None

            def run(carry: Any, m: jax.Array) -> tuple[Any, None]:
                h, value = carry
                out = up(h, m + count - 1)
                here = _when(rank == count - 1, lambda: loss(net.last(own.last, out), ys[m]).mean())
                return (_send(out, count), value + here), None

            h = _varying(jax.tree.map(jnp.zeros_like, jax.eval_shape(net.first, own.first, xs[0])))
            h, _ = lax.scan(fill, h, jnp.arange(count - 1, dtype=jnp.int32))
            kind = jax.eval_shape(lambda: loss(net.last(own.last, h), ys[0]).mean())
            start = (h, _varying(jnp.zeros((), kind.dtype)))
            (_, value), _ = lax.scan(run, start, jnp.arange(microbatches, dtype=jnp.int32))
            return lax.psum(value, AXIS) / microbatches

        value, grads = jax.value_and_grad(objective)(own)
        return value, _gathered(grads), {}

    return _on(mesh, local, microbatches)


def direct(net: Staged, loss: Callable[..., jax.Array], rule: lrules.Rule, mesh: Mesh, microbatches: int) -> Step:
    """A direct rule through the pipeline: every stage learns in the tick in which the output error arrives.

    A stage keeps what its backward pass needs of at most P microbatches, in a ring, because the error of a microbatch
    arrives P - 1 - s ticks after it left stage s. (GPipe keeps all M.)

    Args:
      net: the network.
      loss: `(outputs, targets) -> [batch]`; the objective is its mean.
      rule: a direct rule, such as `lrules.direct_feedback_alignment()`. With `at="boundary"` feedback lands only
        between stages, and inside a stage the error flows as in backprop.
      mesh: one device for each stage (`make_mesh`).
      microbatches: the number of parts of the batch.

    Returns:
      `step(params, feedback, inputs, targets) -> (value, gradients, feedback gradients)`, with `stacked` parameters and
      the feedback of `split_feedback`. The last one is for learned feedback: `{"first": ..., "stages": ...}`.
    """
    count = mesh.shape[AXIS]
    part = lrules.transform(net.alone(net.stage), rule)
    entry = lrules.transform(net.alone(net.first), rule)

    def local(
        params: Params, feedback: SplitFeedback, xs: jax.Array, ys: jax.Array
    ) -> tuple[jax.Array, Params, dict[str, Any]]:
        own = _own(params)
        given = _own(feedback)
        rank = lax.axis_index(AXIS)

        def pulled(apply: Any, p: PyTree, fed: lrules.Feedback, x: jax.Array) -> tuple[jax.Array, Any]:
            """What the part sends, and its backward pass: from an output error to the gradients."""

            def run(p: PyTree, learned: Any) -> tuple[PyTree, jax.Array]:
                return apply({"part": p, "last": own.last}, fed._replace(learned=learned), x)

            (_, h), pull = jax.vjp(run, p, fed.learned)
            return h, pull

        def up(h: jax.Array, t: Any) -> tuple[jax.Array, Any]:
            return pulled(part, own.stages, given.stages, _enter(net, own, rank, h, xs, t))

        constant = {id(leaf) for leaf in jax.tree.leaves((own, given))}

        def kept(pull: Any) -> list[Any]:
            """What the backward pass needs of this microbatch: all but the parameters and the feedback."""
            return [_varying(leaf) for leaf in jax.tree.leaves(pull) if id(leaf) not in constant]

        def with_kept(pull: Any, values: Sequence[Any]) -> Any:
            leaves, tree = jax.tree.flatten(pull)
            left = iter(values)
            return jax.tree.unflatten(tree, [leaf if id(leaf) in constant else next(left) for leaf in leaves])

        def store(ring: list[Any], pull: Any, t: Any) -> list[Any]:
            slot = (t - rank) % count  # of microbatch t - rank
            pairs = zip(ring, kept(pull), strict=True)
            return [lax.dynamic_update_index_in_dim(old, new, slot, 0) for old, new in pairs]

        def fill(carry: Any, t: jax.Array) -> tuple[Any, None]:
            h, ring = carry
            out, pull = up(h, t)
            return (_send(out, count), store(ring, pull, t)), None

        def head(h: jax.Array, targets: jax.Array) -> tuple[jax.Array, PyTree, PyTree]:
            """The value, the output error and the gradient of `last`, on the last device."""
            outputs, pull = jax.vjp(lambda p: net.last(p, h), own.last)
            value, e = jax.value_and_grad(lambda outputs: loss(outputs, targets).mean())(outputs)
            return value, e, pull(e)[0]

        def run(carry: Any, m: jax.Array) -> tuple[Any, None]:
            h, ring, value, grads = carry
            t = m + count - 1
            out, pull = up(h, t)
            ring = store(ring, pull, t)
            here, e, last = _when(rank == count - 1, lambda: head(out, ys[m]))
            e = lax.psum(e, AXIS)  # the broadcast: all other devices add zeros
            pull = with_kept(pull, [lax.dynamic_index_in_dim(old, m % count, 0, False) for old in ring])
            e = _varying(e)
            stage = pull((e, jnp.zeros_like(out)))

            def enter() -> Any:  # the inputs are at hand, so nothing is kept of `first`: it is computed again
                h, pull = pulled(entry, own.first, given.first, xs[m])
                return pull((e, jnp.zeros_like(h)))

            first = _when(rank == 0, enter)
            grads = jax.tree.map(jnp.add, grads, (first, stage, last))
            return (_send(out, count), ring, value + here, grads), None

        h = _varying(jax.tree.map(jnp.zeros_like, jax.eval_shape(net.first, own.first, xs[0])))
        ring = [_varying(jnp.zeros((count, *a.shape), a.dtype)) for a in jax.eval_shape(lambda: kept(up(h, 0)[1]))]
        zeros = jax.tree.map(lambda leaf: _varying(jnp.zeros_like(leaf)), own)
        learned = jax.tree.map(lambda leaf: _varying(jnp.zeros_like(leaf)), given)
        grads = ((zeros.first, learned.first.learned), (zeros.stages, learned.stages.learned), zeros.last)
        (h, ring), _ = lax.scan(fill, (h, ring), jnp.arange(count - 1, dtype=jnp.int32))
        start = (h, ring, _varying(jnp.zeros((), jax.eval_shape(head, h, ys[0])[0].dtype)), grads)
        (_, _, value, grads), _ = lax.scan(run, start, jnp.arange(microbatches, dtype=jnp.int32))
        (first, first_fed), (stage, stage_fed), last = jax.tree.map(lambda g: g / microbatches, grads)
        fed = {"first": lax.psum(first_fed, AXIS), "stages": jax.tree.map(lambda g: g[None], stage_fed)}
        return lax.psum(value, AXIS) / microbatches, _gathered(Params(first, stage, last)), fed

    return _on(mesh, local, microbatches)


def _on(mesh: Mesh, local: Callable[..., Any], microbatches: int) -> Step:
    """The step of all devices, from that of one."""
    everywhere: Any = PartitionSpec()
    split: Any = PartitionSpec(AXIS)
    params = Params(everywhere, split, everywhere)

    def step(given: Params, feedback: Any, inputs: jax.Array, targets: jax.Array) -> tuple[jax.Array, Params, Any]:
        stages = len(jax.tree.leaves(given.stages)[0])
        if stages != mesh.shape[AXIS]:
            raise InputError(f"There are {stages} stages and {mesh.shape[AXIS]} devices: one device for each stage.")
        if len(inputs) % microbatches:
            raise InputError(f"{microbatches} microbatches do not divide a batch of {len(inputs)}.")
        xs, ys = (a.reshape(microbatches, -1, *a.shape[1:]) for a in (inputs, targets))
        fed: Any = everywhere
        learned: Any = everywhere
        if isinstance(feedback, SplitFeedback):
            fed, learned = SplitFeedback(everywhere, split), {"first": everywhere, "stages": split}
        run = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(params, fed, everywhere, everywhere),
            out_specs=(everywhere, params, learned),
        )
        return run(given, feedback, xs, ys)

    return step


def _own(values: Any) -> Any:
    """What lies on this device, without the axis of stages; it varies by device, so that no gradient is summed yet."""
    own = {name: _varying(value) for name, value in values._asdict().items()}
    return type(values)(**own | {"stages": jax.tree.map(lambda leaf: leaf[0], own["stages"])})


def _gathered(grads: Params) -> Params:
    """The gradients as the parameters lie: those of `first` and `last` come from one device to all."""
    first, last = lax.psum((grads.first, grads.last), AXIS)
    return Params(first, jax.tree.map(lambda g: g[None], grads.stages), last)


def _enter(net: Staged, own: Params, rank: jax.Array, h: jax.Array, xs: jax.Array, t: Any) -> jax.Array:
    """What a stage reads at tick t: the first one a new microbatch, the others what came from below."""
    x = xs[jnp.minimum(t, len(xs) - 1)]  # after the last one, the first stage computes what nobody reads
    idle = jnp.where(t < rank, jnp.ones_like(h), h)  # what has no microbatch yet computes with ones, and no NaN
    return lax.cond(rank == 0, lambda: _varying(net.first(own.first, x)), lambda: idle)


def _send(h: jax.Array, count: int) -> jax.Array:
    return lax.ppermute(h, AXIS, [(i, i + 1) for i in range(count - 1)])


def _when(here: jax.Array, f: Callable[[], PyTree]) -> PyTree:
    """`f()` on the devices where `here` is true, zeros on the others, which do not compute it."""
    shapes = jax.eval_shape(f)
    return lax.cond(
        here,
        lambda: _varying(f()),
        lambda: jax.tree.map(lambda a: _varying(jnp.zeros(a.shape, a.dtype)), shapes),
    )


def _varying(values: PyTree) -> PyTree:
    """The same values, as ones that may differ between devices."""

    def vary(leaf: Any) -> Any:
        kind: Any = jax.typeof(leaf)
        kind = getattr(kind, "manual_axis_type", kind)  # JAX 0.10 moved the set of axes there
        axes: Any = getattr(kind, "varying", None) or getattr(kind, "vma", ())
        return leaf if AXIS in axes else lax.pcast(leaf, AXIS, to="varying")

    return jax.tree.map(vary, values)
