"""Writes the libraries that a wheel brings: `python -m diffusers_bitsfusion.native.build OUTDIR`.

OUTDIR is `diffusers_bitsfusion/native/prebuilt` of the tree that the wheel is made from. There is one library for each
instruction set of this platform (`targets.py`); the loader takes one whose sources are those beside it. Needed is gcc
or clang, on Windows and macOS clang, named by CC where it is not the first that is found; neither torch nor any other
package, if called as `python -m native.build OUTDIR` from within the package's folder.

The wheel must be tagged for its platform, as by `--config-setting=--build-option=--plat-name=...`, since it holds no
extension module by which setuptools would know.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .cache import SUFFIX, with_digest
from .compiler import COMMON_FLAGS, SOURCES, BuildError, build
from .targets import file_stem, targets


def build_all(folder: Path) -> list[Path]:
    """Compile the library of every target of this platform into `folder`, and return their paths.

    Raises:
        BuildError: no compiler can, or there are no targets for this kind of processor.
    """
    if not targets():
        raise BuildError("there are no targets for this kind of processor; see targets.py")
    folder.mkdir(parents=True, exist_ok=True)
    libraries = []
    for target, flags in targets().items():
        built = folder / f"{file_stem(target)}{SUFFIX}"
        build(SOURCES, (*COMMON_FLAGS, *flags), built)
        libraries.append(built.replace(with_digest(built, built)))
    return libraries


def main(arguments: list[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(description="Compile the libraries that a wheel brings.")
    parser.add_argument("outdir", type=Path, help="folder to write them to")
    try:
        libraries = build_all(parser.parse_args(arguments).outdir)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(*libraries, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
