"""Initialisation of the projector, from the tower's label heads and the language model's word embeddings.

Two steps that save the language model a long plateau: the first map reads the label heads' directions and the whitened
features, then projected object patches are pulled for some seconds towards the words for what they show.
"""

import time

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from demo_model.architecture import WIDTH
from demo_model.features import FeatureCache
from demo_model.labels import HEADS, PLACES
from demo_model.scene import COLOURS, DIGITS, LETTERS, SHAPES, TINTS
from demo_model.tower import PatchLabels

_WORDS = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "letter": tuple(LETTERS),
    "digit": tuple(DIGITS),
    "place": PLACES,
    "tint": tuple(TINTS),
}


_CODE_WORDS = ("code", "sign", "written", "say")
"""Words of the questions about codes, for the patches that show a part of one."""


def sample(cache: FeatureCache, pictures: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Features (tokens, width) in float32 and labels (tokens, heads) of up to 256 tokens of each of some pictures."""
    features, labels = [], []
    for number in rng.permutation(len(cache))[:pictures]:
        picture = cache.pictures[number]
        rows = np.sort(rng.permutation(picture.count)[:256])
        features.append(cache.features(picture, rows).float())
        labels.append(torch.from_numpy(cache.labels(picture)[rows].astype(np.int64)))
    return torch.cat(features), torch.cat(labels)


@torch.no_grad()
def start_projector(model: LlavaOnevisionForConditionalGeneration, heads: PatchLabels, features: Tensor) -> None:
    """Point the projector's first map along the label heads' directions and the leading whitened directions of
    ``features``.

    Every output of that map starts with mean 0 and variance 1 over ``features`` (tokens, width).
    """
    mean = features.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(features.T))
    whitened = (vectors / values.clamp_min(1e-6).sqrt()).T.flip(0)
    known = heads.heads.weight * heads.norm.weight
    known = known - known.mean(1, keepdim=True)
    known = known / (features @ known.T).std(0)[:, None]
    rows = torch.cat([known, whitened])[:WIDTH]
    first, second = model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2
    first.weight.copy_(rows)
    first.bias.copy_(-rows @ mean)
    nn.init.normal_(second.weight, std=(0.4 * WIDTH) ** -0.5)
    nn.init.zeros_(second.bias)


class PatchWords:
    """The language model's words for what patches show, as directions to pull projected patches towards.

    Args:
        model: whose embeddings the words are.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
        self._embeddings = model.model.language_model.embed_tokens.weight
        self._tokens = {
            name: [tokenizer.encode(word.lower(), add_special_tokens=False) for word in vocabulary]
            for name, vocabulary in _WORDS.items()
        }
        self._code_words = [token for word in _CODE_WORDS for token in tokenizer.encode(word, add_special_tokens=False)]

    def loss(self, projected: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """How far projected patches (n, width) are from naming what their labels (n, heads) say.

        Every kind of label counts alike, however many patches carry it: a letter lies on one patch of a hundred, and
        what no patch is pulled towards the language model never finds.

        Returns:
            Cross-entropy, averaged over the kinds of label that occur, and the share of words named rightly.
        """
        names = list(HEADS)
        directions = F.normalize(projected, dim=-1)
        losses, right, asked = [], 0, 0
        for name, tokens in self._tokens.items():
            target = labels[:, names.index(name)]
            if name not in ("place", "tint"):  # those have no class for "none"
                target = target - 1
            chosen = target >= 0
            if not chosen.any():
                continue
            # A place is the sum of its words; of a lone digit, which is a space and the digit, the digit counts.
            vectors = [self._embeddings[ids if name == "place" else ids[-1:]].sum(0) for ids in tokens]
            words = F.normalize(torch.stack(vectors).detach(), dim=-1)
            logits = 14 * directions[chosen] @ words.T
            losses.append(F.cross_entropy(logits, target[chosen]))
            right += int((logits.argmax(-1) == target[chosen]).sum())
            asked += int(chosen.sum())
        if not losses:
            return projected.new_zeros(()), 0.0
        shown = labels[:, [names.index("letter"), names.index("digit")]]
        known = (shown >= 0).any(1)
        if known.any():
            word = F.normalize(self._embeddings[self._code_words].mean(0).detach(), dim=0)
            logits = 14 * (directions[known] @ word - 0.2)
            losses.append(F.binary_cross_entropy_with_logits(logits, (shown[known] > 0).any(1).to(logits)))
        return torch.stack(losses).mean(), right / asked


def align_with_words(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    cache: FeatureCache,
    *,
    seconds: float,
    rng: np.random.Generator,
) -> float:
    """Train the projector alone until projected patches lie nearest to the words for what they show.

    Returns:
        The share of words named rightly at the end.
    """
    projector = model.model.multi_modal_projector
    words = PatchWords(model, tokenizer)
    optimiser = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.0)
    features, labels = sample(cache, 200, rng)
    named = 0.0
    begun = time.monotonic()
    while time.monotonic() - begun < seconds:
        rows = torch.from_numpy(rng.integers(0, len(features), 2048))
        loss, named = words.loss(projector(features[rows].to(projector.linear_1.weight)), labels[rows])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # Alignment turns vectors but also lengthens them; the layers expect what the words bring, about 1 per dimension.
    with torch.no_grad():
        length = projector(features[:4096].to(projector.linear_1.weight)).square().mean().sqrt()
        projector.linear_2.weight.div_(length)
        projector.linear_2.bias.div_(length)
    return named
