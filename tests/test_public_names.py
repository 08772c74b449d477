import ast
from pathlib import Path

import pytest

import sae_persona

PACKAGE = Path(sae_persona.__file__).parent


def test_every_public_name_is_there_and_named_for_type_checkers():
    told = {
        alias.asname
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sae_persona.")
        for alias in node.names
    }
    assert set(sae_persona.__all__) == told == set(dir(sae_persona))
    for name in sae_persona.__all__:
        assert getattr(sae_persona, name).__name__ == name


def test_no_public_name_is_a_subpackages():
    assert not set(sae_persona.__all__) & {path.stem for path in PACKAGE.iterdir()}


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'steer_everything'"):
        sae_persona.steer_everything  # noqa: B018
