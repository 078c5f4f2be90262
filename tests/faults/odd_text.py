"""Texts that data sets hold by accident or by malice, from a seeded random.Random."""

import random

SPECIAL = ("</s>", "<s>", "<|start|>", "<|im_end|>", "<|eot_id|>", "<think>", "</think>", "[INST]")
_PIECES = (
    *("", " ", "\n", "\r\n", "\t", "  ", "\u00a0", "\u3000", "\u2028", "\u2029", "\x85", "\ufeff"),
    *("\x00", "\x07", "\x1b[31m", "\x7f", "\u200b", "\u200d", "\u202e", "\ufffd", "\ufffe"),
    *(
        "e\u0301",
        "\ufb01",
        "\u0130",
        "\u1e9e",
        "\U0001f468\u200d\U0001f469",
        "\U0001f1e9\U0001f1ea",
    ),
    *(
        "{{ 7 * 7 }}",
        "{% raise %}",
        "${oc.env:HOME}",
        "%s%n",
        "'; DROP TABLE",
        "\\u0041",
        '"',
        "\\",
    ),
    *("abc", "bc", "ab", "The answer", " is 6.", "4", "#", "def f(x):\n\treturn x", "\u05d0\u05d1"),
)


def odd_text(random_: random.Random, *, special: bool = True) -> str:
    """Anything that is Unicode: up to 12 pieces, from words to any character of any plane."""
    pieces = []
    for _ in range(random_.randint(0, 12)):
        kind = random_.random()
        if kind < 0.6:
            pieces.append(random_.choice(_PIECES))
        elif kind < 0.9 or not special:
            pieces.append("".join(_character(random_) for _ in range(random_.randint(1, 4))))
        else:
            pieces.append(random_.choice(SPECIAL))
    return "".join(pieces)


def _character(random_: random.Random) -> str:
    code = random_.randrange(0x110000 - 0x800)
    return chr(code if code < 0xD800 else code + 0x800)  # no half of a character
