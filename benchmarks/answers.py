"""What models answer: each prompt, and below it the answer of each model folder.

    python -m benchmarks.answers --prompt TEXT [--prompt TEXT ...] FOLDER [FOLDER ...]

Greedy, through the chat template of each folder, by transformers. Reads local folders only.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from reinforcer_tp.data.tokenizer import load_tokenizer
from reinforcer_tp.hf_files import read_config


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.answers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--prompt", action="append", required=True, help="may be given again")
    parser.add_argument("--max-new-tokens", type=int, default=96, help="an answer's length")
    args = parser.parse_args(argv)
    disable_progress_bar()
    try:
        answers = [answer(folder, args.prompt, args.max_new_tokens) for folder in args.folders]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for number, prompt in enumerate(args.prompt):
        print(f"prompt: {prompt}")
        for folder, texts in zip(args.folders, answers, strict=True):
            print(f"  {folder}:")
            print("\n".join(f"    {line}" for line in texts[number].splitlines()))
    return 0


def answer(folder: Path, prompts: list[str], max_new_tokens: int) -> list[str]:
    """The model's answer to each prompt, up to its end of turn; "..." where it was cut off.

    ValueError: no model folder, one that asks for code, or one without a chat template.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; expected one with a model")
    read_config(folder)  # refuses code, and kinds of models that are not ours
    tokenizer = load_tokenizer(str(folder))
    if not tokenizer.chat_template:
        raise ValueError(f"{folder} has no chat template; expected the folder of a chat model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto"
    ).to(device)
    return [_generate(model, tokenizer, prompt, max_new_tokens) for prompt in prompts]


def _generate(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    ).to(model.device)
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[0]
    ids = ids[inputs["input_ids"].shape[1] :].tolist()
    is_whole = len(ids) < max_new_tokens or ids[-1] == tokenizer.eos_token_id
    return tokenizer.decode(ids, skip_special_tokens=True).strip() + ("" if is_whole else " ...")


if __name__ == "__main__":
    sys.exit(main())
