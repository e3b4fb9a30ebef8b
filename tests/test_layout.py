"""The house keeps its order: who imports whom, how long a file is, which test belongs to it, what is declared."""

import ast
import functools
import pathlib
import re
import tomllib
import types

import pytest

import lrules

ROOT = pathlib.Path(__file__).resolve().parent.parent


@functools.cache
def parsed(folder):
    """The files of a folder, by the names under which they are imported."""
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imported(tree, modules=(), *, inner=True):
    """What a file imports, as full names; of `from a import b` it is a.b where that is one of the modules, else a."""
    found = set()
    for node in ast.walk(tree) if inner else top_level(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
    return found


def tops(tree):
    """The packages that a file imports."""
    return {name.split(".")[0] for name in imported(tree)}


def top_level(tree):
    """All statements that run when a file is imported."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


LIBRARY = parsed("lrules")
IMPORTS = {name: imported(tree, LIBRARY) & {"lrules", *LIBRARY} for name, tree in LIBRARY.items()}


def under(*prefixes):
    """Modules, with all that lies in them."""
    return {name for name in LIBRARY if any(name == p or name.startswith(f"{p}.") for p in prefixes)}


ENGINE, RULES = under("lrules.engine"), under("lrules.rules") - {"lrules.rules"}


# ------------------------------------------------------------------------------------------------------------- imports

# What the engine may know of the rest of the library.
BELOW_THE_ENGINE = {"lrules.network", "lrules.rule", "lrules.options", "lrules.typing"}
# A rule may be made of another: one line for each such pair.
RULES_OF_RULES = {
    ("kolen_pollack", "feedback_alignment"),
    ("forward_gradient", "local_losses"),
    ("monotone_dfa", "direct_feedback_alignment"),
    ("direct_kolen_pollack", "direct_feedback_alignment"),
}
BUILT_ON_RULES = ("adapters", "audit", "description", "modified", "modifiers", "promises", "testing", "trial")


@pytest.mark.parametrize("name", sorted(ENGINE))
def test_the_engine_stands_alone(name):
    """No file of the engine knows a rule, a modifier, or what users call."""
    assert IMPORTS[name] <= ENGINE | BELOW_THE_ENGINE


def family(name):
    """The rule to which a file of lrules/rules belongs."""
    return name.split(".")[2]


@pytest.mark.parametrize("name", sorted(RULES))
def test_rules_know_no_other_rules(name):
    """A rule imports no other rule but those that it is made of, and nothing that is built on rules."""
    others = {family(m) for m in IMPORTS[name] & RULES} - {family(name)}
    assert {(family(name), other) for other in others} <= RULES_OF_RULES
    assert not IMPORTS[name] & {"lrules", *under(*(f"lrules.{m}" for m in BUILT_ON_RULES))}


def test_rules_are_made_of_what_all_rules_can_have():
    """What `lrules.extend` offers is taken from there, so that a rule of one's own can do what ours can."""
    for name in sorted(RULES | {"lrules.audit", "lrules.diagnostics", "lrules.monotone"}):
        for node in ast.walk(LIBRARY[name]):
            if isinstance(node, ast.ImportFrom) and node.module != "lrules.extend":
                offered = {alias.name for alias in node.names} & set(lrules.extend.__all__)
                assert not (offered and node.module.startswith("lrules.")), f"{name} takes {offered} from {node.module}"


def test_only_the_adapters_know_flax():
    assert {name for name, tree in LIBRARY.items() if "flax" in tops(tree)} == {"lrules.adapters"}


def test_no_circle_of_imports():
    """While a file is imported it imports none that imports it."""
    at_once = {
        name: imported(tree, LIBRARY, inner=False) & set(LIBRARY) - {name}
        for name, tree in LIBRARY.items()
        if name != "lrules"
    }
    done = {"lrules"}
    while ready := {name for name, needs in at_once.items() if name not in done and needs <= done}:
        done |= ready
    left = {name: sorted(needs - done) for name, needs in at_once.items() if name not in done}
    assert not left, f"these wait for one another: {left}"


def test_no_import_for_types_alone():
    """A type that only an import under TYPE_CHECKING can bring stands in the wrong file."""
    for name, tree in LIBRARY.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                assert "lrules" not in tops(node), f"{name} imports a type of the library for types alone"


@pytest.mark.parametrize("name", list(parsed("experiments")))
def test_experiments_use_public_names(name):
    """The experiments are a user of the library: `import lrules`, and what stands in `__all__`."""
    tree = parsed("experiments")[name]
    assert {m for m in imported(tree, LIBRARY) if m.split(".")[0] == "lrules"} <= {"lrules"}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        first, *rest = ast.unparse(node).split(".")
        if first == "lrules" and all(map(str.isidentifier, rest)) and not rest[0].startswith("__"):
            place = lrules
            for part in rest:
                if isinstance(place, types.ModuleType):
                    assert part in public(place), ast.unparse(node)
                place = getattr(place, part)


def public(module):
    return getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]


def test_references_stand_alone():
    """The references are written from the papers: they import neither JAX nor the library."""
    for name, tree in parsed("tests/reference").items():
        assert not tops(tree) & {"jax", "lrules", "flax"}, name


# --------------------------------------------------------------------------------------------------------------- files

LONGEST = 450


@pytest.mark.parametrize("path", sorted((ROOT / "lrules").rglob("*.py")), ids=lambda path: path.stem)
def test_no_file_is_too_long(path):
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST


