"""What a worker that has been taken over can see and do, found out by being there."""

import os
import platform
import re
import resource
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import qubes_restore_svc
from qubes_restore_svc.errors import SandboxUnavailable
from qubes_restore_svc.kdf.engine import best_engine
from qubes_restore_svc.local import sandbox
from qubes_restore_svc.local.memory import memory_reserve
from qubes_restore_svc.local.sandbox import needed_paths, same_layout, worker_command, worker_engine
from qubes_restore_svc.local.sandbox_link import LocalLink
from qubes_restore_svc.worker import system_calls
from tests.local.probes import INTERPRETER, UNFILTERED, inside, needs_bubblewrap, opened, worker_process

MEMORY = 512 << 20

MAKE_A_USER_NAMESPACE = """
libc = ctypes.CDLL(None, use_errno=True)
result = errno.errorcode[ctypes.get_errno()] if libc.unshare(0x10000000) else 'done'
"""


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    path = tmp_path / "backup"
    path.write_bytes(b"the backup")
    path.chmod(0o644)
    return path


@asynccontextmanager
async def _sandboxed(archive: Path, command: list[str]) -> AsyncIterator[LocalLink]:
    async with (
        opened(archive) as descriptor,
        LocalLink(descriptor, command=command, memory_limit=MEMORY) as link,
    ):
        yield link


@pytest.fixture
async def link(archive: Path) -> AsyncIterator[LocalLink]:
    async with _sandboxed(archive, INTERPRETER) as link:
        yield link


@pytest.fixture
async def unfiltered_link(archive: Path) -> AsyncIterator[LocalLink]:
    async with _sandboxed(archive, UNFILTERED) as link:
        yield link


def _status(name: str) -> str:
    match = re.search(rf"^{name}:\s+(.*)$", (worker_process() / "status").read_text(), re.MULTILINE)
    assert match, name
    return match[1]


# --- Who it is --------------------------------------------------------------------------------------


@needs_bubblewrap
async def test_the_environment_holds_nothing_of_ours(link: LocalLink) -> None:
    assert (worker_process() / "environ").read_bytes() == b"PWD=/\0"


@needs_bubblewrap
async def test_it_has_no_capabilities_and_can_get_none(link: LocalLink) -> None:
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(_status(kind), 16) == 0, kind
    assert _status("NoNewPrivs") == "1"


@pytest.mark.parametrize("isolated", [pytest.param(True, marks=needs_bubblewrap), False])
async def test_the_system_calls_of_a_real_worker_are_filtered(archive: Path, isolated: bool) -> None:
    async with opened(archive) as descriptor, LocalLink(descriptor, sandbox=isolated):
        assert _status("Seccomp") == "2"
        assert _status("NoNewPrivs") == "1"


@needs_bubblewrap
async def test_it_is_nobody_and_no_other_user_exists(link: LocalLink) -> None:
    assert await inside(link, "result = [os.getuid(), os.geteuid(), os.getgid()]") == [65534] * 3
    assert (worker_process() / "uid_map").read_text().split() == ["65534", str(os.getuid()), "1"]
    assert (worker_process() / "gid_map").read_text().split() == ["65534", str(os.getgid()), "1"]


@needs_bubblewrap
@pytest.mark.parametrize("namespace", ["user", "pid", "net", "ipc", "uts", "mnt", "cgroup"])
async def test_every_namespace_is_its_own(link: LocalLink, namespace: str) -> None:
    assert os.readlink(worker_process() / "ns" / namespace) != os.readlink(f"/proc/self/ns/{namespace}")


@needs_bubblewrap
async def test_the_host_name_is_not_told(link: LocalLink) -> None:
    assert await inside(link, "result = os.uname().nodename") == "restore-worker"


@needs_bubblewrap
async def test_it_has_a_session_without_a_terminal(link: LocalLink) -> None:
    fields = (worker_process() / "stat").read_text().rpartition(")")[2].split()
    bubblewrap = Path(f"/proc/{_status('PPid')}/stat").read_text().rpartition(")")[2].split()[1]
    assert int(fields[3]) not in (os.getsid(0), os.getsid(int(bubblewrap)))
    assert fields[4] == "0"


