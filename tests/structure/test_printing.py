"""Nothing prints but `say` of values/visible.py and the console of values/console.py, which show what is hidden."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.structure.test_imports import files

ALLOWED = {"values.visible": {"print"}, "values.console": {"rich.console.Console"}}
# What writes to a terminal: builtins, streams, typer's and rich's ways of printing.
CALLS = {"print", "pprint", "echo", "secho", "print_exc", "print_exception"}
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}


def prints(tree: ast.AST) -> Iterator[str]:
    """Yield what a module prints with, apart from `console.print`: a console is looked at where it is made."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id in CALLS | {"Console"}:
                yield function.id
            if isinstance(function, ast.Attribute) and function.attr in CALLS - {"print"}:
                yield function.attr
            if isinstance(function, ast.Attribute) and function.attr in ("write", "writelines"):
                receiver = function.value
                if isinstance(receiver, ast.Attribute) and receiver.attr in STREAMS:
                    yield f"{receiver.attr}.{function.attr}"
            if isinstance(function, ast.Attribute) and ast.unparse(function) in ("os.write", "rich.print"):
                yield ast.unparse(function)
            yield from (f"file={ast.unparse(k.value)}" for k in node.keywords if "sys.std" in ast.unparse(k.value))
        if isinstance(node, ast.ClassDef):
            yield from ("rich.console.Console" for base in node.bases if ast.unparse(base) == "Console")


def test_everything_printed_goes_through_one_place() -> None:
    bad = "print(1); sys.stderr.write(''); console = Console(); typer.echo(2); os.write(1, b''); f(file=sys.stdout)"
    assert len(list(prints(ast.parse(bad)))) == 6
    found, num_allowed = [], 0
    for name, path in files().items():
        for what in prints(ast.parse(path.read_text(encoding="utf-8"))):
            if what in ALLOWED.get(name, ()) or (name == "values.visible" and what.startswith("file=")):
                num_allowed += 1
            else:
                found.append(f"{name}: {what}")
    assert found == []
    assert num_allowed
