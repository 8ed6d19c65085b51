"""Train the embedded model: ``python -m demo_model.train``.

Four stages, each with its budget of minutes: the tower's lower layers, features of many pictures, the scoring layer,
the projector with the language model. Every stage writes checkpoints to a working folder and goes on from them when the
command is given again; a stage whose minutes are spent is passed over.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaOnevisionForConditionalGeneration

from demo_model.architecture import configuration, initialise
from demo_model.features import FeatureCache
from demo_model.folder import save_folder
from demo_model.language import train_language
from demo_model.projector import align_with_words, sample, start_projector
from demo_model.scoring import train_scoring
from demo_model.tokenizer import END, IMAGE, PAD, VIDEO, build_tokenizer, token_id
from demo_model.tower import train_tower
from vflowopt.demo import model_path

_HELD_OUT_PICTURES = 50
"""Pictures on held-out photographs that training is watched on; ``evaluate`` draws others."""


def train(
    work: Path,
    folder: Path,
    *,
    tower_minutes: float,
    feature_minutes: float,
    scoring_minutes: float,
    language_minutes: float,
    pictures: int,
    seed: int,
    start_from: Path | None = None,
) -> None:
    """Run all stages and save the model.

    Args:
        work: folder for checkpoints and cached features (0.4 MB per picture).
        folder: where the finished model goes.
        tower_minutes, feature_minutes, scoring_minutes, language_minutes: budget of each stage.
        pictures: most pictures to cache.
        seed: of everything drawn; budgets in minutes still make a run depend on the machine's speed.
        start_from: a saved model whose projector and language model are trained on, on features of new pictures; its
            tower stays as it is.
    """
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    heads = None
    if start_from is None:
        ids = (token_id(tokenizer, token) for token in (IMAGE, VIDEO, END, PAD))
        model = initialise(configuration(len(tokenizer), *ids), seed)
        tower = model.model.vision_tower
        heads = train_tower(tower, minutes=tower_minutes, checkpoint=work / "tower.pt", seed=seed)
    else:
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(start_from, dtype=torch.float32)
        tower = model.model.vision_tower

    cache, held_out = FeatureCache(work / "features"), FeatureCache(work / "held-out")
    held_out.fill(tower, minutes=2, most=_HELD_OUT_PICTURES, first_seed=seed * 10**9, held_out=True)
    if not len(cache):
        cache.fill(tower, minutes=feature_minutes, most=pictures, first_seed=(seed + 1) * 10**9)
    if heads is not None:
        train_scoring(tower, cache, minutes=scoring_minutes, checkpoint=work / "scoring.pt", seed=seed)

    checkpoint = work / "language.pt"
    if heads is not None and not checkpoint.exists():
        rng = np.random.default_rng(seed)
        features, _ = sample(cache, 100, rng)
        start_projector(model, heads, features)
        aligned = align_with_words(model, tokenizer, cache, seconds=15, rng=rng)
        print(f"projector: {100 * aligned:.1f}% of the words of patches named rightly")
    train_language(model, tokenizer, cache, held_out, minutes=language_minutes, checkpoint=checkpoint, seed=seed)
    save_folder(model, tokenizer, folder)
    print(f"saved the model to {folder}")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the embedded model on pictures that it generates.")
    parser.add_argument("--work", type=Path, default=Path("out/demo-model"), help="checkpoints and cached features")
    parser.add_argument("--folder", type=Path, default=model_path(), help="where the finished model goes")
    parser.add_argument("--tower-minutes", type=float, default=40, help="budget of the vision tower")
    parser.add_argument("--feature-minutes", type=float, default=8, help="budget for caching features")
    parser.add_argument("--scoring-minutes", type=float, default=3, help="budget of the scoring layer")
    parser.add_argument("--language-minutes", type=float, default=50, help="budget of projector and language model")
    parser.add_argument("--pictures", type=int, default=16000, help="most pictures to cache, 0.4 MB each")
    parser.add_argument("--threads", type=int, default=0, help="processor threads; 0: as many as torch likes")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other pictures")
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="FOLDER",
        help="train the language model of this saved model on, its tower as it is; needs a --work folder of its own",
    )
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    train(
        options.work,
        options.folder,
        tower_minutes=options.tower_minutes,
        feature_minutes=options.feature_minutes,
        scoring_minutes=options.scoring_minutes,
        language_minutes=options.language_minutes,
        pictures=options.pictures,
        seed=options.seed,
        start_from=options.start_from,
    )


if __name__ == "__main__":
    main()
