"""Direct random target projection (DRTP; Frenkel, Lefebvre and Bol 2019).

Direct feedback alignment with the targets t (one-hot labels, or whatever has the shape of the outputs) in place of the
output error; the last layer still gets its true gradient:

    s_k = sign scale t . B_k

With fixed random B of either sign, the sign is a convention: +1 puts t where the gradient of the loss stood (the
authors' program); -1 is the direction of the error, as dL/do = o - t falls with t. `scale` stands for the reduction,
which multiplies all losses alike, and so their gradients in the last layer and their projections in the others:

    objective = scale * sum of losses    scale: 1 / batch for a mean over the batch, 1 for a sum,
                                         1 / (batch time) for a mean over losses [batch, time]
"""

import numpy as np

from . import direct_feedback_alignment, nets


def gradients(net, feedback, x, e, targets, *, sign=1.0, scale=None, modify=nets.unmodified, derivative=nets.slope):
    """Direct random target projection.

    Args:
      net, feedback, x, e, modify, derivative: as in `direct_feedback_alignment.gradients`; e serves the last layer
        only.
      targets: [batch, outputs].
      sign: +1 or -1.
      scale: what every loss is multiplied by; 1 / batch if None.
    """
    trace = nets.forward(net, x)
    targets = np.asarray(targets, dtype=np.float64)
    factor = sign * (1 / targets.shape[0] if scale is None else scale)
    signals = [factor * np.tensordot(targets, np.asarray(b), axes=1) for b in feedback[1:]]
    return direct_feedback_alignment.from_signals(net, trace, x, e, signals, modify=modify, derivative=derivative)
