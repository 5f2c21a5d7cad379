"""Fills the pages under docs/ with what the docstrings say, between markers that name the objects.

    python scripts/make_docs.py           # writes the pages
    python scripts/make_docs.py --check   # says which are out of date, and fails if any is

A page has, for each object, a line `<!-- agent_lightning.Client.train -->` and after it a line `<!-- end -->`; what is
between them is replaced by the signature and the docstring. `<!-- settings -->` stands for the table of all settings,
`<!-- metrics -->` for that of all metrics.
"""

import argparse
import importlib
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # these packages, not installed ones of another version
_BLOCK = re.compile(r"<!-- (?P<name>[\w.]+) -->\n.*?<!-- end -->", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        filled = _BLOCK.sub(lambda match: f"<!-- {match['name']} -->\n{_content(match['name'])}\n<!-- end -->", text)
        if filled != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(filled, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/make_docs.py", file=sys.stderr)
        return 1
    return 0


def _content(name: str) -> str:
    if name == "settings":
        return _settings_table()
    if name == "metrics":
        return _metrics_table()
    value = _find(name)
    parts = []
    if not inspect.ismodule(value):
        parts.append(f"```python\n{_signature(value, name)}\n```")
    documentation = inspect.getdoc(value) or ""
    if inspect.isclass(value) and (made := inspect.getdoc(value.__init__)) and "self" not in made:
        documentation += f"\n\n{made}"
    parts.append(f"```text\n{documentation.strip()}\n```")
    return "\n\n".join(parts)


def _find(name: str):
    """The object of a dotted name: the longest prefix that is a module, and attributes of it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise SystemExit(f"docs name {name}, which does not exist")


def _signature(value, name: str) -> str:
    """A call as it is written, one parameter a line where there are several."""
    short = name.rpartition(".")[2]
    try:
        parameters = [p for p in inspect.signature(value).parameters.values() if p.name != "self"]
    except ValueError:  # a class that is made as the built-in one that it derives from
        return f"class {short}({value.__base__.__name__})"
    lines, keyword_only = [], False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("*")
        default = "" if parameter.default is parameter.empty else f"={_default(parameter.default)}"
        lines.append(f"{parameter.name}{default}")
    if len(", ".join(lines)) < 80:
        return f"{short}({', '.join(lines)})"
    return "\n".join([f"{short}(", *(f"    {line}," for line in lines), ")"])


def _default(value) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    return "..." if "object at" in repr(value) or "factory" in repr(value) else repr(value)


def _settings_table() -> str:
    """Every setting with its default and the comment beside it in `default_config`."""
    from lightning_jax import config, config_algorithm

    defaults = dict(config.flatten(config.default_config()))
    source = inspect.getsource(config.default_config)
    section = "c.algorithm = config_algorithm.default()\n"
    assert section in source
    source = source.replace(section, inspect.getsource(config_algorithm.default))
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    above = ""
    for line in source.splitlines():
        if line.strip().startswith("#"):
            above = f"{above} {line.strip()[1:].strip()}".strip()
            continue
        match = re.fullmatch(r"\s+(?:c|(\w+))\.(\w+) = [^#]*?(?:  # (.*))?", line)
        key = match and (f"{match[1]}.{match[2]}" if match[1] else match[2])
        if key in defaults:
            meaning = f"{above} {match[3] or ''}".strip().replace("|", "\\|")
            rows.append(f"| `{key}` | `{defaults[key]!r}` | {meaning} |")
        above = ""
    return "\n".join(rows)


def _metrics_table() -> str:
    from lightning_jax import metric_names

    rows = [f"| `{name}` | {meaning.replace('|', chr(92) + '|')} |" for name, meaning in metric_names.METRICS.items()]
    return "\n".join([inspect.getdoc(metric_names), "", "| metric | meaning |", "|---|---|", *rows])


if __name__ == "__main__":
    sys.exit(main())
