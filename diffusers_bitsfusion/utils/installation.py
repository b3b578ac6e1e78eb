"""Command that installs this package, for messages and model cards."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata

# Name of the package on package indices.
_PACKAGE = "diffusers_bitsfusion"


def install_command(extra: str = "", *, upgrade: bool = False) -> str:
    """Return the pip command that installs the package from its repository, which its metadata name.

    The command names the package alone where there are no metadata, as beside a copied folder.

    Args:
        extra: name of an extra to install as well.
        upgrade: whether to replace an older version.
    """
    source = f"{_PACKAGE}[{extra}]" if extra else _PACKAGE
    if url := _repository():
        source = f"{source}@git+{url}"  # Spaces would need quotes.
    return f"pip install {'-U ' if upgrade else ''}{source}"


def _repository() -> str | None:
    try:
        urls = metadata(_PACKAGE).get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    named = dict(url.split(", ", 1) for url in urls)
    return named.get("Repository")
