"""A small random Llama, its tokenizer and raw-text preference rows, made without any download."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = (
    "the a cat dog bird river stone house runs sleeps sings quickly slowly under over near "
    "green small bright never always because although please sorry thanks question answer"
)


def make_random_llama(folder: Path, seed: int = 0, **config) -> str:
    """Write config.json, model.safetensors and the tokenizer; return the folder's name.

    Awkward on purpose: five layers, grouped queries, an untied head, a vocabulary that no
    parallel size divides, norm weights that are not 1; `config` overrides any of it.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    shape = {
        "vocab_size": len(tokenizer) // 2 * 2 + 1,  # odd: padded under tensor parallelism
        "hidden_size": 48,
        "intermediate_size": 100,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "attention_dropout": 0.0,
    }
    model = LlamaForCausalLM(LlamaConfig(**(shape | config))).float()
    with torch.no_grad():
        for parameter in model.parameters():
            mean, std = (1.0, 0.1) if parameter.dim() == 1 else (0.0, 0.1)
            parameter.normal_(mean, std)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that puts `<s>` in front of raw text by default, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["prompt"] + row["chosen"] for row in make_rows(64)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=256
    )


def make_rows(count: int, seed: int = 1) -> list[dict]:
    """Rows of raw text, both sides of different lengths; some borders fall inside a token."""
    source = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(source.choices(WORDS.split(), k=source.randint(low, high)))

    rows = []
    for index in range(count):
        prompt = words(2, 12) + source.choice([" ", ": ", "\n", " th"])
        row = {"prompt": prompt, "chosen": words(1, 9), "rejected": words(1, 9) + "."}
        if index % 4 == 3:
            row["weight"] = source.choice([0.0, 0.5, 2.0])
        rows.append(row)
    return rows


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)
