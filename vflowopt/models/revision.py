"""The revision of a model: a digest of all that its answers depend on, and of nothing else.

It is made of the files of the model's folder: every byte of the weights, the configuration, the tokenizer and the image
processor; and of what was made of them: the chat template, the tokens that end an answer, and the types that the
weights were loaded in. What libraries note about themselves in these files does not count, nor does the order in which
they write, nor how the weights are spread over files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
import transformers
from torch import Tensor
from transformers.utils import (
    IMAGE_PROCESSOR_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from vflowopt.models.error import ModelError

if TYPE_CHECKING:
    from vflowopt.models.interface import MultimodalModel

_NOTES = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "auto_map",
        "backend",
        "dtype",  # the type that the weights are loaded in is asked for, and counts by itself
        "is_local",
        "local_files_only",
        "model_max_length",
        "name_or_path",
        "padding_side",
        "processor_class",
        "torch_dtype",
        "transformers_version",
        "truncation_side",
        "use_fast",
    }
)
"""Keys under which libraries note something that no answer depends on, at any depth of a configuration."""

_CLASSES = ("image_processor_type", "tokenizer_class")
"""Keys of class names, which end in ``Fast`` in folders of some versions."""

_TOKENIZER = ("vocab.json", "merges.txt", "vocab.txt", "tekken.json")
"""Files of a tokenizer whose folder has no tokenizer.json, besides those of SentencePiece and tiktoken."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
"""How names of files of weights end."""

_DIGESTS = ".vflow-digests.json"
"""Beside the files: the digests of large ones, so that these are read once only."""

_SCHEMA = 1
_LARGE = 16 << 20
"""Bytes of a file whose digest is kept; smaller ones are read within a few hundredths of a second."""

_SETTLED = 2.0
"""Seconds since the last change of a file after which a further change has another time."""

_BLOCK = 8 << 20


def revision(
    model: MultimodalModel, kv_dtype: torch.dtype | None = None, *, tower_dtype: torch.dtype | None = None
) -> str:
    """The revision of ``model``, 16 hexadecimal digits.

    The weights of a model that was wrapped, not loaded, are read from memory, every time. Those of a folder are read
    once: their digests are kept in the folder, or in the user's cache folder where the folder cannot be written to.

    Args:
        model: the model.
        kv_dtype: type in which its keys and values are stored; None: the model's own.
        tower_dtype: the revision that it has with a vision tower of this type; None: with the tower that it has.

    Raises:
        ModelError: MODEL_UNREADABLE; a file of the model cannot be read any more.
    """
    digest = hashlib.sha256()
    for part in _parts(model, kv_dtype, tower_dtype or model.tower_dtype):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def first_values(model: MultimodalModel) -> bytes:
    """What :func:`earlier_revisions` needs of the weights: the name, the shape and the first values of each.

    Call this before the weights are fused.
    """
    parts = []
    for name, weight in model.network.state_dict().items():
        if type(weight) is not Tensor:  # some quantizers use tensor types of their own, which cannot be sliced
            weight = weight.dequantize()
        parts.append(f"{name}{tuple(weight.shape)}".encode())
        parts.append(weight.flatten()[:64].float().cpu().numpy().tobytes())
    return b"".join(parts)


def earlier_revisions(model: MultimodalModel, values: bytes, kv_dtype: torch.dtype | None = None) -> frozenset[str]:
    """Other revisions whose sessions go on with this model.

    Releases before this scheme hashed the first values of the weights, and a configuration with the version of
    transformers that had loaded it. So there is one for each version that they could be installed with.

    And the same model with a vision tower of another type is one: a stored session holds what the tower made of its
    pictures, so it does not need the tower any more.

    Args:
        model: the model.
        values: what :func:`first_values` returned.
        kv_dtype: as for :func:`revision`. Those releases knew no type but the model's.
    """
    towers = {torch.float32, torch.bfloat16, torch.float16, model.dtype} - {model.tower_dtype}
    by_tower = frozenset(revision(model, kv_dtype, tower_dtype=each) for each in towers)
    if kv_dtype not in (None, model.dtype):
        return by_tower
    config = model.network.config.to_json_string()
    latest = int(transformers.__version__.split(".")[1])
    versions = {f"5.{minor}.{patch}" for minor in range(17, latest + 1) for patch in range(5)}
    by_release = (
        hashlib.sha256(
            re.sub(r'("transformers_version": )"[^"]*"', rf'\g<1>"{version}"', config).encode() + values
        ).hexdigest()[:16]
        for version in {transformers.__version__, *versions}
    )
    return by_tower.union(by_release)


