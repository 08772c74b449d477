"""Command-line flags made from config dataclasses: names, types, defaults and help are written once, there."""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer

SUFFIXES = {"": 1, "k": 1_000, "M": 1_000_000, "B": 1_000_000_000}


def count(text: str) -> int:
    """Read a whole number such as 64, 64k or 200M."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)(k|M|B|)", str(text))
    value = float(match[1]) * SUFFIXES[match[2]] if match else 0.5
    if value != int(value):
        raise typer.BadParameter(f"a whole number, such as 64, 64k or 200M, got {text!r}")
    return int(value)


def counts(text: str) -> tuple[int, ...]:
    """Read whole numbers with commas between them, such as 64,1k."""
    return tuple(count(part.strip()) for part in str(text).strip("()").split(",") if part.strip())


def numbers(text: str) -> tuple[float, ...]:
    """Read numbers with commas between them."""
    try:
        return tuple(float(part) for part in str(text).strip("()").split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter(f"numbers with commas between them, got {text!r}") from None


def words(text: str) -> tuple[str, ...]:
    """Read words with commas between them."""
    return tuple(part.strip(" '") for part in str(text).strip("()").split(",") if part.strip(" '"))


TUPLES: dict[type, Callable[[str], tuple]] = {int: counts, float: numbers}  # words for any other


def field_help(config: type) -> dict[str, str]:
    """The docstring under each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(config))).body[0].body  # pyright: ignore
    found = {}
    for node, after in pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            found[node.target.id] = " ".join(str(after.value.value).split())  # pyright: ignore
    return found


def with_flags(skip: Mapping[str, set[str]] | None = None, **configs: type) -> Callable[[Callable], Callable]:
    """Decorate a command: each named parameter gets a config built from flags that its fields become.

    Fields of the same name in two configs share one flag. ``skip`` names fields that get no flag, by parameter. The
    errors that a config raises pass through.
    """
    skip = skip or {}

    def decorate(command: Callable) -> Callable:
        shown = {
            name: [field for field in fields(config) if field.name not in skip.get(name, set())]
            for name, config in configs.items()
        }

        def run(**given: Any) -> Any:
            flags = {field.name for group in shown.values() for field in group}
            values = {name: given.pop(name) for name in list(given) if name in flags}
            built = {
                name: config(**{field.name: values[field.name] for field in shown[name]})
                for name, config in configs.items()
            }
            return command(**given, **built)

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name not in configs]
        made: dict[str, inspect.Parameter] = {}
        for name, config in configs.items():
            hints, helps = get_type_hints(config), field_help(config)
            for field in shown[name]:
                made.setdefault(field.name, _parameter(field, hints[field.name], helps.get(field.name, "")))
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in [*own, *made.values()]]
        run.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _parameter(field: Field, hint: Any, text: str) -> inspect.Parameter:
    optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    kind = next(arg for arg in get_args(hint) if arg is not NoneType) if optional else hint
    default: Any = field.default if field.default_factory is MISSING else field.default_factory()
    option: dict[str, Any] = {"help": text}
    if kind is int:
        option |= {"parser": count, "metavar": "N"}
    elif get_origin(kind) is tuple:
        parser = TUPLES.get(get_args(kind)[0], words)
        option |= {"parser": parser, "metavar": "A,B,..."}
        default = ",".join(f"{part:g}" if isinstance(part, float) else str(part) for part in default)
        kind = str
    elif get_origin(kind) is Literal:
        option |= {"metavar": "|".join(get_args(kind))}
        kind = str
    annotated = Annotated[kind | None if optional else kind, typer.Option(**option)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotated)
