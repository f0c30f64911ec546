"""What a URL is, and what of it may be shown."""

from __future__ import annotations

import re

HIDDEN_LOGIN = "***@"

# A login ends at the last @ before the path. Where what follows its first colon is no port, a
# password with an unescaped slash is taken for one too, for nobody could fetch that anyway.
_LOGIN = re.compile(r"""(?<=//)(?:[^/\s'"]*@|[^/\s'"@:]+:(?!\d*/)[^\s'"@]*@)+""")


def scheme(location: str) -> str:
    """ "http", "pipe" ... of a URL in lower case; "" of a local path."""
    found = re.match(r"([a-z][a-z0-9+.-]*)://|(pipe|file):", location, re.IGNORECASE)
    return (found[1] or found[2]).lower() if found else ""


def without_logins(text: str) -> str:
    """The text with ***@ for the USER:PASSWORD@ of every URL in it."""
    return _LOGIN.sub(HIDDEN_LOGIN, text)


def shown(url: str) -> str:
    """The URL without what may be secret: ***@ for user and password, and no http query.

    Directories are what they were, so that any location may be passed through.
    """
    if not scheme(url):
        return url
    url = without_logins(url)
    return url.split("?")[0] if scheme(url) in ("http", "https") else url


def refuse_pipe(url: str, allow_pipe: bool) -> None:
    """ValueError for a pipe: URL, which runs a program, unless the command line named it."""
    if scheme(url) == "pipe" and not allow_pipe:
        raise ValueError(
            f"got {shown(url)!r}, which runs a program; need a URL; do: pass it as a flag"
        )


def refuse_hidden_login(url: str) -> None:
    """ValueError for a URL as it is kept with a run, whose login was left out."""
    if HIDDEN_LOGIN in url:
        raise ValueError(
            f"got {shown(url)}, whose user and password were not kept; do: give the URL with them "
            "as a flag"
        )
