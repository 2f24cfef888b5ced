"""docs/design.md and the README's tables say what is there: the tree, the rooms, and which recipes start."""

import re
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, NemotronHConfig, PretrainedConfig, Qwen3Config

from nemo_rl_lora.config.cluster import RAY_ADDRESS
from nemo_rl_lora.config.load import CONFIG_DIR, algorithm_of, load_config
from nemo_rl_lora.plan.plan import make_plan

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nemo_rl_lora"
DESIGN = (ROOT / "docs" / "design.md").read_text()
OWN_FILES = "files of `nemo_rl_lora/` itself"


def files_of_the_tree(page: str) -> list[str]:
    """Paths below the package that the tree names. A line that begins with a folder opens it for deeper lines."""
    block = page.split("## Rooms")[1].split("```")[1]
    folders: list[tuple[int, str]] = []
    named = []
    for line in block.strip("\n").splitlines()[1:]:
        indent = len(line) - len(line.lstrip())
        folders = [(depth, name) for depth, name in folders if depth < indent]
        if match := re.match(r" *(\w+)/", line):
            folders.append((indent, match[1]))
        place = "".join(f"{name}/" for _, name in folders)
        named += [f"{place}{file}" for file in re.findall(r"\w+\.(?:py|tsv)\b", line)]
    return named


def test_the_tree_is_what_is_there():
    named = files_of_the_tree(DESIGN)
    found = {
        path.relative_to(PACKAGE).as_posix()
        for suffix in ("py", "tsv")
        for path in PACKAGE.rglob(f"*.{suffix}")
        if path.name != "__init__.py"
    }
    assert sorted(found - set(named)) == [], "not in the tree of docs/design.md"
    assert sorted(set(named) - found) == [], "in the tree of docs/design.md, and not in the package"
    assert len(named) == len(set(named))


def lines_of_rooms() -> dict[str, int]:
    """Lines of code by room, as the first column of the table writes it. Run this file to print the table's rows."""
    rooms: dict[str, int] = {OWN_FILES: 0}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).parts
        room = f"`{parts[0]}/`" if len(parts) > 1 else OWN_FILES
        rooms[room] = rooms.get(room, 0) + len(path.read_text().splitlines())
    return rooms


def test_every_room_has_a_budget():
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d,]+) \|$", DESIGN.split("### Lines of code")[1], re.MULTILINE)
    meant = {room: int(number.replace(",", "")) for room, _, number in rows}
    today = lines_of_rooms()
    assert set(meant) == {*today, "together"}
    assert meant["together"] == sum(meant[room] for room in today)


MODELS: dict[str, PretrainedConfig] = {  # as the recipes' own, with fewer layers
    "llama3.1": LlamaConfig(num_hidden_layers=2, num_key_value_heads=8, architectures=["LlamaForCausalLM"]),
    "qwen3": Qwen3Config(num_hidden_layers=2, architectures=["Qwen3ForCausalLM"]),
    "nanov3": NemotronHConfig(num_hidden_layers=4, architectures=["NemotronHForCausalLM"]),
}
RECIPES = sorted(file.stem for file in (CONFIG_DIR / "recipes" / "llm").glob("*.yaml"))


def test_the_readme_lists_every_recipe():
    assert sorted(recipes_of_the_readme()) == RECIPES


def recipes_of_the_readme() -> dict[str, tuple[str, set[str]]]:
    """Recipe -> (whether it starts, the keys that stop it)."""
    rows = re.findall(r"^\| `([\w.-]+-lora)` \| (.+?) \|(.*)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return {name: (starts, set(re.findall(r"`([\w.]+)`", keys))) for name, starts, keys in rows}


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_readme_says_which_recipes_start(recipe, tmp_path, monkeypatch):
    """On a model of the same family, whose weights are not there; data and tokenizer are not looked at."""
    monkeypatch.setenv(RAY_ADDRESS, "10.0.0.1:6379")  # as on nodes that Ray joins; nobody calls it
    starts, keys = recipes_of_the_readme()[recipe]
    next(model for name, model in MODELS.items() if f"-{name}-" in recipe.lower()).save_pretrained(tmp_path)
    file = CONFIG_DIR / "recipes" / "llm" / f"{recipe}.yaml"
    config = load_config(file, [f"policy.model_name={tmp_path}"], algorithm_of(file))
    machines = ("vLLM is not installed", "this machine has", "attention heads of")
    problems = [text for text in make_plan(config).problems if not any(words in text for words in machines)]
    assert {problem.split("=")[0] for problem in problems} == keys
    assert starts.split(",")[0] == ("no" if problems else "yes")
    if not problems:
        nodes = {1: "one node", 2: "two nodes"}[config.cluster.num_nodes]
        assert starts.endswith(f", in {config.cluster.num_processes} processes of {nodes}")


if __name__ == "__main__":
    today = lines_of_rooms()
    for room, lines in (*today.items(), ("together", sum(today.values()))):
        sys.stdout.write(f"| {room} | {lines:,} |\n")
