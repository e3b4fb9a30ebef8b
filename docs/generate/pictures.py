"""The pictures of the rules and of the terms.

All pictures of rules have the same network: inputs x, hidden signals h1 and h2, outputs y. Above runs the forward pass.
Below runs what the rule sends.
"""

from collections.abc import Callable

from docs.generate.svg import Drawing
from docs.generate.timetables import PIPELINES

X, H1, H2, Y = 70, 230, 390, 550
TOP, BELOW = 62, 172
AT = {1: H1, 2: H2}


def _network(title: str, height: int = 262, *, top: int = TOP, weights: str = "W{}") -> Drawing:
    made = Drawing(title, height=height)
    for i, (left, right) in enumerate(((X, H1), (H1, H2), (H2, Y)), 1):
        made.arrow((left + 28, top), (right - 28, top), "forward", weights.format("₁₂₃"[i - 1]))
    for place, name in ((X, "x"), (H1, "h₁"), (H2, "h₂"), (Y, "y")):
        made.box(place, top, name, "forward")
    return made


def _output_error(made: Drawing, top: int = TOP) -> None:
    made.arrow((Y, top + 18), (Y, BELOW - 17), "error")
    made.circle(Y, BELOW, "e")


def _arrives(made: Drawing, which: int, kind: str, words: str = "× f′", top: int = TOP) -> None:
    made.arrow((AT[which], BELOW - 17), (AT[which], top + 18), kind, dashed=True)
    if words:
        made.text(AT[which] + 26, (BELOW + top) / 2, words, kind, 13)


def _says(made: Drawing, *lines: str, kind: str = "ink") -> None:
    for i, line in enumerate(lines):
        made.text(made.width / 2, made.height - 16 - 20 * (len(lines) - 1 - i), line, kind, 13)


def _sequential(title: str, label: str, kind: str, *says: str, weights: str = "W{}", inside: str = "δ") -> Drawing:
    made = _network(title, weights=weights)
    _output_error(made)
    for which, start in ((2, Y), (1, H2)):
        words = label.format("₁₂₃"[which])
        made.arrow((start - 17, BELOW), (AT[which] + 17, BELOW), kind, words)
        made.circle(AT[which], BELOW, inside + "₁₂"[which - 1])
        _arrives(made, which, "error")
    _says(made, *says)
    return made


def _direct(
    title: str, label: str, kind: str, *says: str, source: str = "e", weights: str = "W{}", height: int = 290
) -> Drawing:
    made = _network(title, height, weights=weights)
    _output_error(made)
    sender = Y
    if source != "e":
        made.box(Y + 66, BELOW, source, "other", 40)
        made.text(Y + 66, BELOW + 32, "targets", "other", 13)
        sender = Y + 66
    for which, bend in ((2, 70 if source != "e" else 46), (1, 120 if source != "e" else 108)):
        start = (sender - 6, BELOW + 17)
        made.arrow(start, (AT[which] + 10, BELOW + 15), kind, label.format("₁₂"[which - 1]), bend=bend)
        made.circle(AT[which], BELOW, "δ" + "₁₂"[which - 1])
        _arrives(made, which, "error")
    _says(made, *says)
    return made


def backprop() -> Drawing:
    return _sequential(
        "Backpropagation: the error goes down through the transposed weights",
        "W{}ᵀ",
        "error",
        "The error e goes down through the transposed forward weights, layer by layer.",
    )


def feedback_alignment() -> Drawing:
    return _sequential(
        "Feedback alignment: fixed random weights carry the error down",
        "B{}ᵀ",
        "fixed",
        "The same path. Fixed random weights B take the place of the forward weights.",
    )


def kolen_pollack() -> Drawing:
    return _sequential(
        "Kolen-Pollack: learned feedback weights carry the error down",
        "B{}ᵀ",
        "learned",
        "The feedback weights B learn: each gets the same update as its forward weight W.",
    )


