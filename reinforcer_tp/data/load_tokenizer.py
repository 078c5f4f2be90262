"""The tokenizer of a folder or a hub id, and a chat template given by hand."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from reinforcer_tp.data.hub import hub_problem, looks_like_path, one_line


def load_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder or a hub id, without code from either.

    `chat_template`: Jinja text, or the path of a .jinja file; None keeps the tokenizer's own.
    ValueError in one line where there is no such tokenizer or template.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and (looks_like_path(name) or folder.exists()):
        raise ValueError(
            f"the tokenizer {name} is no folder; expected one with tokenizer files, or a hub id"
        )
    problem = None if folder.is_dir() else hub_problem(name, "model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if folder.is_dir() else name,
            trust_remote_code=False,
            local_files_only=problem is not None,
        )
    except Exception as error:  # the edge to files and network that others wrote
        raise ValueError(
            f"the tokenizer {name} cannot be loaded: {problem or one_line(error)}; check "
            "policy.model_name and policy.tokenizer.name"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    return tokenizer


def read_chat_template(value: str) -> str:
    """Jinja text as it is, or the text of a .jinja file."""
    if "{" in value:
        return value
    path = Path(value).expanduser()
    if path.suffix != ".jinja" or not path.is_file():
        raise ValueError(
            f"policy.tokenizer.chat_template={value}: expected Jinja text or the path of a .jinja "
            "file"
        )
    return path.read_text(encoding="utf-8")
