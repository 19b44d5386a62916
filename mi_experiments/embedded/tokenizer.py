"""The tokenizer of the synthetic language: one token per word, and `<s>` in front."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast


def build_tokenizer(vocabulary: list[str], context: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer whose token ids are the positions in the vocabulary.

    The beginning token is added by the tokenizer itself; the end of a document is an ordinary word
    of the language, so `</s>` never occurs in its text.

    Args:
        vocabulary: the words; among them the special tokens `<unk>`, `<s>`, `</s>` and `<pad>`.
        context: the most tokens that the model can read.
    """
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", ids["<s>"])]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