def direct_kolen_pollack() -> Drawing:
    return _direct(
        "Direct Kolen-Pollack: learned feedback weights bring the output error to each hidden signal",
        "B{}ᵀ",
        "learned",
        "The feedback weights B learn from e and the hidden signals, and decay as W does.",
    )


def weight_mirror() -> Drawing:
    made = _network("Weight mirror: in a phase of their own, feedback weights learn from noise", 236, top=88)
    for i, (left, right) in enumerate(((H1, H2), (H2, Y))):
        made.text(left, 20, "noise ξ" + "₁₂"[i], "other", 14)
        made.arrow((left, 30), (left, 70), "other")
        made.arrow((right - 28, 136), (left + 28, 136), "learned", f"B{'₂₃'[i]}ᵀ")
        made.text((left + right) / 2, 160, f"learns ξ{'₁₂'[i]} (W{'₂₃'[i]}ξ{'₁₂'[i]})ᵀ", "learned", 13)
    _says(
        made,
        "Noise ξ replaces the inputs of the layers. B learns the products of noise and response,",
        "and so comes to W. Ordinary steps are those of feedback alignment, and leave B alone.",
    )
    return made


def sign_symmetry() -> Drawing:
    return _sequential(
        "Sign symmetry: feedback weights with the signs of the forward weights",
        "(M sign W{})ᵀ",
        "fixed",
        "The feedback knows the signs of the forward weights, but not their sizes.",
    )


def backman() -> Drawing:
    return _sequential(
        "BackMAN: the error goes down, scaled neuron by neuron",
        "W{}ᵀ c",
        "error",
        "Each neuron's error is scaled by its own c. Then its update has the norm alpha.",
    )


def skipped_backprop() -> Drawing:
    made = _sequential(
        "Skipped backpropagation: the way of backpropagation without derivatives on it",
        "W{}ᵀ",
        "error",
        "No derivative on the way down (s). Each layer multiplies by its own derivative only.",
        inside="s",
    )
    return made


def direct_feedback_alignment() -> Drawing:
    return _direct(
        "Direct feedback alignment: the output error comes straight to each hidden signal",
        "B{}ᵀ",
        "fixed",
        "The output error e comes straight to every hidden signal, through a random matrix.",
    )


def monotone_dfa() -> Drawing:
    return _direct(
        "Monotone DFA: direct feedback with non-negative weights",
        "B{}ᵀ ≥ 0",
        "fixed",
        "As DFA. The feedback weights and all weights above the first layer are non-negative.",
    )


def random_target_projection() -> Drawing:
    return _direct(
        "Direct random target projection: the targets come straight to each hidden signal",
        "−B{}ᵀ",
        "fixed",
        "The targets t, not the error, come to every hidden signal. Only W₃ learns from e.",
        source="t",
        height=300,
    )


def last_layer_only() -> Drawing:
    made = _network("Last layer only: no error arrives at any hidden signal", 232)
    _output_error(made)
    for which in (1, 2):
        made.text(AT[which], BELOW - 30, "nothing", "quiet")
    made.arrow((Y - 17, BELOW), (470, TOP + 12), "error", dashed=True)
    _says(made, "Only W₃ learns. The hidden layers keep their first weights.")
    return made


def dual_propagation() -> Drawing:
    made = Drawing("Dual propagation: each state has two values, and their difference carries the error", height=276)
    low = BELOW - 18
    for i, (left, right) in enumerate(((X, H1), (H1, H2), (H2, Y)), 1):
        made.arrow((left + 28, TOP), (right - 30, TOP), "forward", f"W{'₁₂₃'[i - 1]}")
    made.box(X, TOP, "x", "forward")
    made.box(Y, TOP, "y", "forward")
    for which, place in AT.items():
        made.box(place, TOP - 17, "s⁺" + "₁₂"[which - 1], "learned", 60, 30)
        made.box(place, TOP + 17, "s⁻" + "₁₂"[which - 1], "fixed", 60, 30)
    made.arrow((Y, TOP + 18), (Y, low - 17), "error")
    made.circle(Y, low, "βe")
    for which, start in ((2, Y), (1, H2)):
        made.arrow((start - (17 if start == Y else 36), low), (AT[which] + 36, low), "error", f"W{'₁₂₃'[which]}ᵀ")
        made.arrow((AT[which], low - 17), (AT[which], TOP + 33), "error", dashed=True)
        made.box(AT[which], low, "s⁺ − s⁻", "error", 72, 32)
    made.text(made.width / 2, 228, "The error pushes the two values of a state apart: s⁺ up, s⁻ down.", "ink", 13)
    made.text(made.width / 2, 250, "Their difference goes down. No derivative of an activation is used.", "ink", 13)
    return made


