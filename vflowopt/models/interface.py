"""The interface between the runtime and a model family."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

# Where torchvision is not installed, some versions of transformers leave this name out at their top.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from vflowopt.compression.pieces import Pieces, timed, whole
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.compression.strategy import Strategy, StrategyError
from vflowopt.media.picture import Picture, PictureError
from vflowopt.media.video import Video, VideoError
from vflowopt.models.backbone import unservable
from vflowopt.models.error import ModelError
from vflowopt.models.origin import ModelOrigin
from vflowopt.models.product import speed_up
from vflowopt.models.quantization import is_quantized, quantized_on
from vflowopt.models.resizing import for_large
from vflowopt.models.tokenizer import load_tokenizer

LOW_DETAIL_TOKENS = 256
"""The most tokens with pixels of a picture in low detail, in families that take pictures of any size.

One tile of InternVL has as many; the overviews of the LLaVA families have more."""


class MultimodalModel(ABC):
    """One large multimodal model: a vision encoder, and a decoder that the runtime runs layer by layer.

    Args:
        network: the whole model, as Hugging Face defines it.
        tokenizer: its tokenizer, with the chat template.
        processor: its image processor, in the variant that needs no torchvision.

    Raises:
        ModelError: the decoder is of a kind that is not supported.

    Attributes:
        network: the whole model, as Hugging Face defines it.
        tokenizer: its tokenizer, with the chat template.
        processor: its image processor.
        shared: whether another model uses the same weights: then they must not be moved.
        origin: where it was loaded from; None: it was loaded already, and wrapped.
        image_token: the text that its chat template writes for a picture.
        video_mark: the text that it writes for a video; None: the model takes no videos.
        decoder: the decoder stack, with ``layers``, ``embed_tokens``, ``norm`` and ``rotary_emb``.
        head: from last hidden states to logits over the vocabulary.
        heads: key-value heads of a decoder layer.
        head_dim: channels of such a head.
        context: positions in the decoder's context.
        stop_ids: tokens that end an answer.
        scoring_layer: index of the vision tower's layer whose attention scores tokens.
    """

    family: ClassVar[str]
    """The family's name in messages."""
    architecture: ClassVar[Any]
    """Hugging Face's class of the whole model."""

    # Hugging Face's modules find their children by name at run time: no static type says more than Any here.
    network: Any
    tokenizer: Any
    processor: Any
    shared: bool = False
    origin: ModelOrigin | None = None
    image_token: str
    video_mark: str | None
    decoder: Any
    head: Any
    heads: int
    head_dim: int
    context: int
    stop_ids: frozenset[int]
    scoring_layer: int

    def __init__(self, network: Any, tokenizer: Any, processor: Any) -> None:
        text = network.config.text_config
        self._check_decoder(text)
        self.network = network
        self.tokenizer = tokenizer
        self.processor = for_large(processor)
        self.image_token = tokenizer.convert_ids_to_tokens(network.config.image_token_id)
        mark = self._video_mark()
        self.video_mark = mark if mark and self._template_writes({"type": "video"}, mark) else None
        self.decoder = network.model.language_model
        self.head = network.lm_head
        self.heads = text.num_key_value_heads
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.context = text.max_position_embeddings
        stops = network.generation_config.eos_token_id
        stops = tokenizer.eos_token_id if stops is None else stops
        self.stop_ids = frozenset(stops if isinstance(stops, list) else [stops])

    @classmethod
    def unsupported(cls, what: str) -> ModelError:
        """The error that says what a model of this family has that is not supported."""
        return ModelError("MODEL_UNSUPPORTED", f"this {cls.family} model has {what}, which is not supported")

    @classmethod
    def _check_decoder(cls, text: Any) -> None:
        if (flaw := unservable(text)) is not None:
            raise cls.unsupported(flaw)

    @classmethod
    def load(
        cls, model: str | Path, config: Any, device: torch.device, dtype: torch.dtype, quantization: Any = None
    ) -> Self:
        """Load a folder or hub id, whose configuration is ``config``.

        Args:
            model: the folder or hub id.
            config: its configuration.
            device: where to load it.
            dtype: type of the weights that are not quantized.
            quantization: Hugging Face's quantization configuration; None: the weights stay as they are.

        Raises:
            ModelError: the model has something that is not supported.
            OSError, ValueError, KeyError, RuntimeError: Hugging Face's, where the files do not hold a whole model.
        """
        cls._check_decoder(config.text_config)  # before gigabytes of weights are read
        quantizing = quantized_on(device, config, quantization)
        network, report = cls.architecture.from_pretrained(
            model,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            **quantizing,
        )
        if missing := sorted(report["missing_keys"]):
            # Hugging Face initialises missing weights at random: every answer would be nonsense.
            raise ModelError(
                "MODEL_UNREADABLE",
                f"the weights at {model!s} lack {len(missing)} that a {cls.family} model has, {missing[0]} for one; "
                "give a whole model",
            )
        processor = AutoImageProcessor.from_pretrained(model, backend="pil")
        network = network if quantizing else network.to(device)
        return cls(network.eval(), load_tokenizer(model), processor)

    @property
    def quantized(self) -> bool:
        """Whether weights are quantized: then a quantizer's modules, not torch's, multiply with them."""
        return is_quantized(self.network.config)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, in order."""
        layers: nn.ModuleList = self.decoder.layers
        return layers

    @property
    @abstractmethod
    def encoder_layers(self) -> Sequence[nn.Module]:
        """The layers of the vision encoder that may be compiled: nothing watches what happens within them."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the decoder's weights, and of its cache."""
        weight: Tensor = self.decoder.embed_tokens.weight
        return weight.dtype

    @property
    def tower_dtype(self) -> torch.dtype:
        """Type of the weights of the vision tower and its projector."""
        return self.dtype

    @property
    def tower_parts(self) -> tuple[nn.Module, ...]:
        """The modules that :meth:`set_tower_dtype` converts; empty: they have the decoder's type in this model."""
        return ()

    def set_tower_dtype(self, dtype: torch.dtype) -> None:
        """Convert the weights of the vision tower and its projector; the decoder reads what they make in its own type.

        Raises:
            ModelError: this model has no :attr:`tower_parts`.
        """
        for part in self.tower_parts:
            part.to(dtype)
        if dtype != self.tower_dtype:
            raise self.unsupported(f"a vision tower of another type ({dtype}) than its decoder ({self.dtype})")

    @property
    def device(self) -> torch.device:
        """The decoder's device."""
        weight: Tensor = self.decoder.embed_tokens.weight
        return weight.device

    @property
    def strategies(self) -> dict[str, Strategy]:
        """Strategies made for this model, by name: what its configuration has under ``vflow_strategies``.

        Raises:
            ModelError: one of them cannot be read, or does not fit the decoder.
        """
        documents = getattr(self.network.config, "vflow_strategies", None) or {}
        if not isinstance(documents, dict):
            raise ModelError(
                "MODEL_UNSUPPORTED",
                "vflow_strategies in the model's config.json is not an object of strategies by name; correct it, or "
                "remove it",
            )
        found = {}
        for name, document in documents.items():
            try:
                found[name] = Strategy.from_json(json.dumps(document))
                found[name].check(len(self.layers))
            except StrategyError as error:
                raise ModelError(
                    "MODEL_UNSUPPORTED",
                    f"the strategy {name!r} under vflow_strategies in the model's config.json cannot be used: {error}; "
                    "correct it, or remove it",
                ) from error
        return found

    def fuse(self) -> None:
        """Run what is outside the decoder's layers in fewer and faster operations from now on. Weights stay in place.

        Not for a model that shares its weights.
        """
        speed_up(self.network)

    def milliseconds_since(self, begun: float) -> float:
        """Milliseconds since ``time.perf_counter()`` was ``begun``; waits for what this thread queued on the device."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return (time.perf_counter() - begun) * 1e3

    @staticmethod
    def too_narrow(picture: Picture) -> PictureError:
        """The error for a picture of a shape that the image processor refuses, or shrinks to nothing."""
        height, width = picture.pixels.shape[:2]
        return PictureError(
            "PICTURE_TOO_NARROW",
            f"the model's image processor takes no picture of {width} x {height} pixels; send one less narrow",
            width=str(width),
            height=str(height),
        )

    def _video_mark(self) -> str | None:
        """The text that the templates of this family write for a video; None: the family takes no videos."""
        return None

    def _template_writes(self, part: Mapping[str, str], mark: str) -> bool:
        try:
            text = self.tokenizer.apply_chat_template([{"role": "user", "content": [part]}], tokenize=False)
        except Exception:  # a template is a program, and may raise any exception
            return False
        return mark in text

    def encode(self, pictures: Sequence[Picture]) -> list[EncodedImage]:
        """Encode pictures, all in one batch, with the queries and keys of the scoring layer.

        Raises:
            PictureError: the model's processor cannot resize a picture to the shape it needs.
        """
        return whole(self.encoding(pictures))

    def encode_video(self, video: Video) -> EncodedImage:
        """Encode a video: each map is what the tower encodes by itself, one frame or several consecutive ones.

        Raises:
            VideoError: the model takes no videos.
            PictureError: its processor cannot bring the frames to its shape.
        """
        return whole(self.encoding_video(video))

    @torch.inference_mode()
    def encoding(self, pictures: Sequence[Picture]) -> Pieces[list[EncodedImage]]:
        """:meth:`encode` in pieces."""
        encoded, milliseconds = yield from timed(self._encoding(pictures), self.milliseconds_since)
        return [replace(each, encode_ms=milliseconds / len(pictures)) for each in encoded]

    @torch.inference_mode()
    def encoding_video(self, video: Video) -> Pieces[EncodedImage]:
        """:meth:`encode_video` in pieces."""
        if self.video_mark is None:
            raise self._takes_no_videos()
        encoded, milliseconds = yield from timed(self._encoding_video(video), self.milliseconds_since)
        return replace(encoded, encode_ms=milliseconds)

    def check_length(self, video: Video, tokens: int) -> None:
        """Refuse a video of more ``tokens`` than the decoder has positions, before the tower runs.

        With positions of several axes a video takes fewer positions than tokens; such a video would take too much
        memory.

        Raises:
            VideoError: VIDEO_TOO_LONG.
        """
        if tokens > self.context:
            frames = len(video.frames)
            raise VideoError(
                "VIDEO_TOO_LONG",
                f"the {frames} frames take {tokens} tokens, some {tokens // frames} each, and the model was made for "
                f"{self.context} in a whole conversation; send fewer or smaller ones",
                frames=frames,
                max_frames=self.context * frames // tokens,
            )

    def _encoding_video(self, video: Video) -> Pieces[EncodedImage]:
        """Implements :meth:`encoding_video` in families that take videos."""
        raise self._takes_no_videos()

    def _takes_no_videos(self) -> VideoError:
        return VideoError(
            "VIDEO_UNSUPPORTED",
            f"this {self.family} model takes no videos; show the frames as pictures, or serve a model of another "
            "family (docs/models.md lists those that take videos)",
            family=self.family,
        )

    @abstractmethod
    def _encoding(self, pictures: Sequence[Picture]) -> Pieces[list[EncodedImage]]:
        """Implements :meth:`encoding`."""
