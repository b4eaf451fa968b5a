"""The package as others see it: public names, a cheap import, who may import whom, who prints."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import smidgen

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src" / "smidgen").rglob("*.py"))
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(smidgen.__path__, "smidgen.")
    if not module.name.endswith("__main__")
)


def test_public_names_are_frozen() -> None:
    assert set(smidgen.__all__) == PUBLIC
    for name in smidgen.__all__:
        assert getattr(smidgen, name) is not None


def test_no_module_hides_a_public_name() -> None:
    """Importing smidgen.x sets the attribute x of the package, over a function of that name."""
    inside = {path.stem for path in (ROOT / "src" / "smidgen").iterdir()}
    assert not inside & PUBLIC


def test_import_smidgen_is_cheap() -> None:
    program = "import smidgen, sys; print([n for n in ('torch', 'transformers', 'numpy', 'rich') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts a process's memory there")
def test_what_a_run_imports_stays_small() -> None:
    """340 MB in all were measured, of which 82 are pages of program files that the system may take away."""
    program = """
import sys
import smidgen.cli.finetune, smidgen.train.finetune
assert not {"datasets", "bitsandbytes", "pandas", "peft"} & set(sys.modules)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("RssAnon")))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 300 * 1024


@pytest.mark.parametrize("name", MODULES)
def test_every_module_says_what_it_is_and_what_it_offers(name: str) -> None:
    module = importlib.import_module(name)
    if module.__file__ and Path(module.__file__).name == "__init__.py" and not Path(module.__file__).stat().st_size:
        return
    assert module.__doc__, f"{name} has no docstring"
    for public in getattr(module, "__all__", ()):
        assert hasattr(module, public), f"{name}.__all__ names {public}, which is not there"
    if Path(str(module.__file__)).name != "__init__.py":
        assert hasattr(module, "__all__"), f"{name} has no __all__"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_only_the_console_prints(path: Path) -> None:
    if path.name == "console.py":
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"}, (
                f"{path}:{node.lineno} prints"
            )


def test_layers_import_only_downwards() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout


# The end, so that a change of it is seen: what `from smidgen import *` gives.
PUBLIC = {
    "Generation",
    "LoadedModel",
    "Run",
    "SmidgenError",
    "doctor",
    "download",
    "evaluate",
    "export_run",
    "finetune",
    "inspect_data",
    "load",
    "merge",
    "plan",
    "quantize",
    "resume",
    "write_report",
}
