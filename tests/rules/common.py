"""What the tests of rules share: random nets, and a rule's gradients for a given output error, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

import lrules
from tests import bridge
from tests.reference import (
    backman,
    backprop,
    direct_feedback_alignment,
    feedback_alignment,
    kolen_pollack,
    losses,
    nets,
    skipped_backprop,
)

NETS = {
    "shallow": lambda rng: bridge.random_dense(rng, (5, 6, 3), ["tanh"]),
    "deep": lambda rng: bridge.random_dense(rng, (5, 7, 6, 8, 3), ["relu", "gelu", "softplus"]),
    "conv_max": lambda rng: bridge.random_conv(rng, "relu", "max"),
    "conv_average": lambda rng: bridge.random_conv(rng, "silu", "average"),
}
# Where a rule is compared with its reference first; the rest of its tests need no net of one output.
ALL_NETS = NETS | {"one_output": lambda rng: bridge.random_dense(rng, (4, 6, 5, 1), ["sigmoid", "elu"])}
NOTHING = lrules.Feedback({}, {})
BATCH = 5


def make(name, seed=0):
    """A net, inputs, and the output error of a mean over the batch."""
    rng = np.random.default_rng(seed)
    net = ALL_NETS[name](rng)
    shape = (BATCH, 6, 6, 2) if net[0].kernel.ndim == 4 else (BATCH, net[0].kernel.shape[0])
    return net, rng.normal(size=shape), rng.normal(size=(BATCH, net[-1].kernel.shape[1])) / BATCH


def pull(net, rule, feedback, x, e, **options):
    """The rule's gradients for parameters, feedback and inputs when the cotangent `e` arrives."""
    rng = {"rng": options.pop("rng")} if "rng" in options else {}
    f = lrules.transform(bridge.apply_of(net), rule, **options)

    @jax.jit
    def gradients(params, feedback, x, e):
        return jax.vjp(lambda *args: f(*args, **rng), params, feedback, x)[1](e)

    return gradients(bridge.parameters(net), feedback, jnp.asarray(x), jnp.asarray(e))


def draw(rule, net, x, key=1):
    """Feedback, and the same as a reference takes it: `[None, B_1, ...]`."""
    feedback = rule.init(jax.random.key(key), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
    weights = feedback.fixed | feedback.learned
    return feedback, [None] + [np.asarray(weights[f"{k}/kernel"]) for k in range(1, len(net))] if weights else None


def agrees(got, reference):
    """Gradients for parameters and inputs are those of a reference."""
    params, _, inputs = got
    bridge.close(params, bridge.kernels_and_biases(reference))
    bridge.close(inputs, reference.inputs)


def by_name(feedback):
    """A reference's feedback gradients by the library's names."""
    return {name: np.asarray(b) for name, b in bridge.feedback_dict(feedback).items()}


def one_hot_mean(net, x, labels):
    """The output error of the mean softmax cross-entropy."""
    targets = losses.one_hot(labels, net[-1].kernel.shape[1])
    return losses.mean(*losses.softmax_cross_entropy(nets.forward(net, x).outputs, targets))[1]


FAMILIES = ["backprop", "alignment", "direct", "kolen_pollack", "skipped", "backman"]


def references(net, x, family):
    """A rule of a family, its feedback, and its reference as `(x, e, **options)`."""
    rule, reference, with_feedback = {
        "backprop": (lrules.backprop(), backprop, False),
        "alignment": (lrules.feedback_alignment(), feedback_alignment, True),
        "direct": (lrules.direct_feedback_alignment(), direct_feedback_alignment, True),
        "kolen_pollack": (lrules.kolen_pollack(), kolen_pollack, True),
        "skipped": (lrules.skipped_backprop(), skipped_backprop, False),
        "backman": (lrules.backman(), backman, False),
    }[family]
    if not with_feedback:
        return rule, NOTHING, lambda x, e, **options: reference.gradients(net, x, e, **options)
    feedback, listed = draw(rule, net, x)
    return rule, feedback, lambda x, e, **options: reference.gradients(net, listed, x, e, **options)
