"""Calibration: how close a strategy stays to the unpruned model on pictures and questions of one's own.

A sample is a picture with questions about it. The unpruned model answers them once, greedily. Its answers, and its last
hidden state at the end of each prompt, are the reference. A strategy then prefills the same sequence in one pass, with
the reference's answers in it, and its hidden states are compared at all those places at once. So later turns cost
hardly anything, and count as much as the first one (method section 4).

The work shares a runtime with others. It runs in pieces of bounded size (see :mod:`vflowopt.search.pause`), and between
any two of them other work may release its sequences.
"""

from __future__ import annotations

import hashlib
import json
from collections import abc
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vflowopt.compression.pipeline import CompressedImage, EncodedImage, compress
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.models.interface import MultimodalModel
from vflowopt.runtime.cache import PoolExhausted
from vflowopt.runtime.chat import TextTooLong
from vflowopt.runtime.generate import decode
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sampling import Sampler
from vflowopt.runtime.sequence import Item, Sequence, tokens_in
from vflowopt.search.pause import Aside, Pause, Shortage

PIECE = 256
"""First-stage tokens that one piece runs by default."""

PATIENCE = 16
"""Shortages of pages after which a piece is given up."""


class CalibrationError(ValueError):
    """Samples that a model cannot be calibrated on; the message says which, and what to change."""


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture and the questions about it.

    Attributes:
        picture: the picture of the first turn.
        questions: one per turn.

    Raises:
        CalibrationError: there is no question.
    """

    picture: Picture
    questions: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that there is a question."""
        if not self.questions:
            raise CalibrationError("a calibration sample needs at least one question about its picture")


@dataclass(frozen=True, eq=False)
class Reference:
    """What the unpruned model answers to a sample.

    Attributes:
        answers: per turn, the tokens of the greedy answer, without the one that ended it.
        states: float32 [turns, hidden], the hidden states after the last layer and its norm at the end of each prompt.
    """

    answers: tuple[tuple[int, ...], ...]
    states: Tensor


@dataclass(frozen=True)
class Comparison:
    """How a strategy does on all samples.

    Attributes:
        visual_tokens: visual tokens kept of a picture, averaged over decoder layers and samples.
        visual_tokens_full: the same without pruning.
        kv_bytes: KV bytes of a picture's visual tokens, averaged over samples.
        kv_bytes_full: the same without pruning.
        objective: mean cosine with the reference over all questions.
        agreement: share of the questions whose greedy answer equals the reference's, token by token. Each question is
            asked after the reference's answers to the earlier ones.
        sample_objectives: mean cosine with the reference over the questions of each sample.
    """

    visual_tokens: float
    visual_tokens_full: float
    kv_bytes: float
    kv_bytes_full: float
    objective: float
    agreement: float
    sample_objectives: tuple[float, ...]