@needs_bubblewrap
async def test_it_inherits_calls_archive_and_standard_streams_only(link: LocalLink, archive: Path) -> None:
    descriptors = worker_process() / "fd"
    opened_files = {int(entry.name): os.readlink(entry) for entry in descriptors.iterdir()}
    assert opened_files.pop(0) == opened_files.pop(1) == os.devnull
    assert opened_files.pop(2).startswith("pipe:")
    [socket_name] = [name for name in opened_files.values() if name != str(archive)]
    assert socket_name.startswith("socket:")
    assert sorted(opened_files.values()) == sorted([str(archive), socket_name])


@needs_bubblewrap
async def test_its_resources_are_limited(link: LocalLink) -> None:
    worker = int(worker_process().name)
    expected = {
        resource.RLIMIT_CORE: 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_NPROC: 1024,
        resource.RLIMIT_DATA: MEMORY + memory_reserve(),
        resource.RLIMIT_AS: MEMORY + (16 << 30),
    }
    for kind, limit in expected.items():
        assert resource.prlimit(worker, kind) == (limit, limit)


@needs_bubblewrap
async def test_more_memory_than_granted_cannot_be_taken(link: LocalLink) -> None:
    text = """
result = 'done'
try:
    bytearray(2 << 30)
except MemoryError:
    result = 'no memory'
"""
    assert await inside(link, text) == "no memory"


# --- What it sees -----------------------------------------------------------------------------------


@needs_bubblewrap
async def test_only_the_files_of_its_python_exist(link: LocalLink) -> None:
    absent = ["/proc", "/sys", "/run", "/var", "/etc/passwd", "/etc/hostname", "/usr/bin/sh", "/bin", "/boot"]
    assert await inside(link, f"result = [path for path in {absent} if os.path.exists(path)]") == []
    assert await inside(link, "result = sorted(os.listdir('/dev'))") == ["null", "urandom"]


@needs_bubblewrap
async def test_no_home_and_no_temporary_directory_is_seen(link: LocalLink, archive: Path) -> None:
    home = Path.home()
    secret = home / ".restore-test"
    secret.write_text("")
    try:
        places = [str(secret), str(archive)]
        assert await inside(link, f"result = [path for path in {places} if os.path.exists(path)]") == []
    finally:
        secret.unlink()


@needs_bubblewrap
async def test_beside_this_package_nothing_of_its_directory_is_seen(link: LocalLink) -> None:
    directory = Path(sandbox.__file__).parents[2]
    # The interpreter's own environment may lie there, too.
    needed = {"qubes_restore_svc", Path(sys.prefix).name}
    seen = await inside(link, f"result = os.listdir({str(directory)!r})")
    assert isinstance(seen, list) and set(seen) <= needed


@needs_bubblewrap
async def test_other_processes_cannot_be_seen_or_signalled(unfiltered_link: LocalLink) -> None:
    outer = os.getpid()
    text = f"result = [os.getpid(), os.getppid(), attempt(os.kill, {outer}, 0), attempt(os.kill, 3, 0)]"
    assert await inside(unfiltered_link, text) == [2, 1, "ESRCH", "ESRCH"]


# --- What it can write ------------------------------------------------------------------------------


@needs_bubblewrap
async def test_every_mount_is_read_only(link: LocalLink) -> None:
    for line in (worker_process() / "mountinfo").read_text().splitlines():
        assert "ro" in line.split()[5].split(","), line


CREATE_EVERYWHERE = """
places = ['/', '/tmp', '/dev', '/dev/shm', '/usr', '/usr/lib', '/etc', sys.prefix, sys.prefix + '/lib']
results = [attempt(os.open, place + '/written', os.O_WRONLY | os.O_CREAT) for place in places]
result = [place for place, outcome in zip(places, results) if outcome not in ('EROFS', 'ENOENT')]
"""


@needs_bubblewrap
async def test_no_directory_can_be_written_to(link: LocalLink) -> None:
    assert await inside(link, CREATE_EVERYWHERE) == []


@needs_bubblewrap
async def test_no_directory_can_be_written_to_even_without_the_filter(unfiltered_link: LocalLink) -> None:
    assert await inside(unfiltered_link, CREATE_EVERYWHERE) == []


@needs_bubblewrap
async def test_devices_keep_their_mode(unfiltered_link: LocalLink) -> None:
    mode = stat.S_IMODE(os.stat(os.devnull).st_mode)
    assert await inside(unfiltered_link, f"result = attempt(os.chmod, '/dev/null', {mode})") == "EROFS"


