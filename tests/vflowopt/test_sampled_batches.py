"""A seed gives the same answer alone and beside any other sequences of a batch."""

from dataclasses import dataclass, field

from tests.vflowopt.generation import picture
from vflowopt.compression.strategy import Strategy
from vflowopt.media.picture import Picture
from vflowopt.runtime.model_runner import Runtime
from vflowopt.runtime.sampling import Sampler, SamplingOptions
from vflowopt.runtime.sequence import Item, Sequence

TENTH = Strategy.from_budget(0.1, 6, (0.12, 0.9), threshold=1.0, alpha=0.1, grid=3.0)
LENGTHS = (9, 4, 12, 7)
OPTIONS = tuple(SamplingOptions(temperature=0.9, top_p=0.9, seed=seed) for seed in range(len(LENGTHS)))


@dataclass
class Answer:
    """An answer under way."""

    sequence: Sequence
    sampler: Sampler
    length: int
    tokens: list[int] = field(default_factory=list)

    def put(self, token: int) -> None:
        self.tokens.append(token)
        self.sequence.log.append(token)


def answer_one(runtime: Runtime, index: int) -> Answer:
    """An answer about to begin: sequences differ in length, strategy and seed."""
    strategy = (TENTH, Strategy.full())[index % 2]
    (image,) = runtime.compress([Picture.from_pixels(picture(56, 60 + 30 * index, index))], strategy)
    prompt: list[Item] = [*range(20 * index), image, *b"and?"]
    sequence = runtime.start(strategy)
    sequence.log.extend(prompt)
    return Answer(sequence, Sampler(OPTIONS[index]), LENGTHS[index])


def test_seeded_answers_are_the_same_in_any_company(runtime: Runtime) -> None:
    alone = []
    for index in range(len(LENGTHS)):
        answer = answer_one(runtime, index)
        while len(answer.tokens) < answer.length:
            (token,) = runtime.step([answer.sequence], [None], [answer.sampler])
            assert token is not None
            answer.put(token)
        answer.sequence.release()
        alone.append(answer.tokens)
    assert len({tuple(tokens[:4]) for tokens in alone}) == len(alone)

    # Each comes two steps after the one before, reads its prompt in chunks beside the others, and leaves when done.
    together = [answer_one(runtime, index) for index in range(len(LENGTHS))]
    step = 0
    while len(together[-1].tokens) < together[-1].length:
        running = [each for each in together[: step // 2 + 1] if len(each.tokens) < each.length]
        tokens = runtime.step(
            [each.sequence for each in running], [15] * len(running), [each.sampler for each in running]
        )
        for each, token in zip(running, tokens, strict=True):
            if token is not None:
                each.put(token)
        step += 1
    assert [each.tokens for each in together] == alone
    for each in together:
        each.sequence.release()
