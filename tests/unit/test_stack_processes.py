"""Starting and stopping processes, with real ones."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from services.common.ports import free_port
from services.contracts.errors import ConfigError
from stack import processes as module
from stack.__main__ import _reach_this_machine_directly
from stack.marks import VARIABLE, environment_with, kill_marked, marked, new_mark
from stack.processes import Processes, ProcessFailed, Service, port_is_free
from tests.fakes.stack_standin import SLEEP
from tests.meta.test_import_layers import ROOT


@pytest.fixture(autouse=True)
def project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is started by ``python -m`` from there."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark; what carries it ends with the test."""
    mark = new_mark()
    yield mark
    kill_marked(mark)


def standin(*flags: str) -> Service:
    return Service("standin", "tests.fakes.stack_standin", free_port(), flags)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def wait_for_children(process: "subprocess.Popen[bytes]", number: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 20
    while len(found := psutil.Process(process.pid).children(recursive=True)) < number:
        assert time.monotonic() < deadline, f"{len(found)} of {number} children"
        time.sleep(0.02)
    return found


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def test_run_returns_what_the_command_wrote_this_time(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.run("hello", python("print('first')"))
        assert processes.run("hello", python("print('second')")) == "second\n"
    assert (tmp_path / "hello.log").read_text() == "first\nsecond\n"


def test_failed_command_is_named_with_its_code_its_log_and_its_last_lines(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes, pytest.raises(ProcessFailed) as caught:
        processes.run("sum", python("import sys; [print(f'line {i}\\n') for i in range(9)]; sys.exit('no sum')"))
    assert caught.value.message.splitlines() == [
        f"sum ended with code 1; see {tmp_path / 'sum.log'}", "line 5", "line 6", "line 7", "line 8", "no sum"
    ]  # fmt: skip
    assert caught.value.exit_code == 7


def test_failure_shows_nothing_of_an_earlier_attempt(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        with pytest.raises(ProcessFailed, match="an old reason"):
            processes.run("sum", python("import sys; sys.exit('an old reason')"))
        with pytest.raises(ProcessFailed) as caught:
            processes.run("sum", python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"))
    assert caught.value.message == (
        f"sum was ended by signal 9 (Killed), perhaps for lack of memory; see {tmp_path / 'sum.log'}"
    )


def test_failure_on_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FULL_DISK_BYTES", 10**18)
    with Processes(tmp_path) as processes, pytest.raises(ProcessFailed, match=f"the disk of {tmp_path} is full"):
        processes.run("sum", python("raise SystemExit(1)"))


def test_meanwhile_is_called_while_a_command_runs_and_once_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    seen: list[bool] = []
    with Processes(tmp_path) as processes:
        processes.run(
            "slow",
            python(f"import time, pathlib; time.sleep(0.3); pathlib.Path({str(tmp_path / 'done')!r}).touch()"),
            meanwhile=lambda: seen.append((tmp_path / "done").exists()),
        )
    assert seen[0] is False
    assert seen[-1] is True


def test_ready_service_is_reached_and_stopped(tmp_path: Path) -> None:
    service = standin()
    with Processes(tmp_path) as processes:
        processes.start_services([service])
        assert not port_is_free(service.port)
        (process,) = marked(processes.mark)
    assert not process.is_running()
    assert port_is_free(service.port)


def test_service_that_is_never_ready_is_an_error_in_time(tmp_path: Path) -> None:
    service = standin("--unready")
    began = time.monotonic()
    with Processes(tmp_path) as processes:
        processes.start("standin", python_module(service), serves=True)
        with pytest.raises(ProcessFailed) as caught:
            processes.wait_ready(service, timeout_seconds=1.5)
    assert time.monotonic() - began < 10
    log = tmp_path / "standin.log"
    assert caught.value.message in {
        f"standin was not ready within 2 s ({reason}); see {log}" for reason in ("loading", "no answer")
    }
    assert marked(processes.mark) == []


def python_module(service: Service) -> list[str]:
    return [sys.executable, "-m", service.module, "--port", str(service.port), *service.flags]


def test_service_that_ends_at_its_start_is_an_error_at_once(tmp_path: Path) -> None:
    began = time.monotonic()
    with Processes(tmp_path) as processes, pytest.raises(ProcessFailed) as caught:
        processes.start_services([Service("standin", "tests.fakes.stack_standin", 70000)])
    assert time.monotonic() - began < 20
    assert caught.value.message.startswith(f"standin ended with code 1; see {tmp_path / 'standin.log'}\n")
    assert caught.value.message.endswith("OverflowError: bind(): port must be 0-65535.")


def test_service_that_ends_while_a_command_runs_stops_the_command_and_is_named(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start_services([standin("--end-after", "1")])
        with pytest.raises(ProcessFailed) as caught:
            processes.run("long", SLEEP)
    assert caught.value.message == f"standin ended with code 3; see {tmp_path / 'standin.log'}\nerror: a reason to end"
    assert marked(processes.mark) == []


def test_command_that_fails_because_a_service_is_gone_is_explained_by_the_service(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.start_services([standin()])
        (process,) = marked(processes.mark)
        kill = f"import os; os.kill({process.pid}, 9); raise SystemExit('no answer from standin')"
        with pytest.raises(ProcessFailed, match=r"^standin was ended by signal 9"):
            processes.run("question", python(kill))


class Interruption(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for itself."""


@pytest.mark.parametrize("leader_dies", [False, True], ids=["leader lives", "leader was killed"])
@pytest.mark.parametrize("error", [None, ValueError, Interruption])
def test_leaving_the_block_stops_all_descendants(
    tmp_path: Path, error: type[BaseException] | None, leader_dies: bool
) -> None:
    found: list[psutil.Process] = []
    with suppress(ValueError, Interruption), Processes(tmp_path) as processes:
        leader = processes.start("standin", python_module(standin("--children")), serves=True)
        found = [psutil.Process(leader.pid), *wait_for_children(leader, 2)]
        if leader_dies:
            leader.kill()
            leader.wait()
        if error:
            raise error
    assert len(found) == 3
    assert alive(found) == []


def test_what_a_finished_command_left_behind_is_stopped(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        processes.run("parent", python(f"import subprocess; subprocess.Popen({SLEEP!r}, start_new_session=True)"))
        (orphan,) = marked(processes.mark)
        assert orphan.cmdline() == SLEEP
    assert alive([orphan]) == []


def test_process_that_ignores_the_request_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.3)
    with Processes(tmp_path) as processes:
        processes.start_services([standin("--stubborn", "--children")])
        found = marked(processes.mark)
    assert len(found) == 3
    assert alive(found) == []


def test_process_has_time_to_clean_up(tmp_path: Path) -> None:
    cleanup = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(time.sleep(0.3) or print('clean')));"
    with Processes(tmp_path) as processes:
        processes.start("careful", python(cleanup + "print('up'); time.sleep(60)"))
        while not (tmp_path / "careful.log").read_text():
            time.sleep(0.02)
    assert (tmp_path / "careful.log").read_text() == "up\nclean\n"


def test_processes_may_be_left_running(tmp_path: Path) -> None:
    with Processes(tmp_path) as processes:
        process = processes.start("sleep", SLEEP)
        processes.leave_running()
    assert process.poll() is None
    kill_marked(processes.mark)
    assert process.wait(10) == -signal.SIGKILL or process.returncode == 0  # 0: psutil has waited for it already


@pytest.mark.parametrize("log_dir", ["file", "file/logs"])
def test_log_folder_that_cannot_be_written_is_named(tmp_path: Path, log_dir: str) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match=f"^cannot write to {tmp_path / log_dir}: (File exists|Not a directory)$"):
        Processes(tmp_path / log_dir)


def test_log_folder_that_exists_and_cannot_be_written_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^cannot write to /proc/self: "):
        Processes(Path("/proc/self"))


def test_only_what_carries_the_mark_is_found(mark: str) -> None:
    with subprocess.Popen(SLEEP) as unmarked, subprocess.Popen(SLEEP, env=os.environ | environment_with(mark)) as own:
        try:
            assert [process.pid for process in marked(mark)] == [own.pid]
            kill_marked(mark)
            assert marked(mark) == []
            assert unmarked.poll() is None
        finally:
            unmarked.kill()


def test_mark_of_an_outer_command_is_kept(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, mark)
    inner = new_mark()
    with subprocess.Popen(SLEEP, env=os.environ | environment_with(inner)) as process:
        assert [found.pid for found in marked(mark)] == [found.pid for found in marked(inner)] == [process.pid]
        process.kill()


@pytest.mark.parametrize("text", ["", "nonsense", "0" * 31, "0" * 32 + "\n"])
def test_what_is_no_mark_finds_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="not a mark"):
        marked(text)


def test_proxy_of_the_environment_is_not_asked_for_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("no_proxy", "example.org")
    with Processes(tmp_path) as processes:
        service = standin()
        processes.start("standin", python_module(service), serves=True)
        with pytest.raises(ProcessFailed, match="not ready"):
            processes.wait_ready(service, timeout_seconds=1.0)
        _reach_this_machine_directly()
        processes.wait_ready(service, timeout_seconds=20.0)
    assert os.environ["NO_PROXY"] == "example.org,127.0.0.1,localhost"