@needs_bubblewrap
async def test_the_archive_can_be_read_but_not_touched(link: LocalLink, archive: Path) -> None:
    before = archive.stat()
    text = """
import fcntl
result = [
    os.read(archive, 100).decode(),
    attempt(os.write, archive, b'x'),
    attempt(os.fchmod, archive, 0),
    attempt(os.utime, archive, (0, 0)),
    attempt(os.setxattr, archive, 'user.x', b''),
    attempt(os.truncate, archive, 0),
    attempt(fcntl.flock, archive, fcntl.LOCK_SH),
    attempt(fcntl.fcntl, archive, fcntl.F_SETLEASE, fcntl.F_RDLCK),
    attempt(fcntl.ioctl, archive, 0x40086602, b'\\0' * 8),  # FS_IOC_SETFLAGS
    attempt(os.open, f'/proc/self/fd/{archive}', os.O_RDWR),
]
"""
    found = await inside(link, text)
    assert isinstance(found, list)
    assert found[:2] == ["the backup", "EBADF"]
    assert set(found[2:-1]) == {"ENOSYS", "EPERM"}
    assert found[-1] in ("EROFS", "ENOENT")
    after = archive.stat()
    assert (before.st_mode, before.st_mtime_ns) == (after.st_mode, after.st_mtime_ns)


@needs_bubblewrap
async def test_the_archive_cannot_be_opened_again_even_without_the_filter(unfiltered_link: LocalLink) -> None:
    text = "result = attempt(os.open, f'/proc/self/fd/{archive}', os.O_RDWR)"
    assert await inside(unfiltered_link, text) == "ENOENT"


# --- Whom it reaches --------------------------------------------------------------------------------


@needs_bubblewrap
async def test_there_is_no_network(link: LocalLink) -> None:
    interfaces = (worker_process() / "net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    assert await inside(link, "result = attempt(socket.socket, socket.AF_INET)") == "ENOSYS"
    assert await inside(link, "result = attempt(socket.socket, socket.AF_NETLINK)") == "ENOSYS"


@needs_bubblewrap
async def test_servers_outside_cannot_be_reached(unfiltered_link: LocalLink) -> None:
    name = f"\0restore-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as unix_server, socket.socket() as server:
        unix_server.bind(name)
        unix_server.listen()
        server.bind(("127.0.0.1", 0))
        server.listen()
        text = f"""
result = [
    attempt(socket.socket(socket.AF_UNIX).connect, {name!r}),
    attempt(socket.socket().connect, {server.getsockname()!r}),
]
"""
        assert await inside(unfiltered_link, text) == ["ECONNREFUSED", "ECONNREFUSED"]


@needs_bubblewrap
async def test_inherited_sockets_do_not_tell_of_the_network_outside(link: LocalLink) -> None:
    text = """
import fcntl
result = [
    attempt(fcntl.ioctl, channel.fileno(), request, b'\\0' * 40)
    for channel in (calls, connection)
    for request in (0x8912, 0x8915, 0x8927, 0x894C)  # SIOCGIFCONF, SIOCGIFADDR, SIOCGIFHWADDR, SIOCGSKNS
]
"""
    assert await inside(link, text) == ["EPERM"] * 8


@needs_bubblewrap
async def test_nobody_outside_can_call_the_worker(link: LocalLink) -> None:
    named = re.compile(r"^\S+: (?:\S+ ){5}\s*(\d+) (\S+)$", re.MULTILINE)
    names = dict(named.findall(Path("/proc/net/unix").read_text()))
    for entry in (worker_process() / "fd").iterdir():
        match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))
        assert match is None or match[1] not in names


# --- What it can start ------------------------------------------------------------------------------


@needs_bubblewrap
async def test_no_user_namespace_can_be_made(link: LocalLink) -> None:
    assert await inside(link, MAKE_A_USER_NAMESPACE) == "ENOSYS"


@needs_bubblewrap
async def test_no_user_namespace_can_be_made_even_without_the_filter(unfiltered_link: LocalLink) -> None:
    assert await inside(unfiltered_link, MAKE_A_USER_NAMESPACE) == "ENOSPC"


@needs_bubblewrap
async def test_threads_can_be_started_but_no_processes(link: LocalLink) -> None:
    text = """
done = []
thread = threading.Thread(target=done.append, args=(1,))
thread.start()
thread.join()
result = [done, attempt(os.fork), attempt(os.posix_spawn, sys.executable, [sys.executable], {})]
"""
    assert await inside(link, text) == [[1], "EPERM", "EPERM"]


