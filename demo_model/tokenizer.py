"""Tokenizer of the embedded model: a small BPE over lower-case words, with bytes for whatever it has never seen.

Built from the question grammar and some everyday English, so that a common word is one token. Knows nothing of
pictures.
"""

import json
from collections.abc import Iterator
from itertools import product
from string import ascii_lowercase, digits

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo_model.labels import PLACES
from demo_model.questions import PHRASINGS, plural
from demo_model.scene import COLOURS, SHAPES, TINTS

USER, ASSISTANT, END, IMAGE, PAD, VIDEO = "<|user|>", "<|assistant|>", "<|end|>", "<image>", "<pad>", "<video>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '<|user|>' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant|>' -}}
    {%- else -%}
        {{- raise_exception("The roles of this model are 'user' and 'assistant', not '" ~ message['role'] ~ "'.") -}}
    {%- endif -%}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- else -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{- '<image>' -}}
            {%- elif part['type'] == 'video' -%}
                {{- '<video>' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception("Parts are 'text', 'image' and 'video', not '" ~ part['type'] ~ "'.") -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""

_EVERYDAY = """
a about above again all also an and any are as at be because been before below beside between big both but by can could
day describe did different do does down each easy else every few find first for from give go good had has have he hello
help her here him his how i if image in into is it its just know large left less letter like little long look made make
many may me more most much my name near never new next nice not nothing now number object objects of off ok old on one
only or other our out over people photo picture place please put question read right said same say see seven she should
show shown sign six small so some something tell text than thank thanks that the their them then there these they thing
things think this those time to too two three four five up us use very want was way we well were what when where which
white black brown who why will with word words would write written yes you your
"""


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """The id of a token that the tokenizer has."""
    return tokenizer.get_vocab()[token]


def _corpus() -> Iterator[str]:
    for phrasings in PHRASINGS.values():
        for phrasing, (shape, colour) in product(phrasings, product(SHAPES, COLOURS)):
            yield phrasing.format(
                shape=shape, shapes=plural(shape), colour=colour, article="an" if colour[0] == "o" else "a"
            )
    for answer in (*SHAPES, *COLOURS, *TINTS, *PLACES, "yes", "no", *ascii_lowercase, *digits):
        yield from [answer] * 40
    for word in _EVERYDAY.split():
        yield from [word] * 8


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Train the tokenizer; the same every time.

    Text is lower-cased and every digit is a token, so a code such as "K5" is two tokens. Any text can be encoded;
    decoding gives it back in lower case, but for a space at the very start.
    """
    normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    draft = Tokenizer(models.BPE())
    draft.normalizer, draft.pre_tokenizer = normalizer, words
    alphabet = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    draft.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=2000, min_frequency=8, initial_alphabet=alphabet, show_progress=False)
    )
    learned = json.loads(draft.to_str())["model"]
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    merges = [(left, right) for left, right in learned["merges"]]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=merges, byte_fallback=True)
    )
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, words
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always"), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens={
            "user_token": USER,
            "assistant_token": ASSISTANT,
            "image_token": IMAGE,
            "video_token": VIDEO,
        },
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )
