"""Memory that is left, on machines made of files."""

from pathlib import Path

import pytest

from qubes_restore_svc.system_memory import MemoryRoom, group_limit, memory_room

MIB = 1 << 20
V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:3 - cgroup cgroup rw,memory"


class Machine:
    """A directory with the files of /proc and /sys that count."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 99999999 kB\nMemAvailable:   {8000 * 1024} kB\nOther: 1 kB\n")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def process(self, cgroup: str, mountinfo: str) -> None:
        self.write("proc/self/cgroup", cgroup + "\n")
        self.write("proc/self/mountinfo", mountinfo + "\n")

    def group(self, path: str, **files: str | int) -> None:
        for name, content in files.items():
            self.write(f"sys/fs/cgroup/{path}/memory.{name}", f"{content}\n")

    @property
    def available(self) -> float:
        return memory_room(self.root).available / MIB


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_without_groups_it_is_what_the_kernel_calls_available(machine: Machine) -> None:
    assert machine.available == 8000


def test_a_machine_that_tells_nothing_still_gives_a_number(tmp_path: Path) -> None:
    assert memory_room(tmp_path).available > 0


def test_this_machine_gives_a_plausible_number() -> None:
    assert MIB < memory_room().available < 1 << 50


def test_the_limit_of_a_group_counts_less_what_it_uses(machine: Machine) -> None:
    machine.process("0::/user/app", V2_MOUNT)
    machine.group("user/app", max=1000 * MIB, current=300 * MIB)
    assert machine.available == 700


def test_droppable_page_cache_is_not_used_memory(machine: Machine) -> None:
    machine.process("0::/app", V2_MOUNT)
    machine.group("app", max=1000 * MIB, current=900 * MIB)
    machine.group("app", stat=f"anon 5\ninactive_file {600 * MIB}\ntotal_inactive_file 7")
    assert machine.available == 700


def test_the_tightest_group_on_the_way_up_counts(machine: Machine) -> None:
    machine.process("0::/a/b/c", V2_MOUNT)
    machine.group("a", max=500 * MIB, current=450 * MIB)
    machine.group("a/b", max="max", current=400 * MIB)
    machine.group("a/b/c", max=1000 * MIB, current=1 * MIB)
    assert machine.available == 50


def test_the_throttling_limit_counts_too(machine: Machine) -> None:
    machine.process("0::/a", V2_MOUNT)
    machine.group("a", max=1000 * MIB, high=200 * MIB, current=50 * MIB)
    assert machine.available == 150


def test_the_group_that_leaves_no_more_is_named_with_its_limit(machine: Machine) -> None:
    machine.process("0::/a/b c", V2_MOUNT)
    machine.group("a", max=500 * MIB, current=450 * MIB)
    machine.group("a/b c", max=90 * MIB, current=70 * MIB)
    room = memory_room(machine.root)
    assert room == MemoryRoom(20 * MIB, 90 * MIB, "/a/b c")
    assert MemoryRoom.parse(str(room)) == room
    assert room.told == "the control group /a/b c may take 90 MiB, of which 20 MiB are free"


def test_where_the_machine_has_no_more_no_group_is_named(machine: Machine) -> None:
    machine.process("0::/a", V2_MOUNT)
    machine.group("a", max=90000 * MIB, current=0)
    room = memory_room(machine.root)
    assert room == MemoryRoom(8000 * MIB)
    assert MemoryRoom.parse(str(room)) == room


@pytest.mark.parametrize(
    ("room", "advice"),
    [
        (MemoryRoom(300 * MIB, 400 * MIB, "/a"), "Grant it at least that much: --memory 211."),
        (
            MemoryRoom(200 * MIB, 400 * MIB, "/a"),
            "But the control group /a may take 400 MiB, of which 200 MiB",
        ),
        (MemoryRoom(200 * MIB), "Only 200 MiB are free here"),
    ],
)
def test_more_memory_is_advised_only_where_there_is_more(room: MemoryRoom, advice: str) -> None:
    said = room.advice(211 * MIB - 5)
    assert said.startswith(advice)
    assert ("--memory" in said) == (room.available >= 211 * MIB)


def test_a_group_over_its_limit_leaves_nothing(machine: Machine) -> None:
    machine.process("0::/a", V2_MOUNT)
    machine.group("a", max=100 * MIB, current=120 * MIB)
    assert machine.available == 0


def test_the_system_counts_where_groups_leave_more(machine: Machine) -> None:
    machine.process("0::/a", V2_MOUNT)
    machine.group("a", max=90000 * MIB, current=0)
    assert machine.available == 8000


def test_version_1_counts_in_the_same_way(machine: Machine) -> None:
    machine.process("4:cpu,memory:/job/inner\n0::/", V1_MOUNT)
    machine.group("memory/job", limit_in_bytes=400 * MIB, usage_in_bytes=300 * MIB)
    machine.group("memory/job", stat=f"total_inactive_file {100 * MIB}")
    machine.group("memory/job/inner", limit_in_bytes=(1 << 63) - 4096, usage_in_bytes=1)
    assert machine.available == 200


def test_in_a_container_the_group_that_is_mounted_counts(machine: Machine) -> None:
    mount = "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
    machine.process("4:memory:/docker/abc/inner", mount)
    machine.group("memory", limit_in_bytes=300 * MIB, usage_in_bytes=0)
    assert machine.available == 300
    machine.group("memory/inner", limit_in_bytes=200 * MIB, usage_in_bytes=0)
    assert machine.available == 200


@pytest.mark.parametrize("path", ["/somewhere/else", "/../../outside"])
def test_a_group_outside_of_what_is_mounted_falls_back_to_the_mount(machine: Machine, path: str) -> None:
    mount = "35 31 0:32 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw"
    machine.process(f"0::{path}", V2_MOUNT if ".." in path else mount)
    machine.group("", max=300 * MIB, current=0)
    assert machine.available == 300


def test_a_mount_point_with_a_blank_is_found(machine: Machine) -> None:
    machine.process("0::/a", "31 23 0:28 / /sys/fs/cgroup/with\\040blank rw - cgroup2 none rw")
    machine.group("with blank/a", max=300 * MIB, current=0)
    assert machine.available == 300


def test_files_that_hold_something_else_are_passed_over(machine: Machine) -> None:
    machine.process("0::/a\nnonsense\n\n7:", f"{V2_MOUNT}\nshort line\n - \n")
    machine.group("a", max="-5", current="many")
    assert machine.available == 8000


def test_the_least_limit_of_any_group_of_another_process_is_known(machine: Machine) -> None:
    machine.process("0::/", V2_MOUNT)
    machine.write("proc/7/cgroup", "0::/user/worker.scope\n")
    machine.group("user", max="max", current=0)
    assert group_limit(7, machine.root) is None
    machine.group("user/worker.scope", max=300 * MIB, current=0)
    assert group_limit(7, machine.root) == 300 * MIB
    machine.group("user", max=200 * MIB, current=0)
    assert group_limit(7, machine.root) == 200 * MIB
