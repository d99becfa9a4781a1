"""A TLS relay that keeps in plaintext what clients send: it stands where the coordinator stands for them."""

import asyncio
import base64
import ssl
import threading
from asyncio import StreamReader, StreamWriter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

WINDOW = 16  # characters of a sentence that must not cross


class Recorder:
    """What has been sent to the coordinator, one byte string a connection; ``port`` is where to connect."""

    def __init__(self) -> None:
        self.port = 0
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
    recorder = Recorder()

    async def relay(reader: StreamReader, writer: StreamWriter) -> None:
        try:
            outer = await asyncio.open_connection("127.0.0.1", target_port, ssl=client_side)
        except OSError:
            writer.close()
            return
        writers.update((writer, outer[1]))
        await asyncio.gather(pump(reader, outer[1], recorder.stream()), pump(outer[0], writer, bytearray()))

    async def serve() -> None:
        server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=server_side)
        recorder.port = server.sockets[0].getsockname()[1]
        listening.set()
        await asyncio.to_thread(ended.wait)
        server.close()
        for writer in writers:  # those whose other side is gone would wait for its farewell
            writer.transport.abort()
        await asyncio.sleep(0.1)

    writers: set[StreamWriter] = set()
    listening, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    listening.wait()
    try:
        yield recorder
    finally:
        ended.set()
        thread.join()


async def pump(source: StreamReader, sink: StreamWriter, kept: bytearray) -> None:
    """Copy one direction until it ends."""
    with suppress(OSError):
        while data := await source.read(65536):
            kept += data
            sink.write(data)
            await sink.drain()
    sink.close()
