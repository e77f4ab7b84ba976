"""The sandbox against programs that try to get out, to stay, to eat the machine or to pass without passing."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from monkeyjump.evaluation.sandbox import Limits, allow_code, check_sandbox, require_consent, run_program, runner
from monkeyjump.tasks import InputError


def works() -> bool:
    try:
        check_sandbox()
    except InputError:
        return False
    return True


needs_sandbox = pytest.mark.skipif(not works(), reason="this machine gives no namespaces, so nothing is run at all")
SMALL = Limits(seconds=8.0, cpu=2, memory=128, file=1, processes=8)


def mine() -> set[int]:
    """Every process on the machine that runs the jail."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(runner.JAIL).encode() in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:
            continue
    return found


# ---------------------------------------------------------------------- what passes


@needs_sandbox
@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "import collections, hashlib, heapq, itertools, math, random, re, statistics, typing",
        "print('x' * 10_000_000)",  # huge output goes nowhere
        "import os\nfor _ in range(2000): os.write(1, b'x' * 65536)",
        "from pathlib import Path\nPath('a').write_text('b')\nassert Path('/tmp/a').read_text() == 'b'",
        "if __name__ == '__main__': raise SystemExit('a script')",
        "try:\n    input()\nexcept EOFError:\n    pass",
        # an orphan that ends first is not the program
        "import os, time\nif os.fork() == 0:\n  os.fork()\n  os._exit(0)\nos.wait()\ntime.sleep(0.3)",
    ],
)
def test_honest_programs_pass(program: str):
    assert run_program(program, SMALL).passed


# ---------------------------------------------------------------------- passing without passing


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2, 'not equal'", "AssertionError: not equal"),
        ("def f(:", "SyntaxError"),
        ("import sys\nsys.exit(0)\nassert False", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os\nos._exit(0)\nassert False", "ended before its tests did"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
        ("import os\nif os.fork(): os._exit(0)\nassert False", ""),  # whichever process is first
        ("import os\nfor f in range(3, 20):\n  try: os.write(f, b'{\"passed\": true, \"reason\": \"\"}')\n"
         "  except OSError: pass\nos._exit(0)", "no valid verdict"),
        ("import os\nfor f in range(3, 20):\n  try: os.write(f, b'{\"refused\": \"no\"}')\n"
         "  except OSError: pass\nos._exit(1)", "no valid verdict"),
        ("import os\nfor f in range(3, 20):\n  try: os.write(f, b'[' * 9000)\n"
         "  except OSError: pass", "ended before its tests did"),
        ("import builtins\nbuiltins.compile = None\nassert False", "AssertionError"),
        ("import os\nos._exit(200)", "ended before its tests did"),  # 128 + no signal
        ("import os\nos._exit = print\nclass E(Exception):\n  def __str__(self): raise OSError('x')\nraise E",
         "ended before its tests did"),
    ],
)  # fmt: skip
def test_programs_that_do_not_come_to_their_end_fail(program: str, reason: str):
    found = run_program(program, SMALL)
    assert not found.passed
    assert reason in found.reason


# ---------------------------------------------------------------------- getting out


@needs_sandbox
def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        found = run_program(program, SMALL)
        assert not found.passed
        assert "OSError: [Errno 101] Network is unreachable" in found.reason
        with pytest.raises(TimeoutError):
            server.accept()
        socket.create_connection(("127.0.0.1", port), 2).close()  # from out here it can be reached
        server.accept()[0].close()
    assert run_program("import socket\nassert [n for _, n in socket.if_nameindex()] == ['lo']", SMALL).passed


@needs_sandbox
def test_nothing_outside_can_be_read_or_written(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("text")
    secret.chmod(0o666)
    os.chmod(tmp_path, 0o777)
    for action in (
        f"open({str(secret)!r}).read()",
        f"open({str(secret)!r}, 'w').write('x')",
        f"os.remove({str(secret)!r})",
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({os.__file__!r}, 'a')",  # the interpreter's own library
        f"open({str(Path(os.__file__).with_name('planted.py'))!r}, 'w')",
        "open('/usr/planted', 'w')",
        "open('/etc/passwd')",
        "os.listdir('/proc')",
        "os.listdir('/home')",
    ):
        found = run_program(f"import os\n{action}", SMALL)
        assert not found.passed, action
        assert found.reason.startswith(("FileNotFoundError", "PermissionError", "OSError")), found.reason
    assert secret.read_text() == "text"
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]
    assert run_program("import os\nassert os.getcwd() == '/tmp' and not os.listdir('.')", SMALL).passed


@needs_sandbox
def test_the_root_cannot_be_left_by_mounts_chroot_or_a_new_namespace():
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
for flags in (0x20000, 0x10000000 | 0x20000):       # mounts; a user namespace with them
    if libc.unshare(flags) == 0:
        for target in (b"/usr", b"/tmp"):
            assert libc.mount(None, target, None, 32 | 4096, None) != 0 or not os.access("/usr/bin", os.W_OK)
        assert libc.umount2(b"/", 2) != 0
        os.listdir("/..") == os.listdir("/") or 1 / 0
