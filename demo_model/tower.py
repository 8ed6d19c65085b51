"""First stage of training: the vision tower's lower layers learn what every patch shows.

Learns from dense labels, on crowded scenes, so that every picture carries many labels. Knows nothing of the language
model.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import SiglipVisionModel

from demo_model.architecture import READ_LAYERS, WIDTH, normalise
from demo_model.gradient import ShardedGradient
from demo_model.labels import HEADS, IGNORE, label
from demo_model.scene import generate

_WEIGHTS = {
    "shape": 1.0,
    "colour": 0.5,
    "letter": 1.0,
    "digit": 1.0,
    "place": 0.4,
    "alike": 0.5,
    "centre": 0.5,
    "tint": 0.1,
}
"""Weight of each label in the loss."""

_BACKGROUND = 0.1
"""Weight of class 0 beside the others: most patches are background."""

_PATCHES = 132
"""Patches per tile that most batches carry: half of a tile is background, and there is little to learn from it."""

_WHOLE_TILES = 0.12
"""Share of the time, at the end, in which the tower sees whole tiles."""


class PatchLabels(nn.Module):
    """Linear heads over the tower's features; after training, only their directions are used: in the projector."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.heads = nn.Linear(WIDTH, sum(HEADS.values()))

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Logits per label, each (..., classes), of features (..., width)."""
        logits: Tensor = self.heads(self.norm(features))
        return torch.split(logits, list(HEADS.values()), -1)


def read_features(tower: SiglipVisionModel, pixels: Tensor, patches: Tensor | None = None) -> Tensor:
    """What the language model reads of normalised tiles: (tiles, 256, width), the output of the layer before the last.

    Args:
        tower: the vision tower.
        pixels: normalised tiles, (tiles, 3, 224, 224).
        patches: the patches to look at, (tiles, some) indices; all by default.
    """
    hidden: Tensor = tower.embeddings(pixels)
    if patches is not None:
        hidden = hidden.gather(1, patches[..., None].expand(-1, -1, WIDTH))
    for layer in tower.encoder.layers[:READ_LAYERS]:
        hidden = layer(hidden, attention_mask=None)
    return hidden


class TileStream(IterableDataset[tuple[Tensor, Tensor]]):
    """Endless batches of labelled tiles, overviews and mosaic, most of them of crowded scenes."""

    def __init__(self, seed: int, batch: int, *, crowded: float = 0.85, held_out: bool = False) -> None:
        self.seed, self.batch, self.crowded, self.held_out = seed, batch, crowded, held_out

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        rng = np.random.default_rng([self.seed, number])
        pixels: list[np.ndarray] = []
        labels: list[np.ndarray] = []
        while True:
            while len(pixels) < 12 * self.batch:
                scene = generate(
                    int(rng.integers(1 << 40)), crowded=bool(rng.random() < self.crowded), held_out=self.held_out
                )
                cut = label(scene)
                pixels.extend(cut.pixels)
                labels.extend(cut.labels)
            order = rng.permutation(len(pixels))[: self.batch]
            yield (
                torch.from_numpy(np.stack([pixels[i] for i in order])),
                torch.from_numpy(np.stack([labels[i] for i in order])),
            )
            taken = set(order.tolist())
            pixels = [item for i, item in enumerate(pixels) if i not in taken]
            labels = [item for i, item in enumerate(labels) if i not in taken]


def instructive_patches(labels: Tensor, count: int) -> Tensor:
    """Patches to train on, (tiles, count) indices: those that show some object first, then background."""
    shows = labels[:, 0] != 0
    return (shows + torch.rand(shows.shape)).topk(count, 1, sorted=False).indices


def dense_loss(logits: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Weighted sum of the labels' cross entropies; ``labels`` is (tiles, heads, patches)."""
    total = logits[0].new_zeros(())
    for index, (name, classes) in enumerate(HEADS.items()):
        weight = torch.ones(classes)
        if name in ("shape", "colour", "letter", "digit", "centre"):
            weight[0] = _BACKGROUND
        target = labels[:, index].long().reshape(-1)
        loss = F.cross_entropy(logits[index].float().reshape(-1, classes), target, weight, ignore_index=IGNORE)
        total = total + _WEIGHTS[name] * loss.nan_to_num()
    return total


