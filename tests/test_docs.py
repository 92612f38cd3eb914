"""What the README and the examples say is what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distroml.cli.main import _COMMANDS
from distroml.cli.specfile import read_spec
from distroml.http.app import ROUTES
from distroml.model import TRANSITIONS
from distroml.settings import build_parser
from distroml.spec import convert_spec

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted(
    path for path in (ROOT / "examples").iterdir() if path.suffix in (".json", ".yaml", ".toml")
)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_specs_are_valid(path: Path) -> None:
    convert_spec(read_spec(str(path)))


def test_example_specs_named_in_the_readme_exist() -> None:
    for name in re.findall(r"examples/([\w.]+\.(?:json|yaml|toml))", README):
        assert (ROOT / "examples" / name).is_file()


def test_links_in_the_documents_lead_somewhere() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_flags_of_the_node_named_in_the_readme_exist() -> None:
    known = set(build_parser().format_help().split()) | {
        "--follow",
        "--json",
        "--rank",
        "--tail",
        "--undo",
    }
    known = {word.strip("[],()") for word in known}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)):
        assert flag in known, flag


def test_commands_of_the_readme_exist() -> None:
    known = {name.split(":")[1].replace("_", "-") for name in _COMMANDS}
    for command in set(re.findall(r"`?distroml ([a-z]+)", README)):
        assert command in known, command


def test_routes_of_the_readme_exist() -> None:
    paths = {route.path for route in ROUTES}
    for path in re.findall(r"`(?:GET|POST|DELETE|WS) (/[\w/{},]+)", README):
        for one in _expanded(path):
            assert one.replace("{id}", "{job_id}") in paths, one


def _expanded(path: str) -> list[str]:
    """``/a/{b,c}`` as ``/a/b`` and ``/a/c``."""
    found = re.search(r"\{(\w+(?:,\w+)+)\}", path)
    if not found:
        return [path]
    return [path.replace(found.group(0), choice) for choice in found.group(1).split(",")]


def test_every_status_is_in_the_picture_of_the_architecture() -> None:
    picture = (ROOT / "docs" / "architecture.md").read_text()
    for status in TRANSITIONS:
        assert status.value in picture
