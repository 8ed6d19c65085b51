"""Fourth stage of training: projector and language model learn to answer, on cached features.

Most batches carry a random part of every picture's tokens, its size drawn anew for each: several times cheaper, and the
model cannot come to rely on how many tokens there are. A last stretch carries them all.
"""

import math
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast, Qwen2Model

from demo_model.conversation import NEWLINE, NOT_ASKED, PICTURE, Conversation, Row
from demo_model.curriculum import OVERVIEW, Batch, draw, scattered
from demo_model.features import CachedPicture, FeatureCache
from demo_model.gradient import ShardedGradient
from demo_model.labels import HEADS
from demo_model.projector import PatchWords
from demo_model.questions import KINDS, ask
from demo_model.tokenizer import PAD, token_id

_PROBE_TURNS = 8
_RARE = [list(HEADS).index(name) for name in ("letter", "digit", "place")]
_NAMING = 0.3
"""Weight of the loss that holds projected patches near the words for what they show: left alone, the projector forgets
the letters and digits before the language model has learned to look for them."""


def logits_after(
    model: LlavaOnevisionForConditionalGeneration,
    rows: list[Row],
    features: list[Tensor],
    pad: int,
    *,
    hints: bool = False,
) -> tuple[Tensor, Tensor]:
    """Logits where an answer's token is to follow, and that token: (asked, vocabulary) and (asked,), row by row.

    With ``hints``, also logits over the question's last words, and what they ask for.
    """
    length = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), length), pad)
    positions = torch.zeros((len(rows), length), dtype=torch.long)
    targets = torch.full((len(rows), length), NOT_ASKED)
    for index, row in enumerate(rows):
        size = len(row.ids)
        ids[index, :size] = torch.from_numpy(row.ids)
        positions[index, :size] = torch.from_numpy(row.positions)
        wanted = np.where(row.targets == NOT_ASKED, row.hints, row.targets) if hints else row.targets
        targets[index, :size] = torch.from_numpy(wanted)
    core = model.model
    embeds = core.language_model.embed_tokens(ids.clamp_min(0))
    projected = core.multi_modal_projector(torch.cat(features).float()).to(embeds.dtype)
    embeds = embeds.masked_scatter((ids == PICTURE)[..., None], projected)
    embeds = torch.where((ids == NEWLINE)[..., None], core.image_newline, embeds)
    hidden = decode(core.language_model, embeds, positions)
    asked = targets != NOT_ASKED
    return F.linear(hidden[asked], core.language_model.embed_tokens.weight), targets[asked]


def decode(language_model: Qwen2Model, embeds: Tensor, positions: Tensor) -> Tensor:
    """Causal pass over embeddings (batch, length, width) at explicit positions.

    Rows are padded at their end, so no mask is needed.
    """
    rotary = language_model.rotary_emb(embeds, positions)
    for layer in language_model.layers:
        embeds = layer(embeds, attention_mask=None, position_embeddings=rotary)
    hidden: Tensor = language_model.norm(embeds)
    return hidden


@torch.no_grad()
def probe(
    model: LlavaOnevisionForConditionalGeneration,
    conversation: Conversation,
    cache: FeatureCache,
    pictures: list[CachedPicture],
    pad: int,
    keep: float = 1.0,
) -> dict[str, float]:
    """Exact match per kind of question with a random share of the visual tokens: quick, to watch training by."""
    right: dict[str, list[bool]] = defaultdict(list)
    for number, picture in enumerate(pictures):
        rng = np.random.default_rng([number, 7])
        questions = ask(picture.scene, rng, _PROBE_TURNS)
        some = scattered(rng, picture, round(keep * OVERVIEW), round(keep * (picture.count - OVERVIEW)))
        row = conversation.row(picture.scene.size, questions, keep=some)
        with torch.autocast("cpu", torch.bfloat16):
            logits, targets = logits_after(model, [row], [cache.features(picture, row.features)], pad)
        hit = (logits.argmax(-1) == targets).numpy()
        turns = row.turns[row.targets != NOT_ASKED]
        for turn, question in enumerate(questions):
            right[question.kind].append(bool(hit[turns == turn].all()))
            right["all"].append(right[question.kind][-1])
    return {kind: round(100 * float(np.mean(right[kind])), 1) for kind in ("all", *KINDS) if right[kind]}


def train_language(
    model: LlavaOnevisionForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    cache: FeatureCache,
    held_out: FeatureCache,
    *,
    minutes: float,
    checkpoint: Path,
    seed: int = 0,
    shards: int = 2,
    peak_rate: float = 1.5e-3,
) -> None:
    """Train projector, newline and language model in place, for so many minutes; ``checkpoint`` is gone on from."""
    core = model.model
    trained = nn.ModuleDict({"projector": core.multi_modal_projector, "language": core.language_model})
    parameters = [*trained.parameters(), core.image_newline]
    optimiser = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=peak_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    spent, step = 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        trained.load_state_dict(state["trained"])
        core.image_newline.data.copy_(state["newline"])
        optimiser.load_state_dict(state["optimiser"])
        spent, step = state["seconds"], state["step"]

    def save() -> None:
        state = {
            "trained": trained.state_dict(),
            "newline": core.image_newline.data,
            "optimiser": optimiser.state_dict(),
            "seconds": spent,
            "step": step,
        }
        torch.save(state, checkpoint.with_suffix(".partial"))
        checkpoint.with_suffix(".partial").replace(checkpoint)

    conversation = Conversation(tokenizer)
    pad = token_id(tokenizer, PAD)
    rng = np.random.default_rng([seed, step])

    words = PatchWords(model, tokenizer)

    def shard_loss(shard: Batch) -> Tensor:
        logits, targets = logits_after(model, shard.rows, shard.features, pad, hints=True)
        features, labels = torch.cat(shard.features), torch.cat(shard.labels)
        # Few patches carry letters, digits and places, most carry nothing but the tint: these need not all be named.
        telling = torch.cat(((labels[:, _RARE] > 0).any(1).nonzero()[:, 0], torch.arange(0, len(labels), 8)))
        naming, _ = words.loss(core.multi_modal_projector(features[telling].float()), labels[telling])
        return F.cross_entropy(logits.float(), targets) + _NAMING * naming

    gradient = ShardedGradient(parameters, shard_loss, shards, autocast=False)
    drawing = ThreadPoolExecutor(1)  # the next batch is drawn while this one trains
    drawn = drawing.submit(draw, cache, conversation, rng, spent / (60 * minutes))
    budget = 60 * minutes
    begun, saved, smooth = time.monotonic() - spent, time.monotonic(), float("nan")
    seen = 0
    progress = tqdm(total=round(budget), initial=round(spent), desc="language", unit="s", mininterval=10)
    while (spent := time.monotonic() - begun) < budget:
        done = spent / budget
        batch = drawn.result()
        drawn = drawing.submit(draw, cache, conversation, rng, done)
        rate = peak_rate * min(1.0, (step + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        loss = gradient([batch.shard(number, shards) for number in range(shards)])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        step += 1
        seen += len(batch.rows)
        smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
        progress.update(round(spent) - progress.n)
        if time.monotonic() - saved > 100:
            save()
            probes = held_out.pictures[:40]
            full, part = (probe(model, conversation, held_out, probes, pad, share) for share in (1.0, 0.25))
            progress.write(
                f"language step {step} ({spent:.0f} s, {seen} pictures) loss {smooth:.3f} "
                f"held-out {full} at 25% {part['all']}"
            )
            saved = time.monotonic()
    progress.close()
    drawing.shutdown(cancel_futures=True)
    save()
