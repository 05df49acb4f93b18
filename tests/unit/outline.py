"""The protocol operations of a function, read from its source: what a kernel and its model must have in common."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

# The operations that count: how many leading arguments both sides spell alike.
OPERATIONS = {
    **dict.fromkeys(("acquire", "deliver", "release", "drain", "take", "give", "begin", "end"), 9),
    **dict.fromkeys(
        ("named_sync", "named_arrive", "expect", "wait", "copy_arrive", "landing", "box", "part", "index"), 9
    ),
    **dict.fromkeys(("_queries", "_fill", "_copy", "_zero_tail", "Turns", "skip"), 3),
    **dict.fromkeys(("tell", "expect_nothing"), 6),
    **dict.fromkeys(("tile_at", "_numbers"), 3),
    **dict.fromkeys(("_product", "told", "place_after", "takes_tail", "_end"), 2),
    **dict.fromkeys(("tma_store_wait", "warpgroup_mma_wait"), 1),
    **dict.fromkeys(("tma_load", "tma_store", "copy_load", "warpgroup_mma", "load", "store"), 0),
    **dict.fromkeys(
        ("fence_async_shared", "partition_barrier", "_first", "_step", "_last", "_write", "put", "_pass"), 0
    ),
    **dict.fromkeys(("_load_weights", "_load_rows", "_multiply", "_share", "_write_sums", "copy_scales"), 0),
    **dict.fromkeys(("factors_here", "_one_tile", "multiply_packed", "_multiply_rows", "_operand", "write"), 0),
    **dict.fromkeys(("_put_rows",), 0),
}


def operations(node: ast.AST, where: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """(loop or condition, ..., operation) in the order in which they run."""
    if isinstance(node, (ast.If, ast.For, ast.While)):
        if isinstance(node, ast.For):
            inner = f"for {ast.unparse(node.target)}"
        else:
            yield from operations(node.test, where)
            inner = f"{'if' if isinstance(node, ast.If) else 'while'} {ast.unparse(node.test)}"
        for statement in node.body:
            yield from operations(statement, (*where, inner))
        for statement in node.orelse:
            yield from operations(statement, (*where, "else"))
        return
    for child in ast.iter_child_nodes(node):
        yield from operations(child, where)
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        callee = ast.unparse(node.func)
        if name in OPERATIONS and not callee.startswith("gl."):
            yield (*where, f"{callee}({', '.join(map(ast.unparse, node.args[: OPERATIONS[name]]))})")


def outline(path: Path, function: str, spelling: Mapping[str, str] | None = None) -> list[tuple[str, ...]]:
    """Operations of `function` ("Class.method" or "name"); those repeated at once, as by the three loops, count once.

    spelling: what to replace in the source.
    """
    source = path.read_text()
    for kernel, model in (spelling or {}).items():
        source = source.replace(kernel, model)
    node: ast.AST = ast.parse(source)
    for name in function.split("."):
        children = ast.iter_child_nodes(node)
        node = next(x for x in children if isinstance(x, (ast.ClassDef, ast.FunctionDef)) and x.name == name)
    found = [x for statement in getattr(node, "body", ()) for x in operations(statement)]
    return [x for i, x in enumerate(found) if i == 0 or x != found[i - 1]]