# Files without a test of their own name: where they are tested, and why there.
TESTED_ELSEWHERE = {
    "engine/captured": ("test_tracing.py", "what a network closes over may be replaced"),
    "engine/dtypes": ("test_composition.py", "two rules of one line, tested by networks in half precision"),
    "engine/handlers": ("test_modifiers.py", "what rules and modifiers act through"),
    "engine/jaxprs": ("test_zoo.py", "reading jaxprs and evaluating them: every model does"),
    "engine/plan": ("rules/test_partition.py", "who does what at which layer"),
    "engine/planning": ("rules/test_partition.py", "the same"),
    "engine/landing": ("rules/test_direct_feedback_alignment.py", "how the output error gets to hidden signals"),
    "engine/returned": ("test_constructors.py", "mistakes in a rule of one's own"),
    "engine/records": ("test_zoo.py", "what the analysis writes down of every model"),
    "engine/indexing": ("engine/test_order.py", "what indices do to the order of examples"),
    "engine/known": ("engine/test_order.py", "indices that are known"),
    "engine/regions": ("engine/test_activations.py", "activations made of several operations"),
    "engine/traces": ("test_tracing.py", "how often networks are traced"),
    "engine/values": ("test_closed_world.py", "weights made of parameters in every spelling"),
    "rules/forward_gradient/activations": ("rules/test_forward_gradient.py", "directions of activations"),
    "rules/forward_gradient/directions": ("rules/test_forward_gradient.py", "the noise"),
    "rules/forward_gradient/late": ("rules/test_forward_gradient_networks.py", "the memory of inference"),
    "rules/forward_gradient/local": ("rules/test_forward_gradient.py", "local losses"),
    "rules/forward_gradient/weights": ("rules/test_forward_gradient.py", "directions of weights"),
    "rules/difference_target_propagation/handlers": ("rules/test_difference_target_propagation.py", "targets, noise"),
    "rules/node_perturbation/experiment": ("rules/test_node_perturbation.py", "both passes"),
    "rules/node_perturbation/handlers": ("rules/test_node_perturbation.py", "the noise"),
    "rules/node_perturbation/least_squares": ("rules/test_node_perturbation.py", "the solver rls"),
    "rules/predictive_coding/states": ("rules/test_predictive_coding.py", "where the states lie"),
    "typing": ("typing/test_typing.py", "what type checkers say to a user"),
    "modified": ("test_modifiers.py", "the handlers of modifiers"),
    "promises": ("test_testing.py", "what check_rule asks"),
    "trial": ("test_testing.py", "what check_rule tries rules on"),
}


@pytest.mark.parametrize("name", sorted(set(LIBRARY) - {"lrules", "lrules.engine", "lrules.rules"}))
def test_each_file_has_its_test(name):
    """tests/ mirrors lrules/: tests/rules/test_X.py belongs to lrules/rules/X.py."""
    *folders, stem = name.split(".")[1:]
    own = pathlib.Path(*folders, f"test_{stem}.py")
    where, _ = TESTED_ELSEWHERE.get("/".join([*folders, stem]), (own, ""))
    path = ROOT / "tests" / where
    assert path.exists() and "def test_" in path.read_text(), f"{path.relative_to(ROOT)} is missing"
    assert where == own or not (ROOT / "tests" / own).exists(), f"{own} exists: take the file out of TESTED_ELSEWHERE"


# -------------------------------------------------------------------------------------------------------- dependencies

# What is imported under another name than it has in the registry.
IMPORTED_AS = {
    "absl-py": "absl", "dm-pix": "dm_pix", "orbax-checkpoint": "orbax", "PyYAML": "yaml", "scikit-learn": "sklearn",
    "tensorflow-datasets": "tensorflow_datasets",
}  # fmt: skip
# What is not imported here, and who needs it.
NOT_IMPORTED = {
    "importlib_resources": "tensorflow-datasets imports it and does not declare it",
    "build": "called by the Makefile",
    "dm-haiku": "docs/guides/haiku.md imports it, and test_docs.py runs that page",
    "furo": "the theme in docs/conf.py",
    "myst-parser": "an extension in docs/conf.py",
    "sphinx": "called by the Makefile",
    "cosmic-ray": "called by tests/mutate.py",
    "basedpyright": "called by tests/typing/test_typing.py",
    "ipykernel": "runs the notebooks",
    "mypy": "called by the Makefile",
    "pytest-xdist": "called by the Makefile, as pytest -n",
    "ruff": "called by the Makefile",
    "twine": "called by the Makefile",
}
EXTRAS = {
    "dependencies": ["lrules"], "experiments": ["experiments"], "tensorboard": ["experiments"], "dev": ["tests"],
    "docs": [], "mutation": [],
}  # fmt: skip


def declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, needs in {"dependencies": project["dependencies"], **project["optional-dependencies"]}.items():
        for need in needs:
            yield extra, re.match(r"[\w.-]+", need)[0]


@functools.cache
def used_by(folder):
    return set().union(*map(tops, parsed(folder).values()))


@pytest.mark.parametrize("extra, package", list(declared()))
def test_each_dependency_is_used(extra, package):
    """What is declared is imported by those for whom it is declared."""
    used = set().union(*map(used_by, EXTRAS[extra]))
    assert IMPORTED_AS.get(package, package) in used or package in NOT_IMPORTED


def test_each_dependency_is_pinned():
    """What is declared has its version in both sets of constraints."""
    for path in ("constraints.txt", "constraints-floor.txt"):
        pinned = {re.split("[=<>]", line)[0].lower().replace("_", "-") for line in (ROOT / path).read_text().split()}
        assert {package.lower().replace("_", "-") for _, package in declared()} <= pinned
