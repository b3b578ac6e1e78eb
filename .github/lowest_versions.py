"""Print constraints that hold every dependency with a declared floor to the minor version of that floor.

python .github/lowest_versions.py > constraints.txt
"""

from __future__ import annotations

import re
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def constraints(requirements: list[str]) -> list[str]:
    """Return `name~=X.Y.0` for each requirement `name>=X`, `name>=X.Y` or `name>=X.Y.Z`; others have no floor."""
    found = (re.match(r"([\w.-]+)(?:\[[^]]*])?\s*>=\s*(\d+)(?:\.(\d+))?", line) for line in requirements)
    return [f"{floor[1]}~={floor[2]}.{floor[3] or 0}.0" for floor in found if floor]


def main() -> None:
    """Read the project's requirements, the optional ones included."""
    import tomllib  # from Python 3.11 on, which the job has

    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    optional = [line for name, lines in project["optional-dependencies"].items() if name != "docs" for line in lines]
    print("\n".join(constraints(project["dependencies"] + optional)))


if __name__ == "__main__":
    main()