class Calibration:
    """Samples with their references. Use one of its generators at a time.

    Args:
        runtime: runs the model.
        samples: at least one.
        new_tokens: tokens of a reference's answer at most, 1 at least.
        piece: first-stage tokens of a piece. What is compared of one sequence runs in one piece, however long it is.

    Attributes:
        samples: as given.
        sequences: the sequences that may hold KV pages between two pieces. Other work may release them there.

    Raises:
        CalibrationError: there are no samples.
    """

    def __init__(
        self, runtime: Runtime, samples: abc.Sequence[Sample], *, new_tokens: int = 16, piece: int = PIECE
    ) -> None:
        if not samples:
            raise CalibrationError("a calibration needs at least one sample: a picture with questions")
        self.samples = tuple(samples)
        self.sequences: list[Sequence] = []
        self._runtime = runtime
        self._new_tokens = new_tokens
        self._piece = piece
        self._encoded: list[EncodedImage] = []
        self._references: list[Reference] = []
        self._prompts: list[list[list[Item]]] = []  # of the references' samples, by turn: they are tokenized once

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the pictures' identities and the questions. The order of the samples counts."""
        content = [[*sample.picture.identity, *sample.questions] for sample in self.samples]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def turns(self) -> npt.NDArray[np.int64]:
        """Questions of each sample, [samples]."""
        return np.array([len(sample.questions) for sample in self.samples])

    @property
    def prepared(self) -> bool:
        """Whether every picture is encoded and every reference known."""
        return len(self._references) == len(self.samples)

    @property
    def encoded(self) -> abc.Sequence[EncodedImage]:
        """The pictures encoded so far."""
        return self._encoded

    @property
    def references(self) -> abc.Sequence[Reference]:
        """The references known so far."""
        return self._references

    def prepare(self) -> Iterator[Pause]:
        """Encode each picture and compute each reference, once. A new call goes on where a closed one stopped.

        Raises:
            PictureError: the model cannot take a picture of this shape.
            PoolExhausted: a sequence did not fit into the KV pool after all retries.
            CalibrationError: a sample is longer than the model's context.
        """
        for sample in self.samples[len(self._references) :]:
            if len(self._encoded) == len(self._references):
                encoding = Aside("encode", partial(_encode, self._runtime.model, sample.picture))
                yield encoding
                self._encoded.append(encoding.run())
            reference = yield from self._refer(sample, self._encoded[len(self._references)])
            self._references.append(reference)

    def cosines(
        self, strategy: Strategy, numbers: abc.Sequence[int]
    ) -> Generator[Pause, None, list[npt.NDArray[np.float64]]]:
        """Compare hidden states under a strategy with the references', for some of the samples.

        Args:
            strategy: compresses the pictures.
            numbers: which samples, all different; they must be prepared.

        Returns:
            For each of them, in that order, the cosines at the end of its prompts, float64 [turns].

        Raises:
            PoolExhausted: a sequence did not fit into the KV pool after all retries.
        """
        read = yield from self._read(strategy, numbers, answers=False)
        return [_cosines(states, self._references[number]) for number, (states, _) in zip(numbers, read, strict=True)]

    def compare(self, strategy: Strategy) -> Iterator[Pause | Comparison]:
        """Compare a strategy with the references on all samples, which must be prepared.

        Yields:
            Pauses; the last value is the :class:`Comparison`.

        Raises:
            PoolExhausted: a sequence did not fit into the KV pool after all retries.
        """
        numbers = range(len(self.samples))
        read = yield from self._read(strategy, numbers, answers=True)
        cosines: list[list[float]] = []
        agrees: list[bool] = []
        for number, (states, _) in enumerate(read):
            reference = self._references[number]
            by_turn = states.split([1 + len(answer) for answer in reference.answers])
            cosines.append(_cosines(torch.stack([turn[0] for turn in by_turn]), reference).tolist())
            agrees += [
                self._would_answer(turn, answer) for turn, answer in zip(by_turn, reference.answers, strict=True)
            ]
        layers, bytes_per_token = self._runtime.layers, self._runtime.bytes_per_token()
        spans = strategy.spans(layers)
        kept = float(np.mean([np.dot(counts, spans) / layers for _, counts in read]))
        full = float(np.mean([len(encoded.layout) for encoded in self._encoded]))
        yield Comparison(
            visual_tokens=kept,
            visual_tokens_full=full,
            kv_bytes=kept * layers * bytes_per_token,
            kv_bytes_full=full * layers * bytes_per_token,
            objective=float(np.mean(list(chain.from_iterable(cosines)))),
            agreement=float(np.mean(agrees)),
            sample_objectives=tuple(float(np.mean(of_sample)) for of_sample in cosines),
        )

    def _refer(self, sample: Sample, encoded: EncodedImage) -> Generator[Pause, None, Reference]:
        """Answer a sample's questions with the unpruned model."""
        strategy = Strategy.full()
        chat = self._runtime.chat
        image = compress(encoded, strategy, self._runtime.layers)
        answers, states = [], []
        sequence = self._runtime.start(strategy)
        prompts: list[list[Item]] = []
        with self._holding_pages([sequence]):
            for turn, question in enumerate(sample.questions):
                parts: list[str | CompressedImage] = [question] if turn else [image, question]
                try:
                    prompts.append((yield from chat.turning(turn, parts, most=self._runtime.context)))
                except TextTooLong as error:
                    raise self._too_long(sample, sequence.position + error.tokens) from error
                sequence.log += prompts[-1]
                self._check_context(sample, sequence)
                state, answer = yield from self._answer(sequence)
                states.append(state)
                answers.append(answer)
        self._prompts.append(prompts)
        return Reference(tuple(answers), torch.stack(states))

    def _answer(self, sequence: Sequence) -> Generator[Pause, None, tuple[Tensor, tuple[int, ...]]]:
        """Answer greedily; the hidden state [hidden] at the end of the prompt, and the answer's tokens."""
        prompt = len(sequence.log)
        states: list[Tensor] = []
        for forward in decode(sequence, self._runtime.chat, Sampler(), max_new_tokens=self._new_tokens):
            state = yield from self._state_at_the_end(forward.sequence)
            states.append(state)
            (forward.token,) = self._runtime.most_likely(state[None])
        return states[0], tuple(item for item in sequence.log[prompt:] if isinstance(item, int))

    def _check_context(self, sample: Sample, sequence: Sequence) -> None:
        needed = sequence.position + self._new_tokens
        if needed > self._runtime.context:
            raise self._too_long(sample, needed)

    def _too_long(self, sample: Sample, needed: int) -> CalibrationError:
        return CalibrationError(
            f"the conversation about picture {sample.picture.digest[:12]} may take {needed} positions, the model's "
            f"context has {self._runtime.context}; ask fewer or shorter questions"
        )

    def _state_at_the_end(self, sequence: Sequence) -> Generator[Pause, None, Tensor]:
        """Run what is not cached of a sequence; the hidden state [hidden] at the end of its log, on the host."""
        (states,) = yield from self._states([sequence], [[len(sequence.log) - 1]])
        return states[0]

    def _would_answer(self, states: Tensor, answer: abc.Sequence[int]) -> bool:
        """Whether greedy decoding chooses the tokens of ``answer`` one after the other, and then stops.

        Args:
            states: [1 + answer, hidden], at the end of the prompt and at each token of the answer.
            answer: the reference's answer; one of the greatest length was cut off, and need not stop there.
        """
        *tokens, after = self._runtime.most_likely(states)
        return tokens == list(answer) and (after in self._runtime.chat.stop_ids or len(answer) == self._new_tokens)

    def _read(
        self, strategy: Strategy, numbers: abc.Sequence[int], *, answers: bool
    ) -> Generator[Pause, None, list[tuple[Tensor, list[int]]]]:
        """Prefill samples under a strategy, as many in one batch as make up a piece.

        Args:
            strategy: compresses the pictures.
            numbers: which samples.
            answers: whether to return the states at all tokens of the answers, too, and not only at the ends of the
                prompts.

        Returns:
            For each sample the states [places, hidden], and the tokens kept of its picture in each stage.
        """
        read: list[tuple[Tensor, list[int]]] = []
        batch: list[_Reading] = []
        for number in numbers:
            reading = self._reading(strategy, number, answers=answers)
            yield None
            if batch and sum(each.sequence.pending_tokens for each in (*batch, reading)) > self._piece:
                read += yield from self._finish(batch)
                batch = []
            batch.append(reading)
        read += yield from self._finish(batch)
        return read

    def _reading(self, strategy: Strategy, number: int, *, answers: bool) -> _Reading:
        """A sequence of a sample with the reference's answers; nothing of it is cached yet."""
        reference = self._references[number]
        image = compress(self._encoded[number], strategy, self._runtime.layers)
        sequence = self._runtime.start(strategy)
        places: list[int] = []
        for items, answer in zip(self._prompts[number], reference.answers, strict=True):
            sequence.log += [item if isinstance(item, int) else image for item in items]
            prompt = len(sequence.log)
            sequence.log += answer
            places += range(prompt - 1, len(sequence.log) if answers else prompt)
        del sequence.log[places[-1] + 1 :]
        return _Reading(sequence, places, [len(kept) for kept in image.kept])

    def _finish(self, batch: abc.Sequence[_Reading]) -> Generator[Pause, None, list[tuple[Tensor, list[int]]]]:
        sequences = [reading.sequence for reading in batch]
        with self._holding_pages(sequences):
            states = yield from self._states(sequences, [reading.places for reading in batch])
        return [(state, reading.kept) for state, reading in zip(states, batch, strict=True)]

    def _states(
        self, sequences: abc.Sequence[Sequence], places: abc.Sequence[abc.Sequence[int]]
    ) -> Generator[Pause, None, list[Tensor]]:
        """Run what is not cached of sequences, piece by piece; the hidden states at some places of their logs.

        Returns:
            For each sequence the states [places, hidden], on the host.
        """
        shortages = 0
        while True:
            states: list[Tensor] | None = None
            try:
                if not self._approach(sequences, [first for first, *_ in places]):
                    states = self._runtime.states(sequences, places)
            except PoolExhausted:
                shortages += 1
                for each in sequences:
                    each.release()
                pages = sum(each.pages_wanted for each in sequences)
                if shortages == PATIENCE or pages > self._runtime.pool.pages:
                    raise
                yield Shortage(pages)
                continue
            yield None
            if states is not None:
                return [state.cpu() for state in states]

    def _approach(self, sequences: abc.Sequence[Sequence], places: abc.Sequence[int]) -> bool:
        """Run a piece of what comes before ``places``; False, and nothing is run, if all that is left is one piece."""
        if sum(each.pending_tokens for each in sequences) <= self._piece:
            return False
        for each, place in zip(sequences, places, strict=True):
            before = sum(map(tokens_in, each.log[each.cached.items : place])) - each.cached.offset
            if before > 0:
                self._runtime.advance([each], [min(before, self._piece)], want_logits=False)
                return True
        return False

    @contextmanager
    def _holding_pages(self, sequences: abc.Sequence[Sequence]) -> Iterator[None]:
        """List sequences as possible holders of pages; when the block ends, for any reason, release them."""
        self.sequences += sequences
        try:
            yield
        finally:
            for each in sequences:
                self.sequences.remove(each)
                each.release()


@dataclass(frozen=True, eq=False)
class _Reading:
    """A sample to be prefilled under a strategy.

    Attributes:
        sequence: its log is complete.
        places: items of the log whose hidden states are wanted.
        kept: tokens kept of its picture in each stage.
    """

    sequence: Sequence
    places: abc.Sequence[int]
    kept: list[int]


@torch.inference_mode()
def _encode(model: MultimodalModel, picture: Picture) -> EncodedImage:
    return model.encode([picture])[0]


def _cosines(states: Tensor, reference: Reference) -> npt.NDArray[np.float64]:
    """Cosine of each row of ``states`` with the reference's, [turns]."""
    cosines: npt.NDArray[np.float64] = torch.cosine_similarity(states, reference.states, dim=1).double().numpy()
    return cosines
