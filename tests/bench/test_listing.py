"""How much of the archive is read, from a trace of system calls."""

from pathlib import Path

from .listing import bytes_read

BACKUP = Path("/data/sample.qbackup")
TRACE = """\
100 read(3</usr/lib/libc.so.6>, "\\177ELF"..., 832) = 832
101 read(5</data/sample.qbackup>, "backup-header"..., 16384) = 16384
101 preadv(5</data/sample.qbackup>, [{iov_base="scrypt"..., iov_len=300}], 1, 20480) = 300
101 read(5</data/sample.qbackup>, 0x7f, 10) = -1 EIO (Input/output error)
101 read(6</data/sample.qbackup.json>, "{", 10) = 10
102 read(5</data/sample.qbackup>,  <unfinished ...>
101 read(4<pipe:[77]>,  <unfinished ...>
102 <... read resumed>"x"..., 4000)    = 4000
101 <... read resumed>"y"..., 50)      = 50
103 <... read resumed>"z"..., 60)      = 60
101 readv(5</data/sample.qbackup>, [{iov_base="a) = 999", iov_len=8}], 1) = 7
101 +++ exited with 0 +++
"""


def test_only_bytes_that_came_from_the_archive_count() -> None:
    assert bytes_read(TRACE.splitlines(keepends=True), BACKUP) == 16384 + 300 + 4000 + 7
