"""Secrets stay out of what a run prints and writes, and its files are its user's alone."""

import argparse
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import takewhile
from typing import NoReturn
from urllib.parse import quote, quote_plus

HIDDEN = "***"
MIN_LENGTH = 8  # of a value; shorter ones are words
# Variables whose value is one, and parts of a URL or of a text that are one by their form.
_NAME = re.compile(
    r"TOKEN$|PASSW|PASSPHRASE|SECRET|CREDENTIAL|_PAT$|_PWD$|AUTHORIZATION"
    r"|(?:API|ACCESS|PRIVATE|AUTH|ACCOUNT|SIGNING|LICENSE)_?KEY$",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"\b([a-z][a-z0-9+.-]{1,20}://)([^\s/@'\"]+)@", re.IGNORECASE)
_QUERY = re.compile(
    r"([?&](?:[a-z_-]*(?:token|key|secret|password|signature|credential)|sig|auth)=)[^&\s'\"]+",
    re.IGNORECASE,
)
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[opsu]_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\bglpat-[\w-]{16,}|\bsk-[A-Za-z0-9_-]{20,}|\bxox[abp]-[\w-]{10,}"
    r"|(?<=Bearer )[\w.~+/-]{8,}=*|(?<=Basic )[A-Za-z0-9+/]{8,}=*"
)


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with *** for values of secret-looking environment variables and for credentials."""
    variables = os.environ if environment is None else environment
    values = _secret_values(tuple(variables.items()))
    for value in values:
        text = text.replace(value, HIDDEN)
    for value in values:
        text = _without_part(text, value)
    text = _USERINFO.sub(rf"\g<1>{HIDDEN}@", text)
    text = _QUERY.sub(rf"\g<1>{HIDDEN}", text)
    return _FORMS.sub(HIDDEN, text)


def _without_part(text: str, secret: str) -> str:
    """Without what is left of it where a message was cut, from its first half on."""
    start = secret[: max(MIN_LENGTH, len(secret) // 2)]
    position = text.find(start)
    while position >= 0:
        pairs = zip(text[position:], secret, strict=False)
        length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        text = text[:position] + HIDDEN + text[position + length :]
        position = text.find(start, position + len(HIDDEN))
    return text


def holds_secret(text: str, environment: Mapping[str, str] | None = None) -> bool:
    return redact(text, environment) != text


@lru_cache(maxsize=4)  # every text of a configuration asks
def _secret_values(variables: tuple[tuple[str, str], ...]) -> list[str]:
    """Longest first, so that none is left in part; also as a URL, a repr or JSON spells them."""
    found = set()
    for name, value in variables:
        password = _password(value)
        for secret in filter(None, (value if _NAME.search(name) else None, password)):
            secret = secret.strip()
            if len(secret) >= MIN_LENGTH and not _is_path(secret):
                found |= {secret, quote(secret, safe=""), quote_plus(secret), repr(secret)[1:-1]}
    return sorted(found, key=len, reverse=True)


def _password(value: str) -> str | None:
    match = _USERINFO.search(value)
    return match[2].partition(":")[2] if match else None


def _is_path(value: str) -> bool:
    """Variables such as PASSWORD_STORE_DIR and X_TOKEN name files, too."""
    return value.startswith(("/", "~/")) and os.path.exists(os.path.expanduser(value))


class RedactingParser(argparse.ArgumentParser):
    """Its errors repeat arguments."""

    def error(self, message: str) -> NoReturn:
        super().error(redact(message))


def make_files_private() -> None:
    """What this process and its children create from now on, only their user can read."""
    os.umask(0o077)
