"""The command that installs the package names what the package's metadata name."""

from __future__ import annotations

from email.message import Message
from importlib.metadata import PackageNotFoundError

import pytest

from diffusers_bitsfusion.utils import installation
from diffusers_bitsfusion.utils.installation import install_command


@pytest.fixture
def urls(monkeypatch):
    """Metadata with these `Project-URL` entries."""

    def name_urls(*entries: str) -> None:
        fields = Message()
        for entry in entries:
            fields["Project-URL"] = entry
        monkeypatch.setattr(installation, "metadata", lambda package: fields)

    return name_urls


def test_the_repository_is_the_source(urls):
    urls("Repository, https://example.org/git")
    assert install_command() == "pip install diffusers_bitsfusion@git+https://example.org/git"
    assert install_command(upgrade=True) == "pip install -U diffusers_bitsfusion@git+https://example.org/git"
    assert install_command("eval") == "pip install diffusers_bitsfusion[eval]@git+https://example.org/git"


def test_without_a_repository_the_package_is_named(urls, monkeypatch):
    urls()
    assert install_command("app") == "pip install diffusers_bitsfusion[app]"

    def missing(package: str) -> None:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(installation, "metadata", missing)
    assert install_command() == "pip install diffusers_bitsfusion"
