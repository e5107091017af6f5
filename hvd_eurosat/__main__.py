"""What there is to run: python -m hvd_eurosat lists the verbs."""

from __future__ import annotations

import ast
import sys
from pathlib import Path


def verbs() -> dict[str, str]:
    """What each does, in its own first words."""
    texts = {path.stem: path.read_text() for path in sorted(Path(__file__).parent.glob("[a-z]*.py"))}
    docstrings = {name: ast.get_docstring(ast.parse(text)) or "" for name, text in texts.items() if "__main__" in text}
    return {name: text.split("\n\n")[0].replace("\n", " ") for name, text in docstrings.items()}


def main() -> int:
    """List them; a command line that ran none ends with 2."""
    if words := [word for word in sys.argv[1:] if word not in ("-h", "--help")]:
        known = words[0] if words[0] in verbs() else "VERB"
        print(f"error: write python -m hvd_eurosat.{known} (python -m hvd_eurosat lists the verbs)", file=sys.stderr)
        return 2
    print("usage: python -m hvd_eurosat.VERB …, where VERB is\n")
    for name, text in verbs().items():
        print(f"  {name:<11}{text}")
    print("\npython -m hvd_eurosat.VERB --help explains each.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
