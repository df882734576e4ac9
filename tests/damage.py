"""Random damage to collections: flips, truncations and deletions, and what must come of each.

    python tests/damage.py [--seed 0] [--count 300]

Every case copies a collection (of any mode; finished, unfinished, or killed while finishing), damages one of its files,
and asks the three who must not believe it: `verify` names the file; `Store` answers as before or refuses by name;
`collect` refuses by name or ends with exactly the tables of the undamaged collection. Anything else is a defect, raised
as `Defect` with the case to repeat it. The source is fake, so a case takes a tenth of a second.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from fake_source import FakeSource, words

from writesae.collect import Corpus, Store, collect
from writesae.collect import finish as finish_module
from writesae.collect.verify import verify

SETTINGS = {"context": 32, "batch": 4, "shard_passages": 12, "n": 6}
STATES = ("finished", "unfinished", "finishing")
KINDS = ("flip", "truncate", "delete")


class Defect(AssertionError):
    """Damage that was believed, or that ended in an unclear error."""


class Tokenizer:
    """One token a character, kept in the store as a file."""

    bos_token_id = 7

    def __call__(self, text, add_special_tokens, verbose):
        return {"input_ids": words(text)}

    def save_pretrained(self, folder):
        Path(folder, "vocabulary.txt").write_text("one token a character\n" * 20)


class _Stop(Exception):
    pass


class _Failing(FakeSource):
    def firings(self, tokens, mask):
        if self.calls == 12:
            raise _Stop
        return super().firings(tokens, mask)


def tables(folder: Path) -> dict:
    """Every table of a collection, by name; a unit's folder by its number, whichever machine made it."""
    found = {}
    for path in sorted(Path(folder).rglob("*.parquet")):
        parts = list(path.relative_to(folder).parts)
        if parts[0] == "units":
            parts[1] = parts[1].split("-")[0]
        found["/".join(parts)] = pq.read_table(path)
    return found


def prepare(scratch: Path) -> dict[tuple[str, str], Path]:
    """Collections of one text in every mode and state."""
    text = scratch / "text"
    text.mkdir(parents=True)
    rng = random.Random(1)
    for i, size in enumerate((400, 31, 32, 0, 7, 900, 64)):
        (text / f"{i}.txt").write_text("".join(rng.choice("abcdefg hij\n") for _ in range(size)))
    made = {}
    for mode in ("all", "top", "reservoir"):
        for state in STATES:
            out = made[mode, state] = scratch / f"{mode}-{state}"
            if state == "finished":
                again(scratch, mode, out)
                continue
            try:
                if state == "unfinished":
                    again(scratch, mode, out, _Failing())
                else:
                    _interrupted(scratch, mode, out)
            except _Stop:
                pass
    return made


def again(scratch: Path, mode: str, out: Path, source=None) -> dict:
    """The collection's own command."""
    return collect(Corpus.from_path(scratch / "text"), Tokenizer(), source or FakeSource(), out, mode=mode, **SETTINGS)


def _interrupted(scratch: Path, mode: str, out: Path) -> None:
    """Ends while finishing, with one index written and two to come."""
    original, calls = finish_module.mark, []

    def mark(*args, **more):
        if calls:
            raise _Stop
        calls.append(0)
        return original(*args, **more)

    finish_module.mark = mark
    try:
        again(scratch, mode, out)
    finally:
        finish_module.mark = original


def harm(path: Path, kind: str, rng: random.Random) -> str:
    """Damages one file; says how."""
    data = bytearray(path.read_bytes())
    if kind == "delete" or not data:
        path.unlink()
        return "deleted"
    if kind == "truncate":
        size = rng.randrange(len(data))
        path.write_bytes(data[:size])
        return f"truncated from {len(data)} to {size} bytes"
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    return f"bit {bit} of {8 * len(data)} flipped"


