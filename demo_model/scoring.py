"""Third stage of training: the tower's last layer, whose attention scores visual tokens.

Every patch must caption all that its tile shows, which it can only do by attending to the objects: so the layer's
attention falls on them without labels of what is salient. The layers below stay as they are, and no answer is read from
this layer.
"""

import math
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from demo_model.anyres import SIDE, token_sources
from demo_model.architecture import WIDTH
from demo_model.features import CachedPicture, FeatureCache
from demo_model.gradient import ShardedGradient
from demo_model.labels import HEADS
from demo_model.scene import COLOURS, DIGITS, LETTERS, SHAPES, TINTS

_PATCHES = SIDE * SIDE
_PAIRS = len(SHAPES) * len(COLOURS)
CAPTION = _PAIRS + len(LETTERS) + len(DIGITS) + len(TINTS)
"""Size of a caption: which coloured shapes, which characters and which tint a tile shows."""


def captions(labels: np.ndarray) -> np.ndarray:
    """Captions (tiles, CAPTION), 0 or 1, out of patch labels (tiles, 256, heads)."""
    names = list(HEADS)
    shape, colour, letter, digit, tint = (
        labels[..., names.index(name)].astype(np.int64) for name in ("shape", "colour", "letter", "digit", "tint")
    )
    caption = np.zeros((len(labels), CAPTION), np.float32)
    for tile in range(len(labels)):
        objects = (shape[tile] > 0) & (colour[tile] > 0)
        caption[tile, (shape[tile][objects] - 1) * len(COLOURS) + colour[tile][objects] - 1] = 1
        caption[tile, _PAIRS + letter[tile][letter[tile] > 0] - 1] = 1
        caption[tile, _PAIRS + len(LETTERS) + digit[tile][digit[tile] > 0] - 1] = 1
        caption[tile, _PAIRS + len(LETTERS) + len(DIGITS) + tint[tile][tint[tile] >= 0]] = 1
    return caption


def whole_tiles(cache: FeatureCache, picture: CachedPicture) -> tuple[Tensor, np.ndarray] | None:
    """Features (tiles, 256, width) and labels (tiles, 256, heads) of a picture, or None where padding left holes."""
    sources = token_sources(*picture.scene.size)
    sources = sources[sources >= 0]
    if len(sources) % _PATCHES or sources.max() + 1 != len(sources):
        return None
    order = np.argsort(sources)
    features = cache.features(picture, order)
    return features.view(-1, _PATCHES, WIDTH), cache.labels(picture)[order].reshape(-1, _PATCHES, len(HEADS))


@torch.no_grad()
def focus(tower: SiglipVisionModel, cache: FeatureCache, pictures: int = 40) -> float:
    """How many times more attention a patch with an object receives than one without, on average."""
    layer = cast(SiglipEncoderLayer, tower.encoder.layers[-1])
    attention = layer.self_attn
    received: dict[bool, list[Tensor]] = {True: [], False: []}
    for picture in cache.pictures[:pictures]:
        whole = whole_tiles(cache, picture)
        if whole is None:
            continue
        hidden = layer.layer_norm1(whole[0].float())
        heads = (len(hidden), _PATCHES, attention.num_heads, attention.head_dim)
        queries, keys = (
            projection(hidden).view(heads).transpose(1, 2) for projection in (attention.q_proj, attention.k_proj)
        )
        mean = (queries @ keys.transpose(-1, -2) * attention.scale).softmax(-1).mean((1, 2))
        objects = torch.from_numpy(whole[1][..., 1] > 0)
        received[True].append(mean[objects])
        received[False].append(mean[~objects])
    return float(torch.cat(received[True]).mean() / torch.cat(received[False]).mean())


def train_scoring(
    tower: SiglipVisionModel,
    cache: FeatureCache,
    *,
    minutes: float,
    checkpoint: Path,
    seed: int = 0,
    batch: int = 24,
    shards: int = 2,
    peak_rate: float = 1e-3,
) -> None:
    """Train the tower's last layer and final norm in place, for so many minutes, unless ``checkpoint`` has them."""
    layer, norm = tower.encoder.layers[-1], tower.post_layernorm
    if checkpoint.exists():
        state = torch.load(checkpoint)
        layer.load_state_dict(state["layer"])
        norm.load_state_dict(state["norm"])
        return
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    head = nn.Linear(WIDTH, CAPTION)
    trained = [*layer.parameters(), *norm.parameters(), *head.parameters()]
    optimiser = torch.optim.AdamW(trained, lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)

    def shard_loss(shard: tuple[Tensor, Tensor]) -> Tensor:
        logits = head(norm(layer(shard[0], attention_mask=None)))
        wanted = shard[1][:, None].expand(-1, _PATCHES, -1)
        # A caption names few of the many coloured shapes; without the weight, naming none would be a comfortable
        # answer.
        return F.binary_cross_entropy_with_logits(logits.float(), wanted, pos_weight=torch.tensor(4.0))

    gradient = ShardedGradient(trained, shard_loss, shards, autocast=True)
    begun, budget, step, smooth = time.monotonic(), 60 * minutes, 0, float("nan")
    progress = tqdm(total=round(budget), desc="scoring", unit="s", mininterval=10)
    features: list[Tensor] = []
    targets: list[Tensor] = []
    while (spent := time.monotonic() - begun) < budget:
        while sum(map(len, features)) < batch:
            whole = whole_tiles(cache, cache.pictures[int(rng.integers(len(cache)))])
            if whole is not None:
                features.append(whole[0].float())
                targets.append(torch.from_numpy(captions(whole[1])))
        tiles, caption = torch.cat(features)[:batch], torch.cat(targets)[:batch]
        features, targets = [], []
        rate = peak_rate * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * spent / budget)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = gradient(list(zip(tiles.chunk(shards), caption.chunk(shards), strict=True)))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        step += 1
        smooth = loss if math.isnan(smooth) else 0.97 * smooth + 0.03 * loss
        progress.update(round(spent) - progress.n)
        if step % 100 == 0:
            progress.write(f"scoring step {step} ({spent:.0f} s) loss {smooth:.4f} focus {focus(tower, cache):.1f}")
    progress.close()
    torch.save({"layer": layer.state_dict(), "norm": norm.state_dict()}, checkpoint)
