"""G4, part four: tokenizers and chat templates of every kind, and the masks that come of them."""

import itertools
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from reinforcer_tp.data import prepare_data
from tests.faults.generated_rows import unclear
from tests.unit.toy_tokenizer import toy_tokenizer

CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


class Template(NamedTuple):
    """`labels` is what must be trained on, of a response's text; None = the row is refused."""

    text: str
    labels: Callable[[str], str] | None
    reported: str | None = None  # the surprise that the report must count


TEMPLATES = {
    "ChatML": Template(CHATML, lambda r: f"{r}</s>\n"),
    "Llama 3": Template(
        "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}</s>"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}",
        lambda r: f"{r.strip()}</s>",
    ),
    "Qwen3": Template(  # finished thoughts of earlier turns vanish, an empty one is written
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' and "
        "loop.index0 > ns.last and '</think>' not in m.content %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content.split('</think>')[-1] if loop.index0 < ns.last else m.content }}</s>\n"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
        lambda r: ("" if "</think>" in r else "<think>\n\n</think>\n\n") + f"{r}</s>\n",
        "template_text",
    ),
    "drops thoughts": Template(
        CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}"),
        lambda r: f"{r.split('</think>')[-1]}</s>\n",
        "rewritten",
    ),
    "open thought": Template(  # the request is no prefix of the answer
        CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
        lambda r: f"{r}</s>\n",
    ),
    "Gemma": Template(
        "{{ bos_token }}{% for m in messages %}<|start|>{{ 'model' if m.role == 'assistant' else "
        "m.role }}\n{{ m.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start|>model\n{% endif %}",
        lambda r: f"{r}</s>\n",
    ),
    "Mistral": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% else %}"
        "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}",
        lambda r: f" {r}</s>",
    ),
    "strips": Template(
        CHATML.replace("m.content }}", "m.content.strip() }}"), lambda r: f"{r.strip()}</s>\n"
    ),
    "no terminator": Template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        lambda r: f"{r}\n",
    ),
    "no request": Template(
        CHATML.partition("{% if add")[0],
        lambda r: f"<|start|>assistant\n{r}</s>\n",
        "template_text",
    ),
    "dates": Template("{{ strftime_now('%Y') }}\n" + CHATML, lambda r: f"{r}</s>\n"),
    "last user only": Template(  # earlier turns are rewritten once the answer is there
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}<|start|>{{ m.role }}"
        "{% if messages[-1].role == 'assistant' %}!{% endif %}\n{{ m.content }}</s>\n{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
        None,
    ),
    "raises": Template("{{ raise_exception('never') }}", None),
    "divides": Template(CHATML + "{{ 1 // 0 }}", None),
    "undefined": Template("{{ nothing.at.all }}", None),
    "syntax": Template("{% for %}", None),
}


def _fast(model, *, normalizer=None, pre_tokenizer=None, decoder=None, bos=True, pad=None):
    tokenizer = Tokenizer(model)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        tokenizer.decoder = decoder
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if bos else None,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=pad,
        additional_special_tokens=["<|start|>"],
    )


_NAMES = ["<unk>", "<s>", "</s>", "<|start|>"]
_LETTERS = [chr(c) for c in range(33, 127)]


def unigram(**kwargs) -> PreTrainedTokenizerFast:
    """Like SentencePiece: a mark for blanks, one in front, bytes for what it does not know."""
    pieces = [*_NAMES, *(f"<0x{byte:02X}>" for byte in range(256)), *_LETTERS, "\u2581"]
    pieces += ["\u2581is", "is", "\u2581yes", "yes", "ye", "s6", "\u25816"]
    vocab = [(piece, -0.5 - 0.1 * (index % 7)) for index, piece in enumerate(pieces)]
    return _fast(
        models.Unigram(vocab, unk_id=0, byte_fallback=True),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first"),
        decoder=decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        ),
        **kwargs,
    )


