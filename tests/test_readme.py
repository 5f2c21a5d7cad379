"""The README names only what is there."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_links_and_files_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    files = re.findall(r"(?:^|[\s`=])((?:scripts|configs|docs|lightning_jax|agent_lightning)/[\w./]*)", README)
    assert links and files
    missing = [name for name in {*links, *files} if not (ROOT / name).exists()]
    assert not missing


def test_no_figure_is_left_to_be_filled_in():
    assert not re.findall(r"\b[A-Z0-9]+_FIGURES\b|TODO|XXX", README)
