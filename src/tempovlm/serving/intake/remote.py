"""Pictures at an address: off by default; then https, named hosts, no redirects, public addresses, few seconds.

The address is resolved once, checked, and connected to as checked, so that a second look-up cannot lead elsewhere.
"""

from __future__ import annotations

import http.client
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from tempovlm.core.units import now_ms, s_from_ms
from tempovlm.serving.errors import ApiError, invalid

PORT = 443
TIMEOUT_MS = 5_000.0
"""The most time for a picture, from the look-up to its last byte."""

_CHUNK = 1 << 16
_PLAIN = re.compile(r"[A-Za-z0-9._~:/?#\[\]@!$&'()*+,;=%-]+")
_NO_NAME = re.compile(r"[@\\]")

Resolve = Callable[[str], Sequence[str]]
"""Returns the addresses of a host."""


def addresses(host: str) -> list[str]:
    """Look a host up."""
    found = socket.getaddrinfo(host, PORT, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(one[4][0]) for one in found))


class _Pinned(http.client.HTTPSConnection):
    """A connection to an address that was checked, for a host whose certificate is."""

    def __init__(self, host: str, address: str, timeout_ms: float, context: ssl.SSLContext) -> None:
        super().__init__(host, PORT, timeout=s_from_ms(timeout_ms), context=context)
        self._address, self._secure = address, context

    def connect(self) -> None:
        """Connect without another look-up."""
        plain = socket.create_connection((self._address, PORT), self.timeout)
        self.sock = self._secure.wrap_socket(plain, server_hostname=self.host)


def split(url: str, hosts: Sequence[str], param: str) -> tuple[str, str]:
    """Return host and path of an address that may be asked.

    Raises:
        ApiError: remote pictures are off, or it is not https, of another host, or of another form.
    """
    if not hosts:
        raise invalid(
            "pictures are not fetched by this server; send a data URL, such as data:image/png;base64,iVBORw0…",
            param,
            "invalid_image_url",
        )
    if not _PLAIN.fullmatch(url) or not url.startswith("https://"):
        raise invalid("the picture's address must begin with https:// or data:", param, "invalid_image_url")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port, parts = "", None, urlsplit("")
    if _NO_NAME.search(parts.netloc) or port not in (None, PORT) or host not in [one.lower() for one in hosts]:
        raise invalid("the picture's host is not one that this server may ask", param, "invalid_image_url")
    return host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def public_address(host: str, resolve: Resolve, param: str) -> str:
    """Return the first address of a host whose addresses are all public.

    Raises:
        ApiError: it cannot be looked up, or one of them is private, local or reserved.
    """
    try:
        found = [ipaddress.ip_address(one.partition("%")[0]) for one in resolve(host)]
    except (OSError, ValueError):
        found = []
    if not found:
        raise invalid("the picture's host cannot be found", param, "invalid_image_url")
    for one in found:
        inner = getattr(one, "ipv4_mapped", None) or getattr(one, "sixtofour", None) or one
        if not (one.is_global and inner.is_global) or inner.is_multicast:
            raise invalid("the picture's host has an address that is not public", param, "invalid_image_url")
    return str(found[0])


def fetch(url: str, hosts: Sequence[str], most_bytes: int, param: str, resolve: Resolve = addresses) -> bytes:
    """Fetch a picture.

    Raises:
        ApiError: it may not be asked for, is too large or takes too long, or the answer is not 200.
    """
    host, path = split(url, hosts, param)
    end_ms = now_ms() + TIMEOUT_MS
    address = public_address(host, resolve, param)
    connection = _Pinned(host, address, TIMEOUT_MS, ssl.create_default_context())
    try:
        connection.request("GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
        reply = connection.getresponse()
        if reply.status != http.client.OK:
            message = f"the picture's host answered {reply.status}; redirects are not followed"
            raise invalid(message, param, "invalid_image_url")
        data = bytearray()
        while chunk := reply.read(_CHUNK):
            data += chunk
            if len(data) > most_bytes:
                raise ApiError(400, "image_too_large", "the picture at that address is too large", param)
            if now_ms() > end_ms:
                raise TimeoutError
        return bytes(data)
    except (OSError, http.client.HTTPException):
        raise invalid("the picture could not be fetched in time", param, "invalid_image_url") from None
    finally:
        connection.close()
