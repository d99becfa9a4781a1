"""A small HTTP process for tests of the stack: ready at once, or as badly behaved as its flags say."""

import argparse
import http.server
import signal
import subprocess
import sys
import time

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


class _Handler(http.server.BaseHTTPRequestHandler):
    status = 200

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(b"loading" if self.status == 503 else b"ready")


def main() -> None:
    """Serve ``/health/ready`` until told to stop."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--unready", action="store_true")
    parser.add_argument("--end-after", type=float, help="end with code 3 after so many seconds")
    parser.add_argument("--stubborn", action="store_true", help="ignore SIGTERM")
    parser.add_argument("--children", action="store_true", help="start one child, and one in a session of its own")
    flags, _ = parser.parse_known_args()
    if flags.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if flags.children:
        for session in (False, True):
            subprocess.Popen(SLEEP, start_new_session=session)
    if flags.unready:
        _Handler.status = 503
    server = http.server.HTTPServer(("127.0.0.1", flags.port), _Handler)
    if flags.end_after is None:
        server.serve_forever()
    server.timeout = 0.05
    deadline = time.monotonic() + flags.end_after
    while time.monotonic() < deadline:
        server.handle_request()
    print("error: a reason to end", file=sys.stderr)
    sys.exit(3)


if __name__ == "__main__":
    main()