@torch.no_grad()
def patch_accuracy(
    tower: SiglipVisionModel, heads: PatchLabels, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Share of labelled patches named rightly, per label; of object patches only where class 0 means none."""
    right = dict.fromkeys(HEADS, 0)
    seen = dict.fromkeys(HEADS, 0)
    for pixels, labels in batches:
        with torch.autocast("cpu", torch.bfloat16):
            logits = heads(read_features(tower, normalise(pixels)))
        for index, name in enumerate(HEADS):
            target = labels[:, index].long()
            counted = target > 0 if name in ("shape", "colour", "letter", "digit") else target != IGNORE
            right[name] += int((logits[index].argmax(-1) == target)[counted].sum())
            seen[name] += int(counted.sum())
    return {name: right[name] / max(seen[name], 1) for name in HEADS}


def train_tower(
    tower: SiglipVisionModel,
    *,
    minutes: float,
    checkpoint: Path,
    seed: int = 0,
    batch: int = 16,
    shards: int = 2,
    peak_rate: float = 1.2e-3,
) -> PatchLabels:
    """Train the layers below the features that the language model reads, in place, for so many minutes.

    Resumes from ``checkpoint`` where it exists (its minutes count) and writes it about every minute; the rate falls by
    a cosine of the time, since speed varies with what else the machine does.

    Returns:
        The label heads, whose directions start the projector.
    """
    torch.manual_seed(seed)
    heads = PatchLabels()
    trained = [*tower.embeddings.parameters(), *tower.encoder.layers[:READ_LAYERS].parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.02},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=peak_rate,
        betas=(0.9, 0.98),
    )
    spent, step = 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
        optimiser.load_state_dict(state["optimiser"])
        spent, step = state["seconds"], state["step"]
    budget = minutes * 60
    if spent >= budget:
        return heads

    def shard_loss(shard: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        pixels, labels, patches = shard
        asked = labels.gather(2, patches[:, None].expand(-1, len(HEADS), -1))
        return dense_loss(heads(read_features(tower, normalise(pixels), patches)), asked)

    gradient = ShardedGradient(trained, shard_loss, shards, autocast=True)
    held_out = iter(TileStream(seed, 20, crowded=0.0, held_out=True))
    probes = [next(held_out) for _ in range(6)]
    stream = DataLoader(TileStream(seed + 1 + step, batch), batch_size=None, num_workers=1, prefetch_factor=8)
    begun, saved, smooth = time.monotonic() - spent, time.monotonic(), float("nan")
    progress = tqdm(total=round(budget), initial=round(spent), desc="tower", unit="s", mininterval=10)
    for pixels, labels in stream:
        spent = time.monotonic() - begun
        if spent >= budget:
            break
        rate = peak_rate * min(1.0, (step + 1) / 80) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / budget)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        patches = instructive_patches(labels, labels.shape[-1] if spent > (1 - _WHOLE_TILES) * budget else _PATCHES)
        loss = gradient(list(zip(pixels.chunk(shards), labels.chunk(shards), patches.chunk(shards), strict=True)))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        step += 1
        smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
        progress.update(round(spent) - progress.n)
        if time.monotonic() - saved > 90:
            accuracy = {name: round(100 * value, 1) for name, value in patch_accuracy(tower, heads, probes).items()}
            progress.write(f"tower step {step} ({spent:.0f} s) loss {smooth:.3f} held-out patches {accuracy}")
            _save(checkpoint, tower, heads, optimiser, spent, step)
            saved = time.monotonic()
    progress.close()
    _save(checkpoint, tower, heads, optimiser, spent, step)
    return heads


def _save(
    path: Path, tower: nn.Module, heads: nn.Module, optimiser: torch.optim.Optimizer, seconds: float, step: int
) -> None:
    state = {
        "tower": tower.state_dict(),
        "heads": heads.state_dict(),
        "optimiser": optimiser.state_dict(),
        "seconds": seconds,
        "step": step,
    }
    torch.save(state, path.with_suffix(".partial"))
    path.with_suffix(".partial").replace(path)
