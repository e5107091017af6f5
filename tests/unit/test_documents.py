"""The documents: what they link to and name is there, and they are short.

python -m tests.unit.test_documents      lengths of each document
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs import generate
from hvd_eurosat.benchmarks.settings import ProjectSettings
from hvd_eurosat.config.schema import Config, Settings
from hvd_eurosat.config.verbs import EvaluateSettings, ExportSettings, MapSettings, PredictSettings

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PROSE = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
README_LINES, PARAGRAPH_LINES, SENTENCE_WORDS, LINE_LENGTH = 120, 6, 35, 120
SCHEMAS: tuple[type[Settings], ...] = (
    Config,
    EvaluateSettings,
    PredictSettings,
    MapSettings,
    ExportSettings,
    ProjectSettings,
)
SECTIONS = "data|model|optim|train|valid|run"
FILES = {"h5", "json", "md", "onnx", "pt", "pt2", "py", "safetensors", "sbatch", "sh", "toml"}

each = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
of_prose = pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))


def split(text: str) -> tuple[str, str]:
    """A document's words, in which each piece of code is one word, and its code."""
    blocks = re.compile(r"^```(?s:.*?)^```$|(?<=\n\n)(?: {4}.+\n)+", re.M)
    code = blocks.findall(text)
    text = blocks.sub("", text)
    inline = re.compile(r"`[^`]+`")
    return inline.sub("`code`", text), "\n".join([*code, *inline.findall(text)])


def paragraphs(words: str) -> Iterator[list[str]]:
    """The lines of each paragraph or item of a list; no headings, tables or pictures."""
    for block in re.split(r"\n\s*\n|\n(?=[-*] |\d+\. )", re.sub(r"<!--.*?-->", "", words, flags=re.S)):
        lines = [line for line in block.splitlines() if line.strip() and not line.startswith(("#", "|", "![", "<img"))]
        if lines:
            yield lines


def sentences(words: str) -> Iterator[str]:
    """Those of the paragraphs, and the fragments in tables, where a colon or semicolon ends one."""
    for lines in paragraphs(words):
        yield from re.split(r"[.!?](?=[\s)*]|$)", " ".join(lines))
    for row in re.findall(r"^\|.*", words, re.M):
        for cell in row.split("|"):
            yield from re.split(r"[.!?:;](?=[\s)*]|$)", cell)


def count(sentence: str) -> int:
    return len(re.findall(r"[^\s|]*[A-Za-z0-9`][^\s|]*", re.sub(r"\]\([^)]*\)", "]", sentence)))


def anchors(path: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each
def test_links_lead_somewhere(path: Path) -> None:
    words, _ = split(path.read_text())
    for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", words):
        target, _, anchor = "".join(link).partition("#")
        if target.startswith("http"):
            continue
        file = path.parent / target if target else path
        assert file.exists(), f"{path.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{path.name} links to {target}#{anchor}"


def there(code: str, pattern: str) -> set[str]:
    return set(re.findall(pattern, code))


@each
def test_commands_are_there(path: Path) -> None:
    _, code = split(path.read_text())
    for module in there(code, r"-m ((?:hvd_eurosat|tests|docs)(?:\.\w+)*)"):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), f"{path.name}: {module}"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in there(code, r"(?m)(?:^|[` ])make ([a-z][a-z-]*)"):
        assert target in targets, f"{path.name}: make {target}"
    for name in there(code, r"(?<![\w/.])(?:launch|recipes|tests|docs|docker|hvd_eurosat)/[\w./-]*\w"):
        assert (ROOT / name).exists() or name == "launch/slurm/site.env", f"{path.name}: {name}"


@each
def test_keys_are_there(path: Path) -> None:
    _, code = split(path.read_text())
    known = {key for schema in SCHEMAS for key in keys(schema)}
    named = there(code, rf"--((?:{SECTIONS})\.\w+)") | there(code, rf"`((?:{SECTIONS})\.\w+)[`\" ]")
    named |= {name.lower().replace("__", ".") for name in there(code, r"HVD_EUROSAT_([A-Z]+__\w+)")}
    for key in named - {"section.key"}:
        assert key in known or key.partition(".")[2] in FILES, f"{path.name}: {key}"


def keys(schema: type[Settings]) -> Iterator[str]:
    """train.epochs, … of the sections of a schema."""
    for section, field in schema.model_fields.items():
        yield from (f"{section}.{key}" for key in getattr(field.annotation, "model_fields", ()))


def test_gpus_train_by_their_own_recipe() -> None:
    """Wherever a command asks for GPUs; and where it leaves its arguments out, they are named beside it."""
    launchers = [path for path in (*ROOT.glob("launch/**/*"), ROOT / "docker" / "Dockerfile") if path.is_file()]
    found = 0
    for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"), *launchers):
        text = re.sub(r"\\\n#?\s*", " ", path.read_text())
        asking = [line for line in text.splitlines() if re.search(r"--gpus|--nv |node1:8.* train", line)]
        for line in asking:
            assert "recipes/finetune.toml" not in line, f"{path.name}: {line}"
        if path.suffix == ".md" and any("train" in line and "…" in line for line in asking):
            assert "--config recipes/gpu.toml" in text, path.name
        found += len(asking)
    assert found > 10


def test_every_promise_has_its_test() -> None:
    _, code = split((ROOT / "docs" / "reliability.md").read_text())
    defined = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in there(code, r"`(test_\w+)…?`") if f"def {name}" not in defined]
    assert not missing


@of_prose
def test_lengths(path: Path) -> None:
    text = path.read_text()
    words, _ = split(text)
    if path == ROOT / "README.md":
        assert len(text.splitlines()) <= README_LINES
    for line in text.splitlines():
        assert len(line) <= LINE_LENGTH or line.startswith(("|", "    ", "#")), line
    for lines in paragraphs(words):
        assert len(lines) <= PARAGRAPH_LINES, "\n".join(lines)
    for sentence in sentences(words):
        assert count(sentence) <= SENTENCE_WORDS, sentence


def test_configuration_is_as_the_code_says() -> None:
    assert generate.page() == generate.PAGE.read_text(), "make docs"


def test_generating_needs_no_torch() -> None:
    program = "import sys, docs.generate; docs.generate.page(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_the_picture_of_speeds_is_drawn_from_the_page(tmp_path: Path) -> None:
    from docs import pictures

    pictures.draw_speeds(tmp_path / "performance.png")
    assert (tmp_path / "performance.png").stat().st_size


def test_every_picture_is_shown() -> None:
    from docs import pictures

    shown = "\n".join(path.read_text() for path in PROSE)
    drawn = {*pictures.PLOTS, *pictures.SAMPLES.values(), *(path.name for path in (ROOT / "docs/images").glob("*.png"))}
    assert not {name for name in drawn if f"images/{name}" not in shown}


def test_every_page_is_linked_to() -> None:
    linked = set(itertools.chain(*(re.findall(r"\]\(([^)#\s]+)", path.read_text()) for path in DOCUMENTS)))
    names = {Path(link).name for link in linked}
    assert not {path.name for path in DOCUMENTS} - names - {"README.md"}


if __name__ == "__main__":
    for document in PROSE:
        prose, _ = split(document.read_text())
        longest = max(len(lines) for lines in paragraphs(prose))
        most = max(map(count, sentences(prose)))
        lines = len(document.read_text().splitlines())
        print(f"{document.relative_to(ROOT)!s:50} {lines:4} lines, paragraphs to {longest}, sentences to {most} words")