def predictive_coding() -> Drawing:
    made = _network("Predictive coding: states settle between predictions and errors", 284)
    _output_error(made)
    for which, start in ((2, Y), (1, H2)):
        made.arrow((start - 17, BELOW), (AT[which] + 17, BELOW), "error", f"W{'₁₂₃'[which]}ᵀ")
        made.circle(AT[which], BELOW, "ε" + "₁₂"[which - 1])
        made.arrow((AT[which] - 8, BELOW - 17), (AT[which] - 8, TOP + 18), "error")
        made.arrow((AT[which] + 8, TOP + 18), (AT[which] + 8, BELOW - 17), "learned")
    _says(
        made,
        "ε is a state minus its prediction. The states move until all errors balance.",
        "Then each weight learns from the error above it and the state below it.",
    )
    return made


def equilibrium_propagation() -> Drawing:
    made = Drawing("Equilibrium propagation: states settle twice, without and with a nudge", height=262)
    for i, (left, right) in enumerate(((X, H1), (H1, H2), (H2, Y)), 1):
        made.arrow((left + 30, TOP - 9), (right - 30, TOP - 9), "forward", f"W{'₁₂₃'[i - 1]}")
        if i > 1:
            made.arrow((right - 30, TOP + 9), (left + 30, TOP + 9), "learned")
    for place, name in ((X, "x"), (H1, "s₁"), (H2, "s₂"), (Y, "s₃")):
        made.box(place, TOP, name, "forward")
    made.text((H1 + H2) / 2, TOP + 30, "W₂ᵀ", "learned", 14)
    made.text((H2 + Y) / 2, TOP + 30, "W₃ᵀ", "learned", 14)
    made.arrow((Y, BELOW - 17), (Y, TOP + 18), "error", dashed=True)
    made.circle(Y, BELOW, "±βe")
    _says(
        made,
        "All states act on each other until they settle. Then the error nudges the last one.",
        "The difference of the two equilibria is the update.",
    )
    return made


def node_perturbation() -> Drawing:
    made = _network("Node perturbation: feedback weights learn from noise", 300, top=88)
    for which in (1, 2):
        made.text(AT[which], 20, "noise ξ" + "₁₂"[which - 1], "other", 14)
        made.arrow((AT[which], 30), (AT[which], 70), "other")
    _output_error(made, 88)
    for which, start in ((2, Y), (1, H2)):
        made.arrow((start - 17, BELOW), (AT[which] + 17, BELOW), "learned", f"B{'₁₂₃'[which]}ᵀ")
        made.circle(AT[which], BELOW, "δ" + "₁₂"[which - 1])
        _arrives(made, which, "error", "", top=88)
    _says(
        made,
        "A second pass with noise shows how each hidden signal changes the loss.",
        "The feedback weights B learn to bring down this effect. Then W learns through B.",
    )
    return made


def forward_gradient() -> Drawing:
    made = _network("Forward gradient: random directions, and what they do to the loss", 270, top=88)
    for which in (1, 2):
        made.text(AT[which], 20, "direction v" + "₁₂"[which - 1], "other", 14)
        made.arrow((AT[which], 30), (AT[which], 70), "other")
        made.arrow((AT[which], BELOW - 17), (AT[which], 106), "error", dashed=True)
        made.circle(AT[which], BELOW, "D v" + "₁₂"[which - 1], radius=22)
    made.arrow((Y, 106), (Y, BELOW - 17), "error")
    made.circle(Y, BELOW, "D")
    _says(
        made,
        "A forward pass along random directions v shows one number: how the loss changes, D.",
        "Each layer multiplies this number by its own direction. On average, D v is the gradient.",
    )
    return made


