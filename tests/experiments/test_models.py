"""Models: shapes, sizes, names of parameters, and what they refuse."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lrules
from experiments import models
from experiments.errors import InputError
from tests.sampling import mostly_slow


def build(name, shape, classes=10, **options):
    return models.build(name, shape, classes, rngs=nnx.Rngs(0), **options)


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("shape", [(8, 8, 1), (9, 12, 3)])
def test_logits_for_any_image_size(name, shape):
    def logits():
        model = build(name, shape, classes=7)
        model.eval()
        return model(jnp.zeros((5, *shape)))

    logits = jax.eval_shape(logits)
    assert logits.shape == (5, 7) and logits.dtype == jnp.float32


def size(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_sizes_of_the_published_models():
    """32x32 colour images, ten classes: LeNet-5, ResNet-18 with a 3x3 stem, VGG16; and the 784-2000x4-10 MLP."""
    assert size(nnx.eval_shape(lambda: build("lenet5", (32, 32, 3)))) == 62_006
    assert size(nnx.eval_shape(lambda: build("resnet18", (32, 32, 3)))) == 11_173_962
    assert size(nnx.eval_shape(lambda: build("vgg16", (32, 32, 3)))) == 33_638_218
    assert size(nnx.eval_shape(lambda: build("mlp", (28, 28, 1), widths=(2000,) * 4))) == 13_596_010


def test_resnet50_without_its_upper_blocks():
    """The blocks of the four stages have 256, 512, 1024 and 2048 features; each later stage halves the image."""
    whole = nnx.eval_shape(lambda: build("resnet50", (32, 32, 3)))
    features = [block.conv3.out_features for block in whole.blocks]
    assert size(whole) == 23_520_842
    assert features == [256] * 3 + [512] * 4 + [1024] * 6 + [2048] * 3 and whole.out.in_features == 2048
    assert [i for i, block in enumerate(whole.blocks) if block.conv2.strides != 1] == [3, 7, 13]
    cut = nnx.eval_shape(lambda: build("resnet50(blocks=4,width=2)", (32, 32, 3)))
    assert len(cut.blocks) == 4 and cut.out.in_features == 16


def test_vgg16_has_sixteen_layers_and_pools_while_it_can():
    """On 32x32 images five times, to a single pixel; on 2x3 once."""
    for shape, pools in (((32, 32, 3), 5), ((2, 3, 1), 1), ((1, 1, 1), 0)):
        model = models.VGG16(shape, 10, rngs=nnx.Rngs(0), width=2)
        assert sum(model.pools) == pools and model.fc1.in_features == 16 and model.fc2.out_features == 128
        names = {name for name, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)) if name[-1] == "kernel"}
        assert names == {("convs", i, "kernel") for i in range(13)} | {(f, "kernel") for f in ("fc1", "fc2", "out")}
        net, params = lrules.from_nnx(model)
        rows = lrules.describe(net, lrules.backprop(), params, jnp.zeros((2, *shape)))
        assert len(rows.layers) == 16


@pytest.mark.xfail(jax.__version_info__ >= (0, 12), reason="XLA gives NaN on a CPU, without any rule", strict=True)
def test_vgg16_keeps_the_size_of_its_signal_and_the_dtype():
    """Under He's initialisation the logits of a random image measure neither 2 ** -8 nor 2 ** 8."""
    model = models.VGG16((32, 32, 3), 10, rngs=nnx.Rngs(0), width=8, dtype=jnp.bfloat16)
    logits = jax.jit(lambda x: model(x))(jax.random.normal(jax.random.key(0), (4, 32, 32, 3)))
    assert logits.dtype == jnp.bfloat16 and 0.1 < float(jnp.std(logits.astype(jnp.float32))) < 10


def test_lenet_centres_small_images():
    model, image = build("lenet5", (28, 28, 1)), jax.random.uniform(jax.random.key(0), (2, 28, 28, 1))
    wide = build("lenet5", (32, 32, 1))
    padded = jnp.pad(image, [(0, 0), (2, 2), (2, 2), (0, 0)])
    assert (model(image) == wide(padded)).all()


