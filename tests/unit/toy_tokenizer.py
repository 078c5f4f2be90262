"""A byte-level tokenizer built in the test, small enough to compute its ids by hand."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS, EOS, START = "<s>", "</s>", "<|start|>"
CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def toy_tokenizer(
    *,
    merges: list[tuple[str, str]] = (),
    adds_bos: bool = False,
    adds_eos: bool = False,
    has_eos: bool = True,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """Ids: <s> 0, </s> 1, <|start|> 2, then one for every byte and every merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [BOS, EOS, START, *alphabet, *("".join(pair) for pair in merges)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    template = f"{BOS if adds_bos else ''} $A {EOS if adds_eos else ''}".split()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(template), special_tokens=[(BOS, 0), (EOS, 1)]
    )
    special = {"additional_special_tokens": [START, *([] if has_eos else [EOS])]}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS if has_eos else None,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        **special,
    )


def ids_of(tokenizer: PreTrainedTokenizerFast, *pieces: str) -> list[int]:
    """Ids of pieces of the vocabulary; a text that is none is spelled byte by byte."""
    vocab = tokenizer.get_vocab()
    result = []
    for piece in pieces:
        if piece in vocab:
            result.append(vocab[piece])
        else:
            result += [vocab[_symbol(byte)] for byte in piece.encode()]
    return result


def _symbol(byte: int) -> str:
    """GPT-2's printable character of a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))
