"""Runs collections in forked children and kills them at the nth file-system call: one import, many deaths.

Reads lines of JSON from standard input: {"corpus", "out", "crash": n or null, "collect": {arguments}}. Answers each
with {"status": the child's exit status, "calls": file-system calls made, "before": of them before the finishing}. With
"crash": -1 the calls are counted.
"""

import json
import os
import sys

import pyarrow.parquet as pq
from fake_source import FakeSource, words

import writesae.collect.session  # loaded before forking
from writesae.collect import Corpus, collect

DIED = 57


def instrument(crash: int) -> list[int]:
    """Makes the process die right before its nth call of any of these, or between one and the next."""
    calls = [0]

    def wrap(owner, name):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            calls[0] += 1
            if calls[0] == crash:
                if name == "write_table":  # a torn file, as a kill in the middle of a write leaves it
                    with open(args[1], "wb") as file:
                        file.write(b"PAR1 torn")
                os._exit(DIED)
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    for owner, name in ((os, "replace"), (os, "fsync"), (os, "unlink"), (os, "mkdir"), (pq, "write_table")):
        wrap(owner, name)
    return calls


def child(job: dict, answer: int) -> None:
    calls = instrument(job["crash"])
    before, finish = [0], writesae.collect.session.finish

    def counted(*args):
        before[0] = calls[0]
        finish(*args)

    writesae.collect.session.finish = counted
    collect(Corpus.from_path(job["corpus"]), words, FakeSource(), job["out"], **job["collect"])
    os.write(answer, json.dumps({"calls": calls[0], "before": before[0]}).encode())
    os._exit(0)


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(job, write)
            except BaseException as error:
                print(f"crash driver: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
        os.close(write)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(read) as file:
            calls = file.read()
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), **json.loads(calls or "{}")}), flush=True)


if __name__ == "__main__":
    main()
