"""What rules cost, as formulas: bytes of feedback, operations, and what travels between devices.

A network is a list of its layers (`mlp`, `resnet18`, `transformer`), so a network of any size costs nothing to ask:

    >>> from experiments import costs
    >>> net = costs.mlp((784, 1000, 1000, 10))
    >>> costs.feedback_numbers("feedback_alignment", net), costs.feedback_numbers("direct_feedback_alignment", net)
    (1010000, 20000)
    >>> round(costs.products("direct_feedback_alignment", net) / costs.products("backprop", net), 3)
    0.785

Operations are the products of one example (2 operations for each multiplication), without elementwise operations and
reductions. `docs/costs.md` explains the formulas, and tests compare them with compiled programs.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

FLOAT = 4  # bytes of a number in float32


class Layer(NamedTuple):
    """A layer of a network.

    Attributes:
      weights: the numbers in its weight.
      products: the multiplications of its forward pass, for one example (0 for an embedding).
      reads: the name of the hidden signal that it reads; empty if it reads data.
    """

    weights: int
    products: int
    reads: str = ""


class Net(NamedTuple):
    """A network.

    Attributes:
      layers: its layers, from the inputs to the outputs; the last one makes the outputs.
      signals: the size of each hidden signal, for one example.
      outputs: the number of outputs of one example.
      others: the numbers in other parameters (biases, normalisation).
      mixing: the multiplications between activations (attention), for one example.
      linearised: whether other operations than activations lie between the layers (normalisation, pooling), which dual
        propagation linearises at its last states.
      positions: the positions of outputs and hidden signals that can share feedback weights (the tokens).
    """

    layers: list[Layer]
    signals: dict[str, int]
    outputs: int
    others: int = 0
    mixing: int = 0
    positions: int = 1
    linearised: bool = False

    @property
    def parameters(self) -> int:
        """The numbers in all parameters."""
        return self.others + sum(layer.weights for layer in self.layers)

    @property
    def forward(self) -> int:
        """The multiplications of all layers."""
        return sum(layer.products for layer in self.layers)

    @property
    def down(self) -> int:
        """The multiplications that bring the error down through the layers that read a hidden signal."""
        return sum(layer.products for layer in self.layers if layer.reads)


# ----------------------------------------------------------------------------------------------------------- networks


def mlp(widths: Sequence[int]) -> Net:
    """Dense layers with biases: `[inputs, hidden, ..., outputs]`."""
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    layers = [Layer(m * n, m * n, f"h{i}" if i else "") for i, (m, n) in enumerate(pairs)]
    signals = {f"h{i}": m for i, (m, _) in enumerate(pairs) if i}
    return Net(layers, signals, widths[-1], others=sum(widths[1:]))


def resnet18(image: int, channels: int, classes: int, width: int = 64, *, large: bool = False) -> Net:
    """ResNet-18: with the stem for small images of `experiments.models`, or with `large` that of ImageNet.

    (The stem of ImageNet is a 7 x 7 convolution of stride 2, then max-pooling of stride 2.)
    """
    layers, signals, others = [], {}, 2 * width

    def conv(m: int, n: int, size: int, stride: int, side: int, reads: str) -> int:
        out = (side + 2 * (size // 2) - size) // stride + 1
        layers.append(Layer(m * n * size**2, m * n * _on_the_image(side, size, stride) ** 2, reads))
        return out

    side = conv(channels, width, 7 if large else 3, 2 if large else 1, image, "")
    side = (side + 2 - 3) // 2 + 1 if large else side
    m = width
    for block in range(8):
        n, stride = width * 2 ** (block // 2), 2 if block in (2, 4, 6) else 1
        signals[f"block {block}"] = m * side**2
        after = conv(m, n, 3, stride, side, f"block {block}")
        signals[f"inside {block}"] = n * after**2
        conv(n, n, 3, 1, after, f"inside {block}")
        if stride != 1 or m != n:
            conv(m, n, 1, stride, side, f"block {block}")
            others += 2 * n
        side, m, others = after, n, others + 4 * n
    signals["mean"] = m
    layers.append(Layer(m * classes, m * classes, "mean"))
    return Net(layers, signals, classes, others + classes, linearised=True)


def _on_the_image(side: int, size: int, stride: int) -> int:
    """Along one axis, how often a window of a convolution (padded by half its size) lies on a pixel of the image."""
    pad = size // 2
    outs = (side + 2 * pad - size) // stride + 1
    return sum(0 <= o * stride + j - pad < side for o in range(outs) for j in range(size))


def transformer(vocabulary: int, tokens: int, blocks: int = 12, width: int = 512) -> Net:
    """The pre-norm transformer of `experiments.transformer`: predicts each next token."""
    layers, signals = [Layer(vocabulary * width, 0)], {}

    def dense(m: int, n: int, reads: str) -> None:
        signals[reads] = tokens * m
        layers.append(Layer(m * n, tokens * m * n, reads))

    for block in range(blocks):
        for _ in range(3):  # query, key and value read one hidden signal
            dense(width, width, f"norm1 {block}")
        dense(width, width, f"attention {block}")
        dense(width, 4 * width, f"norm2 {block}")
        dense(4 * width, width, f"up {block}")
    dense(width, vocabulary, "norm")
    norms, biases = 2 * width * (2 * blocks + 1), blocks * 9 * width + vocabulary
    mixing = blocks * 2 * tokens**2 * width
    return Net(layers, signals, tokens * vocabulary, norms + biases + tokens * width, mixing, tokens)


# -------------------------------------------------------------------------------------------------------------- rules

SEQUENTIAL = ("feedback_alignment", "kolen_pollack")  # with feedback weights
DIRECT = ("direct_feedback_alignment", "random_target_projection")
RULES = ("backprop", *SEQUENTIAL, "backman", "dual_propagation", *DIRECT, "last_layer_only")


def feedback_numbers(rule: str, net: Net, *, shared: bool = False, rank: int | None = None) -> int:
    """The numbers in the feedback weights of a rule.

    Args:
      rule: one of `RULES`.
      net: the network.
      shared: the positions share feedback weights (`shared_axes=1`).
      rank: that of direct feedback (`rank=`).
    """
    if rule in SEQUENTIAL:
        return sum(layer.weights for layer in net.layers if layer.reads)
    if rule not in DIRECT:
        return 0
    outputs, places = (net.outputs // net.positions, net.positions) if shared else (net.outputs, 1)
    sizes = sum(net.signals.values()) // places
    return outputs * sizes if rank is None else outputs * rank + rank * sizes


def products(rule: str, net: Net, *, shared: bool = False, rank: int | None = None, iterations: int = 1) -> int:
    """The operations of a step for one example: forward pass, gradients and feedback.

    Args:
      rule: one of `RULES`.
      net: the network.
      shared, rank: as in `feedback_numbers`.
      iterations: those of dual propagation.
    """
    weight_gradients, mixed = net.forward, 3 * net.mixing  # forward, and back to both factors
    if rule == "last_layer_only":
        return 2 * (net.forward + net.mixing + net.layers[-1].products)
    if rule in DIRECT:
        return 2 * (net.forward + weight_gradients + mixed + _arriving(net, shared, rank))
    if rule == "dual_propagation":
        if net.mixing:
            raise ValueError("dual propagation of a network with attention has no formula here: count its program")
        last = net.layers[-1].products
        passes = 2 * iterations - 1 + net.linearised
        return 2 * (net.forward + weight_gradients + last + passes * (net.down - last))
    return 2 * (net.forward + weight_gradients + net.down + mixed)


def _arriving(net: Net, shared: bool, rank: int | None) -> int:
    """The multiplications that bring the output error to all hidden signals."""
    outputs = net.outputs // net.positions if shared else net.outputs
    sizes = sum(net.signals.values())
    return outputs * sizes if rank is None else net.outputs * rank + rank * sizes


def pays(net: Net, *, shared: bool = False) -> dict[str, float]:
    """For each hidden signal, the work of direct feedback over that of the error that goes down to it.

    Below 1 direct feedback costs less. This is outputs / fan-out: the fan-out of a hidden unit is the number of
    multiplications that it takes part in.
    """
    outputs = net.outputs // net.positions if shared else net.outputs
    down = {name: sum(layer.products for layer in net.layers if layer.reads == name) for name in net.signals}
    return {name: outputs * size / down[name] for name, size in net.signals.items()}


# --------------------------------------------------------------------------------------------------------- what travels

Sent = dict[str, tuple[int, int]]  # for each collective: how often, and the bytes of its results on one device


def traffic(sent: Sent, devices: int) -> float:
    """The bytes that one device sends, if a collective goes round in a ring."""
    part = (devices - 1) / devices
    factors = {"all-reduce": 2 * part, "all-gather": part, "reduce-scatter": devices - 1, "collective-permute": 1}
    return sum(factors[kind] * size for kind, (_, size) in sent.items())


def data_parallel(rule: str, net: Net) -> Sent:
    """The batch is split; parameters and feedback are on every device. The gradients are summed.

    All gradients can go in one all-reduce, but those of BackMAN: it has to know the gradient of a layer, of the whole
    batch, before the error goes on.
    """
    return {"all-reduce": (len(net.layers) if rule == "backman" else 1, FLOAT * _trained(rule, net))}


def fsdp(
    rule: str,
    net: Net,
    devices: int,
    *,
    keeps: bool = True,
    split: bool = True,
    shared: bool = False,
    rank: int | None = None,
) -> Sent:
    """The batch, the parameters and the feedback are split over the same devices (fully sharded data parallel).

    Each parameter is gathered for the forward pass, and its gradient is summed into the parts. With `keeps`, gathered
    weights stay until the backward pass. Otherwise rules that send the error down through weights gather these once
    more. Feedback is gathered in the backward pass; without `split`, it lies whole on each device. BackMAN and dual
    propagation are as backpropagation (BackMAN sums a norm for each neuron, too).
    """
    through_weights = rule not in (*SEQUENTIAL, *DIRECT, "last_layer_only")
    again = [layer.weights for layer in net.layers if layer.reads] if through_weights and not keeps else []
    feedback = feedback_numbers(rule, net, shared=shared, rank=rank) if split else 0
    pieces = {True: len(net.signals), False: sum(bool(layer.reads) for layer in net.layers)}[rule in DIRECT]
    gathers = len(net.layers) + len(again) + (pieces if feedback else 0)
    trained = _trained(rule, net)
    return {
        "all-gather": (gathers, FLOAT * (net.parameters + sum(again) + feedback)),
        "reduce-scatter": (1 if rule == "last_layer_only" else len(net.layers), FLOAT * trained // devices),
    }


def _trained(rule: str, net: Net) -> int:
    """The numbers in the parameters that have a gradient (the last layer has a bias if the network has any)."""
    if rule != "last_layer_only":
        return net.parameters
    return net.layers[-1].weights + (net.outputs // net.positions if net.others else 0)


def tensor_parallel(rule: str, widths: Sequence[int], batch: int) -> Sent:
    """Dense layers `[inputs, hidden, ..., outputs]` in pairs, split by columns and by rows (Shoeybi et al. 2019).

    The even layers (from 0) are split by columns, the odd ones by rows, and there are as many of both. The layers split
    by rows sum over devices in the forward pass, those split by columns in the backward pass, but the first one, which
    reads data. A direct rule has no such error, and the output error is on every device: with its feedback weights laid
    out as their hidden signals, it sends nothing. BackMAN sums a norm for each neuron that is split by rows, and the
    mean norm of layers split by columns.
    """
    up = widths[2::2]
    down = up[:-1] if rule not in (*DIRECT, "last_layer_only") else ()
    count, numbers = len(up) + len(down), batch * (sum(up) + sum(down))
    if rule == "backman":
        count, numbers = count + len(widths) - 1, numbers + sum(up) + len(up)
    return {"all-reduce": (count, FLOAT * numbers)}


def pipeline(rule: str, width: int, outputs: int, batch: int, microbatches: int) -> Sent:
    """Stages on different devices, see `experiments.parallel`: what a stage in the middle sends for the whole batch.

    `width` is the size of the hidden signal between two stages, for one example.
    """
    up = FLOAT * batch * width
    if rule in DIRECT:
        error = {"all-reduce": (microbatches, FLOAT * batch * outputs)}
        return {"collective-permute": (microbatches, up), **error}
    return {"collective-permute": (2 * microbatches, 2 * up)}


def tensor_parallel_transformer(
    rule: str, vocabulary: int, tokens: int, blocks: int, width: int, batch: int, *, rank: int | None = None
) -> Sent:
    """Blocks of attention and dense layers, split by columns and then by rows; outputs split by the vocabulary.

    Two sums over devices in each block upwards, and two downwards. A direct rule has no error downwards, but each
    device has the output error of its part of the vocabulary only: all of it is gathered once. With `rank`, the error
    times the shared random matrix is summed instead, `[tokens, rank]`. (On paper: no program was compiled for it.)
    """
    one = FLOAT * batch * tokens
    if rule not in DIRECT:
        return {"all-reduce": (4 * blocks, 4 * blocks * one * width)}
    up = (2 * blocks, 2 * blocks * one * width)
    if rank is None:
        return {"all-reduce": up, "all-gather": (1, one * vocabulary)}
    return {"all-reduce": (up[0] + 1, up[1] + one * rank)}


# ------------------------------------------------------------------------------------------------------- what follows


def training_bytes(net: Net, feedback: int) -> int:
    """What training with Adam in float32 holds: parameters, gradients, two moments, and so many numbers of feedback."""
    return FLOAT * (4 * net.parameters + feedback)


def most_outputs(net: Net) -> int:
    """The largest number of outputs (of one position) at which direct feedback costs no more than the error's way down.

    The feedback costs outputs x (all hidden signals), the way down what the layers below the last one cost, and
    outputs x (the last hidden signal).
    """
    last = net.layers[-1]
    ratio = (net.down - last.products) / (sum(net.signals.values()) - net.signals[last.reads])
    return math.floor(ratio)
