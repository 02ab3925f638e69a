"""Reaches a server step by step, so that it shows which of them fails: name, port, TLS."""

import socket
import ssl
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.parse import urlsplit
import urllib.request


class Address(NamedTuple):
    """Where a server is."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> "Address":
        """Return the address in a URL."""
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        return cls(parts.scheme, parts.hostname or "", port)

    def proxy(self) -> str | None:
        """Return the proxy that the environment puts between, without its password, or None."""
        url = urllib.request.getproxies().get(self.scheme)
        if url is None or urllib.request.proxy_bypass(self.host):
            return None
        return urlsplit(url).hostname or url.rpartition("@")[2]

    def resolve(self) -> list[str]:
        """Return the addresses of the name.

        :raises OSError: when it has none.
        """
        found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        return sorted({str(each[4][0]) for each in found})

    def connect(self, timeout: float) -> socket.socket:
        """Return a connection.

        :raises OSError: when nobody answers.
        """
        return socket.create_connection((self.host, self.port), timeout)

    def certificate(self, timeout: float, ca_bundle: str) -> str:
        """Return until when the server's certificate is valid, which is trusted.

        :raises OSError: as an `ssl.SSLError` when it is not, or when there is no TLS.
        """
        context = ssl.create_default_context(cafile=ca_bundle)
        with (
            self.connect(timeout) as connection,
            context.wrap_socket(connection, server_hostname=self.host) as secured,
        ):
            return str((secured.getpeercert() or {}).get("notAfter", ""))


def fetch(url: str, timeout: float, ca_bundle: str, size: int) -> tuple[int, bytes]:
    """Return the status and up to `size` bytes of the answer to a GET without any credentials.

    :raises OSError: when there is none.
    """
    context = ssl.create_default_context()
    context.load_verify_locations(ca_bundle)
    try:
        with urllib.request.urlopen(url, timeout=timeout, context=context) as answer:
            return answer.status, answer.read(size)
    except HTTPError as error:
        with error:
            return error.code, b""
