"""Monotone direct feedback alignment and mono-nets.

Lechner 2020, definition 1 and section 3: every layer but the first has weights >= 0 (the output layer too), biases are
free, activations increase; the learning rule is direct feedback alignment (Eq. 6) with feedback >= 0. Theorem 2: with
one output, every example's update agrees in sign with its gradient.

The constraint is kept by lifting weights below a small positive bound to it after each step of the optimizer.
"""

import numpy as np

from . import direct_feedback_alignment, nets


def lift(net, bound=1e-6):
    """The net with the weights of all layers but the first lifted to at least `bound`; biases as they are."""
    return [net[0], *(layer._replace(kernel=np.maximum(layer.kernel, bound)) for layer in net[1:])]


def is_mono_net(net):
    """Whether every layer but the first has weights >= 0."""
    return all((layer.kernel >= 0).all() for layer in net[1:])


def gradients(net, feedback, x, e, *, modify=nets.unmodified, derivative=nets.slope):
    """Monotone direct feedback alignment: `direct_feedback_alignment.gradients` with B_k >= 0."""
    if any((np.asarray(b) < 0).any() for b in feedback[1:]):
        raise ValueError("monotone feedback must not be negative")
    return direct_feedback_alignment.gradients(net, feedback, x, e, modify=modify, derivative=derivative)
