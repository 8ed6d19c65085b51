"""A model that is named by its hub id: where to read it from, decided before anything of it is read."""

from __future__ import annotations

from pathlib import Path

from vflowopt.models.error import ModelError

PATIENCE = 10.0
"""Seconds to wait for the hub, once."""


def find_on_hub(model: str) -> str | Path:
    """Where to read the model with the hub id ``model`` from: the id itself if the hub knows it, otherwise the folder
    in the local cache.

    The hub is asked once. Where the machine does not reach it, the libraries would ask again and again for each file.

    Raises:
        ModelError: MODEL_NOT_FOUND if this is no hub id, or the hub knows no such model; MODEL_UNREACHABLE if the hub
            cannot be reached. In both cases the model is not in the cache.
    """
    # Imported here, because a model in a folder does not need it.
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(model, timeout=PATIENCE)
        return model
    except HFValidationError as error:
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"{model!r} is neither a folder nor a hub id: there is no such folder here, and a hub id is a name, or an "
            "owner and a name with a slash between them",
        ) from error
    except RepositoryNotFoundError as error:
        refusal = ModelError(
            "MODEL_NOT_FOUND",
            f"there is no folder {model}, and no model of this name on the hub for all or for your HF_TOKEN; "
            "correct the name, or give an existing folder in Hugging Face's layout",
        )
        refusal.__cause__ = error
    except Exception as error:  # whatever its HTTP library raises; being told to stay offline is one of them, too
        refusal = ModelError(
            "MODEL_UNREACHABLE",
            f"there is no folder {model}, no model of this name is in the hub cache, and the hub cannot be reached "
            f"({type(error).__name__}); give an existing folder, or run where the hub can be reached",
        )
        refusal.__cause__ = error
    try:
        return Path(snapshot_download(model, local_files_only=True))
    except OSError:
        raise refusal from refusal.__cause__
