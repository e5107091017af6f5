"""The reference page, docs/configuration.md, from the code: verbs, keys, formats.

    make docs

tests/unit/test_documents.py says when it is stale. Nothing here imports torch.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hvd_eurosat.benchmarks.settings import ProjectSettings
from hvd_eurosat.config.schema import Config, Settings
from hvd_eurosat.config.verbs import EvaluateSettings, ExportSettings, MapSettings, PredictSettings

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "configuration.md"
BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
TYPES = {"integer": "whole number", "number": "number", "boolean": "true, false", "string": "text", "object": "table"}

OF_A_VERB: dict[str, type[Settings]] = {
    "evaluate": EvaluateSettings,
    "predict": PredictSettings,
    "map": MapSettings,
    "export": ExportSettings,
}

HEAD = """\
# Configuration

`make docs` writes this page from the code; do not edit it by hand.

## How a key is set

A *key* is a setting. It can stand in three places. Each one overrides those above it:

| place | how | example |
|---|---|---|
| a recipe, a file in TOML or JSON | `--config FILE` | `[train]` and below it `epochs = 3` |
| the environment | `HVD_EUROSAT_SECTION__KEY` | `HVD_EUROSAT_TRAIN__EPOCHS=3` |
| the command line | `--section.key VALUE` | `--train.epochs 3` |

A list is `[1, 2, 3]` in a recipe and in the environment, and `1,2,3` on the command line. An unknown key is an error,
and so is a value of the wrong kind. Every run writes all its keys to `config.toml` in its folder. `--config` with that
file repeats the run. The JSON of rmldnn, another trainer, is a recipe, too: see [formats](formats.md#rmldnns-json).

A run that goes on must have the configuration that it began with. Only `train.epochs`, `train.device`,
`train.graphs`, `train.deterministic`, `data.cache_dir` and the sections `valid` and `run` may change. `data.root` and
the files of `model.weights` and `model.layers` may be elsewhere, with the same content. All *ranks* (processes of the
job) must have the same configuration; else the job ends and names the key.
"""


def page() -> str:
    """The whole page, as Markdown."""
    about = "`python` is `.venv/bin/python`. `--help` lists the keys of each. This page leaves out those of"
    parts = [HEAD, "## Verbs\n", f"{about}\n`prepare`, `report` and `doctor`.\n", *_verbs(), ""]
    for name, field in Config.model_fields.items():
        if name != "config":
            parts += [f"## {name}\n", f"{_doc(field.annotation)}\n", *_table(Config, name), ""]
    for verb, schema in OF_A_VERB.items():
        parts += [f"## Keys of {verb} alone\n", *_table(schema), ""]
    parts += ["## Keys of benchmark alone\n", "Its other keys are those of `train`.\n", *_table(ProjectSettings), ""]
    parts += [
        "## Formats of export\n",
        *_formats(),
        "",
        "[Formats](formats.md) has the commands, and the formats of weights that can be read.",
    ]
    return "\n".join(parts) + "\n"


def _verbs() -> Iterator[str]:
    yield from ("| command | what it does |", "|---|---|")
    for path in sorted((ROOT / "hvd_eurosat").glob("[a-z]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        if "def main" in path.read_text() or "job.run(" in path.read_text():
            yield f"| `python -m hvd_eurosat.{path.stem}` | {text.splitlines()[0]} |"


def _doc(schema: Any) -> str:
    return " ".join((schema.__doc__ or "").split())


def _table(schema: type[Settings], section: str = "") -> Iterator[str]:
    """The keys of a section of a schema, or those that stand in none."""
    whole = schema.model_json_schema()
    keys = whole["$defs"][_name(whole["properties"][section])] if section else whole
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    for key, of in keys["properties"].items():
        if _name(of) or key in ("config", "expected"):
            continue
        name = f"{section}.{key}" if section else f"--{key}"
        default = _default(of, key in keys.get("required", ()))
        yield f"| `{name}` | {_type(of)} | {default} | {_plain(of['description'])} |"


def _name(of: dict[str, Any]) -> str:
    """The section that a property is, "" for a key."""
    return str(of.get("$ref", "")).rpartition("/")[2]


def _type(of: dict[str, Any]) -> str:
    if "anyOf" in of:
        return _type(of["anyOf"][0])
    if "enum" in of:
        return ", ".join(f"`{value}`" for value in of["enum"])
    if of.get("format") == "path":
        return "path"
    if of["type"] == "array":
        each: Sequence[dict[str, Any]] = of.get("prefixItems", ())
        of_each = _type(each[0] if each else of["items"]).replace("number", "numbers").replace("path", "paths")
        return f"{len(each)} {of_each}" if each else f"list of {of_each}"
    bounds = [f"{word} {of[name]:,.15g}" for name, word in BOUNDS.items() if name in of]
    return " ".join([TYPES[of["type"]], *bounds])


def _default(of: dict[str, Any], required: bool) -> str:
    if required:
        return "must be given"
    value = of["default"]
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return "none" if value in (None, "", []) else f"`{value}`"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _formats() -> Iterator[str]:
    yield from ("| `--format` | files |", "|---|---|")
    for format_and_files in _plain(ExportSettings.model_fields["format"].description or "").split("; "):
        name, files = format_and_files.split(": ")
        yield f"| `{name}` | {files} |"


if __name__ == "__main__":
    PAGE.write_text(page())
