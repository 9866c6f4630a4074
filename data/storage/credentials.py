"""Credentials inside URLs: where they are refused, and how text is cleaned of them before it is shown.

The one idea is one rule for both. A URL holds a secret if it has user information before its host (with a scheme or,
if a password is in it, without one), or a parameter whose
name smells of a secret (token, passwd, x-api-key, sig ...), in its query or its fragment; in plain text or
percent-encoded, and in any of several chained URLs. Imports only the standard library, as error messages need it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote

_NAME = re.compile(
    r"secret|passw|(?<![a-z])(?:user|db)?pass(?:phrase|code|key)?(?![a-z])|pwd|credential|creds(?![a-z])|signature|hmac|bearer|jwt|cookie|"
    r"token(?!iz)|session|auth(?!or(?!i[sz]))|private|(?<![a-z])(?:sig|sas|otp)(?![a-z])|"
    r"(?:(?<![a-z])|api|access|account|private|shared|subscription|function|client|user|master|storage|app|service|"
    r"ssh|encryption|license|pair)[_-]?keys?(?:id)?(?![a-z])|^code$"
)
# The container of Azure's abfs://CONTAINER@ACCOUNT.dfs.core.windows.net stands where others have a user.
_SCHEME = r"(?<![a-z0-9+.-])(?!(?:abfss?|wasbs?)://[\w$-]+@\w+\.(?:dfs|blob)\.)([a-z][a-z0-9+.-]*://)(?!/)"
_USER = re.compile(rf"{_SCHEME}[^/?#\n]*@", re.IGNORECASE)
_USER_IN_TEXT = re.compile(rf"{_SCHEME}(?:[^/?#\s:]*:(?!\s)[^/?#\n]*|[^/?#\s]*)@", re.IGNORECASE)
# A password with / ? or # in it: what follows the colon is not a port.
_ODD_USER = re.compile(rf"{_SCHEME}[^/@?#:\n\[]*:(?![:{{]|\d{{1,5}}(?:[/?#]|$))[^@\n]*@", re.IGNORECASE)
# Without a scheme: //user:password@host, and user:password@host:/path as scp and rsync write it.
_BARE_USER = re.compile(
    r"(?<![^\s'\"(=,;\[{])(?:(//)[^\s/?#@:]*:[^\s/?#@]*@|()[\w.+%-]+:(?![/:\s])[^\s@'\"]+@(?=\[?[\w.:-]+\]?[:/]))"
)
_PARAMETER = re.compile(r"([?&;#])([^=&;?#\s'\"]{1,100})=(?=[^&;#\s'\"])")
_VALUE = re.compile(r"[^&;#\s'\"]+")
_HEADER = re.compile(r"authorization\s*[:=]\s*\S|bearer\s+\S{6}", re.IGNORECASE)  # of a command such as curl


def is_secret_name(name: str) -> bool:
    """Whether a parameter or a variable of this name holds a secret, as far as its name says."""
    return bool(_NAME.search(name.lower()))


def holds_secret(text: str) -> bool:
    """Whether a value is a URL with credentials, several chained ones, or a command with them."""
    return any(map(_count, _forms(text)))


def without_user(url: str) -> str:
    """A URL safe to show: without user information, and without its parameters if one of them is a secret."""
    url = _readable_form(url)
    for pattern in (_USER, _ODD_USER):
        url = pattern.sub(r"\1", url)
    url = _BARE_USER.sub(r"\1", url)
    secret = next((each for each in _PARAMETER.finditer(url) if is_secret_name(each[2])), None)
    if secret:
        url = url[: min(at for at in (url.find(sign) for sign in "?#;&") if at >= 0)]
    return "(a command)" if _HEADER.search(url) else url


def masked(text: str) -> str:
    """A message in which the credentials of URLs are replaced by ***."""
    text = _readable_form(text)
    for pattern in (_USER_IN_TEXT, _ODD_USER):
        text = pattern.sub(r"\1***@", text)
    text = _BARE_USER.sub(r"\1***@", text)
    found, end = [], 0
    for each in _PARAMETER.finditer(text):
        value = _VALUE.match(text, each.end())
        if is_secret_name(each[2]) and value:
            found += [text[end : each.end()], "***"]
            end = value.end()
    return "".join([*found, text[end:]])


def _forms(text: str) -> Iterator[str]:
    """The text as it stands and as it reads when percent signs are decoded, up to three times."""
    for _ in range(4):
        yield text
        decoded = unquote(text)
        if decoded == text:
            return
        text = decoded


def _readable_form(text: str) -> str:
    """The form in which the secrets of a text can be seen: as it stands, unless a decoded form shows more of them."""
    return max(_forms(text), key=_count)


def _count(text: str) -> int:
    named = sum(is_secret_name(each[2]) for each in _PARAMETER.finditer(text))
    return named + sum(len(pattern.findall(text)) for pattern in (_USER, _ODD_USER, _BARE_USER, _HEADER))
