"""Checks within seconds that a server answers at the address of a store.

The store's client retries for minutes, which is right for a run but not for a mistyped address. So the address is read
from the client's own settings, and one connection is tried. Nothing is sent.
"""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from ..errors import RecipeError, safe_text

SECONDS = 2


def refuse_unreachable(url: str) -> None:
    """Raise RecipeError if no server accepts a connection for the store `url`; checked for s3 and gs URLs only."""
    address = endpoint(url)
    if address is None:
        return
    parts = urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme in getproxies() and not proxy_bypass(host):
        return  # only the proxy can reach it
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((host, port), SECONDS).close()
    except (OSError, ValueError):
        setting = "STORAGE_EMULATOR_HOST" if url.startswith("g") else "AWS_ENDPOINT_URL"
        raise RecipeError(
            f"store {safe_text(url)}: nothing answers at {safe_text(address)}; check {setting}, the network, "
            "and the server"
        ) from None


def endpoint(url: str) -> str | None:
    """The server that the client of `url` connects to; None if there is none, or it is not known."""
    kind = urlsplit(url).scheme
    if kind in ("gs", "gcs"):
        emulator = os.environ.get("STORAGE_EMULATOR_HOST", "")
        return (
            (emulator if "://" in emulator else f"http://{emulator}") if emulator else "https://storage.googleapis.com"
        )
    if kind not in ("s3", "s3a"):
        return None
    import botocore.exceptions
    import botocore.session

    try:
        session = botocore.session.Session()
        client = session.create_client("s3", aws_access_key_id="none", aws_secret_access_key="none")
    except (botocore.exceptions.BotoCoreError, ValueError):
        return None  # the store's own check reports what is wrong with the settings
    return str(client.meta.endpoint_url)
