"""What the ids of a pair must be, from the tokenizer's own vocabulary: nothing of ours is asked."""

import functools

from tests.faults.bad_rows import Case

TEMPLATE = (
    "{% if tools %}{{ tools[0].name }}\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def spell(tokenizer, ids: list[int]) -> bytes:
    """The bytes that ids of a byte-level tokenizer stand for, special tokens as their text."""
    added = tokenizer.added_tokens_decoder
    pieces: list[bytes] = []
    names = tokenizer.convert_ids_to_tokens(ids)
    for index, name in zip(ids, names, strict=True):
        if index in added:
            pieces.append(added[index].content.encode())
        else:
            pieces.append(bytes(_bytes()[symbol] for symbol in name))
    return b"".join(pieces)


@functools.cache
def _bytes() -> dict[str, int]:
    """GPT-2's printable character of each byte -> the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + place): byte for place, byte in enumerate(others)
    }


def rendered(case: Case) -> tuple[str, str, str]:
    """The prompt and both whole sequences, as TEMPLATE writes them; text as it stands."""
    if isinstance(case.prompt, str):
        return case.prompt, case.prompt + case.chosen, case.prompt + case.rejected
    head = f"{case.tools[0]['name']}\n" if case.tools else ""
    head += "".join(map(_turn, case.prompt))
    answers = ["".join(map(_turn, side)) for side in (case.chosen, case.rejected)]
    return head + "<|start|>assistant\n", head + answers[0], head + answers[1]


def _turn(message: dict) -> str:
    return f"<|start|>{message['role']}\n{message['content']}</s>\n"


def wrong_with(tokenizer, bos: list[int], case: Case, pair) -> str:
    """What is wrong with the ids of a pair that is used; "" where nothing is."""
    encode = tokenizer.backend_tokenizer.encode
    texts = rendered(case)
    ids = [encode(text, add_special_tokens=False).ids for text in texts]
    if isinstance(case.prompt, str):
        ids = [part if bos and part[:1] == bos else bos + part for part in ids]
        eos = tokenizer.eos_token_id
        ids[1:] = [side if side[-1:] == [eos] else [*side, eos] for side in ids[1:]]
    shared = next(
        (i for i in range(len(ids[0])) if any(side[i : i + 1] != [ids[0][i]] for side in ids[1:])),
        len(ids[0]),
    )
    if pair.prompt != ids[0][:shared]:
        return f"the prompt is not what both sequences share of its {len(ids[0])} ids"
    names = ("chosen", "rejected")
    for name, side, response in zip(names, ids[1:], responses(case), strict=True):
        labels = getattr(pair, name)
        if pair.prompt + labels != side:
            return f"prompt and {name} are not the ids of the whole text"
        lost = spell(tokenizer, ids[0][shared:])
        if bos and case.prompt == "":  # a start that the response spells is the sequence's own
            response = response.removeprefix("<s>")
        expected = lost + response.encode()
        if spell(tokenizer, labels) != expected:
            return f"decode(labels) of {name} is {spell(tokenizer, labels)!r}, not {expected!r}"
    return ""


def responses(case: Case) -> tuple[str, ...]:
    """Both responses with their terminator: the template's, or one EOS behind text."""
    if isinstance(case.prompt, str):
        sides = (case.chosen, case.rejected)
        return tuple(side if side.endswith("</s>") else f"{side}</s>" for side in sides)
    turns = ["".join(map(_turn, side)) for side in (case.chosen, case.rejected)]
    return tuple(turn.removeprefix("<|start|>assistant\n") for turn in turns)
