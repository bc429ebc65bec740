"""`make mutants`: important lines broken one at a time, and the tests that have to notice.

    python -m tests.torture.mutants [NUMBER ...]

Strategy: a table of lines on which the invariants rest, each with what takes its place, and the tests that
must fail then. A scratch copy of the tree is changed, tested, and changed back. What survives is a missing
test, and status 1.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.fixtures import REPOSITORY

_PATIENCE_S = 300


@dataclass(frozen=True, slots=True)
class Mutant:
    """In `file` of the package, `line` (a piece of text that stands there once) becomes `instead`."""

    file: str
    line: str
    instead: str
    tests: str

    def apply(self, tree: Path) -> str:
        """Break it; the text as it was."""
        path = tree / "qubes_restore_svc" / self.file
        text = path.read_text()
        if text.count(self.line) != 1:
            raise ValueError(f"{self.file} has {text.count(self.line)} times: {self.line}")
        path.write_text(text.replace(self.line, self.instead))
        return text


# fmt: off
_ROWS = (
    # What is authentic, and in which order
    (
        "archive/container.py",
        "if not hmac.compare_digest(mac, view[-TAIL_SIZE:]):",
        "if False:",
        "tests/archive/test_container.py",
    ),
    (
        "archive/container.py",
        "return hmac.compare_digest(mac, head.raw[_HEAD_MAC_AT:])",
        "return True",
        "tests/archive/test_container.py",
    ),
    ("archive/container.py", "!= checksum:", "== b'':", "tests/archive/test_container.py"),
    (
        "archive/container.py",
        "    check_cost(parameters, ignore_cost_limit=ignore_cost_limit)\n",
        "",
        "tests/archive/test_container.py",
    ),
    ("archive/container.py", "if version != 0:", "if False:", "tests/archive/test_container.py"),
    ("archive/header.py", "if untrusted_text != text:", "if False:", "tests/archive/test_header.py"),
    (
        "kdf/engine.py",
        "return not self.ignored and parameters.work",
        "return False and parameters.work",
        "tests/worker/test_wrong_keys.py",
    ),
    (
        "kdf/engine.py",
        "if parameters.work > MAX_WORK and not ignore_cost_limit:",
        "if False:",
        "tests/kdf/test_engine.py",
    ),
    (
        "kdf/engine.py",
        "    check_possible(parameters)\n    if parameters.work",
        "    if parameters.work",
        "tests/kdf/test_engine.py",
    ),
    (
        "archive/openssl.py",
        "if not hmac.compare_digest(expected, mac.value):",
        "if False:",
        "tests/archive",
    ),
    (
        "archive/members.py",
        'if any(component in (b"", b".", b"..") for component in name.split(b"/")):',
        "if False:",
        "tests/archive/test_members.py tests/archive/test_outer_tar.py",
    ),
    ("archive/filters.py", "    source.check_end()\n", "", "tests/archive/test_filters.py"),
    (
        "archive/filters.py",
        "if engine is not None or not ended:",
        "if False:",
        "tests/archive/test_filters.py",
    ),
    ("archive/filters.py", "MAX_WINDOW = 1 << 27", "MAX_WINDOW = 1 << 31", "tests/archive/test_filters.py"),
    ("archive/sparse.py", "if offset < end:", "if False:", "tests/archive/test_sparse.py"),
    (
        "archive/sparse.py",
        "if offset + length > self.image_size:",
        "if False:",
        "tests/archive/test_sparse.py",
    ),
    (
        "archive/sparse.py",
        "if self.data_size != stored_size:",
        "if False:",
        "tests/archive/test_sparse.py",
    ),
    ("archive/sparse.py", "if self._entries > MAX_ENTRIES:", "if False:", "tests/archive/test_sparse.py"),
    (
        "archive/settings_files.py",
        'if root.keys() != ["version"]:',
        "if False:",
        "tests/archive/test_settings_files.py",
    ),
    (
        "archive/settings_files.py",
        "if name in fields:",
        "if False:",
        "tests/archive/test_settings_files.py",
    ),
    # The worker
    (
        "worker/pipeline.py",
        "qube.firewall = ()  #",
        "pass  #",
        "tests/worker/test_pipeline.py tests/test_end_to_end.py",
    ),
    (
        "worker/pipeline.py",
        "        qube.settle_doubts()\n",
        "",
        "tests/worker/test_pipeline.py tests/test_end_to_end.py tests/torture",
    ),
    (
        "worker/pipeline.py",
        "            self._selection.doubt(damage, event.after)\n",
        "",
        "tests/worker/test_pipeline.py tests/test_end_to_end.py tests/torture",
    ),
    (
        "worker/pipeline.py",
        "            qube.give_up(error)\n",
        "            pass\n",
        "tests/worker/test_pipeline.py",
    ),
    (
        "worker/pipeline.py",
        "        if self._stop.said:\n            waker()\n",
        "",
        "tests/worker/test_pipeline.py",
    ),
    (
        "worker/keys.py",
        "                job.check()\n",
        "                pass\n",
        "tests/worker/test_intake.py",
    ),
    (
        "worker/chunk.py",
        "            self._store.release(self)\n",
        "            pass\n",
        "tests/worker/test_files.py",
    ),
    ("worker/__main__.py", "    _restrict_process()\n", "", "tests/worker/test_daemon.py"),
    ("worker/__main__.py", "        forbid_the_rest()\n", "", "tests/local tests/worker/test_daemon.py"),
    (
        "cli/process.py",
        "        self._act = lambda: None\n",
        "        pass\n",
        "tests/local/test_command.py -k signal",
    ),
    # The command in dom0 and its service
    (
        "dom0_service/program.py",
        "            if name not in named or int(number) <= 2:\n                raise ValueError(name)\n",
        "",
        "tests/dom0_service/test_program.py",
    ),
    (
        "dom0_service/call.py",
        "            await restore.check(request.choice.pool)\n",
        "",
        "tests/dom0_service/test_program.py",
    ),
    (
        "cli/qvm_review.py",
        "if plan.excess is not None and self._arguments.mode == \"restore\":",
        "if False:",
        "tests/cli/test_qvm_review.py",
    ),
    # A comparison
    (
        "broker/comparison.py",
        "            if here[position:stop] != bytes(data[position:stop]):",
        "            if False:",
        "tests/broker/test_comparison.py",
    ),
    (
        "broker/comparison.py",
        "        if here == size and not difference.different_bytes:",
        "        if not difference.different_bytes:",
        "tests/broker/test_comparison.py",
    ),
    (
        "qubes/comparison.py",
        "self._system.volume_file(self._clone, volume)",
        "self._system.volume_file(name, volume)",
        "tests/qubes/test_comparison.py",
    ),
    ("qubes/comparison.py", "                tags=UNFINISHED,\n", "", "tests/qubes/test_comparison.py"),
    (
        "qubes/grants.py",
        "        if request.mode == \"compare\":",
        "        if False:",
        "tests/qubes/test_grants.py",
    ),
    # What dom0 believes
    (
        "wire/connection.py",
        "if not 0 < length <= limit:",
        "if length > 1 << 40:",
        "tests/wire/test_connection.py",
    ),
    ("wire/connection.py", " if self.may_come(kind))", ")", "tests/wire/test_connection.py"),
    ("wire/connection.py", "        self._check(kind)\n", "", "tests/wire/test_connection.py"),
    (
        "wire/connection.py",
        "        self.advance(message)\n        del",
        "        del",
        "tests/wire/test_connection.py",
    ),
    (
        "wire/connection.py",
        "if len(untrusted_object) != len(untrusted_members):",
        "if False:",
        "tests/wire/test_connection.py",
    ),
    ("wire/connection.py", "if depth > MAX_DEPTH:", "if False:", "tests/wire/test_connection.py"),
    ("wire/connection.py", "if width > MAX_MEMBERS:", "if False:", "tests/wire/test_connection.py"),
    ("wire/connection.py", "if next(count) > MAX_OBJECTS:", "if False:", "tests/wire/test_connection.py"),
    (
        "wire/connection.py",
        "            parse_float=_refuse_number,\n",
        "",
        "tests/wire/test_connection.py",
    ),
    (
        "wire/messages.py",
        "if self._announced not in (None, (message.key, message.volume)):",
        "if False:",
        "tests/wire/test_session.py",
    ),
    (
        "wire/restore_call.py",
        "elif isinstance(message, Confirm) and message.plan != self._last_plan:",
        "elif False:",
        "tests/wire/test_restore_call.py",
    ),
    ("wire/models.py", 'extra="forbid"', 'extra="ignore"', "tests/wire"),
    ("wire/models.py", "strict=True, frozen=True", "strict=False, frozen=True", "tests/wire"),
    ("wire/models.py", "if size > kind.max_size:", "if False:", "tests/wire"),
    (
        "dom0_service/conversation.py",
        "        if self.ended is not None:\n            return\n",
        "",
        "tests/dom0_service/test_hostile_client.py -k nonsense",
    ),
    ("wire/volume.py", "if untrusted_offset < self._position:", "if False:", "tests/wire/test_volume.py"),
    (
        "wire/volume.py",
        "if untrusted_offset + untrusted_length > self._image_size:",
        "if False:",
        "tests/wire/test_volume.py",
    ),
    (
        "wire/volume.py",
        "if untrusted_header != _TOTAL.pack(self.data_bytes):",
        "if False:",
        "tests/wire/test_volume.py",
    ),
    (
        "wire/volume.py",
        "if untrusted_header != encode_header(self._image_size):",
        "if False:",
        "tests/wire/test_volume.py",
    ),
    (
        "wire/names.py",
        '"\\ufffd" if unicodedata.category(char) in _FORBIDDEN_CATEGORIES else char',
        "char",
        "tests/wire/test_names.py",
    ),
    (
        "broker/ledger.py",
        "if claim not in self._unannounced:",
        "if False:",
        "tests/broker/test_ledger.py",
    ),
    (
        "broker/ledger.py",
        "if message.image_size > self._limits[claim]:",
        "if False:",
        "tests/broker/test_ledger.py",
    ),
    (
        "broker/ledger.py",
        "if self._current not in (None, message.key):",
        "if False:",
        "tests/broker/test_ledger.py",
    ),
    ("broker/ledger.py", "if claim not in self._unanswered:", "if False:", "tests/broker/test_ledger.py"),
    (
        "broker/ledger.py",
        "if any(key == message.key for key, _ in self._unanswered):",
        "if False:",
        "tests/broker/test_ledger.py",
    ),
    (
        "broker/ledger.py",
        "if self._unanswered or self._unsettled:",
        "if False:",
        "tests/broker/test_ledger.py",
    ),
    (
        "broker/ledger.py",
        'if message.outcome == "ok" and not self._is_as_announced(claim, message.image_size):',
        "if False:",
        "tests/broker/test_ledger.py",
    ),
    (
        "broker/ledger.py",
        "kind = type(error) if error.for_a_worker_to_say else RestoreError",
        "kind = type(error)",
        "tests/broker/test_ledger.py tests/broker/test_hostile_worker.py",
    ),
    (
        "broker/receiver.py",
        "if (done.data_bytes, done.image_size) != (result, expected):",
        "if False:",
        "tests/broker/test_receiver.py tests/broker/test_hostile_stream.py",
    ),
    (
        "broker/receiver.py",
        "    if _receive(connection, buffer):",
        "    if False:",
        "tests/broker/test_receiver.py",
    ),
    (
        "broker/restore_run.py",
        '        await self._roll_back(qube)\n        self._conclude(qube, "failed")',
        '        self._conclude(qube, "failed")',
        "tests/broker/test_restore_run.py",
    ),
    (
        "broker/restore_run.py",
        "elif not all(volume.is_whole for volume in qube.report.volumes):",
        "elif False:",
        "tests/broker",
    ),
    (
        "wire/report.py",
        "elif error is None and all(qube.succeeded for qube in wanted):",
        "elif error is None:",
        "tests/wire/test_report.py",
    ),
    (
        "owners.py",
        "    if status.st_mode & stat.S_IWOTH:",
        "    if False:",
        "tests/qubes/test_config.py",
    ),
    (
        "broker/allowlist.py",
        "            case Standing.NEVER:\n                return False\n",
        "            case Standing.NEVER:\n                return True\n",
        "tests/broker/test_allowlist.py",
    ),
    (
        "broker/allowlist.py",
        "if device.bus not in self._devices and not (once and setting in told.also):",
        "if False:",
        "tests/broker/test_allowlist.py",
    ),
    # What is on the disk
    (
        "broker/filesystem.py",
        "return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)",
        "return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)",
        "tests/broker/test_filesystem.py tests/local/test_directory.py tests/local/test_directory_record.py",
    ),
    (
        "broker/filesystem.py",
        "os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW",
        "os.O_WRONLY | os.O_CREAT",
        "tests/broker/test_filesystem.py",
    ),
    ("broker/filesystem.py", "        os.fsync(directory)\n", "        pass\n", "tests/local"),
    (
        "broker/image_directory.py",
        "            os.fsync(self._file)\n",
        "",
        "tests/local/test_directory_qube.py tests/local/test_directory_qube_volumes.py",
    ),
    (
        "local/directory.py",
        "        os.fsync(file)\n",
        "",
        "tests/local/test_directory_qube.py tests/local/test_directory_qube_volumes.py",
    ),
    (
        "broker/image_directory.py",
        "        sync_directory(self._inside)\n",
        "",
        "tests/local/test_directory_qube.py",
    ),
    (
        "broker/image_directory.py",
        "                sync_directory(self._parent)\n",
        "",
        "tests/local/test_directory_qube.py",
    ),
    (
        "broker/image_directory.py",
        "                    _remove(self._partial, self._inside, self._files, dir_fd=self._parent)\n",
        "                    pass\n",
        "tests/local/test_directory_qube.py",
    ),
    (
        "broker/image_directory.py",
        "            if actual != size:",
        "            if False:",
        "tests/local/test_directory_qube.py tests/local/test_directory_qube_volumes.py",
    ),
    (
        "broker/image_directory.py",
        "if not _leads_to(name, self._inside, dir_fd=self._parent):",
        "if False:",
        "tests/local/test_directory_qube.py",
    ),
    (
        "broker/image_directory.py",
        "if _holds_only(files, inside):",
        "if True:",
        "tests/local/test_directory_record.py",
    ),
    ("broker/restore_run.py", "qube.blame(reason)", "pass", "tests/broker/test_restore_run.py"),
    # What an earlier restore has finished.
    ("worker/selection.py", "spent_files=spent_files)", "spent_files=set())", "tests/worker/test_session.py"),
    ("broker/ledger.py", "set(here)", "set()", "tests/broker/test_resume.py"),
    ("broker/plan.py", "and name in (None, one.name)", "", "tests/broker/test_plan_resume.py"),
    (
        "local/directory.py",
        " or status.st_size != volume.size",
        "",
        "tests/local/test_directory_resumed.py",
    ),
    (
        "qubes/host.py",
        'if self._client in ("dom0", proof.client):',
        "if True:",
        "tests/qubes/test_proof.py",
    ),
    ("qubes/host.py", "= not from_before and", "=", "tests/qubes/test_proof.py"),
    (
        "local/memory.py",
        "resource.RLIMIT_FSIZE: 0,",
        "resource.RLIMIT_FSIZE: 1 << 40,",
        "tests/local/test_sandbox_link.py tests/local/test_sandbox.py",
    ),
)
# fmt: on
MUTANTS = tuple(Mutant(*row) for row in _ROWS)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; its status."""
    numbers = [int(word) for word in (sys.argv[1:] if argv is None else argv)] or range(len(MUTANTS))
    survivors = 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        tree = Path(name) / "tree"
        shutil.copytree(REPOSITORY, tree, ignore=shutil.ignore_patterns(".git", ".venv", "build", ".*_cache"))
        for number in numbers:
            mutant = MUTANTS[number]
            text = mutant.apply(tree)
            noticed = _noticed(tree, mutant)
            (tree / "qubes_restore_svc" / mutant.file).write_text(text)
            survivors += not noticed
            outcome = "noticed" if noticed else "SURVIVES"
            print(f"{number}: {outcome}: {mutant.file}: {mutant.line.strip()}", flush=True)
    print(f"{len(numbers)} lines broken, {survivors} not noticed")
    return 1 if survivors else 0


def _noticed(tree: Path, mutant: Mutant) -> bool:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += mutant.tests.split()
    try:
        return subprocess.run(command, cwd=tree, capture_output=True, timeout=_PATIENCE_S).returncode == 1
    except subprocess.TimeoutExpired:
        return True


if __name__ == "__main__":
    sys.exit(main())