try:
    os.mkdir("a"); os.chroot("a")
    for _ in range(50): os.chdir("..")
    os.chroot(".")
except OSError:
    pass
assert not os.path.exists("/etc/passwd") and not os.path.exists("/proc/1")
"""
    found = run_program(program, SMALL)
    assert found.passed, found.reason


@needs_sandbox
def test_the_environment_and_the_callers_processes_are_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "not to be seen")
    program = f"""
import os, signal, sys
assert "HF_TOKEN" not in os.environ and set(os.environ) <= {{"LC_CTYPE"}}, os.environ
assert not any("not to be seen" in one for one in sys.argv)
assert os.getpid() < 10
for pid in ({os.getpid()}, {os.getppid()}):
    try: os.kill(pid, 0)
    except ProcessLookupError: pass
    else: raise RuntimeError(pid)
"""
    found = run_program(program, SMALL)
    assert found.passed, found.reason
    rights = "import os\nassert all(os.getresuid()) and all(os.getresgid()) and os.getgroups() == []"
    if os.getuid() == 0:
        assert run_program(rights, SMALL).passed


# ---------------------------------------------------------------------- eating the machine, staying


@needs_sandbox
def test_an_endless_loop_ends_by_the_clock_or_by_cpu_time():
    start = time.monotonic()
    found = run_program("import time\ntime.sleep(60)", Limits(seconds=1.0))
    assert (found.passed, found.reason) == (False, "not done after 1 seconds")
    assert time.monotonic() - start < 5
    start = time.monotonic()
    found = run_program("while True: pass", Limits(seconds=30.0, cpu=1))
    assert not found.passed
    assert "killed by SIGKILL (limits of CPU time" in found.reason
    assert time.monotonic() - start < 8
    found = run_program("import signal\nfor s in range(1, 20):\n  try: signal.signal(s, signal.SIG_IGN)\n"
                        "  except (OSError, ValueError): pass\nwhile True: pass", Limits(seconds=1.0))  # fmt: skip
    assert "not done after 1 seconds" in found.reason


@needs_sandbox
def test_memory_and_files_are_limited():
    assert run_program("x = bytearray(1 << 30)", SMALL).reason.startswith("MemoryError")
    found = run_program("with open('big', 'wb') as f:\n  while True: f.write(b'x' * 65536)", SMALL)
    assert not found.passed
    large = "with open('big', 'wb') as f:\n  f.write(b'x' * 1_500_000)\n  f.flush()\n  raise RuntimeError(f.tell())"
    assert "RuntimeError" not in run_program(large, SMALL).reason  # one file may have 1 MiB
    many = "for i in range(9):\n  with open(f'f{i}', 'wb') as f: f.write(b'x' * 1000_000)"
    assert "No space left" in run_program(many, SMALL).reason


@needs_sandbox
def test_a_fork_bomb_is_contained_and_nothing_of_it_stays():
    bomb = """
import os, signal, time
for s in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(s, signal.SIG_IGN)
most = 0
while True:
    try:
        if os.fork() == 0: os.setsid()
    except OSError as error:
        assert error.errno == 11
        time.sleep(0.05)
"""
    start = time.monotonic()
    found = run_program(bomb, Limits(seconds=2.0, cpu=2))
    assert not found.passed
    assert time.monotonic() - start < 8
    deadline = time.monotonic() + 5
    while mine() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not mine()
    limited = "import os, time\nn = 0\ntry:\n  while True:\n    if os.fork() == 0: time.sleep(30)\n    n += 1\n" \
        "except BlockingIOError:\n  assert n < 8\nelse:\n  raise RuntimeError\n"  # fmt: skip
    assert run_program(limited, SMALL).passed
    assert not mine()


@needs_sandbox
def test_a_daemon_does_not_outlive_its_program():
    daemon = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0: time.sleep(60)\n  os._exit(0)"
    start = time.monotonic()
    assert run_program(daemon, SMALL).passed
    assert time.monotonic() - start < 5
    assert not mine()


@needs_sandbox
def test_limits_are_hard_and_rights_cannot_come_back():
    program = """
import ctypes, os, resource
for name, most in (("CPU", 2), ("AS", 128 << 20), ("FSIZE", 1 << 20), ("NPROC", 8), ("NOFILE", 64), ("CORE", 0)):
    assert resource.getrlimit(getattr(resource, "RLIMIT_" + name)) == (most, most), name
try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
except ValueError:
    pass
else:
    raise RuntimeError("raised")
libc = ctypes.CDLL(None)
assert libc.prctl(39, 0, 0, 0, 0) == 1  # PR_GET_NO_NEW_PRIVS
assert os.umask(0o077) == 0o077
for path in ("/new", "/usr/new"):
    try:
        os.mkdir(path)
    except OSError:
        continue
    raise RuntimeError(path)
