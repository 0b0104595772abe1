"""Which module may import which: the layers of docs/architecture.md, read from the source files' import statements."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"", "errors", "terminal", "command_line", "io"},
    {"config", "balancing", "hardware", "run_directory"},
    {"models"},
    {"optim", "parallel"},
    {"data", "checkpoint", "interop", "evaluation", "merging", "spectrum"},
    {"monitor"},
    {"training", "dam"},
    {"planning", "reporting"},
]
LAYER = {folder: number for number, layer in enumerate(LAYERS) for folder in layer}


def name_of(path: Path) -> str:
    """A source file's module."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {name_of(path): path for path in sorted((ROOT / "trinity").rglob("*.py"))}


def imports(path: Path) -> set[str]:
    """The modules of trinity that a file imports, wherever in it."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names if alias.name in FILES}
        elif isinstance(node, ast.ImportFrom) and node.module in FILES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                imported.add(inner if inner in FILES else node.module)
    return imported - {name_of(path)}


IMPORTS = {name: imports(path) for name, path in FILES.items()}


def folder_of(module: str) -> str:
    """The part of the package that a module is in."""
    return module.split(".")[1] if "." in module else ""


def test_every_folder_has_a_layer() -> None:
    """A new folder must be placed, or nothing below would look at it."""
    assert {folder_of(name) for name in FILES} <= LAYER.keys()
    assert sum(map(len, IMPORTS.values())) > 300


@pytest.mark.parametrize("name", FILES)
def test_no_import_points_upward(name: str) -> None:
    """A file imports from its own layer or those below."""
    layer = LAYER[folder_of(name)]
    assert not [other for other in IMPORTS[name] if LAYER[folder_of(other)] > layer]


def test_no_cycles() -> None:
    """Modules can be put in an order in which each imports only earlier ones."""
    remaining = {name: set(others) for name, others in IMPORTS.items()}
    while ready := [name for name, others in remaining.items() if not others]:
        for name in ready:
            del remaining[name]
        for others in remaining.values():
            others.difference_update(ready)
    assert not remaining


def test_kernels_import_nothing_of_trinity() -> None:
    """The package of operations is the lowest layer."""
    for path in (ROOT / "kernels" / "trinity_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] == "trinity"], path


def test_functions_are_at_most_60_lines() -> None:
    """In both packages, the line of `def` and the docstring counted."""
    long = []
    for path in [*FILES.values(), *(ROOT / "kernels" / "trinity_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}: {node.name}")
    assert not long
