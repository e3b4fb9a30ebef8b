"""Rules by layer against the explicit reference, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lrules
from tests import bridge
from tests.reference import partition
from tests.rules.common import ALL_NETS, agrees, make, pull


@pytest.mark.parametrize("kinds", [("fa", "bp", "fa", "fa"), ("bm", "fa", "bp", "bm"), ("fa", "dfa", "dfa", "bp")])
@pytest.mark.parametrize("name", ALL_NETS)
def test_partition(name, kinds):
    """Each layer follows its own rule: what arrives at the hidden signal it reads, and how its gradient is formed."""
    with jax.enable_x64(True):
        net, x, e = make(name)
        kinds = kinds[: len(net)]
        dfa = lrules.direct_feedback_alignment()
        rules = {"fa": lrules.feedback_alignment(), "bp": lrules.backprop(), "bm": lrules.backman(0.7), "dfa": dfa}
        rule = lrules.partition({f"^{k}/": rules[kind] for k, kind in enumerate(kinds)})
        feedback = rule.init(jax.random.key(1), bridge.apply_of(net), bridge.parameters(net), jnp.asarray(x))
        b = {k: np.asarray(feedback.fixed.get(f"{k}/kernel")) for k in range(len(net))}
        forms = {
            "fa": lambda k: ("feedback_alignment", b[k]),
            "bp": lambda k: ("backprop",),
            "bm": lambda k: ("backman", 0.7),
            "dfa": lambda k: ("direct", b[k]),
        }
        wanted = partition.gradients(net, [forms[kind](k) for k, kind in enumerate(kinds)], x, e)
        agrees(pull(net, rule, feedback, x, e), wanted)
