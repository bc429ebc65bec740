"""What the processes ask of the kernel, seen with strace: nothing is staged, and the broker reads no archive.

Strategy: every process of a run is traced, the worker in its sandbox too, one file a thread. Whatever could
change a file system by its name must be on the short list of what may be; whatever could bring bytes of the
archive into a process must come from the worker. An attempt that fails counts like one that succeeds.

bubblewrap builds the worker's root in a tmpfs that only exists in its own mount namespace. Its calls count as
harmless only in the process that was created with CLONE_NEWNS, only after it has mounted that tmpfs and gone
into it, and only below `newroot`; the files of the host are then below `oldroot`.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from .support import passphrase_file, running

#: Calls that change a file system, and on what: the positions of the names among their arguments.
CHANGES = {
    "creat": (0,), "mkdir": (0,), "mkdirat": (1,), "rename": (0, 1), "renameat": (1, 3), "renameat2": (1, 3),
    "unlink": (0,), "unlinkat": (1,), "rmdir": (0,), "link": (1,), "linkat": (3,), "symlink": (1,),
    "symlinkat": (2,), "mknod": (0,), "mknodat": (1,), "truncate": (0,), "chmod": (0,), "fchmodat": (1,),
    "fchmodat2": (1,), "chown": (0,), "lchown": (0,), "fchownat": (1,), "utime": (0,), "utimes": (0,),
    "futimesat": (1,), "utimensat": (1,), "setxattr": (0,), "lsetxattr": (0,), "removexattr": (0,),
}  # fmt: skip
OPENS = {"open": 0, "openat": 1, "openat2": 1}
#: Calls that bring bytes of a file into memory or to another descriptor.
READS = {
    "read", "pread64", "readv", "preadv", "preadv2", "mmap", "sendfile", "splice", "tee", "copy_file_range",
    "vmsplice",
}  # fmt: skip
#: Calls after which this list would be incomplete.
UNSEEN = {"io_uring_setup", "open_by_handle_at", "ptrace", "process_vm_readv"}
OTHERS = {"clone", "clone3", "fork", "vfork", "execve", "chdir", "mount", "pivot_root"}
WRITES = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|O_TMPFILE|O_APPEND")

#: Written to by every program, or by bubblewrap for the process that it is (files of the kernel, on no disk).
#: A pipe of the command's own is opened once more by its number.
HARMLESS = {"/dev/null", "/dev/tty"}
OF_THE_KERNEL = re.compile(
    r"/proc/(self/fd/\d+|\d+/(uid_map|gid_map|setgroups)|sys/user/max_user_namespaces)"
)


@cache
def reason_not_to_trace() -> str | None:
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-f", "--seccomp-bpf", "-e", "trace=none", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"strace cannot trace here: {tried.stderr.decode()[-200:]}"


pytestmark = pytest.mark.skipif(reason_not_to_trace() is not None, reason=reason_not_to_trace() or "")

ways = pytest.mark.parametrize("options", [(), ("--no-sandbox",)], ids=["sandbox", "plain"])


@dataclass(frozen=True)
class Call:
    """A system call as strace writes it, with the paths of descriptors."""

    name: str
    arguments: list[str]
    result: str

    def path(self, position: int) -> str:
        """The name at `position`, made absolute by the descriptor of a directory before it."""
        name = self.arguments[position].strip('"')
        if name.startswith("/"):
            return name
        directory = self.arguments[position - 1] if position else ""
        within = re.search(r"<(/[^>]*)>", directory)
        return f"{within[1]}/{name}" if within else name


@dataclass(frozen=True)
class Trace:
    """All calls of one run, by thread."""

    calls: dict[int, list[Call]]
    first: int

    def threads_of_broker(self) -> set[int]:
        """The first process: its main thread and all that it started."""
        found = [self.first]
        for thread in found:
            found += [
                int(call.result.split()[0])
                for call in self.calls.get(thread, [])
                if call.name in ("clone", "clone3") and "CLONE_THREAD" in str(call.arguments)
            ]
        return set(found)

    def changes(self) -> Iterator[tuple[int, str]]:
        """Every name that a call would have created, opened for writing, renamed, removed or altered."""
        namespaces = {
            int(call.result.split()[0])
            for calls in self.calls.values()
            for call in calls
            if call.name in ("clone", "clone3") and "CLONE_NEWNS" in str(call.arguments)
        }
        for thread, calls in self.calls.items():
            yield from ((thread, path) for path in _changes(calls, in_own_namespace=thread in namespaces))


def _changes(calls: list[Call], *, in_own_namespace: bool) -> Iterator[str]:
    root, inside, own_root = "", False, False
    for call in calls:
        if in_own_namespace and call.name == "mount" and call.arguments[2] == '"tmpfs"':
            root = call.arguments[1].strip('"')
        elif root and call.name == "chdir" and call.path(0) == root:
            inside = True
        elif inside and call.name == "pivot_root":
            own_root = True
        for path in _changed_by(call):
            if inside and not own_root and path in ("newroot", "oldroot"):
                continue
            if own_root and path.startswith("/newroot/") and ".." not in path:
                continue
            yield path


def _changed_by(call: Call) -> list[str]:
    if call.name in OPENS:
        return [call.path(OPENS[call.name])] if WRITES.search(", ".join(call.arguments)) else []
    return [call.path(position) for position in CHANGES.get(call.name, ())]


def traced(directory: Path, *arguments: str | Path) -> Trace:
    """Run the command to its successful end under strace."""
    traces = directory / "traces"
    traces.mkdir()
    names = ",".join(sorted({*CHANGES, *OPENS, *READS, *UNSEEN, *OTHERS}))
    known = subprocess.run(["strace", "-e", f"trace={names}", "true"], capture_output=True).returncode == 0
    spelt = names if known else ",".join(f"?{name}" for name in names.split(","))
    prefix = [
        "strace",
        "-ff",
        "-y",
        "--seccomp-bpf",
        "-s",
        "4096",
        "-o",
        f"{traces}/t",
        "-e",
        f"trace={spelt}",
    ]
    with running(*arguments, prefix=prefix) as run:
        outcome = run.outcome()
    assert outcome.status == 0, outcome.errors
    calls = {int(file.suffix[1:]): list(_calls(file)) for file in traces.iterdir()}
    [first] = [
        thread
        for thread, found in calls.items()
        if found and found[0].name == "execve" and '"-m"' in str(found[0])
    ]
    return Trace(calls, first)


def _calls(file: Path) -> Iterator[Call]:
    for line in file.read_text(errors="replace").splitlines():
        if line.startswith(("---", "+++")) or "<unfinished ...>" in line:
            continue
        match = re.fullmatch(r"(\w+)\((.*)\)\s+= (.+)", line)
        assert match, line
        yield Call(match[1], _split(match[2]), match[3])


def _split(text: str) -> list[str]:
    """Arguments at the top level: commas in quotes, brackets and paths of descriptors separate nothing."""
    pieces = re.findall(r'(?:"(?:[^"\\]|\\.)*"(?:\.\.\.)?|<[^<>]*>|\{[^{}]*\}|\[[^\[\]]*\]|[^,])+', text)
    return [piece.strip() for piece in pieces]


@ways
def test_verify_writes_nothing_anywhere(options: tuple[str, ...], backup: Path, tmp_path: Path) -> None:
    trace = traced(tmp_path, "verify", backup, "-p", passphrase_file(tmp_path), "-v", *options)
    changed = {path for _, path in trace.changes()}
    assert {path for path in changed if not OF_THE_KERNEL.fullmatch(path)} <= HARMLESS
    assert _only_the_worker_read(trace, backup)


@ways
def test_extract_writes_only_below_its_directory(
    options: tuple[str, ...], backup: Path, tmp_path: Path
) -> None:
    target = tmp_path / "restored"
    trace = traced(tmp_path, "extract", backup, "--to", target, "-p", passphrase_file(tmp_path), *options)
    changed = {path for _, path in trace.changes() if not OF_THE_KERNEL.fullmatch(path)}
    outside = {path for path in changed if path != str(target) and not path.startswith(f"{target}/")}
    assert outside <= HARMLESS
    assert not any(".." in path for path in changed)
    # The trace does see what is written, and by whom.
    assert {f"{target}/.work.partial", f"{target}/.work.partial/private.img"} <= changed
    broker = trace.threads_of_broker()
    assert {thread for thread, path in trace.changes() if path.startswith(str(target))} <= broker
    assert _only_the_worker_read(trace, backup)


def _only_the_worker_read(trace: Trace, backup: Path) -> bool:
    """Was the archive read, and neither by a thread of the broker nor in a way that would not be seen?"""
    readers = {
        thread
        for thread, calls in trace.calls.items()
        for call in calls
        if call.name in READS and f"<{backup}>" in str(call.arguments)
    }
    unseen = {call.name for calls in trace.calls.values() for call in calls if call.name in UNSEEN}
    return bool(readers) and not readers & trace.threads_of_broker() and not unseen
