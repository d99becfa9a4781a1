"""A TLS relay that keeps in plaintext what clients send: it stands where the coordinator stands for them."""

import base64
import socket
import ssl
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

WINDOW = 16  # characters of a sentence that must not cross


class Recorder:
    """What has been sent to the coordinator, one byte string a connection."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._streams: list[bytearray] = []

    def stream(self) -> bytearray:
        """Begin a new connection."""
        self._streams.append(bytearray())
        return self._streams[-1]

    def total(self) -> int:
        """How many bytes were sent."""
        return sum(map(len, self._streams))

    def clear(self) -> None:
        """Forget what connections have sent so far; they go on."""
        for stream in self._streams:
            del stream[:]

    def find(self, texts: Iterable[str]) -> list[str]:
        """Every piece of ``WINDOW`` characters of the texts that was sent, in any of the usual encodings."""
        haystacks = [bytes(stream) for stream in self._streams]
        pieces = {text[i : i + WINDOW] for text in texts for i in range(max(1, len(text) - WINDOW + 1))}
        return sorted(p for p in pieces if any(form in hay for form in encodings(p) for hay in haystacks))


def encodings(text: str) -> set[bytes]:
    """A text as UTF-8, UTF-16 (both orders), hex, and base64 at each of its three alignments."""
    raw = text.encode()
    shifted = (base64.b64encode(b"x" * shift + raw)[4 * (shift > 0) : -4] for shift in range(3))
    return {raw, text.encode("utf-16-le"), text.encode("utf-16-be"), raw.hex().encode(), *shifted}


@contextmanager
def recording(target_port: int, certificate: str, authority: str) -> Iterator[Recorder]:
    """Relay TLS connections to ``target_port`` on the loopback, for as long as the block lasts."""
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server_side.load_cert_chain(certificate)
    client_side = ssl.create_default_context(cafile=authority)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        recorder = Recorder(listener.getsockname()[1])

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=relay, args=(connection,), daemon=True).start()

        def relay(connection: socket.socket) -> None:
            with suppress(OSError):
                inner = server_side.wrap_socket(connection, server_side=True)
                outer = client_side.wrap_socket(
                    socket.create_connection(("127.0.0.1", target_port)), server_hostname="127.0.0.1"
                )
                threading.Thread(target=pump, args=(outer, inner, None), daemon=True).start()
                pump(inner, outer, recorder.stream())

        threading.Thread(target=serve, daemon=True).start()
        yield recorder


def pump(source: ssl.SSLSocket, sink: ssl.SSLSocket, kept: bytearray | None) -> None:
    """Copy one direction until it ends."""
    with suppress(OSError), source, sink:
        while data := source.recv(65536):
            if kept is not None:
                kept += data
            sink.sendall(data)
