"""A real PostgreSQL in a temporary folder, on a Unix socket; a test that needs it is skipped where there is none."""

import getpass
import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def _program(name: str) -> str | None:
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))  # where Debian keeps it, off the PATH
    return shutil.which(name) or (str(found[-1]) if found else None)


class PostgresServer:
    """PostgreSQL as child processes that can be killed and started again."""

    def __init__(self) -> None:
        if not (_program("initdb") and _program("pg_ctl")):
            pytest.skip("PostgreSQL is not installed: the audit in it cannot be tested")
        # The server refuses to run as root, so root runs it as somebody else, in a folder of theirs.
        self._user = "nobody" if os.geteuid() == 0 else None
        folder = self._folder = Path(tempfile.mkdtemp(prefix="fedward-postgres-"))
        self._data = folder / "data"
        if self._user:
            os.chown(folder, pwd.getpwnam(self._user).pw_uid, -1)
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", "fedward", "--no-sync", "-E", "UTF8")
        self.url = f"postgresql://fedward@/postgres?host={folder}"

    def start(self) -> None:
        options = f"-k {self._folder} -c listen_addresses='' -c fsync=off"
        self._run("pg_ctl", "start", "-w", "-D", str(self._data), "-o", options, "-l", str(self._folder / "log"))

    def kill(self) -> None:
        """Stop at once, as a crash would: connections break, nothing is said."""
        self._run("pg_ctl", "stop", "-D", str(self._data), "-m", "immediate")

    def remove(self) -> None:
        """Stop it and delete its data."""
        self.kill()
        shutil.rmtree(self._folder)

    def sql(self, statement: str) -> None:
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement)

    def _run(self, name: str, *arguments: str) -> None:
        program = _program(name)
        assert program is not None
        done = subprocess.run(
            [program, *arguments], user=self._user, cwd=self._folder, capture_output=name == "initdb", timeout=60,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "USER": self._user or getpass.getuser()},
            stdout=None if name == "initdb" else subprocess.DEVNULL, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{name} failed: {done.stderr!r}"
