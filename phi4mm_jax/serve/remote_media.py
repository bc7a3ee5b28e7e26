"""Media fetched from the network for a client, who must not reach with them what only the server can.

The name is resolved once and the connection goes to that address, so that no second answer of the resolver counts.
Every redirect is checked anew. No proxy is used.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from urllib.parse import urljoin, urlsplit

from phi4mm_jax.errors import MediaError

_REDIRECTS = 3
_BLOCK = 1 << 16
_PORTS = {"http": 80, "https": 443}
_EMBEDDING = [  # IPv6 networks whose addresses stand for ones of IPv4
    ipaddress.ip_network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")
]


def is_public(address: str) -> bool:
    """Return whether an address is one of the public internet: not of this host, its networks or the provider's."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        elif any(ip in network for network in _EMBEDDING):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


@dataclass(frozen=True)
class Fetcher:
    """Downloads media of http and https URLs.

    Attributes:
        max_bytes: of a medium.
        allowed: tells whether an address may be connected to.
    """

    max_bytes: int
    allowed: Callable[[str], bool] = is_public
    context: ssl.SSLContext = field(default_factory=ssl.create_default_context)

    def __call__(self, where: str, url: str, seconds: float) -> bytes:
        """Return the content.

        Args:
            seconds: for all of it, redirects included.

        Raises:
            MediaError: it is not allowed, too large, too slow or not there; it begins with `where`.
        """
        end = time.monotonic() + seconds
        for _ in range(_REDIRECTS + 1):
            try:
                content, target = self._get(url, end)
                if time.monotonic() >= end:  # the end of the connection may look like that of the content
                    raise TimeoutError
            except (OSError, http.client.HTTPException, ValueError) as error:
                if time.monotonic() >= end:
                    cause = f"takes longer than the {seconds:.3g} seconds that are left"
                else:
                    cause = f"cannot be fetched ({error or type(error).__name__})"
                raise MediaError(f"{where} is {url!r:.200}, which {cause}; pass its bytes as a data URL") from error
            if target is None:
                return content
            url = urljoin(url, target)
        raise MediaError(f"{where} is {url!r:.200}, reached by more than {_REDIRECTS} redirects; pass the last URL")

    def _get(self, url: str, end: float) -> tuple[bytes, str | None]:
        """Return the content, or where it has moved to."""
        parts = urlsplit(url)
        if parts.scheme not in _PORTS or not parts.hostname or parts.username is not None:
            raise ValueError("only http and https URLs without a user's name are fetched")
        port = parts.port or _PORTS[parts.scheme]
        # TLS takes the socket away from `plain`; the handle stays on the connection
        with closing(self._connect(parts.hostname, port, end)) as plain, closing(plain.dup()) as handle:
            watch = threading.Timer(max(end - time.monotonic(), 0), _shut, [handle])  # however slowly bytes come
            watch.daemon = True
            watch.start()
            try:
                secure = parts.scheme == "https"
                opened = self.context.wrap_socket(plain, server_hostname=parts.hostname) if secure else plain
                with closing(opened):
                    connection = http.client.HTTPConnection(parts.hostname, port)
                    connection.sock = opened
                    target = parts._replace(scheme="", netloc="", fragment="").geturl() or "/"
                    headers = {"Accept-Encoding": "identity", "User-Agent": "phi4mm-jax", "Connection": "close"}
                    connection.request("GET", target, headers=headers)
                    return self._read(connection.getresponse())
            finally:
                watch.cancel()

    def _connect(self, host: str, port: int, end: float) -> socket.socket:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if refused := [address for address in addresses if not self.allowed(address)]:
            raise ValueError(f"{host} is {refused[0]}, which is no public address")
        return socket.create_connection((addresses[0], port), timeout=max(end - time.monotonic(), 0.01))

    def _read(self, response: http.client.HTTPResponse) -> tuple[bytes, str | None]:
        if response.status in (301, 302, 303, 307, 308) and (target := response.getheader("Location")):
            return b"", target
        if response.status != 200:
            raise ValueError(f"the server answers {response.status}")
        announced = response.getheader("Content-Length", "")
        content = bytearray()
        if not (announced.isdecimal() and int(announced) > self.max_bytes):
            while block := response.read(min(_BLOCK, self.max_bytes + 1 - len(content))):
                content += block
                if len(content) > self.max_bytes:
                    break
            else:
                if announced.isdecimal() and len(content) < int(announced):
                    raise ValueError("it ends before its announced length")
                return bytes(content), None
        raise ValueError(f"it has more than {self.max_bytes} bytes")


def _shut(opened: socket.socket) -> None:
    try:
        opened.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it is closed
