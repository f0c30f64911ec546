"""Recognize URLs, and hide logins before a URL is shown."""

from __future__ import annotations

import re

HIDDEN_LOGIN = "***@"

# A login ends at the last @ before the path. If the text after its first colon is not a port, the
# login may also hold a slash: a password with an unescaped slash cannot be fetched, only hidden.
_LOGIN = re.compile(r"""(?:(?<=//)|(?<=\w:/)(?!/))(?:[^/\s'"]*@|[^/\s'"@:]+:(?!\d*/)[^\s'"@]*@)+""")

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://|(pipe|file):|(s3|gs|az|hf|https?):/", re.IGNORECASE)


def scheme(location: str) -> str:
    """Return a URL's scheme ("http", "pipe", ...) in lower case, or "" for a local path.

    Of those that are common, one slash is enough: a pathlib.Path has taken the other one out.
    """
    found = _SCHEME.match(location)
    return found[0].rstrip(":/").lower() if found else ""


def without_logins(text: str) -> str:
    """Return the text with ***@ in place of USER:PASSWORD@ in every URL."""
    return _LOGIN.sub(HIDDEN_LOGIN, text)


def shown(url: str) -> str:
    """Return the URL without secrets: ***@ for user and password, and no http query.

    A directory is returned unchanged, so any location may be passed.
    """
    if not scheme(url):
        return url
    url = without_logins(url)
    return url.split("?")[0] if scheme(url) in ("http", "https") else url


def refuse_pipe(url: str, allow_pipe: bool) -> None:
    """Raise ValueError for a pipe: URL, which runs a program, unless allow_pipe is set."""
    if scheme(url) == "pipe" and not allow_pipe:
        raise ValueError(
            f"got {shown(url)!r}, which runs a program; need a URL; do: pass it as a flag"
        )


def refuse_hidden_login(url: str) -> None:
    """Raise ValueError for a URL whose login was replaced by ***@ when it was saved with a run."""
    if HIDDEN_LOGIN in url:
        raise ValueError(
            f"got {shown(url)}, whose user and password were not kept; do: give the URL with them "
            "as a flag"
        )
