"""lrules: learning rules other than backpropagation, for unmodified JAX models."""

from lrules import diagnostics, extend, feedback, monotone, testing
from lrules.adapters import from_linen, from_nnx
from lrules.apply import FeedbackGrad, TransformedNetwork, ValueAndGrad, feedback_grad, transform, value_and_grad
from lrules.audit import audit
from lrules.constructors import direct, sequential
from lrules.description import describe, refusals
from lrules.marks import activation, hidden, not_activation
from lrules.modifiers import (
    drop_error,
    magnitude_error,
    modify_error,
    quantize_error,
    quantize_update,
    replace_derivative,
    sign_error,
    without_derivatives,
)
from lrules.network import Network
from lrules.rule import Feedback, Gradients, Rule
from lrules.rules.backman import backman
from lrules.rules.backprop import backprop, last_layer_only
from lrules.rules.difference_target_propagation import difference_target_propagation
from lrules.rules.direct_feedback_alignment import direct_feedback_alignment
from lrules.rules.direct_kolen_pollack import direct_kolen_pollack
from lrules.rules.dual_propagation import dual_propagation
from lrules.rules.equilibrium_propagation import equilibrium_propagation
from lrules.rules.feedback_alignment import feedback_alignment
from lrules.rules.forward_gradient import forward_gradient
from lrules.rules.kolen_pollack import kolen_pollack
from lrules.rules.local_losses import local_losses
from lrules.rules.monotone_dfa import monotone_dfa
from lrules.rules.node_perturbation import node_perturbation
from lrules.rules.partition import partition
from lrules.rules.predictive_coding import predictive_coding
from lrules.rules.random_target_projection import random_target_projection
from lrules.rules.sign_symmetry import sign_symmetry
from lrules.rules.skipped_backprop import skipped_backprop
from lrules.rules.weight_mirror import weight_mirror

__version__ = "0.2.0"

__all__ = [
    "Feedback",
    "FeedbackGrad",
    "Gradients",
    "Network",
    "Rule",
    "TransformedNetwork",
    "ValueAndGrad",
    "activation",
    "audit",
    "backman",
    "backprop",
    "describe",
    "diagnostics",
    "difference_target_propagation",
    "direct",
    "direct_feedback_alignment",
    "direct_kolen_pollack",
    "drop_error",
    "dual_propagation",
    "equilibrium_propagation",
    "extend",
    "feedback",
    "feedback_alignment",
    "feedback_grad",
    "forward_gradient",
    "from_linen",
    "from_nnx",
    "hidden",
    "kolen_pollack",
    "last_layer_only",
    "local_losses",
    "magnitude_error",
    "modify_error",
    "monotone",
    "monotone_dfa",
    "node_perturbation",
    "not_activation",
    "partition",
    "predictive_coding",
    "quantize_error",
    "quantize_update",
    "random_target_projection",
    "refusals",
    "replace_derivative",
    "sequential",
    "sign_error",
    "sign_symmetry",
    "skipped_backprop",
    "testing",
    "transform",
    "value_and_grad",
    "weight_mirror",
    "without_derivatives",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
