"""Hugging Face's own answers to a sequence, computed the plain way: everything again in every turn."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tests.vflowopt.reference_video import VideoInputs
from vflowopt.media.video import Video

Turn = Sequence[str | np.ndarray | Video]
"""Parts of a turn: text, the pixels of a picture, or a video."""


class Reference:
    """The unpruned model behind ``generate``, stateless but for the logits behind every token of the last answers.

    Its vision tower and projector can be of another type than its decoder.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        tower_dtype: torch.dtype | None = None,
    ) -> None:
        self.network = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).to(device).eval()
        if tower_dtype not in (None, dtype):
            self.network.model.vision_tower.to(tower_dtype)
            self.network.model.multi_modal_projector.to(tower_dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.logits: list[Tensor] = []
        self._asked: list[int] = []

    @torch.no_grad()
    def answers(self, turns: Sequence[Turn], new_tokens: int) -> list[list[int]]:
        """Greedy answers, as token ids without the end token, to turns that follow each other."""
        self.logits, self._asked = [], []
        messages: list[dict[str, object]] = []
        pictures: list[np.ndarray] = []
        videos: list[Video] = []
        answers: list[list[int]] = []
        for turn in turns:
            content = [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "video" if isinstance(part, Video) else "image"}
                for part in turn
            ]
            messages.append({"role": "user", "content": content})
            pictures += [part for part in turn if isinstance(part, np.ndarray)]
            videos += [part for part in turn if isinstance(part, Video)]
            answers.append(self._generate(messages, pictures, videos, answers, new_tokens))
            text = f"ANSWER{len(answers) - 1}."
            messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        return answers

    def _generate(
        self,
        messages: list[dict[str, object]],
        pictures: list[np.ndarray],
        videos: list[Video],
        answers: list[list[int]],
        new_tokens: int,
    ) -> list[int]:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        moving = VideoInputs(self.network, self.tokenizer, self.processor, videos)
        text = moving.with_single_marks(text)
        ids: list[int] = [] if text.startswith(self.tokenizer.bos_token or "") else self.tokenizer("")["input_ids"]
        # Earlier answers enter as the very tokens that were generated, not as text tokenized again, behind the very
        # words that asked for them: some templates put a space before an answer that they do not ask for.
        for index, answer in enumerate(answers):
            head, text = text.split(f"ANSWER{index}.")
            ids += [*self.tokenizer(head[: self._asked[index]], add_special_tokens=False)["input_ids"], *answer]
        ids += self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self._asked.append(len(text))
        inputs: dict[str, Tensor] = {}
        image, video = self.network.config.image_token_id, moving.token
        standing: Iterator[list[int]] = iter(())
        if pictures:
            inputs, standing = self._pictures(pictures)
        frames = iter(moving.standing)
        shown = [each for each in ids if each in (image, video)]
        ids = [
            token
            for each in ids
            for token in (next(standing) if each == image else next(frames) if each == video else [each])
        ]
        moving.add_to(inputs, before=shown.index(video) if video in shown else 0)
        if "image_grid_thw" in inputs or "video_grid_thw" in inputs:
            # Families whose positions have several axes ask which tokens are pictures, and which are videos.
            prompt = torch.tensor([ids])
            inputs["mm_token_type_ids"] = prompt.eq(image).int() + 2 * prompt.eq(self.network.config.video_token_id)
        prompt = torch.tensor([ids], device=self.network.device)
        inputs = {name: self._placed(values) for name, values in inputs.items()}
        output = self.network.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=new_tokens,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **inputs,
        )
        self.logits += [row[0].float() for row in output.logits]
        answer: list[int] = output.sequences[0, prompt.shape[1] :].tolist()
        ends = self.network.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return answer[:-1] if answer and answer[-1] in ends else answer

    def _placed(self, values: Tensor) -> Tensor:
        """Values where the network is, pixels in its number type."""
        placed: Tensor = values.to(self.network.device, self.network.dtype if values.is_floating_point() else None)
        return placed

    def _pictures(self, pictures: list[np.ndarray]) -> tuple[dict[str, Tensor], Iterator[list[int]]]:
        """What the model takes of pictures, and the tokens that stand for each."""
        image = self.network.config.image_token_id
        if self.network.config.model_type == "mistral3":
            return self._pictures_in_rows(pictures)
        if self.network.config.model_type != "internvl":
            inputs = dict(self.processor(pictures, return_tensors="pt", input_data_format="channels_last"))
            features = self.network.get_image_features(
                **{name: self._placed(values) for name, values in inputs.items()}
            ).pooler_output
            return inputs, iter([[image] * len(of_picture) for of_picture in features])
        batch = self.processor(pictures, return_tensors="pt", input_data_format="channels_last", crop_to_patches=True)
        inputs = {"pixel_values": self._placed(batch["pixel_values"])}
        tokens = self.network.get_image_features(**inputs).pooler_output.shape[1]
        begin, end = self.tokenizer.start_image_token_id, self.tokenizer.end_image_token_id
        return inputs, iter([[begin, *[image] * (tokens * int(tiles)), end] for tiles in batch["num_patches"]])

    def _pictures_in_rows(self, pictures: list[np.ndarray]) -> tuple[dict[str, Tensor], Iterator[list[int]]]:
        """The same, where a token ends each row of a picture, and another the last."""
        config = self.network.config
        side = config.vision_config.patch_size * config.spatial_merge_size
        inputs = dict(self.processor(pictures, return_tensors="pt", input_data_format="channels_last", patch_size=side))
        row_end, end = self.tokenizer.convert_tokens_to_ids(["[IMG_BREAK]", "[IMG_END]"])
        standing = []
        for height, width in inputs["image_sizes"].tolist():
            row = [*[config.image_token_id] * (width // side), row_end]
            standing.append([*(row * (height // side))[:-1], end])
        return inputs, iter(standing)
