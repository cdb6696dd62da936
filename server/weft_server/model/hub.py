"""From a model's name to its directory, downloading from the Hugging Face hub where needed.

Owns what may be downloaded (safetensors, JSON, tokenizer files, templates; never pickle or code) and the
messages for what can go wrong. Imports `huggingface_hub` only when something is to be downloaded.
"""

from __future__ import annotations

import re
from pathlib import Path

from weft_server.errors import ConfigError
from weft_server.model.config_fields import ModelError

ALLOWED_FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model"]
# Weights in other layouts, which repositories keep beside the Hugging Face files or in folders.
SKIPPED_FILES = ["*/*", "consolidated*.safetensors"]
ALLOWED_MODELS = "a Hugging Face directory (config.json, safetensors, tokenizer.json), a hub id, or demo"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_model(
    name: str, *, revision: str | None = None, cache_dir: Path | None = None, endpoint: str | None = None
) -> Path:
    """The directory of the model `name`.

    Args:
        name: an existing directory, or else a hub id ("organisation/model"), which is downloaded, or taken
            from the hub library's cache when the hub cannot be reached.
        revision: branch, tag or commit on the hub; its default branch when None. Only for hub ids.
        cache_dir: where downloads are kept; the hub library's own cache when None.
        endpoint: the hub's address; the hub library's own when None.

    Raises:
        ConfigError: neither a directory with a `config.json` nor a hub id.
        ModelError: the hub has no such model or revision or gives no right to it, or it cannot be reached and
            the model is not in the cache.
    """
    directory = Path(name).expanduser()
    if name and directory.is_dir():
        if revision is not None:
            raise ModelError(f"{name} is a directory, which has no revision {revision!r}", param="revision")
        if not (directory / "config.json").is_file():
            raise ConfigError(
                f"MODEL is {name}, which holds no config.json, so it is not a Hugging Face model directory. "
                f"Allowed: {ALLOWED_MODELS}.",
                param="model",
            )
        return directory
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"MODEL is {name!r}, which is neither an existing directory nor a hub id. "
            f"Allowed: {ALLOWED_MODELS}.",
            param="model",
        )
    return _download(name, revision, cache_dir, endpoint)


def _download(name: str, revision: str | None, cache_dir: Path | None, endpoint: str | None) -> Path:
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise ModelError(
            f"{name!r} is no directory here, and downloading it needs the huggingface_hub package",
            param="model",
        ) from error
    wanted = f"model {name!r}" if revision is None else f"model {name!r} at revision {revision!r}"
    try:
        path = snapshot_download(
            name,
            revision=revision,
            cache_dir=cache_dir,
            endpoint=endpoint,
            allow_patterns=ALLOWED_FILES,
            ignore_patterns=SKIPPED_FILES,
        )
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{wanted} is gated: accept its terms on the hub and set HF_TOKEN to a token with access",
            param="model",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{wanted}: the hub has the model, but no such revision", param="revision"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{wanted} is neither a directory here nor on the hub (a private one needs HF_TOKEN)",
            param="model",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(
            f"{wanted} is neither a directory here nor in the cache, and the hub cannot be reached: {error}",
            param="model",
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise ModelError(f"{wanted} could not be downloaded: {error}", param="model") from error
    return Path(path)
