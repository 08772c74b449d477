from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
import typer
from typer.testing import CliRunner

from sae_persona.commands.flags import count, counts, field_help, numbers, with_flags, words


@dataclass(frozen=True, kw_only=True)
class Config:
    n: int = 64
    """How many."""
    lr: float | None = None
    """How fast. None: as
    it likes."""
    rule: Literal["a", "b"] = "a"
    """Which."""
    steps: tuple[float, ...] = (0.5, 1.0)
    """At which."""
    stop: tuple[str, ...] = ()
    """Where."""
    sizes: tuple[int, ...] = (4, 8)
    """How large."""
    inner: list = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Other:
    n: int = 64
    seed: int = 0


def invoke(*arguments):
    app, got = typer.Typer(), []

    @app.command()
    @with_flags(skip={"config": {"inner"}}, config=Config, other=Other)
    def command(name: Annotated[str, typer.Argument()], config: Config, other: Other, loud: bool = False) -> None:
        """Do it."""
        got.append((name, config, other, loud))

    return CliRunner().invoke(app, list(arguments)), got


def test_defaults_are_the_configs_own():
    result, got = invoke("x")
    assert result.exit_code == 0, result.output
    assert got == [("x", Config(), Other(), False)]


def test_flags_reach_every_config_that_has_the_field():
    flags = [
        "--n",
        "2k",
        "--lr",
        "0.1",
        "--rule",
        "b",
        "--steps",
        "1,2.5",
        "--stop",
        "one,two",
        "--sizes",
        "64,1k,2M",
        "--seed",
        "3",
        "--loud",
    ]
    _, got = invoke("x", *flags)
    wanted = Config(n=2000, lr=0.1, rule="b", steps=(1.0, 2.5), stop=("one", "two"), sizes=(64, 1000, 2_000_000))
    assert got == [("x", wanted, Other(n=2000, seed=3), True)]


def test_help_is_the_docstring_under_the_field():
    assert field_help(Config)["lr"] == "How fast. None: as it likes."
    assert "How many." in invoke("--help")[0].output


@pytest.mark.parametrize(("text", "value"), [("64", 64), ("64k", 64_000), ("1.5M", 1_500_000), ("2B", 2_000_000_000)])
def test_numbers_take_suffixes(text, value):
    assert count(text) == value


@pytest.mark.parametrize("text", ["many", "1.5", "1.2345k", "k", ""])
def test_other_numbers_are_refused(text):
    with pytest.raises(typer.BadParameter, match="a whole number, such as 64, 64k or 200M"):
        count(text)


def test_lists_are_split_at_commas():
    assert numbers("0.5, 1") == (0.5, 1.0)
    assert words("a, b") == ("a", "b")
    assert counts("64, 1.5k") == (64, 1500) and counts("") == ()
    with pytest.raises(typer.BadParameter, match=r"a whole number, such as 64, 64k or 200M, got '1\.5'"):
        counts("64,1.5")
    with pytest.raises(typer.BadParameter, match="numbers with commas"):
        numbers("a")
