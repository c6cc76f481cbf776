"""Promise: docs/thesis.md names functions and artefacts that exist, and CITATION.cff names this version."""

import importlib
import re
from pathlib import Path

import catapult_opt
from catapult_opt.analysis.reproduce import ARTEFACTS

ROOT = Path(catapult_opt.__file__).parent.parent
ROWS = re.findall(r"^\| ([^|]+) \| (`[^|]+) \| ([^|]+) \|$", (ROOT / "docs" / "thesis.md").read_text(), re.M)


def test_every_function_of_the_mapping_exists_and_says_what_it_is():
    assert len(ROWS) > 40
    for thesis, functions, _ in ROWS:
        for name in re.findall(r"`([\w.]+)`", functions):
            module, _, function = name.rpartition(".")
            if name.islower() and not module and name in ("vertex", "width"):  # an argument or attribute, in brackets
                continue
            owner = importlib.import_module(f"catapult_opt.analysis.{module}") if module else catapult_opt
            assert getattr(owner, function).__doc__, (thesis, name)


def test_every_artefact_of_the_mapping_exists():
    known = {artefact.name for artefact in ARTEFACTS}
    for thesis, _, artefacts in ROWS:
        assert set(artefacts.split(", ")) <= known, thesis


def test_all_numbered_results_of_chapters_2_to_4_are_mapped():
    column = " ".join(thesis for thesis, *_ in ROWS)
    for number in ("2.2.1", "2.2.2", "2.2.5", "2.2.7", "2.3.6", "2.3.7", "2.3.8", "2.4.4", "3.2.1", "3.2.2", "3.3.1",
                   "3.3.4", "3.3.6", "4.2.1", "A.3.1", "A.4.1", "A.5.1", "B.3.1", "B.7.1", "B.13.1"):  # fmt: skip
        assert number in column, number


def test_the_citation_names_this_version_and_the_thesis():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"version: {catapult_opt.__version__}\n" in text
    assert "family-names: Zhu" in text
