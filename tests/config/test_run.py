"""Every setting of the schema has a docstring below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import trinity.config.model
import trinity.config.run


def is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def classes() -> Iterator[ast.ClassDef]:
    for module in (trinity.config.run, trinity.config.model):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        yield from (node for node in tree.body if isinstance(node, ast.ClassDef))


def test_every_field_has_a_docstring() -> None:
    """A section has the docstring of its class."""
    sections = {node.name for node in classes() if ast.get_docstring(node)}
    missing = []
    for node in classes():
        for statement, following in zip(node.body, [*node.body[1:], None]):
            if isinstance(statement, ast.AnnAssign) and not is_text(following):
                kind = ast.unparse(statement.annotation)
                if kind not in sections:
                    missing.append(f"{node.name}.{ast.unparse(statement.target)}")
    assert missing == []
    assert {"RunConfig", "MuonConfig", "DataConfig", "ModelConfig"} <= sections