def check(
    seed: int, count: int, scratch: Path, progress: Callable[[int], object] = lambda n: None, made: dict | None = None
) -> Counter:
    """Tries `count` damages; returns how many ended how.

    Args:
        seed, count: case i of a seed is always the same.
        scratch: a folder to work in, where `prepare` made `made`; without `made`, an empty one.
        progress: told each case's number.

    Raises:
        Defect: one was believed, or ended in another error than a ValueError that names a file of the folder.
    """
    made = prepare(scratch) if made is None else made
    whole = {mode: tables(made[mode, "finished"]) for mode in ("all", "top", "reservoir")}
    answers = {key: _answers(folder) for key, folder in made.items()}
    outcomes: Counter = Counter()
    for case in range(count):
        rng = random.Random(f"{seed} {case}")
        mode, state = rng.choice(sorted(made))
        source, out = made[mode, state], scratch / "case"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, out)
        files = sorted(p for p in out.rglob("*") if p.is_file() and p.name != ".lock")
        path, kind = rng.choice(files), rng.choice(KINDS)
        how = harm(path, kind, rng)
        name = path.relative_to(out).as_posix()
        label = f"seed {seed} case {case}: {mode} {state}, {name} {how}"
        try:
            seen = _verify(out, name, state, verify(source).left_over, how)
            read = _read(out, answers[mode, state])
            ended = _collect(scratch, mode, out, whole[mode])
        except Defect as error:
            raise Defect(f"{label}: {error}") from error
        except Exception as error:
            raise Defect(f"{label}: {type(error).__name__}: {error}") from error
        outcomes.update([f"{state} {kind}", f"verify: {seen}", f"read: {read}", f"collect: {ended}"])
        progress(case)
    return outcomes


def _verify(out: Path, name: str, state: str, left_over: list[str], how: str) -> str:
    try:
        found = verify(out)
    except ValueError as error:
        _named(out, error)
        return "refused by name"
    if name in found.damaged or name in found.missing:
        return "named"
    if found.sound:
        # Of an unfinished collection: what its next run makes anew in any case, or its last marker, unknown when gone.
        if state != "finished" and (name in left_over or (how == "deleted" and name.startswith("done/"))):
            return "not part of it"
        raise Defect("verify found nothing")
    if how == "deleted" and name == "summary.json":
        return "named"  # what the summary stood for is missing
    raise Defect(f"verify named other files: {found.lines()}")


def _answers(folder: Path) -> dict:
    """What a store says, or the refusal."""
    questions = {
        "documents": lambda s: s.documents, "counts": lambda s: s.counts(), "top": lambda s: s.top(1, 0, 5, 5),
        "deep": lambda s: s.top(4, 2, 9, 1000), "at": lambda s: s.at(0, 3), "tokens": lambda s: s.tokens(5).tolist(),
        "firings": lambda s: [t.to_pylist() for t in s.firings()], "shards": lambda s: s.summary()["shards"],
        "contexts": lambda s: [(c.tokens.tolist(), c.at, c.source) for c in s.contexts(1, 3, 7, 4)],
    }  # fmt: skip
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, question in questions.items():
            try:
                found[name] = question(Store(folder))
            except ValueError as error:
                found[name] = error
    return found


def _read(out: Path, expected: dict) -> str:
    refused, answers = 0, _answers(out)
    # An unfinished one whose last marker went has fewer shards, and says so.
    shards = answers["shards"]
    fewer = not isinstance(shards, ValueError) and shards < expected["shards"] and not Store(out).complete
    for name, answer in answers.items():
        if isinstance(answer, ValueError):
            refused += 1
            if not isinstance(expected[name], ValueError) and not fewer:
                _named(out, answer)
        elif isinstance(expected[name], ValueError):
            raise Defect(f"Store.{name} answers where it refused")
        elif answer != expected[name] and not (hasattr(answer, "equals") and answer.equals(expected[name])):
            if not fewer:
                raise Defect(f"Store.{name} answers otherwise")
    before = sum(isinstance(answer, ValueError) for answer in expected.values())
    return "something refused by name" if refused > before else "same"


def _collect(scratch: Path, mode: str, out: Path, whole: dict) -> str:
    try:
        summary = again(scratch, mode, out)
    except ValueError as error:
        _named(out, error)
        return "refused by name"
    here = tables(out)
    if here.keys() != whole.keys() or not all(here[name].equals(table) for name, table in whole.items()):
        raise Defect("collect accepted it with other tables")
    if not summary["complete"] or not verify(out).sound:
        raise Defect("collect left an unsound folder")
    return "made again" if summary["repaired"] else "same tables"


def _named(out: Path, error: ValueError) -> None:
    if str(out) not in str(error):
        raise Defect(f"a refusal names no file: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=300)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = check(args.seed, args.count, Path(scratch))
    print(f"{args.count} damages, none believed, no unclear error")
    for name, number in sorted(outcomes.items()):
        print(f"{number:6} {name}")


if __name__ == "__main__":
    main()
