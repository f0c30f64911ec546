"""What a URL is, and what of it may be shown."""

from __future__ import annotations

import re


def scheme(location: str) -> str:
    """ "http", "pipe" ... of a URL in lower case; "" of a local path."""
    found = re.match(r"([a-z][a-z0-9+.-]*)://|(pipe|file):", location, re.IGNORECASE)
    return (found[1] or found[2]).lower() if found else ""


def shown(url: str) -> str:
    """The URL without what may be secret: user and password, and an http query."""
    url = re.sub(r"//[^/@]*@", "//", url)
    return url.split("?")[0] if scheme(url) in ("http", "https") else url


def refuse_pipe(url: str, allow_pipe: bool) -> None:
    """ValueError for a pipe: URL, which runs a program, unless the command line named it."""
    if scheme(url) == "pipe" and not allow_pipe:
        raise ValueError(f"got {url!r}, which runs a program; need a URL; do: pass it as a flag")