"""
    found = run_program(program, SMALL)
    assert found.passed, found.reason
    files = run_program("files = []\nwhile True: files.append(open('/tmp/a', 'w'))", SMALL)
    assert "Too many open files" in files.reason
    inodes = run_program("i = 0\nwhile True:\n  open(f'/tmp/{i}', 'w').close()\n  i += 1", SMALL)
    assert "No space left" in inodes.reason


@needs_sandbox
def test_nothing_is_handed_down_but_the_standard_library():
    program = """
import os, sys
assert not any("packages" in path for path in sys.path), sys.path
for fd in range(3, 64):
    try:
        inherited = os.get_inheritable(fd)
    except OSError:
        continue
    assert not inherited, fd
try:
    import torch
except ImportError:
    pass
else:
    raise RuntimeError("torch is there")
"""
    found = run_program(program, SMALL)
    assert found.passed, found.reason


@needs_sandbox
def test_reasons_are_short_and_folders_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path))
    found = run_program("raise ValueError('x' * 100_000)", SMALL)
    assert found.reason == ("ValueError: " + "x" * 100_000)[:300]
    assert not list(tmp_path.iterdir())


@needs_sandbox
def test_a_caller_with_many_open_files_is_served():
    """`select` takes no descriptor from 1,024 on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2048:
        pytest.skip("this machine lets a process open fewer files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    files = [os.open("/dev/null", os.O_RDONLY) for _ in range(1100)]
    try:
        assert run_program("assert True", SMALL).passed
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_every_program_has_a_token_of_its_own(monkeypatch: pytest.MonkeyPatch):
    jobs = []
    monkeypatch.setattr(runner, "_converse", lambda job, seconds: (jobs.append(json.loads(job)), (b"", 1))[1])
    for _ in range(2):
        run_program("pass")
    first, second = (job["token"] for job in jobs)
    assert first != second
    assert len(first) == len(second) == 32


# ---------------------------------------------------------------------- refusing


def test_without_namespaces_nothing_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = runner.JAIL.read_text(encoding="utf-8")
    for number, (good, bad) in enumerate(
        [("0x40000000", "0x00000001"), ('"tmpfs", root, "tmpfs"', '"tmpfs", root, "no-such"'), ("= 442", "= 100000")]
    ):
        assert good in text
        jail = tmp_path / f"jail{number}.py"
        jail.write_text(text.replace(good, bad))
        monkeypatch.setattr(runner, "JAIL", jail)
        with pytest.raises(InputError, match=r"the sandbox cannot be made: (unshare|mount|syscall): ") as caught:
            run_program("assert True")
        assert "CAP_SYS_ADMIN" in caught.value.hint


def test_elsewhere_than_on_linux_it_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(InputError, match="the sandbox needs Linux, not darwin"):
        check_sandbox()


def test_code_runs_only_where_somebody_said_so():
    with pytest.raises(InputError, match=r"pass@1 runs code that the model writes") as caught:
        require_consent("pass@1")
    assert "--allow-code" in caught.value.hint
    with allow_code():
        require_consent("pass@1")
    with pytest.raises(InputError):  # not longer than asked for
        require_consent("pass@1")
    with pytest.raises(InputError), allow_code(False):
        require_consent("pass@1")


@needs_sandbox
def test_a_sandbox_that_does_not_work_is_noticed_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    jail = tmp_path / "jail.py"
    jail.write_text(runner.JAIL.read_text(encoding="utf-8").replace("exec(compile", "int(compile"))
    monkeypatch.setattr(runner, "JAIL", jail)
    with pytest.raises(InputError, match="the sandbox does not work here: TypeError"):
        check_sandbox()


@needs_sandbox
@pytest.mark.skipif(os.getuid() != 0, reason="an ordinary user runs all of the above without root anyway")
def test_an_ordinary_user_has_the_same_sandbox(tmp_path: Path):
    """The same in a user namespace, where we are no root."""
    user = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    if subprocess.run([*user, "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    expected = {
        "import os; assert os.getuid() == 1000 and not os.path.exists('/etc')": "",
        "open('/usr/planted', 'w')": "OSError: [Errno 30] Read-only file system",
        "import socket; socket.create_connection(('127.0.0.1', 1), 1)": "OSError: [Errno 101] Network is unreachable",
        "import os; open('/tmp/a', 'w').write('b')": "",
        "import ctypes; assert ctypes.CDLL(None).mount(None, b'/usr', None, 32 | 4096, None) == 0": "AssertionError",
    }
    for program, reason in expected.items():
        job = {"program": program, "token": "t", "root": str(tmp_path), "libraries": runner._libraries()}
        found = subprocess.run(
            [*user, sys._base_executable, "-I", "-S", "-B", str(runner.JAIL)],
            input=json.dumps({**job, "limits": SMALL.as_resources()}), capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        verdict = json.loads(found.stdout)
        assert verdict["reason"].startswith(reason), verdict
        assert verdict["passed"] is (not reason)