def test_parameters_are_named_for_partition():
    names = {name for name, _ in nnx.to_flat_state(nnx.state(build("mlp", (4,), widths=(3,)), nnx.Param))}
    assert names == {("layers", i, kind) for i in (0, 1) for kind in ("kernel", "bias")}


def test_dtype_is_that_of_the_computation():
    model = build("cnn", (8, 8, 1), dtype=jnp.bfloat16)
    assert model(jnp.zeros((1, 8, 8, 1))).dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    ("name", "signals"),
    mostly_slow(
        [("mlp", 2), ("lenet5", 4), ("cnn", 3), ("resnet18", 17), ("vgg16", 15)],
        [("mlp", 2), ("lenet5", 4), ("cnn", 3)],
    ),
)
def test_rules_find_every_hidden_signal(name, signals):
    """ResNet-18: three of its twenty layers above the stem are skips that share a signal with a block's first layer."""
    net, params, state = lrules.from_nnx(build(name, (8, 8, 1), widths=(5, 4)), with_state=True)
    rule, inputs = lrules.direct_feedback_alignment(), (state, jnp.zeros((2, 8, 8, 1)))
    feedback = jax.eval_shape(lambda params: rule.init(jax.random.key(0), net, params, inputs), params)
    assert len(feedback.fixed) == signals


@pytest.mark.parametrize(
    ("name", "activation", "function"),
    [
        ("mlp", "", "tanh"),
        ("lenet5", "", "tanh"),
        ("cnn", "", "tanh"),
        ("mlp", "relu", "relu"),
        ("lenet5", "relu", "relu"),
        ("cnn", "sigmoid", "logistic"),
        ("vgg16", "", "relu"),
        ("resnet18", "relu", "relu"),
    ],
)
def test_a_model_has_its_activation_and_no_other(name, activation, function):
    def logits(x):
        return build(name, (8, 8, 1), widths=(5, 4), activation=activation)(x)

    text = str(jax.make_jaxpr(logits)(jnp.zeros((2, 8, 8, 1))))
    forward = text[text.index("dot_general") if name == "mlp" else text.index("conv_general_dilated") :]
    assert [name for name in ("tanh", "relu", "logistic") if name in forward] == [function]


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (("mpl", (4,)), {}, ["no model 'mpl'", "did you mean 'mlp'?"]),
        (("mlp", (4,)), {"activation": "rleu"}, ["no activation 'rleu'", "did you mean 'relu'?"]),
        (("lenet5", (8, 8, 1)), {"activation": "tanj"}, ["no activation 'tanj'", "did you mean 'tanh'?"]),
        (("vgg16", (8, 8, 1)), {"activation": "tanh"}, ["vgg16 has the activation relu", "'tanh'", "leave it out"]),
        (("resnet18", (8, 8, 1)), {"activation": "gelu"}, ["resnet18 has the activation relu", "'gelu'"]),
        (("lenet5", (64,)), {}, ["lenet5 needs images [height, width, channels]", "(64,)", "use mlp"]),
        (("cnn", (3, 3, 1)), {}, ["at least 4x4", "3x3", "use mlp"]),
        (("lenet5(width=3)", (8, 8, 1)), {}, ["lenet5 has no option 'width'", "write lenet5 alone"]),
        (("resnet50(depth=3)", (8, 8, 1)), {}, ["resnet50 has no option 'depth'", "resnet50(width=8)"]),
        (("resnet50(3)", (8, 8, 1)), {}, ["resnet50 has no option 3"]),
        (("resnet50(blocks=17)", (8, 8, 1)), {}, ["16 blocks", "ask for fewer"]),
        (("vgg16(width=0)", (8, 8, 1)), {}, ["width must be a whole number above 0, got 0"]),
    ],
)
def test_wrong_model_is_told_in_a_sentence(arguments, options, words):
    with pytest.raises(InputError) as error:
        build(*arguments, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
