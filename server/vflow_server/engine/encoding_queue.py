"""The encoding queue: which pictures and videos are encoded next.

One piece is encoded at a time. A batch of small pictures takes a few pieces, one after the other. A large picture takes
many, and so does a video: after each of them comes a batch of small pictures, if any waits. So no small picture waits
for a whole large one. Tenants take turns among the small ones, and among the large; within a tenant the order is first
come, first served. Belongs to the engine's thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from vflow_server.engine.encoder import EncoderThread
from vflow_server.engine.engine import Task
from vflow_server.engine.fair_queue import RoundRobin
from vflow_server.engine.ops import Encode
from vflow_server.engine.token_meter import TokenMeter
from vflow_server.kv.image_cache import ImageCache, Key
from vflowopt.compression.pieces import Pieces
from vflowopt.compression.pipeline import CompressedImage
from vflowopt.media.video import Video
from vflowopt.models.resizing import LARGE_PIXELS

PICTURES = 4
"""Pictures that are encoded in one batch at most; only one while answers are being decoded, unless the encoder has a
stream of its own: there the tiles of several pictures take hardly longer than those of one."""

TOKENS_PER_PIECE = 256
"""Visual tokens that a piece of what is given up is taken to have encoded, until one has encoded more."""


@dataclass(frozen=True, eq=False)
class Asking:
    """A task that waits for a picture, and its op."""

    task: Task
    op: Encode

    @property
    def tenant(self) -> str:
        """The tenant of the task."""
        return self.task.tenant

    @property
    def key(self) -> Key:
        """What the cache holds the compressed picture under."""
        return self.op.visual.identity, self.op.strategy, self.op.tenant

    @property
    def large(self) -> bool:
        """Whether it is a video, or a picture that takes long to resize."""
        visual = self.op.visual
        return isinstance(visual, Video) or visual.width * visual.height >= LARGE_PIXELS

    @property
    def waits(self) -> bool:
        """Whether the task still waits for the op; it may have been cancelled."""
        return self.task.op is self.op


@dataclass(eq=False)
class _Encoding:
    """A batch of pictures, or a video, that is being encoded.

    Attributes:
        asking: the tasks that asked for it.
        pieces: the work.
        num_run: pieces that were begun.
    """

    asking: Sequence[Asking]
    pieces: Pieces[list[CompressedImage]]
    num_run: int = 0


class _Line:
    """What waits, of one kind: small pictures, or what is larger.

    Args:
        encoder: begins to encode it.
        meter: takes what is encoded from the allowances of those who asked for it.

    Attributes:
        under_way: what is between two pieces.
    """

    def __init__(self, encoder: EncoderThread, meter: TokenMeter) -> None:
        self._encoder = encoder
        self._meter = meter
        self._tokens_per_piece = TOKENS_PER_PIECE
        self._tenants = RoundRobin()
        self.under_way: _Encoding | None = None

    def begin(self, asking: Sequence[Asking]) -> _Encoding:
        """Begin to encode a batch."""
        return _Encoding(asking, self._encoder.begin([each.op for each in asking]))

    def next(self, missing: Sequence[Asking], most: int) -> _Encoding | None:
        """What to encode a piece of: what is under way, if somebody still waits for it, or else the next few.

        Args:
            missing: what waits in this line, in the order in which it came.
            most: pictures of a batch at most. The same picture of a tenant is encoded once.
        """
        encoding, self.under_way = self.under_way, None
        if encoding is not None:
            wanted = {each.key for each in missing}
            if any(each.key in wanted for each in encoding.asking):
                return encoding
            encoding.pieces.close()  # all who asked for it are gone
            self.give_up(encoding, encoding.asking)
        if not missing:
            return None
        ordered = self._tenants.order(missing)
        alike = [each for each in ordered if each.op.strategy == ordered[0].op.strategy]
        batch = list({each.key: each for each in reversed(alike)}.values())[::-1][:most]
        for each in batch:
            self._tenants.served(each.tenant)
        return self.begin(batch)

    def give_up(self, encoding: _Encoding, asking: Sequence[Asking]) -> None:
        """Take what was encoded so far from the allowances of ``asking``, who get nothing for it.

        It is an estimate, as the tokens are known at the end only. It is not on the low side: small pictures that end
        must not make large ones cheap that are given up.
        """
        for each in asking:
            self._meter.add(each.tenant, encoding.num_run * self._tokens_per_piece // len(encoding.asking))

    def finish(self, encoding: _Encoding, images: Sequence[CompressedImage]) -> None:
        """Take the tokens that were encoded from the allowances, whether anybody still waits for them or not."""
        for each, image in zip(encoding.asking, images, strict=True):
            self._meter.add(each.tenant, image.tokens)
        per_piece = sum(image.tokens for image in images) // encoding.num_run
        self._tokens_per_piece = max(self._tokens_per_piece, per_piece)


class EncodingQueue:
    """Encodes what tasks ask for, piece by piece.

    Args:
        images: the cache of compressed pictures.
        encoder: encodes those that are not cached.
        meter: takes what is encoded from the tenants' allowances.
    """

    def __init__(self, images: ImageCache, encoder: EncoderThread, meter: TokenMeter) -> None:
        self._images = images
        self._encoder = encoder
        self._threads = torch.get_num_threads()
        self._small, self._large = _Line(encoder, meter), _Line(encoder, meter)
        self._last = self._large
        self._running: tuple[_Line, _Encoding, Future[list[CompressedImage] | None]] | None = None

    @property
    def under_way(self) -> bool:
        """Whether something is between two pieces."""
        return any(line.under_way is not None for line in (self._small, self._large))

    def finish(self) -> bool:
        """Finish the piece that is being encoded, if it is done; returns whether it was.

        Pictures that are complete are cached, and handed to the tasks that still wait for them.
        """
        if self._running is None or not self._running[2].done():
            return False
        (line, encoding, future), self._running = self._running, None
        waiting = [each for each in encoding.asking if each.waits]
        failure = future.exception()
        if failure is not None:
            assert isinstance(failure, Exception)
            # The others of a batch are encoded again; they do not pay for the faulty one.
            line.give_up(encoding, [each for each in encoding.asking if len(encoding.asking) == 1 or not each.waits])
            if len(encoding.asking) == 1:
                for each in waiting:
                    each.task.fail(failure)
            elif waiting:
                line.under_way = line.begin(waiting[:1])  # one by one: only the faulty picture fails
        elif (images := future.result()) is None:
            line.under_way = encoding
        else:
            line.finish(encoding, images)
            for each, image in zip(encoding.asking, images, strict=True):
                self._images.put(each.key, image)
                if each.waits:
                    each.op.put(image, cache_hit=False)
                    each.task.done()
        return True

    def advance(self, asking: Sequence[Asking], wake: Callable[[], None], *, answering: bool) -> bool:
        """Hand out the pictures that are cached. Encode a piece of others, unless one is being encoded.

        Args:
            asking: the tasks that wait for a picture or a video, in the order in which they began.
            wake: called, from any thread, when the piece is done.
            answering: whether answers are being decoded, which must not be held up.

        Returns:
            Whether a task got its picture.
        """
        missing = []
        for each in asking:
            image = self._images.get(each.key)
            if image is None:
                missing.append(each)
            else:
                each.op.put(image, cache_hit=True)
                each.task.done()
        if self._running is None:
            self._encode(missing, wake, answering=answering)
        return len(missing) < len(asking)

    def _encode(self, missing: Sequence[Asking], wake: Callable[[], None], *, answering: bool) -> None:
        lines = [self._small, self._large]
        if self._last is self._small and self._small.under_way is None:
            lines.reverse()
        for line in lines:
            waiting = [each for each in missing if each.large == (line is self._large)]
            several = line is self._small and (self._encoder.has_stream or not answering)
            encoding = line.next(waiting, PICTURES if several else 1)
            if encoding is not None:
                # One thread is left to the answers.
                threads = max(self._threads - 1, 1) if answering else self._threads
                encoding.num_run += 1
                future = self._encoder.advance(encoding.pieces, threads=threads)
                self._last, self._running = line, (line, encoding, future)
                future.add_done_callback(lambda _: wake())
                return