def _parts(model: MultimodalModel, kv_dtype: torch.dtype | None, tower_dtype: torch.dtype) -> list[bytes]:
    tokenizer = model.tokenizer
    settings: dict[str, Any] = {
        "chat_template": tokenizer.chat_template,
        "stop_ids": sorted(model.stop_ids),
        "video_size": getattr(model, "video_size", None),
        "dtype": str(model.dtype),
    }
    if tower_dtype != model.dtype:
        settings["tower_dtype"] = str(tower_dtype)
    if kv_dtype not in (None, model.dtype):  # otherwise it is as it was before there was a choice
        settings["kv_dtype"] = str(kv_dtype)
    if (origin := model.origin) is None:
        config, processor = model.network.config.to_diff_dict(), model.processor.to_dict()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        texts = [repr(tokenizer) if backend is None else backend.to_str()]
        weights = _in_memory(model)
    else:
        folder = origin.folder
        settings["quantization"] = origin.quantization
        try:
            kept = _KeptDigests(folder)
            config = _json(folder / "config.json")
            processor = _json(folder / PROCESSOR_NAME).get("image_processor") or _json(folder / IMAGE_PROCESSOR_NAME)
            texts = _tokenizer_files(folder, kept)
            weights = kept.weights(_weight_files(folder, config))
            kept.write()
        except (OSError, ValueError) as error:
            raise ModelError(
                "MODEL_UNREADABLE",
                f"the files of the model at {folder} cannot be read any more: {error}; put them back, and start again",
            ) from error
    # Every session names its strategy itself.
    config = {key: value for key, value in config.items() if key != "vflow_strategies"}
    documents = [settings, _without_notes(config), _without_notes(processor), texts, weights]
    return [_canonical(document) for document in documents]


def _canonical(document: object) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), default=str).encode()


def _without_notes(document: Any) -> Any:
    if isinstance(document, Mapping):
        return {
            key: value.removesuffix("Fast")
            if key in _CLASSES and isinstance(value, str)
            else value
            if key == "quantization_config"
            else _without_notes(value)
            for key, value in document.items()
            if key not in _NOTES
        }
    if isinstance(document, list | tuple):
        return [_without_notes(each) for each in document]
    return document


def _json(file: Path) -> dict[str, Any]:
    """The object in ``file``; an empty one if there is no such file."""
    try:
        document: dict[str, Any] = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    return document


def _tokenizer_files(folder: Path, kept: _KeptDigests) -> list[str]:
    """Digests of the files that make the tokenizer."""
    texts = []
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        document = _json(folder / name)
        document.pop("chat_template", None)  # the one in use counts, wherever it stands
        document = {**document.pop("model_specific_special_tokens", {}), **document}  # some versions repeat these
        texts.append(hashlib.sha256(_canonical(_without_notes(document))).hexdigest())
    if (folder / "tokenizer.json").exists():
        return [*texts, kept.of(folder / "tokenizer.json", _digest_of_tokenizer)]
    names = {*_TOKENIZER, *(file.name for pattern in ("*.model", "*.tiktoken") for file in folder.glob(pattern))}
    return [*texts, *(kept.of(folder / name, _digest) for name in sorted(names) if (folder / name).exists())]


def _digest_of_tokenizer(file: Path) -> str:
    """Digest of a tokenizer.json, without what the latest call of the tokenizer left in it."""
    document = {key: value for key, value in _json(file).items() if key not in ("padding", "truncation")}
    return hashlib.sha256(_canonical(document)).hexdigest()


