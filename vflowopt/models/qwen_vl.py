"""What the Qwen-VL families share: pictures of any size as one grid of patches, merged two by two, on three axes.

A picture is resized to whole squares of patches, within a range of pixels that the image processor's configuration
gives; nothing is cut or padded. The tower reads the patches square by square; here they are put back into rows, so that
the importance map is a picture again. Tokens stand at (time, row, column), and text goes on behind the longer side
(M-RoPE); so a picture of N tokens takes far fewer than N positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from vflowopt.compression.layout import TokenLayout, frames_layout
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import EncodedImage
from vflowopt.media.picture import Picture
from vflowopt.media.video import Video
from vflowopt.models.interface import LOW_DETAIL_TOKENS, MultimodalModel
from vflowopt.models.normalisation import Normalisation
from vflowopt.models.resizing import in_pieces
from vflowopt.models.video_size import video_size

_MOST_PATCHES = 1 << 14
"""Patches of a video in one batch of the tower, unless a step has more. Each step is encoded by itself."""


class QwenVl(MultimodalModel):
    """A model of the Qwen-VL families.

    The configuration may name, under ``vflow_scoring_layer``, another layer to score tokens by than the last one whose
    patches see the whole picture.

    Args:
        network: the model; its decoder must have been built with this package's paged attention.
        tokenizer: its tokenizer.
        processor: its image processor, in the variant that needs no torchvision.

    Attributes:
        merge: side, in patches, of the square that becomes one token.
        patch: side of a patch in pixels.
        step: frames of a video that the tower encodes together.
        video_size: fewest and most pixels that frames are resized to, see :meth:`_frame_size`.

    Raises:
        ModelError: the configuration uses something that is not supported, by name.
    """

    usual_video_size: ClassVar[tuple[int, int]] = (128 * 28**2, 768 * 28**2)
    """The range that Hugging Face's video processor uses if the configuration names none."""

    def __init__(self, network: Any, tokenizer: Any, processor: Any) -> None:
        super().__init__(network, tokenizer, processor)
        vision = network.config.vision_config
        self.merge: int = vision.spatial_merge_size
        self.patch: int = vision.patch_size
        self.step: int = vision.temporal_patch_size
        self.video_size = self.usual_video_size
        if (processor.patch_size, processor.merge_size) != (self.patch, self.merge):
            raise self.unsupported(
                f"an image processor for patches of {processor.patch_size} pixels merged by {processor.merge_size} "
                f"before a tower for {self.patch} and {self.merge}"
            )
        # Only these see more of the picture than a window.
        whole = self._whole_layers()
        chosen = getattr(network.config, "vflow_scoring_layer", None)
        self.scoring_layer = whole[-1] if chosen is None else chosen % vision.depth
        if self.scoring_layer not in whole:
            raise self.unsupported(f"vflow_scoring_layer {chosen}, a layer whose patches see no more than a window,")

    @classmethod
    def load(
        cls, model: str | Path, config: Any, device: torch.device, dtype: torch.dtype, quantization: Any = None
    ) -> Self:
        """See :meth:`MultimodalModel.load`."""
        loaded = super().load(model, config, device, dtype, quantization)
        loaded.video_size = video_size(model, cls.usual_video_size)
        return loaded

    def _video_mark(self) -> str | None:
        token: str | None = self.tokenizer.convert_ids_to_tokens(self.network.config.video_token_id)
        return token

    def _whole_layers(self) -> Sequence[int]:
        """The layers of the tower whose patches attend to the whole picture, ascending."""
        return range(self.network.config.vision_config.depth)

    @property
    def _later(self) -> int:
        """Decoder layers behind which further features of a token enter (deepstack)."""
        return 0

    def _features(self, output: Any) -> Tensor:
        """The tower's output as the decoder's input: [tokens, hidden], or wider (deepstack)."""
        features: Tensor = output.pooler_output
        return features

    def _squares(self, grids: Tensor) -> Tensor:
        """Where the tower has each square of patches: int64 [tokens], in the order of its features."""
        return torch.arange(int(grids.prod(-1).sum()) // self.merge**2)

    def _encoding(self, pictures: Sequence[Picture]) -> Pieces[list[EncodedImage]]:
        seen = []
        for picture in pictures:
            seen.append((yield from in_pieces(self.processor, partial(self.resized, picture))))
            yield
        patches = torch.cat([self._patches(pixels[None]).to(self.dtype) for pixels in seen])
        shapes = [(pixels.shape[1] // self.patch, pixels.shape[2] // self.patch) for pixels in seen]
        features, queries, keys = self._tower(patches, torch.tensor([[1, *shape] for shape in shapes]))
        counts = [rows * columns for rows, columns in shapes]
        embeddings = features.split([count // self.merge**2 for count in counts])
        return [
            EncodedImage(
                digest=picture.digest,
                embeddings=of_picture,
                layout=self.layout(shape, (picture.height, picture.width)),
                query=self._in_rows(query, shape),
                key=self._in_rows(key, shape),
                scale=self._attention.scaling,
                pixels=torch.from_numpy(np.ascontiguousarray(pixels.transpose(1, 2, 0)))[None],
                patch=self.patch,
                arrange=partial(self._arrange, shape),
                merge=self.merge,
                positions=self.positions(shape),
                later=self._later,
                detail=picture.detail,
            )
            for picture, pixels, shape, of_picture, query, key in zip(
                pictures, seen, shapes, embeddings, queries.split(counts), keys.split(counts), strict=True
            )
        ]

    def _encoding_video(self, video: Video) -> Pieces[EncodedImage]:
        apart = self._positions_per_step(video)
        frames = self.resized_frames(video)
        steps, shape = len(frames) // self.step, (frames.shape[2] // self.patch, frames.shape[3] // self.patch)
        self.check_length(video, steps * shape[0] * shape[1] // self.merge**2)
        together = max(_MOST_PATCHES // (shape[0] * shape[1]), 1)
        features, queries, keys = [], [], []
        for part in np.split(frames, range(together * self.step, len(frames), together * self.step)):
            patches = self._patches(part).to(self.dtype)
            of_part, query, key = self._tower(patches, torch.tensor([[len(part) // self.step, *shape]]))
            features.append(of_part)
            queries.append(self._in_rows(query, shape))
            keys.append(self._in_rows(key, shape))
            yield
        return EncodedImage(
            digest=video.digest,
            embeddings=torch.cat(features),
            layout=self.layout(shape, (video.height, video.width), steps),
            query=torch.cat(queries),
            key=torch.cat(keys),
            scale=self._attention.scaling,
            # Of the frames that are encoded together, the first one is scored for all.
            pixels=torch.from_numpy(np.ascontiguousarray(frames[:: self.step].transpose(0, 2, 3, 1))),
            patch=self.patch,
            arrange=partial(self._arrange, shape),
            merge=self.merge,
            positions=self.positions(shape, (torch.arange(steps) * apart).long().tolist()),
            later=self._later,
            frames=len(video.frames),
        )

    def resized_frames(self, video: Video) -> np.ndarray:
        """The 8-bit frames that the tower sees: uint8 [frames, 3, height, width], whole squares of patches.

        The last frame is repeated until there are whole steps.

        Raises:
            PictureError: the processor takes no frames of this shape.
        """
        try:
            height, width = self._frame_size(len(video.frames), video.height, video.width)
        except ValueError as error:
            raise self.too_narrow(video.frames[0]) from error
        size = SizeDict(height=height, width=width)
        frames = [
            PilBackend.resize(self.processor, frame.pixels.transpose(2, 0, 1), size, self.processor.resample)
            for frame in video.frames
        ]
        return np.stack([*frames, *[frames[-1]] * (-len(frames) % self.step)])

    def _frame_size(self, frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width that frames are resized to, each within :attr:`video_size`."""
        size: tuple[int, int] = smart_resize(height, width, self.patch * self.merge, *self.video_size)
        return size

    def _patches(self, frames: np.ndarray) -> Tensor:
        """What the tower reads of 8-bit frames, or of one picture, which it takes for a step of equal frames.

        Returns:
            float32 [patches, channels * step * patch * patch], square by square, on the model's device.
        """
        _, channels, height, width = frames.shape
        rows, columns = (side // self.patch // self.merge for side in (height, width))
        pixels = self._normalise(frames)
        if len(frames) == 1:
            pixels = pixels.expand(self.step, -1, -1, -1)
        patches = pixels.reshape(-1, self.step, channels, rows, self.merge, self.patch, columns, self.merge, self.patch)
        # [steps, rows, columns, merge, merge, channels, step, patch, patch]
        return patches.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, channels * self.step * self.patch**2)

    @cached_property
    def _normalise(self) -> Normalisation:
        return Normalisation(self.processor, self.device)

    def _positions_per_step(self, video: Video) -> float:
        """The distance of consecutive steps on the axis of time.

        Raises:
            VideoError: the model has too few positions for that.
        """
        return 1.0

    def resized(self, picture: Picture) -> np.ndarray:
        """The 8-bit picture that the tower sees: uint8 [3, height, width], whole squares of patches.

        Raises:
            PictureError: the processor takes no picture of this shape.
        """
        side, size = self.patch * self.merge, self.processor.size
        pixels = picture.pixels.transpose(2, 0, 1)
        if picture.detail == "low":
            most = min(size.longest_edge, LOW_DETAIL_TOKENS * side**2)
            size = SizeDict(shortest_edge=min(size.shortest_edge, most), longest_edge=most)
        try:
            resized = self.processor.resize(pixels, size, self.processor.resample, factor=side)
        except ValueError as error:
            raise self.too_narrow(picture) from error
        return np.asarray(resized)

    def layout(self, shape: tuple[int, int], size: tuple[int, int], steps: int = 1) -> TokenLayout:
        """Where the tokens of a picture or a video come from.

        Args:
            shape: rows and columns of patches.
            size: height and width of the picture or the frames as they came, in pixels.
            steps: steps of a video, each a grid.
        """
        rows, columns = (side // self.merge for side in shape)
        return frames_layout(steps, (rows, columns), size)

    def positions(self, shape: tuple[int, int], times: Sequence[int] = (0,)) -> Tensor:
        """Time, row and column of each token of a picture, or of a video with steps at ``times``: int64 [3, N]."""
        rows, columns = (side // self.merge for side in shape)
        return torch.cartesian_prod(torch.tensor(times), torch.arange(rows), torch.arange(columns)).T

    @property
    def encoder_layers(self) -> Sequence[nn.Module]:
        """See :attr:`MultimodalModel.encoder_layers`."""
        blocks = self.network.model.visual.blocks
        return [block for index, block in enumerate(blocks) if index != self.scoring_layer]

    @property
    def _attention(self) -> Any:
        """The attention of the scoring layer."""
        return self.network.model.visual.blocks[self.scoring_layer].attn

    def _tower(self, patches: Tensor, grids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [tokens, channels], and queries and keys [patches, heads, head_dim], square by square."""
        with _watched(self._attention) as seen:
            output = self.network.model.visual(patches, grid_thw=grids.to(self.device))
        projected = seen["projected"].view(len(patches), 3, self._attention.num_heads, -1)
        query, key = apply_rotary_pos_emb_vision(projected[:, 0], projected[:, 1], *seen["turns"])
        squares = self._squares(grids).to(self.device)
        query, key = (states.unflatten(0, (-1, self.merge**2))[squares].flatten(0, 1) for states in (query, key))
        return self._features(output), query, key

    def _in_rows(self, states: Tensor, shape: tuple[int, int]) -> Tensor:
        """States of patches, from square by square to row by row: [steps, heads, patches, head_dim], 1 of a picture."""
        rows, columns = (side // self.merge for side in shape)
        in_squares = states.view(-1, rows, columns, self.merge, self.merge, *states.shape[1:])
        return in_squares.transpose(2, 3).flatten(1, 4).transpose(1, 2)

    def _arrange(self, shape: tuple[int, int], values: Tensor) -> Tensor:
        """Values per patch, [steps, patches], averaged over the squares that become tokens: [N]."""
        return nn.functional.avg_pool2d(values.view(-1, *shape), self.merge).flatten()


@contextmanager
def _watched(attention: Any) -> Iterator[dict[str, Any]]:
    """Within, what an attention of the tower computes on its way: queries, keys and values, and how they are turned."""
    seen: dict[str, Any] = {}
    handles = (
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(turns=kwargs["position_embeddings"]), with_kwargs=True
        ),
        attention.qkv.register_forward_hook(lambda _, args, projected: seen.update(projected=projected)),
    )
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
