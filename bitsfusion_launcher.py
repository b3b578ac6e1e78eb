"""Starts the command `bitsfusion` without first importing torch and diffusers.

Importing any part of `diffusers_bitsfusion` runs the package's `__init__`, which registers the method and for that
imports torch, diffusers, transformers and PEFT. That takes seconds, which `bitsfusion --help` or a misspelled option
should not cost. So the console script starts here, beside the package: the folder of the command line, which imports
nothing heavy at its top, is loaded by itself under the name `bitsfusion_cli`. The command that is run imports the
package.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> None:
    """Run the command line."""
    package = find_spec("diffusers_bitsfusion")  # finds a top-level package without running it
    assert package is not None
    assert package.origin is not None
    folder = Path(package.origin).parent / "cli"
    spec = spec_from_file_location("bitsfusion_cli", folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    cli = module_from_spec(spec)
    sys.modules[spec.name] = cli
    spec.loader.exec_module(cli)
    cli.app(prog_name="bitsfusion")
