"""Sources of pipelines and models: folders, the Hub, single files."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONFIGS = ["model_index.json", "config.json", "*/config.json"]
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_SINGLE_FILES = (".safetensors", ".ckpt")


@dataclass(frozen=True)
class Source:
    """A pipeline or model of which nothing but configs has been read.

    Attributes:
        name: folder, Hub id or single file, as the user wrote it.
        folder: with its configs.
        options: which of its files to load, as arguments of `from_pretrained`.
    """

    name: str
    folder: Path
    options: dict[str, Any]

    @classmethod
    def find(
        cls, name: str, *, revision: str | None = None, variant: str | None = None, config: str | None = None
    ) -> Source:
        """Return the source that `name` stands for.

        Args:
            name: folder or Hub id of a pipeline or model, or a file of an original Stable Diffusion checkpoint.
            revision: on the Hub.
            variant: of the weight files; in a folder without plain ones, their only variant is found.
            config: of a single file, the folder or Hub id of a pipeline with the same configs.

        Raises:
            ValueError: it is nothing of this, or a folder that holds neither pipeline nor model.
            OSError: the Hub has no such repository, or cannot be reached.
        """
        if Path(name).is_file() and Path(name).suffix in _SINGLE_FILES:
            return cls(name, config_folder(config or _usual_config(name), revision), {})
        if config is not None:
            raise ValueError(f"--config is for a single file; {name} is none.")
        folder = config_folder(name, revision)
        check_holds_something(folder, name)
        if variant is None and Path(name).is_dir():
            variant = _only_variant(folder)
        options = {"revision": revision, "variant": variant}
        return cls(name, folder, {key: value for key, value in options.items() if value is not None})

    @property
    def is_file(self) -> bool:
        """Whether it is a single file, whose configs are another's."""
        return Path(self.name).is_file()

    @property
    def is_model(self) -> bool:
        """Whether it is a model rather than a pipeline."""
        return is_model(self.folder)

    @property
    def components(self) -> list[str]:
        """Names of a pipeline's components; none of a model."""
        index = {} if self.is_model else read_config(self.folder / "model_index.json")
        return [name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0]]

    def load(self, **kwargs: Any) -> Any:
        """Return the pipeline or model, by the class that its config names.

        Args:
            **kwargs: of `from_pretrained`, `quantization_config` and `dtype` for example.

        Raises:
            ValueError: its config names no class of diffusers.
            OSError: files are missing.
        """
        import diffusers

        file = self.folder / ("config.json" if self.is_model else "model_index.json")
        name = read_config(file).get("_class_name")
        if not name or not hasattr(diffusers, name):
            raise ValueError(f"{file} names no diffusers class (_class_name is {name!r}).")
        kind = getattr(diffusers, name)
        if self.is_file:
            return kind.from_single_file(self.name, config=str(self.folder), **kwargs)
        # Pipelines of a Hub's own classes are found by the base class alone.
        kind = kind if self.is_model else diffusers.DiffusionPipeline
        return kind.from_pretrained(self.name, **self.options, **kwargs)


def config_folder(source: str, revision: str | None = None, *, weights: bool = False) -> Path:
    """Return the folder of a pipeline or model; of a Hub id, the folder that its configs are downloaded to.

    Args:
        source: folder or Hub id.
        revision: on the Hub.
        weights: whether to download the weights too.

    Raises:
        ValueError: it is neither a folder nor a Hub id.
        OSError: the Hub has no such repository, or cannot be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if Path(source).is_dir():
        return Path(source)
    patterns = [*_CONFIGS, *(_WEIGHTS if weights else [])]
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except HFValidationError as error:
        raise ValueError(f"{source} is neither a folder nor a Hub id.") from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"There is no folder {source}, and the Hub cannot be reached to look for a model of this name (there is "
            "no connection, or HF_HUB_OFFLINE is set)."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"{source} has no revision {revision!r} on the Hub.") from error
    except GatedRepoError:
        raise
    except RepositoryNotFoundError as error:
        raise OSError(
            f"There is no folder {source}, and the Hub has no model of this name, or none that you may read: check "
            "the name, or log in with `hf auth login`."
        ) from error


def _usual_config(file: str) -> str:
    """Return the Hub id of the pipeline whose configs diffusers uses for a single file."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    name: str = fetch_diffusers_config(load_single_file_checkpoint(file))["pretrained_model_name_or_path"]
    return name


