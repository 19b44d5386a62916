"""Tokenizers with a token per word, so that tokens can be counted by hand; built without files."""

import itertools

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

WORDS = 2000
BOS = 1


def build_tokenizer(*, adds: bool = True, has_bos: bool = True) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose word `i` has id `i`, with or without a beginning token."""
    names = {0: "<unk>", BOS: "<s>"}
    ids = {names.get(i, str(i)): i for i in range(WORDS)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if adds:
        tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
        )
    options = {"bos_token": "<s>"} if has_bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **options)


PLAIN = build_tokenizer(adds=False)
ADDING = build_tokenizer(adds=True)
BARE = build_tokenizer(adds=False, has_bos=False)


def numbered(*lengths: int) -> list[str]:
    """Return documents of these lengths in which no word occurs twice, counting from 10."""
    counter = itertools.count(10)
    return [" ".join(str(next(counter)) for _ in range(length)) for length in lengths]
