"""The embedded model: a small LLaVA-OneVision that this repository trains on pictures it generates itself."""

from pathlib import Path


def model_path() -> Path:
    """Folder of the packaged weights, in the form that ``from_pretrained`` loads."""
    return Path(__file__).parent / "weights"


def picture_path() -> Path:
    """Folder of the bundled demonstration pictures and their ``questions.json``."""
    return Path(__file__).parent / "pictures"
