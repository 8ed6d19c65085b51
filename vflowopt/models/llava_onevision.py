"""LLaVA-OneVision: SigLIP tower, MLP projector, Qwen2 decoder, AnyRes tiles with an overview.

Every picture is read on its own as overview plus mosaic of tiles (AnyRes), however many there are in a conversation:
only then can it be compressed when it arrives. Modules, geometry and packing are Hugging Face's own; the importance
map goes through the very function that packs the features, so that map and tokens cannot drift apart.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.utils.hub import cached_file

from vflowopt.attention import PAGED
from vflowopt.compression import EncodedImage
from vflowopt.layout import TokenLayout
from vflowopt.models.interface import ModelError, MultimodalModel
from vflowopt.picture import Picture, PictureError


class LlavaOnevision(MultimodalModel):
    """A model of the family ``llava_onevision``.

    The scoring layer is the last tower layer whose output feeds the projector (method section 1), unless the
    configuration names another by ``vflow_scoring_layer`` (an index into the tower's layers, negative from the end).

    Args:
        network: the model; its decoder must have been built with this package's paged attention.
        tokenizer: its tokenizer.
        processor: its image processor.

    Raises:
        ModelError: the configuration uses something that is not supported, by name.
    """

    def __init__(self, network: Any, tokenizer: Any, processor: Any) -> None:
        config = network.config
        text = config.text_config
        unsupported = {
            f"vision tower {config.vision_config.model_type!r}": config.vision_config.model_type
            != "siglip_vision_model",
            "vision_feature_select_strategy other than 'full'": config.vision_feature_select_strategy != "full",
            "sliding-window layers in the decoder": "sliding_attention" in (getattr(text, "layer_types", None) or ()),
        }
        for what in (name for name, present in unsupported.items() if present):
            raise ModelError("MODEL_UNSUPPORTED", f"this LLaVA-OneVision model has {what}, which is not supported")
        self.network = network
        self.tokenizer = tokenizer
        self.processor = processor
        self.image_token = tokenizer.convert_ids_to_tokens(config.image_token_id)
        self.decoder = network.model.language_model
        self.head = network.lm_head
        self.heads = text.num_key_value_heads
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.context = text.max_position_embeddings
        stops = network.generation_config.eos_token_id
        stops = tokenizer.eos_token_id if stops is None else stops
        self.stop_ids = frozenset(stops if isinstance(stops, list) else [stops])

        depth = config.vision_config.num_hidden_layers
        chosen = config.vision_feature_layer
        # hidden_states[i] is the input of layer i, so hidden_states[-1] is what the last layer puts out.
        self.feature_states = [
            index % (depth + 1) for index in ([chosen] if isinstance(chosen, int) else chosen)
        ]  # tower layers that have run when a feature is taken
        scoring = getattr(config, "vflow_scoring_layer", None)
        self.scoring_layer = max(self.feature_states) - 1 if scoring is None else scoring % depth

    @classmethod
    def load(cls, model: str | Path, config: Any, device: torch.device, dtype: torch.dtype) -> Self:
        """Load weights, tokenizer and image processor from a folder or hub id; errors are Hugging Face's."""
        network: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(
            model,
            config=config,
            dtype=dtype,
            attn_implementation={"text_config": PAGED, "vision_config": "sdpa"},
        )
        tokenizer = AutoTokenizer.from_pretrained(model)
        # Folders of before chat_template.jinja keep the template that knows pictures here, and the one of the language
        # model, which takes text alone, with the tokenizer: the processor's goes first, as in Hugging Face's processor.
        template = cached_file(
            str(model),
            "chat_template.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if template is not None:
            tokenizer.chat_template = json.loads(Path(template).read_text(encoding="utf-8"))["chat_template"]
        return cls(
            network.to(device).eval(),
            tokenizer,
            LlavaOnevisionImageProcessorPil.from_pretrained(model),
        )

    @torch.inference_mode()
    def encode(self, pictures: Sequence[Picture]) -> list[EncodedImage]:
        """See :meth:`MultimodalModel.encode`."""
        begun = time.perf_counter()
        tiles = [self.tiles(picture) for picture in pictures]
        features, queries, keys = self._tower(np.concatenate(tiles))
        counts = [len(of_picture) for of_picture in tiles]
        projected = self.network.model.multi_modal_projector(features).split(counts)
        packed = [
            self._pack(of_picture, picture.pixels.shape[:2], self.network.model.image_newline)
            for of_picture, picture in zip(projected, pictures, strict=True)
        ]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # work is only queued there: the time would count as scoring
        milliseconds = (time.perf_counter() - begun) * 1e3 / len(pictures)
        return [
            EncodedImage(
                digest=picture.digest,
                embeddings=embeddings,
                layout=self.layout(*picture.pixels.shape[:2]),
                query=query,
                key=key,
                scale=self._tower_layer(self.scoring_layer).self_attn.scale,
                pixels=torch.from_numpy(np.ascontiguousarray(seen.transpose(0, 2, 3, 1))),
                patch=self.network.config.vision_config.patch_size,
                arrange=partial(self._arrange, picture.pixels.shape[:2]),
                encode_ms=milliseconds,
            )
            for picture, embeddings, query, key, seen in zip(
                pictures, packed, queries.split(counts), keys.split(counts), tiles, strict=True
            )
        ]

    def tiles(self, picture: Picture) -> np.ndarray:
        """The 8-bit tiles that the tower sees, overview first: uint8 [tiles, 3, side, side].

        Raises:
            PictureError: the processor cannot cut a picture of this shape.
        """
        try:
            batch = self.processor(
                picture.pixels, do_rescale=False, do_normalize=False, input_data_format=ChannelDimension.LAST
            )
        except (ValueError, ZeroDivisionError) as error:
            height, width = picture.pixels.shape[:2]
            raise PictureError(
                "PICTURE_TOO_NARROW",
                f"the model cannot cut a picture of {width} x {height} pixels into tiles; send one less narrow",
                width=str(width),
                height=str(height),
            ) from error
        return np.asarray(batch["pixel_values"][0])

    def layout(self, height: int, width: int) -> TokenLayout:
        """Where the visual tokens of a picture of ``height`` x ``width`` pixels come from."""
        vision = self.network.config.vision_config
        side, patch = vision.image_size // vision.patch_size, vision.patch_size
        best = select_best_resolution((height, width), self.network.config.image_grid_pinpoints)
        tiles = 1 + (best[0] // vision.image_size) * (best[1] // vision.image_size)
        # A newline of NaN marks the structural tokens, wherever packing puts them.
        marks = self._pack(torch.zeros(tiles, side * side, 1), (height, width), torch.full((1,), torch.nan)).flatten()
        structural = marks.isnan()
        overview = side * side
        mosaic = structural[overview:]
        # Of a very thin picture unpadding leaves no rows at all, or rows of nothing but their newline.
        columns = int(mosaic.nonzero()[0]) + 1 if len(mosaic) else 1
        place = torch.arange(len(mosaic))
        grid = torch.cat((torch.zeros(overview, dtype=torch.long), torch.ones(len(mosaic), dtype=torch.long)))
        row = torch.cat((torch.arange(overview) // side, place // columns))
        column = torch.cat((torch.arange(overview) % side, place % columns))

        # Pixels of a mosaic token: its share of the unpadded patch rows and columns, less the padding, unscaled.
        rows = len(mosaic) // columns
        inner = get_patch_output_size(np.broadcast_to(np.uint8(0), (1, height, width)), best, ChannelDimension.FIRST)
        scale = (inner[0] / height, inner[1] / width)
        overview_boxes = _boxes(row[:overview], column[:overview], (height / side, width / side), (0.0, 0.0))
        steps, offsets = [], []
        for axis, count in enumerate((rows, columns - 1)):
            whole = best[axis] // patch
            cut = (whole - int(round(whole * min(1.0, self._share(height, width, best)[axis]), 7))) // 2
            steps.append((whole - 2 * cut) / max(count, 1) * patch / scale[axis])
            offsets.append((cut * patch - (best[axis] - inner[axis]) // 2) / scale[axis])
        mosaic_boxes = _boxes(row[overview:], column[overview:], (steps[0], steps[1]), (offsets[0], offsets[1]))
        boxes = torch.cat((overview_boxes, mosaic_boxes))
        limit = torch.tensor([width, height, width, height], dtype=torch.float32)
        boxes = torch.minimum(boxes.clamp_min(0), limit).masked_fill(structural[:, None], 0.0)
        return TokenLayout(grid=grid, row=row, column=column, structural=structural, boxes=boxes)

    @staticmethod
    def _share(height: int, width: int, best: Sequence[int]) -> tuple[float, float]:
        """The share of the padded mosaic's height and width that the picture itself fills."""
        ratio = (width / height) / (best[1] / best[0])
        return (1 / ratio, 1.0) if ratio > 1 else (1.0, ratio)

    def _arrange(self, size: Sequence[int], values: Tensor) -> Tensor:
        """Per-patch values [tiles, patches] through the packing of the features, to [N]."""
        return self._pack(values[..., None], size, values.new_zeros(1)).flatten()

    def _pack(self, features: Tensor, size: Sequence[int], newline: Tensor) -> Tensor:
        """Hugging Face's packing of one picture: features [tiles, patches, channels] to [N, channels]."""
        packed, _ = self.network.model.pack_image_features(
            [features], [tuple(size)], newline, self.network.config.vision_aspect_ratio
        )
        result: Tensor = packed[0]
        return result

    def _tower_layer(self, index: int) -> Any:
        return self.network.model.vision_tower.encoder.layers[index]

    def _tower(self, tiles: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """Features [tiles, patches, channels], and queries and keys [tiles, heads, patches, head_dim] for scoring.

        Layers run only as far as features and scoring need them; the scoring layer's attention itself stays fused
        (where the layer runs at all): scoring takes its own look at queries and keys.
        """
        processor, tower = self.processor, self.network.model.vision_tower
        pixels = np.stack(
            [
                processor.normalize(
                    processor.rescale(tile, scale=processor.rescale_factor),
                    mean=processor.image_mean,
                    std=processor.image_std,
                )
                for tile in tiles
            ]
        )
        hidden = tower.embeddings(torch.from_numpy(pixels).to(self.device))
        states: dict[int, Tensor] = {}
        query, key = None, None
        last = max(*self.feature_states, self.scoring_layer)
        for index in range(last + 1):
            # Only what is needed is kept: the states of all layers and tiles of a large tower are gigabytes.
            if index in self.feature_states:
                states[index] = hidden
            if index == self.scoring_layer:
                layer = self._tower_layer(index)
                normed = layer.layer_norm1(hidden)
                query, key = (
                    _split_heads(projection(normed), layer.self_attn.num_heads)
                    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
                )
            if index < last:
                hidden = self._tower_layer(index)(hidden, None)
        assert query is not None and key is not None
        return torch.cat([states[index] for index in self.feature_states], dim=-1), query, key


def _split_heads(states: Tensor, heads: int) -> Tensor:
    """[tiles, patches, channels] to [tiles, heads, patches, head_dim]."""
    tiles, patches, _ = states.shape
    return states.view(tiles, patches, heads, -1).transpose(1, 2)


def _boxes(row: Tensor, column: Tensor, step: tuple[float, float], offset: tuple[float, float]) -> Tensor:
    """Left, top, right, bottom [n, 4] of cells of ``step`` (height, width) pixels, the first at ``offset`` (y, x)."""
    top, left = row * step[0] + offset[0], column * step[1] + offset[1]
    return torch.stack((left, top, left + step[1], top + step[0]), dim=-1).float()
