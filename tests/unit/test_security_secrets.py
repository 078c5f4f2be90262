"""Secrets are taken out of what is printed and written; files are private."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reinforcer_tp.secrecy import holds_secret, redact

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "HF_TOKEN": "plain-value-1",
    "HUGGING_FACE_HUB_TOKEN": "plain-value-1-and-more",
    "WANDB_API_KEY": "a/b+c=d e",
    "AWS_SECRET_ACCESS_KEY": "line\nbreak-secret",
    "MLFLOW_TRACKING_PASSWORD": "correct horse",
    "HTTPS_PROXY": "http://me:proxy-password@proxy:3128",
    "MY_TOKEN": "short",
    "PASSWORD_STORE_DIR": "/tmp",
    "PATH": "/usr/bin-not-secret",
    "TOKENIZERS_PARALLELISM": "false-not-secret",
}


@pytest.mark.parametrize(
    "secret",
    [
        "plain-value-1",
        "plain-value-1-and-more",
        "a/b+c=d e",
        "a%2Fb%2Bc%3Dd%20e",
        "a%2Fb%2Bc%3Dd+e",
        "line\nbreak-secret",
        r"line\nbreak-secret",
        "correct horse",
        "proxy-password",
        "hf_abcdefghijklmnopqrst",
        "AKIAABCDEFGHIJKLMNOP",
    ],
)
def test_values_of_the_environment_and_of_known_forms_go(secret):
    text = f"before {secret} after"
    assert redact(text, ENVIRONMENT) == "before *** after"
    assert holds_secret(text, ENVIRONMENT)


def test_a_secret_that_a_message_cuts_goes_too():
    secret = "0123456789abcdefghij"
    for length in range(10, 21):
        cut = f"got {secret[:length]}... (rank 0), {secret}{secret}"
        assert redact(cut, {"X_TOKEN": secret}) == "got ***... (rank 0), ******"
    assert redact("01234567", {"X_TOKEN": secret}) == "01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:pw@host:1/x", "https://***@host:1/x"),
        ("s3://KEY@bucket", "s3://***@bucket"),
        ("https://h/x?a=1&access_token=abc&b=2", "https://h/x?a=1&access_token=***&b=2"),
        ("https://h/x?X-Amz-Signature=abc", "https://h/x?X-Amz-Signature=***"),
        ("Authorization: Bearer abcdefghij", "Authorization: Bearer ***"),
        ("git+ssh://me:pw@h and http://u:p@g", "git+ssh://***@h and http://***@g"),
    ],
)
def test_credentials_in_urls_go(text, expected):
    assert redact(text, {}) == expected


@pytest.mark.parametrize(
    "text",
    [
        "short words, /tmp/x, /usr/bin-not-secret, false-not-secret",
        "https://huggingface.co/a/b?revision=main",
        "mail me@host.org about user:pw",
        "step 3: loss 0.69 (token 12, key 4)",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "<|im_start|>assistant",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text, ENVIRONMENT) == text


COMMANDS = {
    "train": ["reinforcer_tp/train.py"],
    "selftest": ["-m", "reinforcer_tp.selftest"],
    "reference": ["-m", "reinforcer_tp.reference"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("argument", ["--canary-of-42", "dpo.seed=canary-of-42", "canary-of-42"])
def test_errors_about_arguments_do_not_repeat_secrets(command, argument, tmp_path):
    environment = os.environ | {"SOME_API_KEY": "canary-of-42"}
    done = subprocess.run(
        [sys.executable, *COMMANDS[command], *(["inspect"] if command == "reference" else []),
         argument],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "canary-of-42" not in done.stdout + done.stderr
    assert "error" in done.stderr


@pytest.mark.parametrize("module", ["train", "selftest.__main__", "reference.__main__"])
def test_the_commands_create_private_files(module, tmp_path):
    code = (
        f"from reinforcer_tp.{module} import main\n"
        "import contextlib\n"
        "with contextlib.suppress(SystemExit, Exception):\n"
        "    main(['--help'])\n"
        f"open({str(tmp_path / 'file')!r}, 'w').close()\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120,
                   capture_output=True)  # fmt: skip
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600