def word_piece(**kwargs) -> PreTrainedTokenizerFast:
    pieces = [*_NAMES, *_LETTERS, *(f"##{letter}" for letter in _LETTERS), "yes", "##es", "is"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    return _fast(
        models.WordPiece(vocab, unk_token="<unk>"),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        **kwargs,
    )


def _added(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens(["<think>", "</think>", " is", "yes "])  # none of them special
    return tokenizer


def _normalized(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def _prefix_space(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return tokenizer


_MERGES = [("\u010a", "y"), ("\u0120", "y"), ("y", "e"), ("\u010a", "\u010a"), ("]", "\u0120")]
TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": toy_tokenizer,
    "bytes, BOS": lambda: toy_tokenizer(adds_bos=True),
    "bytes, BOS and EOS": lambda: toy_tokenizer(adds_bos=True, adds_eos=True),
    "bytes, no EOS": lambda: toy_tokenizer(has_eos=False),
    "merges": lambda: toy_tokenizer(merges=_MERGES),
    "added": lambda: _added(toy_tokenizer(merges=_MERGES)),
    "NFKC": lambda: _normalized(toy_tokenizer(adds_bos=True)),
    "prefix space": lambda: _prefix_space(toy_tokenizer()),
    "Unigram": unigram,
    "Unigram, NFKC": lambda: unigram(normalizer=normalizers.NFKC(), pad="</s>"),
    "WordPiece": word_piece,
    "WordPiece, no BOS": lambda: word_piece(bos=False),
}
EVERY = [(t, m) for m in TEMPLATES for t in ("bytes, BOS", "merges")]  # 32
PAIRS = [
    *EVERY,
    *((t, m) for t in TOKENIZERS for m in ("ChatML", "Mistral") if (t, m) not in EVERY),
]
SIDES = ("chosen", "rejected")
RESPONSES = (
    "yes",
    " yes it is 6. ",
    "\nyes\n",
    "y" * 50,
    "\u00e9\u0301\ufb01 \U0001f468\u200d\U0001f469",
    "<think>\nhm\n</think>\n\n6",
    "is</think>6",
    "\u2028\u3000a",
    "6",
    "[/INST]",
    "\x00a\x07",
    "  x",
)


def _rows() -> list[dict]:
    def say(role: str, text: str) -> dict:
        return {"role": role, "content": text}

    earlier = [say("user", "before"), say("assistant", "<think>a</think>b")]
    return [
        {
            "prompt": [*(earlier if index % 3 == 2 else []), say("user", f"q{index}")],
            "chosen": [say("assistant", response)],
            "rejected": [say("assistant", f"no {index}")],
        }
        for index, response in enumerate(RESPONSES)
    ]


class TemplateRows:
    on_bad_row = "drop"

    def __init__(self) -> None:
        self.formatted_ds = {"train": _rows()}


def check_templates(folder: Path, every: int = 1) -> tuple[Counter, list[str]]:
    """Counts and failures of every `every`-th pair of a tokenizer and a template."""
    counts, failures = Counter(), []
    for names in PAIRS[::every]:
        tokenizer = TOKENIZERS[names[0]]()
        template = TEMPLATES[names[1]]
        tokenizer.chat_template = template.text
        try:
            used, wrong = _check_pair(tokenizer, template, folder)
        except Exception as error:
            used, wrong = 0, [unclear(error, "rows")]
            wrong = [text for text in wrong if text or template.labels is not None]
        counts["template_pairs"] += 1
        counts["masks"] += 2 * used
        failures += [f"{names[0]} and {names[1]}: {text}" for text in wrong]
    return counts, failures


def _check_pair(tokenizer, template: Template, folder: Path) -> tuple[int, list[str]]:
    data = prepare_data(
        {"dataset_name": "tests.faults.template_pairs.TemplateRows"},
        tokenizer=tokenizer,
        max_total_sequence_length=None,
        cache_dir=folder / "templates",
    )
    report, rows, failures = data.report["train"], _rows(), []
    if report["used"] + sum(report["dropped"].values()) != len(rows):
        failures.append(f"rows do not add up: {report['used']}, {report['dropped']}")
    if template.labels is None:
        failures += [
            f"row {pair.row} is used" for pair in data.train if len(rows[pair.row]["prompt"]) > 1
        ]
    elif report["used"] < len(rows) - 4:
        failures.append(f"only {report['used']} rows are used: {report['dropped']}")
    if template.reported is not None and template.reported not in report["surprises"]:
        failures.append(f"{template.reported} is not reported: {report['surprises']}")
    for pair in data.train if template.labels is not None else ():
        row = rows[pair.row]
        for name in ("chosen", "rejected"):
            wrong = wrong_mask(tokenizer, template, row, name, pair.prompt, getattr(pair, name))
            failures += [f"row {pair.row} {name}: {wrong}"] if wrong else []
    return len(data.train), failures


def wrong_mask(tokenizer, template: Template, row: dict, name: str, prompt, labels) -> str:
    """The labels must be the tokens whose characters are the response and its terminator."""
    encode = tokenizer.backend_tokenizer.encode
    texts = [
        tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True),
        *(
            tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            for side in SIDES
        ),
    ]
    asked, *sides = (encode(text, add_special_tokens=False) for text in texts)
    whole, encoded = texts[1 + SIDES.index(name)], sides[SIDES.index(name)]
    if prompt + labels != encoded.ids:
        return "prompt and response are not the ids of the whole text"
    expected = template.labels(row[name][0]["content"])
    if not whole.endswith(expected):
        return f"the oracle is wrong: {whole!r} does not end with {expected!r}"
    columns = zip(asked.ids, *(side.ids for side in sides), strict=False)
    shared = [ids[0] for ids in itertools.takewhile(lambda ids: len(set(ids)) == 1, columns)]
    if prompt != shared:
        return f"the prompt has {len(prompt)} ids, {len(shared)} are shared"
    is_merged = len(shared) < len(asked.ids)  # a token of a side reaches over the border
    start, first = len(whole) - len(expected), encoded.offsets[len(prompt)][0]
    if first == start or (is_merged and 0 < start - first <= 2):
        return ""
    unseen = encode(whole[start:first], add_special_tokens=False).ids if first > start else [0]
    if not unseen:  # the tokenizer has no tokens for blanks
        return ""
    if encoded.offsets[len(prompt)] == encoded.offsets[len(prompt) - 1]:  # bytes of one stretch
        found = tokenizer.decode(labels, clean_up_tokenization_spaces=False)
        if unicodedata.normalize("NFKC", found) == unicodedata.normalize("NFKC", expected):
            return ""
    return f"labels start at {whole[first : first + 20]!r}, expected {expected[:20]!r}"
