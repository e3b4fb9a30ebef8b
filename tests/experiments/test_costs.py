"""The formulas of costs against compiled programs, and what the page says of them."""

import doctest
import json

import jax
import pytest

import lrules
from docs.generate.facts import DOCS
from experiments import costs
from experiments.parallel import compiled
from tests.sampling import mostly_slow

DFA = "direct_feedback_alignment"
CASES = {
    f"{name} {rule} {options}": (name, rule, options)
    for name, model in compiled.MODELS.items()
    for rule, options in compiled.CASES
    if name == "mlp" and compiled.serves(rule, options, model[-1])
}


@pytest.mark.parametrize("case", mostly_slow(CASES, [n for n in CASES if "backprop" in n or DFA in n or "3" in n]))
def test_operations(case):
    """To the last product, and to the last number of feedback."""
    name, rule, options = CASES[case]
    row = compiled.operations(compiled.MODELS[name], rule, options)
    assert row["counted"] == row["formula"] > 0
    assert row["feedback"] == row["feedback_formula"]


@pytest.mark.parametrize("options", [{}, {"shared": True}, {"rank": 3}, {"shared": True, "rank": 3}])
def test_a_small_transformer(options):
    model = (*compiled.MODELS["transformer"][1:4], costs.transformer(11, 8, blocks=1, width=16))
    blocks = lambda rngs: compiled.Transformer(11, 8, rngs=rngs, blocks=1, width=16, heads=2)  # noqa: E731
    row = compiled.operations((blocks, *model), DFA, options)
    assert row["counted"] == row["formula"] and row["feedback"] == row["feedback_formula"]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["backprop", DFA])
def test_a_small_resnet(rule):
    row = compiled.operations(compiled.MODELS["resnet18"], rule, {})
    assert row["counted"] == row["formula"] and row["feedback"] == row["feedback_formula"]


@pytest.mark.parametrize("layout, rule", compiled.SENT)
def test_what_is_sent(layout, rule):
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    row = compiled.sent(layout, rule, (16,) * 4 + (8,), 8, 4)
    assert row["counted"] == row["formula"]


def test_direct_rules_send_no_more_than_backprop():
    """Where positions and outputs are few; and the page says where not."""
    net, widths = costs.mlp((256,) * 8 + (16,)), (256,) * 8 + (16,)
    for make in (
        lambda rule: costs.data_parallel(rule, net),
        lambda rule: costs.fsdp(rule, net, 8, keeps=False),
        lambda rule: costs.tensor_parallel(rule, widths, 64),
        lambda rule: costs.pipeline(rule, 256, 16, 64, 8),
    ):
        assert costs.traffic(make(DFA), 8) <= costs.traffic(make("backprop"), 8)


def test_known_networks():
    """Parameters that are known: ResNet-18 of ImageNet has 11,689,512."""
    assert costs.resnet18(224, 3, 1000, large=True).parameters == 11_689_512
    for name, (module, *_, net) in compiled.MODELS.items():
        _, params = lrules.from_nnx(module(compiled.nnx.Rngs(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == net.parameters, name


def test_where_direct_feedback_pays():
    """With the most outputs it costs no more than backprop, and with one more it does."""
    for make in (lambda c: costs.mlp((30, 50, 40, c)), lambda c: costs.mlp((9, 7, 6, 5, c))):
        most = costs.most_outputs(make(1))
        work = [costs.products(DFA, make(c)) / costs.products("backprop", make(c)) for c in (most, most + 1)]
        assert work[0] <= 1 < work[1]
    assert costs.most_outputs(costs.transformer(50, 16, 3, 70)) == 12 * 70 // 7
    assert set(costs.pays(costs.mlp((5, 6, 7, 3))).values()) == {3 / 7, 1.0}


def test_no_formula():
    with pytest.raises(ValueError, match="count its program"):
        costs.products("dual_propagation", compiled.MODELS["transformer"][-1])


def test_examples():
    assert doctest.testmod(costs).failed == 0


def test_the_measured_file():
    """Every case is there, and each is equal to the formulas of today."""
    content = json.loads((DOCS / "parallel" / "costs.json").read_text())
    for name, (*_, net) in compiled.MODELS.items():
        wanted = [case for case in compiled.CASES if compiled.serves(*case, net)]
        assert [(row["rule"], row["options"]) for row in content["operations"][name]] == wanted
        for row in content["operations"][name]:
            assert (
                row["counted"] == row["formula"] == compiled.BATCH * costs.products(row["rule"], net, **row["options"])
            )
            assert row["feedback"] == row["feedback_formula"]
    rows = [(row["layout"], row["rule"]) for row in content["sent"]]
    assert rows == compiled.SENT
    for row in content["sent"]:
        assert row["counted"] == row["formula"]


def test_the_table_of_layouts():
    """The library's placements, as docs/many_devices.md has them: with 4 bytes for the value, which it sums, too."""
    found, widths = json.loads((DOCS / "layouts.json").read_text())["cells"], (256,) * 8 + (10,)
    cells = {layout: {rule: cell["sent"] for rule, cell in rows.items()} for layout, rows in found.items()}
    net = costs.mlp(widths)
    for rule in ("backprop", "feedback_alignment", DFA, "backman", "dual_propagation"):
        count, size = costs.data_parallel(rule, net)["all-reduce"]
        assert cells["data"][rule] == {"all-reduce": [count, size + costs.FLOAT]}
        assert cells["tensor"][rule] == {"all-reduce": list(costs.tensor_parallel(rule, widths, 64)["all-reduce"])}
        if rule != "backman":  # biases lie whole there, and so does direct feedback
            wanted = costs.fsdp(rule, net._replace(others=0), 8, split=rule != DFA)
            assert cells["FSDP"][rule]["all-gather"] == list(wanted["all-gather"])
    elsewhere = cells["FSDP"]["direct feedback, split over its last axis"]
    assert elsewhere["all-gather"] == list(costs.fsdp(DFA, net._replace(others=0), 8)["all-gather"])


def test_numbers_in_the_text():
    """What the sentences of the page say of the extrapolations."""
    text = " ".join((DOCS / "costs.md").read_text().split())
    net = costs.transformer(32000, 2048, 20, 2048)
    assert "1.14 billion" in text and round(net.parameters / 1e9, 2) == 1.14
    assert f"pays up to {costs.most_outputs(net):,}" in text
    shared = costs.feedback_numbers(DFA, net, shared=True)
    assert "37 GB more" in text and round(costs.FLOAT * shared / 1e9) == 37
    assert "eight times as large as the parameters" in text and round(shared / net.parameters) == 8
    assert "three times that" in text
    assert round(costs.products(DFA, net, shared=True) / costs.products("backprop", net)) == 3
    work = costs.products(DFA, net, shared=True, rank=64) / costs.products("backprop", net)
    assert f"the work is {work:.2f}" in text and "16 times as large" in text and round(32000 / 2048) == 16