def _weight_files(folder: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files of weights that ``from_pretrained`` reads; all of them if it reads others than are known here."""
    names = [config.get("transformers_weights"), SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]
    for name in [*names, WEIGHTS_NAME, WEIGHTS_INDEX_NAME]:
        if name and (folder / name).exists():
            if not name.endswith(".index.json"):
                return [folder / name]
            return sorted({folder / shard for shard in _json(folder / name)["weight_map"].values()})
    return sorted(file for file in folder.iterdir() if file.suffix in _WEIGHTS)


class _KeptDigests:
    """Digests of large files, which are computed once and kept by size and times.

    Args:
        folder: the folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vflow"
        elsewhere = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]
        self._places = (folder / _DIGESTS, cache / f"digests-{elsewhere}.json")
        self._kept = self._read()
        self._new: dict[str, Any] = {}

    def of(self, file: Path, digest: Callable[[Path], Any]) -> Any:
        """The ``digest`` of ``file``, kept or computed.

        Raises:
            OSError: the file cannot be read.
        """
        before = _times(file)
        kept = self._kept.get(file.name)
        if isinstance(kept, dict) and kept.get("times") == before:
            return kept["digest"]
        computed = digest(file)
        size, modified, changed, _ = before
        if size >= _LARGE and time.time() - max(modified, changed) / 1e9 > _SETTLED and _times(file) == before:
            self._new[file.name] = {"times": before, "digest": computed}
        return computed

    def weights(self, files: Iterable[Path]) -> dict[str, str]:
        """Digests of all weights in ``files``: by tensor, or by file where a file does not tell where each begins."""
        with ThreadPoolExecutor(4) as threads:
            found = threads.map(lambda file: self.of(file, _digests_of_weights), files)
            return {name: digest for each in found for name, digest in each.items()}

    def write(self) -> None:
        """Keep what was computed, where that is possible."""
        if not self._new:
            return
        files = {name: kept for name, kept in self._kept.items() if (self._folder / name).exists()} | self._new
        for place in self._places:
            draft = place.with_name(f"{place.name}.{os.getpid()}")
            try:
                if place.parent != self._folder:
                    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                draft.write_text(json.dumps({"schema": _SCHEMA, "files": files}))
                draft.replace(place)
            except OSError:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
                continue
            return

    def _read(self) -> dict[str, Any]:
        for place in self._places:
            with suppress(OSError, ValueError, KeyError, TypeError):
                document = json.loads(place.read_bytes())
                if document["schema"] == _SCHEMA and isinstance(document["files"], dict):
                    return dict(document["files"])
        return {}


def _times(file: Path) -> list[int]:
    """Size and times of a file, and its place on the disk: a change of its content changes one of them."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def _digests_of_weights(file: Path) -> dict[str, str]:
    """The digest of each tensor by name; of a file that is not safetensors, that of its content."""
    if file.suffix != ".safetensors":
        return {file.name: _digest(file)}
    with file.open("rb", buffering=0) as content:
        length = int.from_bytes(content.read(8), "little")
        header: dict[str, Any] = json.loads(content.read(length))
        header.pop("__metadata__", None)
        digests = {}
        for name, tensor in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = tensor["data_offsets"]
            digest = hashlib.sha256(f"{tensor['dtype']}{tensor['shape']}".encode())
            content.seek(8 + length + begin)
            _update(digest, content, end - begin)
            digests[name] = digest.hexdigest()[:32]
    return digests


def _update(digest: Any, content: BinaryIO, nbytes: int) -> None:
    buffer = memoryview(bytearray(min(nbytes, _BLOCK)))
    while nbytes:
        read = content.readinto(buffer[: min(nbytes, _BLOCK)])  # type: ignore[attr-defined]
        if not read:
            raise ValueError("a file of weights is cut off")
        digest.update(buffer[:read])
        nbytes -= read


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _in_memory(model: MultimodalModel) -> dict[str, str]:
    """The digest of each tensor of a model, by name."""
    return {name: _digest_of_tensor(weight) for name, weight in model.network.state_dict().items()}


def _digest_of_tensor(weight: Any) -> str:
    if type(weight) is not Tensor:  # some quantizers use tensor types of their own
        weight = weight.dequantize()
    digest = hashlib.sha256(f"{weight.dtype}{tuple(weight.shape)}".encode())
    if weight.numel():
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
