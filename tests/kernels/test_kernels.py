"""What interpreted.py and interpreted_step.py test, each in a process that has Triton's interpreter from its start."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
Failures = dict[str, list[str]]  # by the name of a test: what its cases that did not pass said


def run_interpreted(file: Path, directory: Path) -> Failures:
    report = directory / "report.xml"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", str(file), f"--junitxml={report}", "-p", "no:cacheprovider"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert report.is_file(), ended.stdout[-3000:] + ended.stderr[-3000:]
    failures: Failures = defaultdict(list)
    for case in ElementTree.parse(report).iter("testcase"):
        said = [
            child.text or child.get("message", "") for child in case if child.tag in ("failure", "error", "skipped")
        ]
        failures[case.attrib["name"].partition("[")[0]] += said
    return failures


def names_in(file: Path) -> list[str]:
    return re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def failures(tmp_path_factory) -> Failures:
    return run_interpreted(HERE / "interpreted.py", tmp_path_factory.mktemp("interpreted"))


@pytest.mark.parametrize("name", names_in(HERE / "interpreted.py"))
def test_in_the_interpreter(failures, name):
    assert name in failures, "was not run"
    assert failures[name] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_training_steps_in_the_interpreter(tmp_path):
    file = HERE / "interpreted_step.py"
    failures = run_interpreted(file, tmp_path)
    assert list(failures) == names_in(file)
    assert sum(failures.values(), []) == []
