"""What several of the project's files say of one thing agrees: where it comes from, its version, its Pythons."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml
from code_blocks import PAGES, REPOSITORY

import diffusers_bitsfusion

PYPROJECT = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
URL = re.search(r'^Repository = "(.+)"$', PYPROJECT, re.MULTILINE)[1]
TEXTS = [*PAGES, REPOSITORY / "mkdocs.yml", REPOSITORY / "CITATION.cff", REPOSITORY / "pyproject.toml"]
CONFIGURATIONS = [
    *sorted((REPOSITORY / ".github").rglob("*.yml")),
    REPOSITORY / ".pre-commit-config.yaml",
    REPOSITORY / "CITATION.cff",
]
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|c|h|json|jsonl|txt))`")
ROOTS = (REPOSITORY, REPOSITORY / "diffusers_bitsfusion")


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("path", TEXTS, ids=name)
def test_the_package_comes_from_one_place(path):
    found = re.findall(r"https://github\.com/[\w.-]+/diffusers_bitsfusion", path.read_text(encoding="utf-8"))
    assert set(found) <= {URL}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_nobody_is_told_to_install_it_from_an_index_that_lacks_it(path):
    assert not re.search(r"pip install (-\S+ )*[\"']?diffusers[_-]bitsfusion", path.read_text(encoding="utf-8"))


def test_readme_and_site_tell_how_to_install_it():
    for page in ("README.md", "docs/getting-started.md"):
        assert f"pip install git+{URL}\n" in (REPOSITORY / page).read_text(encoding="utf-8")


def test_the_citation_has_the_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == diffusers_bitsfusion.__version__
    assert "2406.04333" in citation["preferred-citation"]["url"]


def test_ci_runs_the_pythons_that_are_declared():
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    declared = re.findall(r"Programming Language :: Python :: (3\.\d+)\"", PYPROJECT)
    assert set(declared) <= set(workflow["jobs"]["tests"]["strategy"]["matrix"]["python"])
    assert declared[0] == re.search(r'requires-python = ">=(.+)"', PYPROJECT)[1]


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=name)
def test_configurations_are_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text(encoding="utf-8")), dict)


def test_every_page_of_the_site_is_in_its_navigation():
    pages = re.findall(r"[\w./-]+\.md", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    assert all((REPOSITORY / "docs" / page).is_file() for page in pages)
    assert {name(page) for page in PAGES if page.parent.name == "results"} == {
        f"docs/{page}" for page in pages if page.startswith("results/")
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_a_page_names_exist(page):
    found = set(PATH.findall(page.read_text(encoding="utf-8")))
    written = {"OUTPUT_DIR/stage1/losses.jsonl"}  # by training
    assert [file for file in sorted(found - written) if not any((root / file).is_file() for root in ROOTS)] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == REPOSITORY], ids=name)
def test_links_of_pages_outside_the_site_lead_somewhere(page):
    """The site's own links are checked where it is built."""
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert links and [link for link in links if not (REPOSITORY / link).exists()] == []


def test_readme_is_read_in_two_minutes():
    lines = (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100


def test_lowest_versions_are_those_that_are_declared():
    file = REPOSITORY / ".github" / "lowest_versions.py"
    spec = importlib.util.spec_from_file_location("lowest_versions", file)
    lowest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lowest)
    assert lowest.constraints(["torch>=2.6", "transformers>=5,<5.24", "x[y]>=1.2.3; z", "numpy"]) == [
        "torch~=2.6.0",
        "transformers~=5.0.0",
        "x~=1.2.0",
    ]
