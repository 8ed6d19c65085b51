"""What can be told of a model without loading it: no more is imported for that than what reads JSON."""

from __future__ import annotations

import json
from pathlib import Path

from vflowopt.models.error import ModelError
from vflowopt.models.families import FAMILIES
from vflowopt.models.hub import find_on_hub


def find_model(model: str | Path) -> str | Path:
    """Where to read ``model``, a folder or a hub id, from; see :func:`~vflowopt.models.hub.find_on_hub`.

    Raises:
        ModelError: there is no such folder, it has no configuration, the family in it is unknown, or there is no such
            model on the hub.
    """
    if not _is_path(model) and not Path(model).is_dir():
        model = find_on_hub(str(model))
    _check_folder(model)
    return model


def _check_folder(model: str | Path) -> None:
    """Refuse a folder that cannot hold a model of a known family; says nothing about a hub id."""
    if _is_path(model) and not Path(model).is_dir():
        raise ModelError(
            "MODEL_NOT_FOUND",
            f"there is no folder {model!s}; give an existing folder in Hugging Face's layout, or a hub id",
        )
    if not Path(model).is_dir():
        return
    file = Path(model) / "config.json"
    if not file.is_file():
        raise ModelError("MODEL_NOT_FOUND", f"the folder {model} has no config.json; give a Hugging Face model folder")
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable_configuration(model, error) from error
    if isinstance(config, dict) and isinstance(family := config.get("model_type"), str):
        check_family(model, family)


def check_family(model: str | Path, family: str) -> None:
    """Refuse a ``model`` whose configuration names a ``family`` that is not known.

    Raises:
        ModelError: it is not.
    """
    if family not in FAMILIES:
        raise ModelError(
            "MODEL_FAMILY_UNKNOWN",
            f"{model!s} is of the family {family!r}; the families known here are: {', '.join(FAMILIES)}",
        )


def unreadable_configuration(model: str | Path, error: Exception) -> ModelError:
    """The refusal of a ``model`` whose configuration cannot be read."""
    return ModelError(
        "MODEL_NOT_FOUND",
        f"no model configuration can be read at {model!s} ({first_line(error)}); "
        "give an existing folder, or the id of a model in the hub cache, of one of the families: "
        f"{', '.join(FAMILIES)}",
    )


def first_line(error: Exception) -> str:
    """The first line of what ``error`` says, or its type where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_path(model: str | Path) -> bool:
    """Whether this can only be a folder: hub ids are relative and have at most one slash."""
    return isinstance(model, Path) or model.startswith((".", "~", "/")) or model.count("/") > 1
