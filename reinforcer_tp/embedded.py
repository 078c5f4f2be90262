"""The embedded demo: a tiny Llama, its tokenizer and preference pairs, made by the package itself.

A prompt asks for something in a formal or in a casual manner; of two equally long answers the one
in that manner is chosen. Every answer is chosen as often as it is rejected, so a model that does
not read the prompt stays at accuracy 0.5. No noun of the validation prompts occurs in training.

Everything follows from this file: the rows hold nothing random, the weights come from the integers
of a counter-based generator by exact float arithmetic, the tokenizer's merges from the rows.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from reinforcer_tp.config import ConfigError

HELD_OUT_NOUNS = (
    "lantern", "violin", "ticket", "blanket", "compass", "pudding", "ribbon", "shovel",
)  # fmt: skip
TRAIN_NOUNS = (
    "table", "report", "garden", "parcel", "bicycle", "invoice", "kettle", "jacket",
    "camera", "ladder", "printer", "letter", "wallet", "mirror", "carpet", "engine",
    "basket", "hammer", "pencil", "window", "bottle", "poster", "helmet", "guitar",
    "sandwich", "notebook", "curtain", "pillow", "button", "saddle", "napkin", "trumpet",
    "rudder", "contract", "drawing", "magnet", "bracelet", "scissors", "tablet", "cushion",
)  # fmt: skip
# (request, formal answer, casual answer); the two answers have the same number of characters.
REQUESTS = (
    (
        "Say that the {noun} is ready",
        "Certainly. The {noun} has been prepared and awaits your kind approval.",
        "Yep, the {noun}'s all set, so swing by and grab it whenever you like!!",
    ),
    (
        "Tell them the {noun} is late",
        "We regret to inform you that the {noun} will be subject to a delay.",
        "Ugh, my bad, looks like the {noun} is gonna show up kinda late, ok?",
    ),
    (
        "Offer to talk about the {noun}",
        "It would be an honour to discuss the {noun} at your convenience.",
        "Wanna chat about the {noun} sometime? Hit me up, I'm around lol!",
    ),
)
# (formal manner, casual manner), appended to the request.
MANNERS = (
    ("in a formal tone", "in a casual tone"),
    ("as a lawyer would", "as a buddy would"),
    ("with great courtesy", "without any fuss"),
    ("for the board of directors", "for my best friend"),
)

VOCAB_SIZE = 512
BOS, EOS, PAD, MESSAGE = "<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

MODEL_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}
WEIGHT_STD = 0.05  # learns in fewer steps than the usual 0.02 at this width


@dataclass(frozen=True, kw_only=True)
class EmbeddedPaths:
    """Where the files are: a Hugging Face folder (model and tokenizer) and two jsonl files."""

    model: str
    train: str
    validation: str


def ensure_embedded(cache_root: str | None = None) -> EmbeddedPaths:
    """Paths of the embedded model and rows, written first where they are not there yet (under 1 s).

    `cache_root` None means $REINFORCER_TP_CACHE, else $XDG_CACHE_HOME/reinforcer_tp, else
    ~/.cache/reinforcer_tp. Several processes may call at once: each writes its own temporary folder
    and the first rename wins.

    Raises:
        ConfigError: the folder cannot be written or has lost files.
    """
    folder = Path(cache_root or default_cache_root()) / f"embedded-{content_version()}"
    if not folder.exists():
        try:
            _write_and_rename(folder)
        except OSError as error:
            raise ConfigError(
                f"cannot write the embedded demo files to {folder} ({error.strerror}); "
                "set REINFORCER_TP_CACHE to a writable folder"
            ) from error
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"the embedded demo folder {folder} has lost {missing}; delete it and start again"
        )
    return EmbeddedPaths(
        model=str(folder / "model"),
        train=str(folder / "train.jsonl"),
        validation=str(folder / "validation.jsonl"),
    )


def default_cache_root() -> Path:
    """$REINFORCER_TP_CACHE, else reinforcer_tp under $XDG_CACHE_HOME or ~/.cache."""
    if os.environ.get("REINFORCER_TP_CACHE"):
        return Path(os.environ["REINFORCER_TP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reinforcer_tp"


def content_version() -> str:
    """Hash of this file: a change of anything below or above takes a new cache folder."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]


def preference_rows(nouns: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows with str keys prompt, chosen, rejected; rows 2i and 2i+1 hold the same two answers.

    Such neighbours differ in the manner asked for and so in which answer is chosen: any even number
    of leading rows is balanced. len(nouns) * 24 rows.
    """
    for manners in MANNERS:
        for request, *answers in REQUESTS:
            for noun in nouns:
                formal, casual = (answer.format(noun=noun) for answer in answers)
                start = request.format(noun=noun)
                yield {
                    "prompt": f"{start} {manners[0]}.\n",
                    "chosen": formal,
                    "rejected": casual,
                }
                yield {
                    "prompt": f"{start} {manners[1]}.\n",
                    "chosen": casual,
                    "rejected": formal,
                }


def build_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Byte-level BPE of VOCAB_SIZE pieces (256 bytes, 4 special tokens, merges counted in `texts`).

    Encodes any text without an unknown token and decodes it to the same text; BOS goes in front.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS, PAD, MESSAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    assert tokenizer.get_vocab_size() == VOCAB_SIZE, tokenizer.get_vocab_size()
    return tokenizer


def model_weights() -> dict[str, np.ndarray]:
    """Hugging Face names -> float32 arrays: norms are 1, matrices uniform with std WEIGHT_STD."""
    weights = {}
    for name, shape in _weight_shapes().items():
        if len(shape) == 1:
            weights[name] = np.ones(shape, dtype=np.float32)
            continue
        # 24 random bits -> exact float32 in [-1, 1); no libm call, so the same bits everywhere.
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        bits = np.random.Philox(key=key).random_raw(int(np.prod(shape))) >> np.uint64(40)
        uniform = bits.astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
        weights[name] = (uniform * np.float32(WEIGHT_STD * 3**0.5)).reshape(shape)
    return weights


def _weight_shapes() -> dict[str, tuple[int, ...]]:
    hidden, ffn = MODEL_CONFIG["hidden_size"], MODEL_CONFIG["intermediate_size"]
    q_size = MODEL_CONFIG["num_attention_heads"] * MODEL_CONFIG["head_dim"]
    kv_size = MODEL_CONFIG["num_key_value_heads"] * MODEL_CONFIG["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, hidden)}
    for layer in range(MODEL_CONFIG["num_hidden_layers"]):
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (q_size, hidden),
            "self_attn.k_proj": (kv_size, hidden),
            "self_attn.v_proj": (kv_size, hidden),
            "self_attn.o_proj": (hidden, q_size),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "mlp.down_proj": (hidden, ffn),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCAB_SIZE, hidden)}


_FILES = (
    "train.jsonl",
    "validation.jsonl",
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
)


def _write_and_rename(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        _write_files(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError:
        if not folder.exists():  # else another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(folder: Path) -> None:
    train, validation = list(preference_rows(TRAIN_NOUNS)), list(preference_rows(HELD_OUT_NOUNS))
    _write_jsonl(folder / "train.jsonl", train)
    _write_jsonl(folder / "validation.jsonl", validation)
    model = folder / "model"
    model.mkdir()
    build_tokenizer(text for row in train for text in row.values()).save(
        str(model / "tokenizer.json")
    )
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": MODEL_CONFIG["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(model / "tokenizer_config.json", tokenizer_config)
    _write_json(model / "config.json", MODEL_CONFIG)
    save_file(model_weights(), model / "model.safetensors", metadata={"format": "pt"})


def _write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