def difference_target_propagation() -> Drawing:
    made = _sequential(
        "Difference target propagation: learned inverses carry targets down",
        "g{}",
        "learned",
        "Each layer learns an inverse g. It turns the target of its output into one of its input:",
        "t₁ = h₁ + g₂(t₂) − g₂(h₂). Each layer learns to come nearer to its own target.",
        inside="t",
    )
    return made


def local_losses() -> Drawing:
    made = _network("Local losses: each hidden signal has its own loss", 262)
    _output_error(made)
    for which in (1, 2):
        made.arrow((AT[which] + 12, TOP + 18), (AT[which] + 12, BELOW - 17), "learned", "C" + "₁₂"[which - 1])
        made.circle(AT[which], BELOW, "L" + "₁₂"[which - 1])
        made.arrow((AT[which] - 12, BELOW - 14), (AT[which] - 12, TOP + 18), "error", dashed=True)
    _says(made, "A learned layer C predicts the targets from each hidden signal. No error comes from above.")
    return made


def partition() -> Drawing:
    made = _network("Partition: each layer has its own rule")
    _output_error(made)
    made.arrow((Y - 17, BELOW), (H2 + 17, BELOW), "error", "W₃ᵀ")
    made.arrow((H2 - 17, BELOW), (H1 + 17, BELOW), "fixed", "B₂ᵀ")
    for which in (1, 2):
        made.circle(AT[which], BELOW, "δ" + "₁₂"[which - 1])
        _arrives(made, which, "error")
    made.text((H2 + Y) / 2, BELOW + 28, "backprop", "error", 13)
    made.text((H1 + H2) / 2, BELOW + 28, "feedback alignment", "fixed", 13)
    _says(made, "The rule of a layer says what arrives at the hidden signal that the layer reads.")
    return made


# ---------------------------------------------------------------------------------------------------------- the terms


def layer() -> Drawing:
    made = Drawing("A layer is the product of data and a parameter", height=216)
    made.arrow((82, 90), (192, 90))
    made.arrow((248, 90), (342, 90))
    made.arrow((398, 90), (490, 90))
    made.arrow((220, 150), (220, 112), "learned")
    made.arrow((370, 150), (370, 112), "learned")
    made.box(56, 90, "h₁", "forward")
    made.circle(220, 90, "·", "forward", 22)
    made.circle(370, 90, "+", "forward", 22)
    made.circle(514, 90, "f", "forward", 22)
    made.arrow((536, 90), (582, 90))
    made.box(610, 90, "h₂", "forward")
    made.box(220, 168, "W₂", "learned")
    made.box(370, 168, "b₂", "learned")
    made.frame(164, 52, 112, 144)
    made.text(220, 32, "the layer W₂", "other")
    made.text(370, 48, "the bias: no part of it", "quiet", 13)
    made.text(514, 48, "the activation", "quiet", 13)
    return made


def hidden_signal() -> Drawing:
    made = _network("Hidden signals are what layers read, if it depends on parameters", 178)
    for place in (H1, H2):
        made.frame(place - 40, TOP - 28, 80, 56)
        made.text(place, TOP + 48, "hidden signal", "other", 14)
    made.text(X, TOP + 48, "data", "quiet", 14)
    made.text(Y, TOP + 48, "outputs", "quiet", 14)
    _says(made, "The layer W₂ reads h₁, so h₁ is the hidden signal with the name W₂. W₁ reads data only.")
    return made


def learning_channel() -> Drawing:
    made = _sequential("The learning channel is the way of the error from the outputs to the layers", "?", "error")
    made.frame(H1 - 44, BELOW - 32, Y - H1 + 88, 64)
    _says(made, "The learning channel: in backpropagation the transposed network. A rule replaces it.", kind="other")
    return made