def is_model(folder: Path) -> bool:
    """Return whether a `config_folder` holds a model rather than a pipeline."""
    return (folder / "config.json").is_file() and not (folder / "model_index.json").is_file()


def model_config(source: str, revision: str | None = None) -> Path:
    """Return the config.json of a model or of a pipeline's denoiser, by folder, Hub id or the file itself.

    Raises:
        ValueError: the pipeline has no denoiser, or see `config_folder`.
        OSError: there is none, or see `config_folder`.
    """
    from diffusers_bitsfusion.evaluation import DENOISERS

    if source.endswith(".json"):
        return Path(source)
    folder = config_folder(source, revision)
    check_holds_something(folder, source)
    if is_model(folder):
        return folder / "config.json"
    index = read_config(folder / "model_index.json")
    name = next((name for name in DENOISERS if (index.get(name) or [None])[0]), None)
    if name is None:
        raise ValueError(f"The pipeline {source} has neither a UNet nor a transformer.")
    return folder / name / "config.json"


def check_holds_something(folder: Path, source: str) -> None:
    """Refuse a folder that holds neither, before diffusers lists every file that it looked for.

    Raises:
        FileNotFoundError: there is neither a model nor a pipeline.
    """
    if not any((folder / name).is_file() for name in ("model_index.json", "config.json")):
        raise FileNotFoundError(f"{source} holds neither a model (config.json) nor a pipeline (model_index.json).")


def read_config(file: Path) -> dict[str, Any]:
    """Return the content of a config.json.

    Raises:
        OSError: it cannot be read.
        DamagedFileError: it is no JSON object.
    """
    from diffusers_bitsfusion.utils.json_files import read_json

    config: dict[str, Any] = read_json(file, non_finite=True)
    return config


def _only_variant(folder: Path) -> str | None:
    """Return the variant of the weight files in a folder, where all are of one; None where some are plain."""
    from diffusers_bitsfusion.codec.weight_files import stem

    files = [*folder.glob("*.safetensors"), *folder.glob("*/*.safetensors")]
    variants = {str(stem(file.name)).partition(".")[2] for file in files}
    return next(iter(variants)) or None if len(variants) == 1 else None


def refuse_quantized(folder: Path, components: Iterable[str]) -> None:
    """Refuse to quantize a quantized model, which loads as it is whatever the config says.

    Args:
        folder: a `config_folder`.
        components: of a pipeline, those that would be quantized.

    Raises:
        ValueError: the config of one, or of the model, has a quantization_config.
    """
    for file in (folder / part / "config.json" for part in ("", *components)):
        if file.is_file() and "quantization_config" in read_config(file):
            raise ValueError(f"{file} is of a model that is quantized already. Quantize the original.")


def refuse_destination(source: str, destination: Path, components: Iterable[str]) -> None:
    """Refuse to write where that would destroy an original, or where nothing can be written, before the work begins.

    Args:
        source: a folder or Hub id to read.
        destination: folder to write.
        components: of a pipeline, those that are quantized.

    Raises:
        ValueError: the folders are one, whatever they are called; one is within the other; or the destination holds
            a model in full precision.
        OSError: the destination is no folder, or cannot be written.
    """
    if Path(source).is_dir():
        read, written = Path(source).resolve(), destination.resolve()
        if read == written or (destination.exists() and os.path.samefile(source, destination)):
            raise ValueError(f"SRC and DST are one folder, {read}: choose another DST, or the original would be lost.")
        if read in written.parents or written in read.parents:
            raise ValueError(f"One of SRC {read} and DST {written} is within the other: choose another DST.")
    is_earlier_result = any("quantization_config" in read_config(file) for file in destination.glob("*/config.json"))
    for file in (destination / part / "config.json" for part in ("", *components)):
        if file.is_file() and not is_earlier_result and "quantization_config" not in read_config(file):
            raise ValueError(
                f"DST {destination} holds a model that is not quantized ({file}), which would be lost: choose another "
                "DST, or delete it first."
            )
    existing = next(folder for folder in (destination, *destination.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file: choose another DST.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(f"{existing} cannot be written: choose another DST.")
