"""The README and the docs: their Python runs, their links lead somewhere, what they name exists."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import dualprune

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page, language):
    return [body for word, body in FENCE.findall(page.read_text(encoding="utf-8")) if word == language]


def named(page):
    return str(page.relative_to(ROOT))


def headings(page):
    """The anchors of a page, as GitHub and mkdocs spell them."""
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", title.lower())) for title in titles}


def run_python(page):
    scope = {"__name__": page.stem}
    for body in blocks(page, "python"):
        exec(compile(body, named(page), "exec"), scope)


@pytest.mark.parametrize("page", [p for p in PAGES[1:] if blocks(p, "python")], ids=named)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_python(page)


def test_readme_program_gives_what_the_readme_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_python(PAGES[0])
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("dense"))
    shown = next(body for body in blocks(PAGES[0], "") if body.startswith("dense"))
    dense, one_shot, slr = figures(printed)
    assert dense >= slr > one_shot + 10
    assert figures(shown) == pytest.approx([dense, one_shot, slr], abs=3)


def figures(line):
    return [float(number) for number in re.findall(r"([\d.]+) %", line)]


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_resolve(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{named(page)} links to {link}, which is not there"
        assert not anchor or anchor in headings(target), f"{named(page)} links to {link}; {place} has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_name_what_exists(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    cli = (ROOT / "src/dualprune/cli.py").read_text()
    commands = set(re.findall(r"@app\.command\(\)\ndef (\w+)", cli))
    for body in blocks(page, ""):
        for path in re.findall(r"\b(?:recipes|benchmarks|examples)/[\w./-]+\.(?:toml|py)", body):
            assert (ROOT / path).exists(), f"{named(page)} names {path}, which is not there"
        assert set(re.findall(r"^make ([\w-]+)", body, re.MULTILINE)) <= targets
        assert set(re.findall(r"^dualprune (\w+)", body, re.MULTILINE)) <= commands


def test_readme_leads_with_demo_and_test():
    assert re.findall(r"^make ([\w-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)[:2] == ["demo", "test"]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "toml")], ids=named)
def test_recipes_shown_are_recipes(page):
    from dualprune.recipe import parse_recipe

    for body in blocks(page, "toml"):
        parse_recipe(body)


def test_one_version_everywhere():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert dualprune.__version__ == pyproject["version"] == importlib.metadata.version("dualprune")
    assert f"\nversion: {pyproject['version']}\n" in citation
    assert f"\n## {pyproject['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_reference_has_every_public_name():
    shown = re.findall(r"^::: (\S+)$", (ROOT / "docs/reference.md").read_text(encoding="utf-8"), re.MULTILINE)
    public = [getattr(dualprune, name) for name in dualprune.__all__ if name != "__version__"]
    assert sorted(shown) == sorted(f"{one.__module__}.{one.__name__}" for one in public)


def test_architecture_has_every_module():
    page = (ROOT / "docs/architecture.md").read_text()
    package = ROOT / "src/dualprune"
    modules = {p.name for p in package.glob("*.py") if not p.name.startswith("__")}
    modules |= {f"{p.parent.name}/" for p in package.glob("*/__init__.py")}
    assert not {name for name in modules if f"`{name}`" not in page}


def test_nothing_names_a_machine():
    suffixes = {".py", ".md", ".toml", ".txt", ".cff", ".yml", ".yaml", ".bib", ".json"}
    folders = ("src", "tests", "docs", "recipes", "results", "benchmarks", "examples")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*") if p.suffix in suffixes]
    files += [p for p in ROOT.iterdir() if p.suffix in suffixes] + [ROOT / "Makefile", ROOT / ".ci/run"]
    machine = re.compile(r"(?<![\w.~*-])/(?:home|root|tmp|work|Users)/\w|--(?:extra-)?index-url|--find-links")
    found = [f"{named(p)}: {hit[0]}" for p in files if p != Path(__file__) for hit in machine.finditer(p.read_text())]
    assert not found
