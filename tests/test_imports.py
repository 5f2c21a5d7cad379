"""The house's rules about who may import whom, read from the source, and how light `import agent_lightning` is."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A file may import from its own package and from lower floors. `agent_lightning` is the ground: everyone may.
FLOORS = {
    "agent_lightning": 0,
    "lightning_jax": 0,  # __init__.py: it must stay empty of imports
    "lightning_jax.heap": 1,
    "lightning_jax.metrics": 1,
    "lightning_jax.metric_names": 1,
    "lightning_jax.job_state": 1,
    "lightning_jax.text": 1,
    "lightning_jax.config_rules": 1,
    "lightning_jax.config_algorithm": 1,  # config's part about the section algorithm
    "lightning_jax.config_models": 1,  # config's part about several models
    "lightning_jax.config": 2,
    "lightning_jax.store": 2,
    "lightning_jax.command_line": 3,  # of config's floor, but built on it
    "lightning_jax.data": 3,  # of store's floor, but built on it
    "lightning_jax.hlo_costs": 1,
    "lightning_jax.gpu": 1,
    "lightning_jax.mesh": 3,
    "lightning_jax.compiler": 4,
    "lightning_jax.processes": 3,
    "lightning_jax.outcomes": 3,
    "lightning_jax.model": 4,
    "lightning_jax.sampler": 5,
    "lightning_jax.rl": 5,
    "lightning_jax.utilization": 5,
    "lightning_jax.policy": 6,
    "lightning_jax.policies": 6.5,  # of policy's floor, but built on it
    "lightning_jax.rows": 6,
    "lightning_jax.aot": 6,  # the programs of sampler and rl, lowered from shapes
    "lightning_jax.temporaries": 6,
    "lightning_jax.memory": 7,
    "lightning_jax.training": 7,
    "lightning_jax.server": 8,
    "lightning_jax.main": 9,
}
FILES = sorted(path for package in ("agent_lightning", "lightning_jax") for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def imports_of(source: str, package: str, *, at_import_time_only: bool = False) -> Iterator[tuple[str, int]]:
    """(full name of the imported module, line) of every import statement, those inside functions too."""

    def visit(node: ast.AST) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield (full if full in MODULES else base), node.lineno
        for child in ast.iter_child_nodes(node):
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            )
            if not (later and at_import_time_only):
                yield from visit(child)

    yield from visit(ast.parse(source))


def imports(path: Path, *, at_import_time_only: bool = False) -> Iterator[tuple[str, int]]:
    """`imports_of` a file."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    return imports_of(path.read_text(encoding="utf-8"), package, at_import_time_only=at_import_time_only)


def room(module: str) -> str:
    """The entry of FLOORS that a module belongs to."""
    if module.split(".")[0] == "agent_lightning":
        return "agent_lightning"
    return ".".join(module.split(".")[:2])


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("agent_lightning", "lightning_jax")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert room(module) in FLOORS, f"{module} stands on no floor: give it one in FLOORS"
    for target, line in imports(MODULES[module]):
        if is_ours(target) and room(target) != room(module):
            assert FLOORS[room(target)] < FLOORS[room(module)], (
                f"{MODULES[module]}:{line} imports {target}, up or across"
            )


def test_every_floor_has_somebody_on_it():
    assert set(FLOORS) == {room(module) for module in MODULES}


def test_modules_import_each_other_in_no_circle():
    graph = {
        module: {target for target, _ in imports(path, at_import_time_only=True) if target in MODULES} - {module}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def walk(module: str, above: tuple[str, ...]):
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for target in graph[module]:
                walk(target, (*above, module))
            done.add(module)

    for module in graph:
        walk(module, ())


FORBIDDEN = {
    "agent_lightning": {"lightning_jax", "jax", "jaxlib", "numpy", "torch", "transformers", "tokenizers", "flax"},
    "lightning_jax": {"torch", "tensorflow"},
}


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_stay_out(module):
    """Not even inside a function: `Client` runs where only the base is installed, and the product without PyTorch."""
    for target, line in imports(MODULES[module]):
        top = target.split(".")[0]
        assert top not in FORBIDDEN[module.split(".")[0]], f"{MODULES[module]}:{line} imports {target}"


def test_the_check_sees_every_kind_of_import():
    """Guards the tests above against passing because they see nothing."""
    source = "import a.b\nfrom c import d\ndef f():\n    import e\nfrom . import config\nfrom .model import llama\n"
    everything = ["a.b", "c", "e", "lightning_jax.config", "lightning_jax.model.llama"]
    assert [name for name, _ in imports_of(source, "lightning_jax")] == everything
    everything.remove("e")
    assert [name for name, _ in imports_of(source, "lightning_jax", at_import_time_only=True)] == everything


MEASURE = """
import json, sys, time
start = time.perf_counter()
import agent_lightning
print(json.dumps({"s": time.perf_counter() - start, "modules": sorted({m.split(".")[0] for m in sys.modules})}))
"""


def test_import_agent_lightning_is_light():
    """Under 0.3 s and without JAX, NumPy or transformers; the best of five, because others use the machine too."""
    runs = []
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    assert not {"jax", "jaxlib", "numpy", "torch", "transformers", "lightning_jax"} & set(runs[0]["modules"])
    assert min(run["s"] for run in runs) < 0.3
