"""House rules that a machine can check: budgets, who imports whom, who reads what.

`python -m tools.check_house [ROOT]` prints `file:line: message` for each breach and exits 1 if there is one. A rule is
one function over one parsed file; to add one, write it and name it in RULES. The reasons are in CONTRIBUTING.md.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

FOLDERS = ("flashinfer", "tests", "bench", "examples", "tools")
MAX_FILE_LINES = 500
MAX_HOST_LINES = 60
MAX_KERNEL_LINES = 150
MAX_PARAMETERS = 8
MIN_LADDER = 3
# Folders of the package; all others, and the modules beside them, are its facade.
ROOMS = ("core", "device", "integrations", "ops", "testing")
OP_MODULES = ("spec", "support", "plan", "reference", "triton", "variants")

Function = ast.FunctionDef | ast.AsyncFunctionDef
Breach = tuple[int, str]
Rule = Callable[["Source"], Iterator[Breach]]


@dataclass(frozen=True)
class Import:
    """One imported thing by its absolute dotted name: `from a import b` is `a.b`, be it a module or a function."""

    line: int
    target: str

    def inside(self, *packages: str) -> bool:
        """Whether the target is one of the packages or lies in one."""
        return any(self.target == p or self.target.startswith(p + ".") for p in packages)


@dataclass(frozen=True)
class Source:
    """One parsed file. path: relative to the repository's root, with forward slashes."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, self.path)

    @cached_property
    def module(self) -> str:
        """Dotted name: flashinfer/ops/norm/__init__.py is flashinfer.ops.norm."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def parts(self) -> list[str]:
        return self.module.split(".")

    @property
    def in_package(self) -> bool:
        return self.parts[0] == "flashinfer"

    @property
    def room(self) -> str:
        """One of ROOMS; "facade" for what lies beside them in flashinfer; "" outside of the package."""
        if not self.in_package:
            return ""
        folder = self.path.split("/")[1]
        return folder if folder in ROOMS else "facade"

    @property
    def op(self) -> str:
        """The op whose folder the file is in; "" elsewhere."""
        return self.parts[2] if self.room == "ops" and len(self.parts) > 2 else ""

    @property
    def implementation(self) -> str:
        """The folder of kernels the file is in ("triton", "gluon_sm90"); "" elsewhere."""
        folder = self.parts[3] if self.op and len(self.parts) > 3 else ""
        return folder if folder == "triton" or folder.startswith("gluon_") else ""

    @cached_property
    def functions(self) -> list[Function]:
        return [node for node in ast.walk(self.tree) if isinstance(node, Function)]

    @cached_property
    def imports(self) -> list[Import]:
        """Every import, those inside functions too."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [Import(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found += [Import(node.lineno, f"{self._base(node)}.{alias.name}") for alias in node.names]
        return found

    def _base(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        package = self.parts if self.path.endswith("/__init__.py") else self.parts[:-1]
        return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


# --- budgets: what fits a screen can be read --------------------------------------------------------------------------


def file_length(source: Source) -> Iterator[Breach]:
    """A longer file holds two subjects."""
    lines = len(source.text.splitlines())
    if lines > MAX_FILE_LINES:
        yield 1, f"{lines} lines, {MAX_FILE_LINES} allowed; split it by subject"


def is_kernel(function: Function) -> bool:
    """Decorated with jit, triton.jit, gluon.jit, or one of them called with arguments."""
    plain = (d.func if isinstance(d, ast.Call) else d for d in function.decorator_list)
    return any(ast.unparse(d).split(".")[-1] == "jit" for d in plain)


def code_lines(function: Function, with_signature: bool) -> int:
    """Lines of a function without its docstring: documentation is not what the budget is against."""
    first, last = function.lineno, function.end_lineno or function.lineno
    body = function.body
    docstring = 0
    if ast.get_docstring(function) is not None:
        docstring = (body[0].end_lineno or body[0].lineno) - body[0].lineno + 1
    signature = 0 if with_signature else body[0].lineno - first
    return last - first + 1 - docstring - signature


def function_length(source: Source) -> Iterator[Breach]:
    """A longer function does two things."""
    for function in source.functions:
        limit = MAX_KERNEL_LINES if is_kernel(function) else MAX_HOST_LINES
        lines = code_lines(function, with_signature=source.room != "facade")
        if lines > limit:
            yield function.lineno, f"{function.name} has {lines} lines, {limit} allowed; split it"


def parameter_count(source: Source) -> Iterator[Breach]:
    """More parameters want a record. The facade's are FlashInfer's; kernels group theirs in tuples."""
    if source.room == "facade":
        return
    for function in source.functions:
        a = function.args
        names = [p.arg for p in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > MAX_PARAMETERS and not is_kernel(function):
            yield function.lineno, f"{function.name} has {count} parameters, {MAX_PARAMETERS} allowed; group them"


# --- imports go facade -> ops/X -> core, device -----------------------------------------------------------------------


def allowed_imports(source: Source) -> tuple[str, ...] | None:
    """What of the package a file may import, by its room; None: anything."""
    if source.room in ("core", "device"):
        return (f"flashinfer.{source.room}",)
    if source.room == "ops":
        gate = ("flashinfer.testing.gate",) if source.parts[-1] == "gate" else ()
        return ("flashinfer.core", "flashinfer.device", "flashinfer.ops", *gate)
    return None


def import_direction(source: Source) -> Iterator[Breach]:
    """Each room knows only the rooms below it."""
    allowed = allowed_imports(source)
    if allowed is None:
        return
    for found in source.imports:
        if found.inside("flashinfer") and not found.inside(*allowed):
            yield found.line, f"{source.room} may not import {found.target}; it may import {', '.join(allowed)}"


def other_ops(source: Source) -> Iterator[Breach]:
    """An op may use another op's public function, never its insides."""
    for found in source.imports if source.op else ():
        parts = found.target.split(".")
        foreign = found.inside("flashinfer.ops") and len(parts) > 3 and parts[2] != source.op
        if foreign and (len(parts) > 4 or parts[3] in OP_MODULES or parts[3].startswith("gluon_")):
            yield found.line, f"imports {found.target}, inside of another op; import from flashinfer.ops.{parts[2]}"


def separate_implementations(source: Source) -> Iterator[Breach]:
    """A kernel folder stands alone: what it leant on could not be deleted, and the reference could not judge it."""
    home = f"flashinfer.ops.{source.op}"
    for found in source.imports if source.implementation else ():
        sibling = found.target.removeprefix(home + ".").split(".")[0] if found.inside(home) else ""
        is_other = sibling in ("triton", "reference") or sibling.startswith("gluon_")
        if is_other and sibling != source.implementation:
            yield found.line, f"{source.implementation} imports its sibling {sibling}; share through device/ or plan"


def tests_stay_outside(source: Source) -> Iterator[Breach]:
    """Nothing that serves imports what tests or engines need."""
    if not source.in_package or source.room in ("testing", "integrations") or source.parts[-1] == "gate":
        return
    for found in source.imports:
        if found.inside("flashinfer.integrations", "flashinfer.testing", "tests", "bench", "tools", "examples"):
            yield found.line, f"the package may not import {found.target}"


def triton_where_kernels_are(source: Source) -> Iterator[Breach]:
    """`import flashinfer` must work without Triton."""
    shared = source.room in ("device", "testing") or (source.op and source.parts[3:4] == ["device"])
    free = shared or source.implementation or source.module == "flashinfer.core.launch"
    if not source.in_package or free:
        return
    for found in source.imports:
        if found.inside("triton"):
            yield found.line, "imports Triton; kernels live in ops/<op>/triton, shared functions in device/"


# --- one reader each --------------------------------------------------------------------------------------------------


def environment_reader(source: Source) -> Iterator[Breach]:
    """Settings are in one place, typed and documented."""
    if not source.in_package or source.module == "flashinfer.core.config":
        return
    for line, name in qualified_names(source):
        if name in ("os.environ", "os.environb", "os.getenv", "os.getenvb", "os.putenv"):
            yield line, f"uses {name}; add a field to core/config.py"


def capability_reader(source: Source) -> Iterator[Breach]:
    """An architecture is a row of a table, not a question asked everywhere."""
    if not source.in_package or source.module == "flashinfer.core.arch":
        return
    for line, name in qualified_names(source):
        if name.split(".")[-1] in ("get_device_capability", "get_device_properties", "get_device_name"):
            yield line, f"uses {name}; take what you need from core/arch.py"


def qualified_names(source: Source) -> Iterator[tuple[int, str]]:
    """Dotted names used or imported by name, with their lines."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


# --- shape of the code ------------------------------------------------------------------------------------------------


def compared_to_string(test: ast.expr) -> str | None:
    """The left side of `x == "a"` or `x in ("a", "b")`; None for any other test."""
    if not isinstance(test, ast.Compare) or len(test.ops) != 1 or not isinstance(test.ops[0], ast.Eq | ast.In):
        return None
    right = test.comparators[0]
    options = right.elts if isinstance(right, ast.Tuple | ast.List | ast.Set) else [right]
    strings = all(isinstance(o, ast.Constant) and isinstance(o.value, str) for o in options)
    return ast.unparse(test.left) if strings and options else None


def ladder_arms(node: ast.If) -> list[str]:
    """What each arm of an if/elif chain compares with strings."""
    arms: list[str] = []
    arm: ast.stmt | None = node
    while isinstance(arm, ast.If):
        arms += filter(None, [compared_to_string(arm.test)])
        arm = arm.orelse[0] if len(arm.orelse) == 1 else None
    return arms


def name_ladder(source: Source) -> Iterator[Breach]:
    """A choice by name is a table: a new name is a new row, not a new branch."""
    arms_of_others: set[ast.stmt] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.If):
            arms_of_others.update(node.orelse)
            arms = ladder_arms(node)
            longest = max(((arms.count(a), a) for a in arms), default=(0, ""))
            if longest[0] >= MIN_LADDER and node not in arms_of_others:
                yield node.lineno, f"{longest[0]} branches compare {longest[1]} with strings; make it a table"
        elif isinstance(node, ast.Match):
            patterns = [c.pattern.value for c in node.cases if isinstance(c.pattern, ast.MatchValue)]
            if sum(isinstance(p, ast.Constant) and isinstance(p.value, str) for p in patterns) >= MIN_LADDER:
                yield node.lineno, f"cases compare {ast.unparse(node.subject)} with strings; make it a table"


def no_autotune(source: Source) -> Iterator[Breach]:
    """Tuning on a serving path stalls the first request of each shape; configurations come from tuned/*.json."""
    for function in source.functions if source.room in ("ops", "device") else ():
        if any("autotune" in ast.unparse(d) for d in function.decorator_list):
            yield function.lineno, f"{function.name} tunes itself while serving; measure with bench, store in tuned/"


RULES: tuple[Rule, ...] = (
    file_length,
    function_length,
    parameter_count,
    import_direction,
    other_ops,
    separate_implementations,
    tests_stay_outside,
    triton_where_kernels_are,
    environment_reader,
    capability_reader,
    name_ladder,
    no_autotune,
)


def sources(root: Path) -> Iterator[Source]:
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            yield Source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))


def breaches(source: Source) -> list[str]:
    """Every breach of one file, as `file:line: message`, each once."""
    found = {(line, message) for rule in RULES for line, message in rule(source)}
    return [f"{source.path}:{line}: {message}" for line, message in sorted(found)]


def main(argv: Sequence[str] | None = None) -> int:
    args = sys.argv[1:] if argv is None else argv
    root = Path(args[0]) if args else Path(__file__).resolve().parents[1]
    files = list(sources(root))
    found = [line for source in files for line in breaches(source)]
    for line in found:
        print(line)
    print(f"check_house: {len(files)} files, {len(RULES)} rules, {len(found)} breaches")
    return 1 if found or not files else 0


if __name__ == "__main__":
    sys.exit(main())
