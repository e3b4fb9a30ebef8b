"""Analysis: what a jaxpr's values depend on, and the layers, hidden signals and activations found in it.

Each value has a class: it depends on parameters only, on data only, on both, or on none. For scan carries, the
classes are found by iteration. A *layer* multiplies a value that depends on data by a weight. The *hidden signal* that
it reads is followed back through casts, reshapes and transposes to the tensor where it was defined. A weight is:

- a value that depends on parameters alone;
- a value that depends on parameters, and on data only through integers and booleans: a weight *chosen* by data, as that
  of an expert behind a router. An embedding is such a weight too, until another value than data multiplies it: then it
  is data itself;
- a value that layers have made from their weights, if it has no batch and multiplies data with a batch, or if it has a
  batch and multiplies as a matrix: the weights that a hypernetwork makes, a mixed kernel.

Layers may also read values without a batch (coordinates that are closed over, support sets): constants that go through
a nonlinearity between two multiplications by parameters. The first walk takes them for weights made of parameters. When
it meets such a nonlinearity, the walk begins again, with the multiplications before it as layers.

Uses of parameters that no rule can serve become refusals. The rule that meets them raises them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lrules.engine import by_hand
from lrules.engine.activations import MARK, UNMARK, Doubt, is_atom
from lrules.engine.dtypes import counts, is_inexact
from lrules.engine.findings import REMEDIES, Findings
from lrules.engine.jaxprs import (
    COND,
    INLINED,
    NEW_FORMS,
    OWN_DERIVATIVE,
    SCAN,
    SHARD_MAP,
    WHILE,
    Aval,
    Equation,
    Jaxpr,
    call_name,
    open_jaxpr,
    scan_counts,
    varying_axes,
)
from lrules.engine.layers import Multiplication, multiplication, multiplies, of_latents, one_layer, stage, transformed
from lrules.engine.operations import is_product, of, view_axes
from lrules.engine.records import EMPTY, Block, Value, ancestors, classes_of, merged_classes, united
from lrules.engine.values import output_parameter_axes, parameter_axes, slice_of, varying_dims


class Analysis(Findings):
    """One walk over a jaxpr and all jaxprs inside it.

    Args:
      names, ndims: the names and the numbers of axes of the parameters.
      promoted: keys of equations that an earlier walk has found to be layers: the first layers of networks without a
        batch (value 0), and products between a Fourier transform and its inverse (value: the number of axes).
    """

    def __init__(self, names: Sequence[str], ndims: Sequence[int], promoted: Mapping[Any, int]) -> None:
        super().__init__(names, ndims)
        self.promoted = promoted
        self.found: dict[Any, int] = {}  # further ones

    def walk(
        self, jaxpr: Jaxpr, ins: Sequence[Value], scope: Any, loops: Any, path: tuple[Any, ...]
    ) -> tuple[Block, list[Value]]:
        jaxpr, consts = open_jaxpr(jaxpr)
        block = Block(jaxpr, consts, scope, loops)
        for var, const in itertools.zip_longest(jaxpr.constvars, consts):
            block.values[var] = Value(var.aval, known=None if isinstance(const, jax.core.Tracer) else const)
        for var, value in zip(jaxpr.invars, ins, strict=True):
            block.values[var] = value
            if value.block is None:
                value.block, value.variable = block, var
        for index, eqn in enumerate(jaxpr.eqns):
            outs = self.equation(block, index, eqn, [block.value(v) for v in eqn.invars], path)
            for var, value in zip(eqn.outvars, outs, strict=True):
                block.values[var] = value
                if value.block is None:
                    value.block, value.variable = block, var
        if not (self.silent or self.sealed or self.unmarked):
            self.noted.append(block)
        return block, [block.value(v) for v in jaxpr.outvars]

    def equation(self, block: Block, index: int, eqn: Equation, ins: list[Value], path: tuple[Any, ...]) -> list[Value]:
        row, name = of(eqn), of(eqn).name
        params = united(v.params for v in ins)
        key = (*path, index)
        begins = key in self.promoted and not any(v.data for v in ins)
        data = any(v.data for v in ins) or begins
        atom = is_atom(eqn, ins)
        if name in INLINED and not atom and (params or any(v.loops for v in ins)):
            unmarked, self.unmarked = self.unmarked, self.unmarked or call_name(eqn).startswith(UNMARK)
            if call_name(eqn).startswith(MARK) and not self.silent and any(v.both for v in ins):
                what = "is not seen to act on each element alone, without parameters"
                self.noted.append(Doubt(call_name(eqn).removeprefix(MARK), why=f"marked, but it {what}"))
            child, outs = self.walk(eqn.params[INLINED[name]], ins, block.scope, block.loops, key)
            self.unmarked = unmarked
            block.children[index] = [child]
            return outs
        found = None
        if params and data:
            walk = {SCAN: self.scan, COND: self.cond, WHILE: self.loop, SHARD_MAP: self.shard_map}.get(name)
            if walk is not None:
                return walk(block, index, eqn, ins, key)
            if any(v.differentiable for v in ins):
                found = self.mixture(block, index, eqn, ins, key)
        elif params and name == SCAN:
            outs = self.generic(eqn, ins, carried=any(v.carried for v in ins))
            if multiplies(eqn.params["jaxpr"]):  # a network without a batch may lie inside
                walked = self.scan(block, index, eqn, ins, key)
                if any(v.data for v in walked):
                    return walked
                del block.children[index]
                for out, inner in zip(outs, walked, strict=True):
                    out.stage, out.operands = inner.stage, (*out.operands, inner)
            return outs
        elif params:
            self.find_beginnings(eqn, ins)
        outs = self.generic(eqn, ins)
        layer = block.layers.get(index)
        if begins:
            outs[0].data = outs[0].smooth = True
        if found is not None:  # a layer makes a signal from signals; else it looks up rows
            outs[0].smooth |= begins or found.operand.smooth or bool(found.operand.differentiable)
        if not self.silent and not (outs and outs[0].chosen and layer is None):
            weights = found.weight.lookups if found else EMPTY
            for lookup in united(v.lookups for v in ins) - weights:
                lookup.uses.add("data")
        if layer is not None:
            outs[0].layer, layer.output = layer, outs[0]
            outs[0].lookups = frozenset([layer]) if outs[0].chosen else EMPTY
            if not outs[0].chosen:
                layer.uses.add("data")
                outs[0].products, outs[0].axes = by_hand.of_layer(layer), output_parameter_axes(layer)
        elif params and data and not self.silent and row.elementwise:
            self.add_affine(block, index, ins, outs[0])
        if params and not data and outs and is_product(eqn):
            outs[0].key = key
        for out in outs:
            if any(p.key is None for p in out.products):
                out.products = tuple(dataclasses.replace(p, key=key) if p.key is None else p for p in out.products)
        self.sums(block, eqn, ins)
        marked = row.marks and ins[0].both and jnp.issubdtype(ins[0].aval.dtype, jnp.inexact)
        if marked and not self.silent and not self.sealed:
            self.add_hidden(ins[0], eqn.params["name"], ins[0].loops, mark=True)
        return outs

    def find_beginnings(self, eqn: Equation, ins: list[Value]) -> None:
        """If a nonlinear function of a product meets parameters again, the product was a layer without a batch."""
        if is_product(eqn) and all(v.params for v in ins[:2]):
            bent = [v for v in ins[:2] if v.stage == 2]
            self.found |= {v.key: 0 for b in bent for v in ancestors(b, lambda v: False) if v.key is not None}

    def mixture(
        self, block: Block, index: int, eqn: Equation, ins: list[Value], key: tuple[Any, ...]
    ) -> Multiplication | None:
        """An equation in which values made of parameters meet data: a layer, a bias or scale, or unknown."""
        row = of(eqn)
        found = multiplication(eqn, ins) or transformed(eqn, ins, self.promoted.get(key, 0))
        if found is None and key in self.promoted and not any(v.data for v in ins):
            found = of_latents(eqn, ins)
        if found is not None:
            self.add_layer(block, index, eqn, found)
            return found
        weights = [v for v in ins if v.pure or v.chosen]
        inner = [v for k, v in eqn.params.items() if k in ("call_jaxpr", "fun_jaxpr")]
        if not weights or not any(v.data for v in ins if v not in weights):
            return None
        if row.name in OWN_DERIVATIVE and inner:
            return self.own_derivative(block, index, eqn, ins, inner[0])
        if not row.may_mix:
            self.refuse(
                united(v.params for v in weights),
                f"the parameter {{name}} meets data in the primitive {row.name!r}, which lrules does not know: "
                + NEW_FORMS.get(row.name, "write it with dot_general or conv_general_dilated"),
            )
        return None

    def own_derivative(
        self, block: Block, index: int, eqn: Equation, ins: list[Value], body: Any
    ) -> Multiplication | None:
        """A function with a custom derivative: one layer if one weight multiplies data in it, else it is sealed."""
        what = f"{of(eqn).name[:10]} function"
        before = self.inner, self.sealed, self.refusals
        self.inner, self.sealed, self.refusals = [], self.sealed or what, []
        self.walk(body, [dataclasses.replace(v, block=None) for v in ins], (), (), (index, "custom"))
        found, refusals = self.inner, self.refusals
        self.inner, self.sealed, self.refusals = before
        served = None if refusals or any(loop for _, loop in found) else one_layer(eqn, ins, [p for p, _ in found])
        if served is not None:
            self.add_layer(block, index, eqn, served)
            return served
        self.refusals += refusals
        for product, loop in found:
            self.refuse(
                product.sources,
                f"the parameter {{name}} is multiplied by data inside a {loop}{what}, and rules cannot act there: move "
                f"the multiplication out of the {loop}{what}{REMEDIES.get(loop + what, '')}",
            )
        return None

    def generic(self, eqn: Equation, ins: list[Value], carried: bool = False) -> list[Value]:
        """The results of an equation without inner jaxprs: what they inherit from the operands."""
        found = []
        for result, out in enumerate(eqn.outvars):
            found.append(self.generic_one(eqn, [ins[result]] if of(eqn).same else ins, out.aval, carried))
            found[-1].result = result
        return found

    def generic_one(self, eqn: Equation, ins: list[Value], aval: Aval, carried: bool) -> Value:
        row = of(eqn)
        value = Value(
            aval,
            params=united(v.params for v in ins),
            data=any(v.data for v in ins),
            batched=any(v.batched for v in ins),
            loops=united(v.loops for v in ins),
            carried=carried or any(v.carried for v in ins),
            producer=eqn,
            operands=tuple(ins),
        )
        own = self.inner is not None  # inside a function with a custom derivative, which may pass integers
        stops = row.stops and ins[0].smooth and not own  # a weight is only frozen by it
        if is_inexact(aval) or (own and counts(aval)):
            value.differentiable = EMPTY if stops else united(v.differentiable for v in ins)
            if value.differentiable == value.params:
                value.differentiable = value.params
            value.smooth = any(v.smooth or (v.data and counts(v.aval) and row.casts) for v in ins)
        if value.chosen:
            value.params = value.differentiable
            value.lookups = united(v.lookups for v in ins)
        operand = ins[0] if len(ins) == 1 else None
        axes = view_axes(eqn, operand.aval.shape) if operand is not None and hasattr(operand.aval, "shape") else None
        if operand is not None and axes is not None and value.both:
            value.source, value.view = operand, eqn
        value.varies = varying_dims(eqn, ins, aval, axes)
        if value.pure or value.chosen:
            value.axes = parameter_axes(eqn, ins, aval, axes)
        if value.pure:
            value.stage = stage(eqn, ins)
        elif value.both:
            value.products = (*by_hand.made(eqn, ins, value), *by_hand.passed(eqn, ins, value, axes))[: by_hand.MOST]
            if not value.batched or any(p.is_matrix for p in value.products):
                value.axes = parameter_axes(eqn, ins, aval, axes)
        return value

    def sums(self, block: Block, eqn: Equation, ins: list[Value]) -> None:
        """Refuses products of weights and data that are summed by hand."""
        for product, sentence in by_hand.summed(eqn, ins, block):
            if of(eqn).kind == "transform":  # a product between two transforms is a convolution
                self.found[product.key] = len(of(eqn).contracted(eqn, 0))
            else:
                self.refuse(product.params, sentence)

    # -- constructs

    def scan(self, block: Block, index: int, eqn: Equation, ins: list[Value], key: tuple[Any, ...]) -> list[Value]:
        n_consts, n_carry = scan_counts(eqn.params)
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        avals = [v.aval for v in open_jaxpr(body)[0].invars]
        scope, loops = (*block.scope, "scan"), (*block.loops, (key, length))
        carry = [classes_of(v) for v in ins[n_consts : n_consts + n_carry]]

        def inputs() -> Iterator[Value]:
            for value in ins[:n_consts]:
                yield value
            for classes, aval in zip(carry, avals[n_consts : n_consts + n_carry], strict=True):
                value = Value(aval, **classes)
                value.carried = value.pure or value.chosen
                value.loops = frozenset([] if value.data else [key])
                yield value
            for value, aval in zip(ins[n_consts + n_carry :], avals[n_consts + n_carry :], strict=True):
                yield slice_of(value, aval, key)

        while True:
            self.silent += 1
            _, outs = self.walk(body, list(inputs()), scope, loops, key)
            self.silent -= 1
            merged = [merged_classes(a, classes_of(v)) for a, v in zip(carry, outs[:n_carry], strict=True)]
            if merged == carry:
                break
            carry = merged
        inner_ins = list(inputs())
        for i, value in enumerate(inner_ins[n_consts : n_consts + n_carry]):  # from the last walk
            value.operands = (ins[n_consts + i], outs[i])
        child, outs = self.walk(body, inner_ins, scope, loops, key)
        block.children[index] = [child]
        for i, value in enumerate(inner_ins[n_consts : n_consts + n_carry]):
            value.operands = (ins[n_consts + i], outs[i])
        for inner in outs[:n_carry]:
            for p in inner.products:
                if p.outer and p.kind == "product" and key in p.weight.loops:
                    self.refuse(p.params, by_hand.BY_HAND)
        for lookup in united(v.lookups for v in (*ins[n_consts : n_consts + n_carry], *outs[:n_carry])):
            lookup.uses.add("data")
        results = []
        for i, (inner, out) in enumerate(zip(outs, eqn.outvars, strict=True)):
            classes = carry[i] if i < n_carry else classes_of(inner)
            result = Value(out.aval, **classes, producer=eqn, operands=(inner,), loops=inner.loops - {key})
            result.carried = (result.pure or result.chosen) and (i < n_carry or inner.carried)
            result.lookups = inner.lookups if i >= n_carry else frozenset()
            results.append(result)
        return results

    def cond(self, block: Block, index: int, eqn: Equation, ins: list[Value], key: tuple[Any, ...]) -> list[Value]:
        walked = [
            self.walk(branch, ins[1:], (*block.scope, "cond"), block.loops, (*key, i))
            for i, branch in enumerate(eqn.params["branches"])
        ]
        block.children[index] = [child for child, _ in walked]
        results = []
        for j, out in enumerate(eqn.outvars):
            inner = [outs[j] for _, outs in walked]
            merged = self.generic_one(eqn, [ins[0], *inner], out.aval, False)
            merged.source = None
            results.append(merged)
        return results

    def loop(self, block: Block, index: int, eqn: Equation, ins: list[Value], key: tuple[Any, ...]) -> list[Value]:
        """A while loop: rules cannot serve anything inside, so it must not hold a layer."""
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        consts, carry = ins[n : n + m], ins[n + m :]
        everything = self.generic_one(eqn, ins, eqn.outvars[0].aval, False)
        everything.differentiable = united(v.differentiable for v in ins)
        everything.smooth = any(v.smooth for v in ins)
        body = eqn.params["body_jaxpr"]
        inner = [dataclasses.replace(v, block=None) for v in consts] + [
            Value(v.aval, **classes_of(v if v.pure else everything)) for v in carry
        ]
        before, self.sealed = self.sealed, self.sealed or "while loop"
        self.walk(body, inner, (*block.scope, "while"), (), (*key, "while"))
        self.sealed = before
        return [Value(v.aval, **classes_of(everything), producer=eqn, operands=tuple(ins)) for v in eqn.outvars]

    def shard_map(self, block: Block, index: int, eqn: Equation, ins: list[Value], key: tuple[Any, ...]) -> list[Value]:
        body = eqn.params["jaxpr"]
        avals = [v.aval for v in open_jaxpr(body)[0].invars]
        inner = [
            dataclasses.replace(
                v, aval=aval, source=None, view=None, block=None, hidden=None, operands=(v,), layer=None,
                split=varying_axes(aval) - varying_axes(v.aval),
            )
            for v, aval in zip(ins, avals, strict=True)
        ]  # fmt: skip
        checked = "shard_map" if eqn.params["check_vma"] else "shard_map unchecked"
        child, outs = self.walk(body, inner, (*block.scope, checked), block.loops, key)
        block.children[index] = [child]
        return [
            Value(
                out.aval, **classes_of(v), axes=v.axes, varies=v.varies, carried=v.carried, producer=eqn, operands=(v,),
                lookups=v.lookups,
            )
            for v, out in zip(outs, eqn.outvars, strict=True)
        ]  # fmt: skip
