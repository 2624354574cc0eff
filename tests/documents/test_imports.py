"""Which part of the house imports which, that there is no circle, and what `kernels` is alone."""

import ast
import graphlib
import importlib.util
from pathlib import Path

import pytest

import bngd_triton
from bngd_triton import kernels
from support.checkout import BENCH

# each imports only what stands before it
ORDER = (
    "options", "foreign", "summed_gradients", "tensors", "records", "checks", "flat_buffers",
    "checkpoint_files", "strict_json", "eager", "kernels", "reference", "state", "clocks",
    "state_dicts", "standstill", "sharding", "engine", "optimizer", "fp32_weights",
    "gradient_release", "inputs", "telemetry", "integrations", "bngd_triton", "info", "cli", "demo",
    "verify", "__main__", "bench",
)  # fmt: skip
FOLDERS = {
    "bngd_triton": Path(bngd_triton.__file__).parent,
    "bngd_triton.kernels": Path(kernels.__file__).parent,
    "bench": BENCH,
}
PATHS = {
    ".".join([package, *path.relative_to(folder).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for package, folder in FOLDERS.items()
    for path in folder.rglob("*.py")
}


def imports(module, lazy):
    """Modules of the house, and Triton, that a module imports: when it is loaded, or ever."""
    path = PATHS[module]
    todo = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")
            parents = parents[: len(parents) - node.level + (path.name == "__init__.py")]
            source = ".".join(filter(None, [*(parents if node.level else ()), node.module]))
            names = (f"{source}.{alias.name}" for alias in node.names)
            yield from (name if name in PATHS else source for name in names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif lazy or not isinstance(node, ast.FunctionDef):
            todo.extend(ast.iter_child_nodes(node))


def part(module):
    """The entry of `ORDER` that a module belongs to."""
    return module.removeprefix("bngd_triton.").split(".")[0]


@pytest.mark.parametrize("module", PATHS)
def test_imports_go_down_only(module):
    at = ORDER.index(part(module))
    for other in set(imports(module, lazy=False)) & set(PATHS):
        assert part(other) == part(module) or ORDER.index(part(other)) < at, other
        assert (part(module), part(other)) != ("kernels", "eager")
    triton = any(name.split(".")[0] == "triton" for name in imports(module, lazy=False))
    assert triton == module.startswith(("bngd_triton.kernels.device.", "bench.driver"))


def test_there_is_no_circle_even_of_imports_within_functions():
    edges = {(module, name) for module in PATHS for name in imports(module, lazy=True)}
    graph = {module: set() for module in PATHS}
    for module, name in edges:
        if name in PATHS and name != module:
            graph[module].add(name)
    graphlib.TopologicalSorter(graph).prepare()


def test_the_folder_kernels_is_empty_under_its_bare_name():
    # as where a checkout's root is on sys.path, and a library looks for Hugging Face's `kernels`
    spec = importlib.util.spec_from_file_location("kernels", kernels.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not [name for name in vars(module) if not name.startswith("__")]
    assert callable(kernels.fused_step_)
