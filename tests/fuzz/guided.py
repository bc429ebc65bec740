"""The process that atheris takes over: one target, its inputs guided by the coverage of our code.

python -m tests.fuzz.guided TARGET RUNS SECONDS DIRECTORY
"""

import importlib
import sys
from pathlib import Path

atheris = importlib.import_module("atheris")
with atheris.instrument_imports(include=["qubes_restore_svc"]):
    from .targets import TARGETS

#: Longest input, bytes.
_LONGEST = 1 << 14


def main() -> None:
    """Does not return: libFuzzer ends the process."""
    name, runs, limit_s, directory = sys.argv[1:]
    target, kept = TARGETS[name], Path(directory)
    corpus, words = kept / name, kept / f"{name}.words"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words)
    words.write_text("".join(f'"{word}"\n' for word in quoted))
    options = [f"-runs={runs}", f"-max_total_time={limit_s}", f"-max_len={_LONGEST}"]
    options += [f"-dict={words}"] if target.words else []
    options += [
        "-print_final_stats=1",
        "-rss_limit_mb=1024",
        "-timeout=10",
        f"-artifact_prefix={kept}/{name}-",
    ]

    def run(data: bytes) -> None:
        target.run(data)

    atheris.Setup([sys.argv[0], *options, str(corpus)], run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
