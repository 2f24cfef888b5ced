"""Who may import whom: every import goes to the same room's own files or to a lower layer."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nemo_rl_lora"


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, at any depth of its code but not for type checking alone."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("nemo_rl_lora."):
            names.add(node.module.removeprefix("nemo_rl_lora."))
        if isinstance(node, ast.Import):
            names |= {a.name.removeprefix("nemo_rl_lora.") for a in node.names if a.name.startswith("nemo_rl_lora.")}
    return names


CATALOG = imports_of(PACKAGE / "data" / "catalog.py")
"""The datasets with files of their own. The configuration reads their names and keys, so they lie beside it."""


def layers_of_the_page() -> list[list[str]]:
    """From the bottom to the top, as docs/design.md lists them."""
    page = (ROOT / "docs" / "design.md").read_text()
    block = page.split("## Who may import whom")[1].split("```")[1]
    lines = [
        [
            f"{prefix}{name}"
            for entry in line.split()
            for prefix, _, names in [re.match(r"([\w.]*?)(\{)?([\w,.]+)\}?$", entry).groups("")]
            for name in names.split(",")
        ]
        for line in block.strip().splitlines()
    ]
    return [
        [*(name for name in line if name != "data.datasets"), *(CATALOG if "data.datasets" in line else ())]
        for line in reversed(lines)
    ]


LAYERS = layers_of_the_page()
HEAVY = {"ray", "vllm", "nemo_automodel", "megatron"}


def level_of(module: str) -> tuple[int, str]:
    """(layer, room) of a module such as `policy.dtensor`; the longest entry wins."""
    found = [
        (len(room), level, room)
        for level, rooms in enumerate(LAYERS)
        for room in rooms
        if module == room or module.startswith(room + ".")
    ]
    assert found, f"{module} has no layer: give it one"
    _, level, room = max(found)
    return level, room


def test_imports_go_down():
    offences = []
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("__init__.py", "__main__.py"):
            continue
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        level, room = level_of(module)
        for imported in imports_of(path):
            other_level, other_room = level_of(imported)
            if other_level > level or (other_level == level and other_room != room and level >= 3):
                offences.append(f"{module} (layer {level}) imports {imported} (layer {other_level})")
    assert not offences, "\n".join(offences)


def test_drivers_import_no_backend():
    for path in (PACKAGE / "algorithms").glob("*.py"):
        tree = ast.parse(path.read_text())
        roots = {
            (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not roots & (HEAVY | {"transformers"}), path.name


def test_importing_the_package_and_its_config_loads_nothing_heavy():
    code = (
        "import sys, nemo_rl_lora, nemo_rl_lora.config.load, nemo_rl_lora.lora.spec, nemo_rl_lora.types;"
        f"print(sorted(({HEAVY!r} | {{'torch', 'transformers', 'datasets'}}) & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_files_stay_small():
    too_long = {
        str(path.relative_to(ROOT)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 600
    }
    assert not too_long