@needs_bubblewrap
async def test_of_all_system_calls_a_ready_worker_can_make_those_of_the_list_alone(link: LocalLink) -> None:
    machine = platform.machine()
    if machine not in system_calls._MACHINES:
        pytest.skip(f"the numbers of the system calls of {machine} are not known")
    column = system_calls._MACHINES[machine][1]
    listed = {row[column] for row in (*system_calls._ALLOWED, *system_calls._BY_ARGUMENT)}
    if machine == "x86_64":
        listed |= {
            335,
            336,
        }  # uretprobe and uprobe: the kernel lets no filter see them, and kills who calls them
    text = f"""
libc = ctypes.CDLL(None, use_errno=True)
result = []
for number in {[number for number in range(1000) if number not in listed]}:
    if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != errno.ENOSYS:
        result.append(number)
"""
    assert await inside(link, text) == []


TAKE_SHARED_MEMORY = """
libc = ctypes.CDLL(None, use_errno=True)
def failed(number):
    if number < 0:
        raise OSError(ctypes.get_errno(), '')
kept = []
result = [
    attempt(lambda: kept.append(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_SHARED))),
    attempt(lambda: kept.append(mmap.mmap(archive, 10, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))),
    attempt(lambda: kept.append(mmap.mmap(-1, 1 << 20, prot=mmap.PROT_READ | mmap.PROT_EXEC))),
    attempt(lambda: kept.append(os.memfd_create('x'))),
    attempt(lambda: failed(libc.shmget(0, 1 << 20, 0o600))),
    attempt(lambda: kept.append(mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE))),
]
"""


@needs_bubblewrap
async def test_memory_that_no_limit_counts_cannot_be_had(link: LocalLink) -> None:
    assert await inside(link, TAKE_SHARED_MEMORY) == ["EPERM", "EPERM", "EPERM", "ENOSYS", "ENOSYS", "done"]


# --- Where it cannot be had -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ({"ID": "debian"}, "sudo apt install bubblewrap"),
        ({"ID": "linuxmint", "ID_LIKE": "ubuntu debian"}, "sudo apt install bubblewrap"),
        ({"ID": "fedora"}, "sudo dnf install bubblewrap"),
        ({"ID": "rocky", "ID_LIKE": "rhel centos fedora"}, "sudo dnf install bubblewrap"),
        ({"ID": "qubes", "ID_LIKE": "rhel fedora"}, "sudo qubes-dom0-update bubblewrap"),
        ({"ID": "unheard-of"}, "its package is called bubblewrap"),
    ],
)
def test_a_missing_bubblewrap_is_an_error_that_names_the_command_to_install_it(
    monkeypatch: pytest.MonkeyPatch, release: dict[str, str], command: str
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: release)
    with pytest.raises(SandboxUnavailable, match="not installed") as caught:
        sandbox.find_bubblewrap()
    assert command in caught.value.advice
    assert "--no-sandbox" in caught.value.advice


def test_what_bubblewrap_says_is_told_on_one_clean_line() -> None:
    error = sandbox.sandbox_failed("noise\nbwrap: setting up \x1b[31muid map: Permission denied\n")
    assert error.reason.startswith(
        "bubblewrap cannot isolate the worker here: setting up \ufffd[31muid map: Permission denied"
    )
    assert "--no-sandbox" in error.advice
    assert "your files" in error.advice


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("bwrap: Can't fork for pid 1: Resource temporarily unavailable\n", "ulimit -u"),
        ("bwrap: pipe2() failed: Too many open files\n", "ulimit -n"),
    ],
)
def test_a_bubblewrap_that_lacks_a_resource_is_no_reason_to_go_without(words: str, advice: str) -> None:
    error = sandbox.sandbox_failed(words)
    assert advice in error.advice
    assert "--no-sandbox" not in error.advice


def test_a_setting_that_forbids_user_namespaces_is_named(tmp_path: Path) -> None:
    assert sandbox._forbidding_setting(tmp_path) is None
    (tmp_path / "kernel").mkdir()
    setting = tmp_path / "kernel/apparmor_restrict_unprivileged_userns"
    setting.write_text("0\n")
    assert sandbox._forbidding_setting(tmp_path) is None
    setting.write_text("1\n")
    found = sandbox._forbidding_setting(tmp_path)
    assert found == "kernel.apparmor_restrict_unprivileged_userns = 1"