def sequential_and_direct() -> Drawing:
    made = Drawing("A sequential rule goes from one hidden signal to the next; a direct rule goes straight", height=304)
    for left, name in ((0, "sequential"), (330, "direct")):
        made.text(left + 165, 24, name, "other", 16)
        for i, label in enumerate(("y", "h₂", "h₁")):
            y = 66 + 78 * i
            made.box(left + 80, y, label, "forward")
            if i:
                made.arrow((left + 80, y - 18), (left + 80, y - 60), "forward")
                made.text(left + 54, y - 39, f"W{'₃₂'[i - 1]}", "ink", 14)
            made.circle(left + 220, y, ("e", "δ₂", "δ₁")[i])
    for i, label in enumerate(("B₃ᵀ", "B₂ᵀ")):
        y = 66 + 78 * i
        made.arrow((220, y + 17), (220, y + 61), "fixed")
        made.text(245, y + 39, label, "fixed", 14)
    made.arrow((550, 83), (550, 127), "fixed")
    made.text(530, 105, "B₂ᵀ", "fixed", 14)
    made.parts += [  # a bow to the right
        '<path class="fixed" d="M567 66 Q640 144 575 217" fill="none" stroke-width="1.8"/>',
        '<polygon class="h-fixed" points="568,222 571.6,213.4 578.6,219.4"/>',
    ]
    made.text(628, 144, "B₁ᵀ", "fixed", 14)
    _says(
        made,
        "Feedback weights of a sequential rule have the shape of W.",
        "Those of a direct rule have the shape outputs × hidden signal.",
    )
    return made


def output_error() -> Drawing:
    made = Drawing("The output error is taken below a softmax", height=226)
    for left, right, name in ((98, 202, "W₃"), (258, 362, ""), (458, 552, "")):
        made.arrow((left, 62), (right, 62), "forward", name)
    made.box(70, 62, "h₂", "forward")
    made.box(230, 62, "z", "forward")
    made.box(410, 62, "softmax", "forward", 96)
    made.box(580, 62, "y", "forward")
    made.arrow((580, 140), (580, 82), "quiet", dashed=True)
    made.text(580, 156, 'error_at="outputs"', "quiet", 13)
    made.arrow((230, 122), (230, 82), "error")
    made.circle(230, 140, "e")
    made.text(330, 140, "here: e = y − t", "error", 14)
    _says(
        made,
        "A softmax at the end has no parameters. So direct rules take the error below it:",
        "with the cross-entropy this is the outputs minus the targets.",
    )
    return made


def modifier() -> Drawing:
    made = _network("A modifier changes the error at each hidden signal")
    _output_error(made)
    for which, start in ((2, Y), (1, H2)):
        left = AT[which] + 17
        made.arrow((start - 17, BELOW), (left + 76, BELOW), "fixed", "")
        made.box(left + 50, BELOW, "± 2ⁿ", "other", 52, 30)
        made.arrow((left + 24, BELOW), (left, BELOW), "other")
        made.circle(AT[which], BELOW, "δ" + "₁₂"[which - 1])
        _arrives(made, which, "error")
    _says(made, "quantize_error(rule, bits=5): the error is rounded where it arrives.")
    return made


Maker = Callable[[], Drawing]
RULES: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (
        backprop, last_layer_only, feedback_alignment, direct_feedback_alignment, skipped_backprop, sign_symmetry,
        kolen_pollack, direct_kolen_pollack, weight_mirror, random_target_projection, backman, monotone_dfa,
        dual_propagation, predictive_coding, equilibrium_propagation, node_perturbation, forward_gradient, local_losses,
        difference_target_propagation, partition,
    )
}  # fmt: skip
TERMS: dict[str, Maker] = {
    maker.__name__: maker
    for maker in (layer, hidden_signal, learning_channel, sequential_and_direct, output_error, modifier)
}
ALL = RULES | TERMS | PIPELINES


def files() -> dict[str, str]:
    """The text of each picture, by its name in docs/pictures."""
    return {f"{name}.svg": maker().svg() for name, maker in ALL.items()}
