"""Media of the network: what is fetched, and what never is."""

import shutil
import ssl
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from phi4mm_jax import MediaError
from phi4mm_jax.serve import remote_media
from phi4mm_jax.serve.remote_media import Fetcher, is_public


class Site(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            return self.answer(302, b"", Location="/found")
        if self.path.startswith("/to/"):
            return self.answer(302, b"", Location=self.path[len("/to/") :])
        if self.path == "/loop":
            return self.answer(302, b"", Location="/loop")
        if self.path in ("/slow", "/slow_body"):
            if self.path == "/slow_body":
                self.send_response(200)
                self.end_headers()
            for _ in range(400):
                self.wfile.write(b"H")
                time.sleep(0.05)
            return None
        if self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"x" * 5000)
            return None
        if self.path == "/cut":
            return self.answer(200, b"abc", length=9)
        return self.answer(200 if self.path == "/found" else 404, b"the content")

    def answer(self, status, content, length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module", params=["http", "https"])
def served(request, tmp_path_factory):
    """URL of a site, and what fetches from it."""
    server, context = ThreadingHTTPServer(("127.0.0.1", 0), Site), ssl.create_default_context()
    if request.param == "https":
        if shutil.which("openssl") is None:
            pytest.skip("openssl is not installed, which makes a certificate (Debian: apt install openssl)")
        path = tmp_path_factory.mktemp("tls") / "certificate.pem"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=site",
             "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", path, "-out", path.with_suffix(".crt")],
            check=True, capture_output=True,
        )  # fmt: skip
        own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        own.load_cert_chain(path.with_suffix(".crt"), path)
        server.socket = own.wrap_socket(server.socket, server_side=True)
        context.load_verify_locations(path.with_suffix(".crt"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield (
        f"{request.param}://127.0.0.1:{server.server_port}",
        Fetcher(max_bytes=1000, allowed=lambda address: address == "127.0.0.1", context=context),
    )
    server.shutdown()
    server.server_close()


def test_content_and_redirects(served):
    site, fetch = served
    thrice = f"{site}/to/{site}/to/{site}/moved"
    for url in (f"{site}/found", f"{site}/moved", thrice):
        assert fetch("image", url, 9) == b"the content"


@pytest.mark.parametrize(("path", "cause"), [
    ("/nothing", "answers 404"), ("/loop", "more than 3 redirects"), ("/endless", "more than 1000 bytes"),
    ("/cut", "ends before its announced length|IncompleteRead"), ("/to/http://127.0.0.2/", "127.0.0.2, which is no "),
    ("/to/file:///etc/passwd", "only http and https"), ("/slow", "takes longer than the 1 seconds"),
    ("/slow_body", "takes longer than the 1 seconds"),
])  # fmt: skip
def test_what_is_not_fetched(served, path, cause):
    (site, fetch), began = served, time.monotonic()
    with pytest.raises(MediaError, match=cause):
        fetch("image", site + path, 1.0)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("url", [
    "http://localhost/", "http://127.0.0.1/", "http://[::1]/", "http://2130706433/", "http://0/", "http://0x7f.1/",
    "http://[::ffff:127.0.0.1]/", "http://10.0.0.1/", "http://169.254.169.254/latest/meta-data/", "ftp://example.org/",
    "http://user:word@127.0.0.1/", "http:///", "http://[fe80::1]/", "http://[64:ff9b::7f00:1]/", "http://a b/",
])  # fmt: skip
def test_addresses_of_this_host_and_its_networks(url):
    """However an address is written; a name is looked up before its address is judged."""
    with pytest.raises(MediaError):
        Fetcher(max_bytes=1000)("image", url, 2.0)


def test_a_name_with_any_private_address_is_refused(monkeypatch):
    found = [(None, None, None, "", (address, 80)) for address in ("127.0.0.1", "10.0.0.1")]
    monkeypatch.setattr(remote_media.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(MediaError, match=r"site is 10\.0\.0\.1, which is no public address"):
        Fetcher(max_bytes=1000, allowed=lambda address: address == "127.0.0.1")("image", "http://site/", 2.0)


def test_public_addresses():
    private = ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
               "224.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "240.0.0.1", "::", "::1", "fe80::1%eth0",
               "fc00::1", "ff02::1", "::ffff:10.0.0.1", "::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:a00:1::",
               "2001:0:4136:e378::1", "2001:db8::1"]  # fmt: skip
    assert [address for address in private if is_public(address)] == []
    assert all(map(is_public, ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"]))
