"""Second stage of training: the trained tower's features of many pictures, kept on disk for the stages that read them.

The tower is by far the most expensive step; its features are computed once and used for many questions.
"""

import pickle
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from io import BufferedWriter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from transformers import SiglipVisionModel

from demo_model.anyres import token_sources
from demo_model.architecture import WIDTH, normalise
from demo_model.labels import HEADS, label
from demo_model.scene import Scene, generate
from demo_model.tower import read_features

_NOTHING = np.zeros((0, 0), np.uint8)


@dataclass(frozen=True)
class CachedPicture:
    """Features of one picture.

    Attributes:
        scene: what the picture shows, without its pixels.
        start, count: where its tokens lie in the cache; newline tokens have no features and are left out.
    """

    scene: Scene
    start: int
    count: int


class FeatureCache:
    """Tower features and labels of pictures, in the order in which the language model reads them.

    Two flat files, read through memory maps, and an index. ``fill`` appends; what is there stays.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._features = folder / "features.bin"
        self._labels = folder / "labels.bin"
        self._index = folder / "index.pickle"
        self.pictures: list[CachedPicture] = pickle.loads(self._index.read_bytes()) if self._index.exists() else []

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def tokens(self) -> int:
        """Tokens of all pictures together."""
        return self.pictures[-1].start + self.pictures[-1].count if self.pictures else 0

    def features(self, picture: CachedPicture, rows: np.ndarray | slice = slice(None)) -> Tensor:
        """Features (tokens, width) in bfloat16 of a picture, or of some of its tokens."""
        stored = np.memmap(self._features, np.int16, "r", 2 * WIDTH * picture.start, (picture.count, WIDTH))
        return torch.from_numpy(np.array(stored[rows])).view(torch.bfloat16)

    def labels(self, picture: CachedPicture) -> np.ndarray:
        """Labels (tokens, heads) of a picture, int8."""
        return np.memmap(self._labels, np.int8, "r", len(HEADS) * picture.start, (picture.count, len(HEADS)))

    def fill(
        self,
        tower: SiglipVisionModel,
        *,
        minutes: float,
        most: int,
        first_seed: int,
        held_out: bool = False,
        threads: int = 2,
    ) -> None:
        """Append pictures until so many minutes have passed or the cache holds ``most`` of them.

        The picture at place ``n`` has the seed ``first_seed + n``. Each thread encodes a picture of its own.
        """
        begun = time.monotonic()
        # Whatever a stopped run wrote after its last index is cut off.
        for path, width in ((self._features, 2 * WIDTH), (self._labels, len(HEADS))):
            path.touch()
            with path.open("r+b") as file:
                file.truncate(width * self.tokens)
        stream = DataLoader(
            _Pictures(first_seed + len(self), held_out), batch_size=None, num_workers=1, prefetch_factor=8
        )
        pictures = iter(stream)
        progress = tqdm(total=most, initial=len(self), desc="features", unit="picture", mininterval=10)
        with (
            self._features.open("ab") as features,
            self._labels.open("ab") as labels,
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            while len(self) < most and time.monotonic() - begun < 60 * minutes:
                group = [next(pictures) for _ in range(min(threads, most - len(self)))]
                for (scene, _, patch_labels), rows in zip(group, pool.map(partial(_encode, tower), group), strict=True):
                    sources = _sources(scene)
                    features.write(rows.view(torch.int16).numpy().tobytes())
                    labels.write(patch_labels.transpose(1, 2).reshape(-1, len(HEADS))[sources].numpy().tobytes())
                    self.pictures.append(CachedPicture(scene, self.tokens, len(sources)))
                    progress.update()
                if len(self) % 500 < threads:
                    self._write_index(features, labels)
            self._write_index(features, labels)
        progress.close()

    def _write_index(self, *files: BufferedWriter) -> None:
        for file in files:
            file.flush()
        unfinished = self._index.with_suffix(".partial")
        unfinished.write_bytes(pickle.dumps(self.pictures))
        unfinished.replace(self._index)


def _sources(scene: Scene) -> Tensor:
    """Which tower output each token of the picture is, newlines left out."""
    sources = torch.from_numpy(token_sources(*scene.size))
    return sources[sources >= 0]


def _encode(tower: SiglipVisionModel, picture: tuple[Scene, Tensor, Tensor]) -> Tensor:
    """Features (tokens, width) of a picture in bfloat16, in the order of its tokens."""
    scene, pixels, _ = picture
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = read_features(tower, normalise(pixels))
    return hidden.reshape(-1, WIDTH)[_sources(scene)].to(torch.bfloat16)


class _Pictures(IterableDataset[tuple[Scene, Tensor, Tensor]]):
    """Scenes of consecutive seeds with their tiles and labels; the pixels leave the scene once they are cut.

    For training, every third scene shows distinct objects only: in the others codes are rare.
    """

    def __init__(self, seed: int, held_out: bool) -> None:
        self.seed, self.held_out = seed, held_out

    def __iter__(self) -> Iterator[tuple[Scene, Tensor, Tensor]]:
        seed = self.seed
        while True:
            scene = generate(seed, held_out=self.held_out, distinct=not self.held_out and seed % 3 == 0)
            cut = label(scene)
            yield (
                replace(scene, image=_NOTHING, instances=_NOTHING),
                torch.from_numpy(cut.pixels),
                torch.from_numpy(cut.labels),
            )
            seed += 1
