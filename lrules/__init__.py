"""lrules: learning rules other than backpropagation, for unmodified JAX models."""

from types import ModuleType as _ModuleType

from jax.ad_checkpoint import checkpoint_name as hidden

from lrules import diagnostics, feedback, monotone, testing
from lrules.adapters import from_linen, from_nnx
from lrules.apply import transform, value_and_grad
from lrules.audit import audit
from lrules.constructors import direct, sequential
from lrules.description import describe, refusals
from lrules.engine.activations import activation, not_activation
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
from lrules.rules.direct_feedback_alignment import direct_feedback_alignment
from lrules.rules.dual_propagation import dual_propagation
from lrules.rules.feedback_alignment import feedback_alignment
from lrules.rules.kolen_pollack import kolen_pollack
from lrules.rules.monotone_dfa import monotone_dfa
from lrules.rules.node_perturbation import node_perturbation
from lrules.rules.partition import partition
from lrules.rules.random_target_projection import random_target_projection
from lrules.rules.sign_symmetry import sign_symmetry
from lrules.rules.skipped_backprop import skipped_backprop

__version__ = "0.1.0"

_public_modules = (diagnostics, feedback, monotone, testing)
__all__ = [
    name
    for name, value in list(globals().items())
    if not name.startswith("_") and (not isinstance(value, _ModuleType) or value in _public_modules)
]
