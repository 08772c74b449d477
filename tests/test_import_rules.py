"""Data flows one way: a stage imports from the stages before it, never from those after."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = [
    *("errors", "types", "runs", "lab", "activations", "sae", "features", "attribution", "steering", "studies"),
    *("stages", "report", "demo", "commands", "cli", "__main__"),
]
ONLY_IN = {
    "triton": {"sae_kernels"},
    "transformers": {"lab", "activations", "steering", "studies"},
    "sae_lens": {"sae"},
    "jinja2": {"report", "activations"},
    "typer": {"commands", "cli"},
}
FILES = sorted([*(ROOT / "sae_persona").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
KERNELS_MAY = {"torch", "triton", "sae_kernels", "einops", *sys.stdlib_module_names}


def stage_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "sae_kernels" if parts[0] == "kernels" else parts[1]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: absolute imports only"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_backwards(path):
    here = stage_of(path)
    if here == "__init__":  # the public face may import every stage
        return
    for name in imported(path):
        package, _, rest = name.partition(".")
        if here == "sae_kernels":
            assert package in KERNELS_MAY, f"kernels know torch and triton, yet import {name}"
        if package == "sae_persona":
            there = rest.partition(".")[0]
            assert STAGES.index(there) <= STAGES.index(here), f"{here} is before {there}, yet imports {name}"
        assert here in ONLY_IN.get(package, {here}), f"{package} belongs in {ONLY_IN[package]}, not in {here}"


def test_oracles_never_import_triton():
    assert "triton" not in {name.partition(".")[0] for name in imported(ROOT / "kernels/sae_kernels/reference.py")}


def test_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_the_package_loads_nothing_heavy():
    loaded = run_python("import sys, sae_persona; print(*sys.modules)").split()
    assert not {"torch", "transformers", "triton", "sae_lens", "matplotlib", "scipy", "sklearn"} & set(loaded)


def test_importing_the_package_is_fast():
    code = "import time; t = time.perf_counter(); import sae_persona; print(time.perf_counter() - t)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.5


def test_a_model_is_read_without_triton_and_sae_lens():
    code = "import sys, sae_persona as sp; sp.load_lm; sp.SAE; sp.train; sp.intervene; sp.rank; print(*sys.modules)"
    assert not {"triton", "sae_lens", "transformer_lens", "transformers"} & set(run_python(code).split())
