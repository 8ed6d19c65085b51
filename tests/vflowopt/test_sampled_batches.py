"""A seed gives the same answer alone and beside any other sequences of a batch."""

from collections.abc import Generator

from tests.vflowopt.generation import picture
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.generate import Forward, Generated, decode
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sampling import Sampler, SamplingOptions
from vflowopt.runtime.sequence import Item, Sequence

TENTH = Strategy.from_budget(0.1, 6, (0.12, 0.9), threshold=1.0, alpha=0.1, grid=3.0)
LENGTHS = (9, 4, 12, 7)
OPTIONS = tuple(SamplingOptions(temperature=0.9, top_p=0.9, seed=seed) for seed in range(len(LENGTHS)))


def begun(runtime: Runtime, index: int) -> Sequence:
    """A sequence about to be answered; its length and strategy depend on ``index``."""
    strategy = (TENTH, Strategy.full())[index % 2]
    (image,) = runtime.compress([Picture.from_pixels(picture(56, 60 + 30 * index, index))], strategy)
    prompt: list[Item] = [*range(20 * index), image, *b"and?"]
    sequence = runtime.start(strategy)
    sequence.log.extend(prompt)
    return sequence


def answering(runtime: Runtime, sequence: Sequence, index: int) -> Generator[Forward, None, Generated]:
    """The steps of an answer with its own seed and length."""
    length = LENGTHS[index]
    return decode(sequence, runtime.chat, Sampler(OPTIONS[index]), max_new_tokens=length, min_new_tokens=length)


def test_seeded_answers_are_the_same_in_any_company(runtime: Runtime) -> None:
    alone: list[list[int]] = []
    for index in range(len(LENGTHS)):
        sequence = begun(runtime, index)
        alone.append([])
        for forward in answering(runtime, sequence, index):
            (token,) = runtime.step([sequence], [None], [forward.sampler])
            assert token is not None
            forward.token = token
            alone[index].append(token)
        sequence.release()
    assert len({tuple(tokens[:4]) for tokens in alone}) == len(alone)
    assert tuple(map(len, alone)) == LENGTHS

    # Each comes two steps after the one before, reads its prompt in chunks beside the others, and leaves when done.
    sequences = [begun(runtime, index) for index in range(len(LENGTHS))]
    answers = [answering(runtime, sequence, index) for index, sequence in enumerate(sequences)]
    together: list[list[int]] = [[] for _ in LENGTHS]
    running: dict[int, Forward] = {}
    step = 0
    while running or step < 2 * len(answers):
        if step % 2 == 0 and step < 2 * len(answers):
            running[step // 2] = next(answers[step // 2])
        forwards = running.values()
        tokens = runtime.step(
            [each.sequence for each in forwards], [15] * len(forwards), [each.sampler for each in forwards]
        )
        for (index, forward), token in zip(list(running.items()), tokens, strict=True):
            if token is None:
                continue
            forward.token = token
            together[index].append(token)
            if (following := next(answers[index], None)) is None:
                del running[index]
            else:
                running[index] = following
        step += 1
    assert together == alone
    for sequence in sequences:
        sequence.release()