def _binds(options: list[str]) -> list[str]:
    return [options[i + 1] for i in range(0, len(options), 3) if options[i] == "--ro-bind"]


def _links(options: list[str]) -> dict[str, str]:
    return {options[i + 2]: options[i + 1] for i in range(0, len(options), 3) if options[i] == "--symlink"}


def test_a_place_is_bound_under_its_own_name(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    assert same_layout([f"{tmp_path}/a"]) == ["--ro-bind", f"{tmp_path}/a", f"{tmp_path}/a"]


def test_what_lies_in_a_bound_place_is_not_bound_again(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a-c").mkdir()
    options = same_layout([f"{tmp_path}/a/b", f"{tmp_path}/a", f"{tmp_path}/a-c"])
    assert _binds(options) == [f"{tmp_path}/a", f"{tmp_path}/a-c"]


def test_every_link_on_the_way_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "versions/3.11.7/bin").mkdir(parents=True)
    (tmp_path / "versions/3.11.7/bin/python").touch()
    (tmp_path / "versions/3.11").symlink_to("3.11.7")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(tmp_path / "versions/3.11/bin/python")
    (tmp_path / "bin/python3").symlink_to("../bin/python")
    options = same_layout([f"{tmp_path}/bin/python3"])
    assert _binds(options) == [f"{tmp_path}/versions/3.11.7/bin/python"]
    assert _links(options) == {
        f"{tmp_path}/bin/python3": "../bin/python",
        f"{tmp_path}/bin/python": f"{tmp_path}/versions/3.11/bin/python",
        f"{tmp_path}/versions/3.11": "3.11.7",
    }


def test_a_link_inside_of_a_bound_place_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "lib/link").symlink_to("../elsewhere")
    options = same_layout([f"{tmp_path}/lib", f"{tmp_path}/lib/link"])
    assert _binds(options) == [f"{tmp_path}/elsewhere", f"{tmp_path}/lib"]
    assert _links(options) == {}


def test_nothing_is_shown_for_loops_dead_links_and_the_root(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "dead").symlink_to("nowhere")
    (tmp_path / "root").symlink_to("/")
    paths = [f"{tmp_path}/{name}" for name in ("loop", "one", "dead", "root", "absent")]
    assert _binds(same_layout([*paths, "/"])) == []


def test_no_home_and_no_working_directory_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["", os.getcwd(), str(Path.home()), "/", *sys.path])
    bound = _binds(same_layout(needed_paths()))
    for place in (Path.home(), Path.cwd(), Path("/")):
        assert not any(place.is_relative_to(path) for path in bound)


def test_this_package_comes_before_an_installed_copy_and_after_the_standard_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent = str(Path(qubes_restore_svc.__path__[0]).parent)
    monkeypatch.setattr(sys, "path", ["", "/stdlib", "relative", "/x/site-packages", "/other"])
    assert sandbox._module_path() == ["/stdlib", parent, "/x/site-packages", "/other"]
    monkeypatch.setattr(sys, "path", ["/x/site-packages", parent])
    assert sandbox._module_path() == ["/x/site-packages", parent]


def test_the_worker_is_found_from_any_directory_and_without_an_environment() -> None:
    done = subprocess.run(
        [*worker_command(), "--help"], env={}, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--archive-fd" in done.stdout


# --- What derives the keys: asked of the worker, and believed only if it is a name -----------------------


async def test_the_worker_says_what_it_derives_keys_with() -> None:
    assert await worker_engine() == best_engine().name


@pytest.mark.parametrize(
    "program", ["import sys; sys.exit(1)", "print()", "print('\\x1b[2J')", "print('ä')", "print('a\\nb')"]
)
async def test_anything_but_a_name_is_not_repeated(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "worker_command", lambda: [sys.executable, "-c", program])
    assert await worker_engine() is None


async def test_a_worker_that_cannot_be_started_or_hangs_is_no_reason_to_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sandbox, "worker_command", lambda: ["/nonexistent/python"])
    assert await worker_engine() is None
    monkeypatch.setattr(sandbox, "_ENGINE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(
        sandbox, "worker_command", lambda: [sys.executable, "-c", "import time; time.sleep(60)"]
    )
    assert await worker_engine() is None
