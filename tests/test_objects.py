"""Object stores: text read from one, collections in one, connections cut at random moments: nothing lost or doubled.

The server is a small one of this machine (`fake_s3`), the client the real one (pyarrow's).
"""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from damage import tables
from fake_s3 import KEY, SECRET, FakeS3, serving
from fake_source import FakeSource, words

from writesae import objects
from writesae.cli import main
from writesae.collect import Corpus, Store, collect, files, merge, mirror
from writesae.collect.merging import put_together
from writesae.collect.verify import verify

SETTINGS = {"context": 32, "batch": 4, "shard_passages": 6, "n": 6, "unit": 150}


@pytest.fixture
def server(tmp_path, monkeypatch):
    with serving(FakeS3(buckets=("bucket", "mine"))) as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WRITESAE_SCRATCH", str(tmp_path / "scratch"))
        monkeypatch.setattr(objects, "_PAUSE", 0.001)
        objects._file_system.cache_clear()
        yield server
    objects._file_system.cache_clear()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(1)
    for i, size in enumerate((400, 31, 32, 0, 7, 300, 64)):
        (folder / f"{i}.txt").write_text("".join(rng.choice("abcdefg hij\n") for _ in range(size)))
    (folder / "more").mkdir()
    lines = (json.dumps({"text": "".join(rng.choice("abc de\n") for _ in range(40))}) for _ in range(8))
    (folder / "more" / "records.jsonl").write_text("\n".join(lines))
    (folder / ".hidden").write_text("not text of the corpus")
    return folder


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """{mode: (summary, tables) of one worker's collection into a folder}."""
    root = tmp_path_factory.mktemp("alone")
    found = {}
    for mode in ("all", "top", "reservoir"):
        summary = make(text, root / mode, mode=mode)
        found[mode] = summary, tables(root / mode)
    return found


def make(corpus, out, source=None, **settings) -> dict:
    return collect(Corpus.from_path(corpus), words, source or FakeSource(), out, **{**SETTINGS, **settings})


def assert_same(server, prefix: str, folder, expected: dict) -> None:
    """What lies there is a sound collection of these tables, and nothing else lies there."""
    here = tables(server.save(prefix, folder))
    assert here.keys() == expected.keys()
    for name, table in expected.items():
        assert here[name].equals(table), name
    for found in (verify(folder), verify(f"s3://bucket/{prefix}")):
        assert found.sound and found.complete and not found.left_over, found


@pytest.mark.parametrize("mode", ["all", "top", "reservoir"])
def test_text_and_collection_in_a_bucket(server, text, alone, tmp_path, mode):
    server.put_folder(text, "text")
    summary = make("s3://bucket/text", "s3://bucket/runs/one/", mode=mode)
    expected, whole = alone[mode]
    for name in ("complete", "units", "documents", "tokens", "firings", "kept"):
        assert summary[name] == expected[name], name
    assert_same(server, "runs/one", tmp_path / "here", whole)
    there, here = Store("s3://bucket/runs/one"), Store(tmp_path / "here")
    assert there.documents.equals(here.documents) and there.counts().equals(here.counts())
    assert there.tokens(5).tolist() == here.tokens(5).tolist()
    assert [t.to_pylist() for t in there.firings(1, 3)] == [t.to_pylist() for t in here.firings(1, 3)]
    assert there.at(0, 3).equals(here.at(0, 3))
    # Nothing is left to do: no pass of the model.
    source = FakeSource()
    assert make("s3://bucket/text", "s3://bucket/runs/one", source, mode=mode) == Store(there.where).summary()
    assert source.calls == 0


def test_a_corpus_is_read_as_from_a_folder(server, text):
    server.put_folder(text, "text")
    here, there = Corpus.from_path(text), Corpus.from_name("s3://bucket/text/")
    assert [(d.source, d.place, d.open().read()) for d in here.documents()] == [
        (d.source, d.place, d.open().read()) for d in there.documents()
    ]
    assert here.fingerprint() == there.fingerprint() and here.digest() == there.digest()
    assert here.left_out() == there.left_out() and here.left_out()["hidden"] == 1
    assert here.sample() == there.sample()
    one = Corpus.from_path("s3://bucket/text/more/records.jsonl")
    assert len(list(one.documents())) == 8 and one.files[0][1] == "records.jsonl"


def test_what_changed_meanwhile_is_noticed(server, text, monkeypatch):
    """A text of the same length that takes another's place: named, and not taken for the one that was begun with."""
    server.put_folder(text, "text")

    class Changing(FakeSource):
        def firings(self, tokens, mask):
            if self.calls == 1:
                server.put("text/5.txt", b"x" * 300)
            return super().firings(tokens, mask)

    with pytest.raises(ValueError, match="5.txt changed while it was being collected"):
        make("s3://bucket/text", "s3://bucket/out", Changing())
    with pytest.raises(ValueError, match="other arguments: corpus.digests.5.txt"):
        make("s3://bucket/text", "s3://bucket/out")
    stream = Corpus.from_path("s3://bucket/text/0.txt").files[0][0].open()
    server.put("text/0.txt", b"y" * 400)
    assert stream.read() == b"y" * 400  # opened is not yet read; what is read is of one object
    blocks = objects.Objects("s3://bucket/text").blocks("0.txt", size=100)
    assert next(blocks) == b"y" * 100
    server.put("text/0.txt", b"z" * 400)
    monkeypatch.setattr(objects, "TRIES", 50)
    server.cutting = 0.9
    with pytest.raises(ValueError, match="0.txt changed while it was read"):
        list(blocks)


def test_cut_connections_lose_and_double_nothing(server, text, alone, tmp_path):
    server.put_folder(text, "text")
    server.cutting = 0.1
    make("s3://bucket/text", "s3://bucket/out")
    moments = {moment for moment, _, _ in server.cuts}
    assert len(server.cuts) > 20 and moments == {"unread", "reading", "unanswered", "answering"}
    server.cutting = 0.0
    assert_same(server, "out", tmp_path / "here", alone["all"][1])
    assert not server.parts  # of uploads that were not ended


def test_large_objects_go_on_where_they_broke_off(server, tmp_path, monkeypatch):
    data = random.Random(0).randbytes(12 << 20)
    path = tmp_path / "large"
    path.write_bytes(data)
    server.cutting = 0.4
    there = objects.Objects("s3://bucket/some")
    there.put("large", path)
    assert server.objects["bucket", "some/large"][0] == data
    there.fetch("large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == data and server.cuts
    server.cutting = 1.0
    monkeypatch.setattr(objects, "TRIES", 2)
    with pytest.raises(objects.Unreachable, match="s3://bucket/some/large was not reached in 2 tries"):
        there.fetch("large", tmp_path / "never")
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("mode", ["all", "top"])
def test_workers_that_see_nothing_of_one_another_but_the_bucket(server, text, alone, tmp_path, mode, monkeypatch):
    """No folder, no locks: a unit done twice is there once."""
    monkeypatch.setattr(mirror.Mirror, "poll", 0.05)
    server.cutting = 0.02
    places = []
    for rank in range(2):
        monkeypatch.setenv("WRITESAE_SCRATCH", str(tmp_path / f"machine-{rank}"))
        places.append(mirror.Mirror("s3://bucket/out"))

    def work(rank: int) -> dict:
        return make(text, places[rank], FakeSource(delay=0.01), mode=mode, rank=rank, world_size=2)

    with ThreadPoolExecutor(2) as pool:
        assert all(summary["complete"] for summary in pool.map(work, range(2)))
    server.cutting = 0.0
    assert_same(server, "out", tmp_path / "here", alone[mode][1])


def test_a_worker_that_comes_while_another_begins(server, text, monkeypatch):
    """Its list of the bucket is from before; what is there now is no stranger's."""
    make(text, "s3://bucket/begun")
    begun, listed = server.names("begun/"), objects.Objects.names

    def names(self, under="", deep=True):
        found = listed(self, under, deep)
        if under == "done" and not found:
            for name in begun:
                server.put(name.replace("begun/", "late/"), server.objects["bucket", name][0])
        return found

    monkeypatch.setattr(objects.Objects, "names", names)
    source = FakeSource()
    assert make(text, "s3://bucket/late", source, rank=1, world_size=2)["complete"] and source.calls == 0


class Stop(Exception):
    pass


class Failing(FakeSource):
    """Breaks off at the tenth batch."""

    def firings(self, tokens, mask):
        if self.calls == 10:
            raise Stop
        return super().firings(tokens, mask)


def test_another_machine_goes_on(server, text, alone, tmp_path, monkeypatch):
    """What one that died had sent stays; units that are done are not done again, and what nobody names goes."""
    with pytest.raises(Stop):
        make(text, "s3://bucket/out", Failing())
    done = server.names("out/done/unit-")
    assert done and not [name for name in server.names("out/") if name.endswith("summary.json")]
    server.put("out/units/000000-0123456789ab-0123456789ab/firings/part-000000.parquet", b"of one that died")
    found = verify("s3://bucket/out")
    assert found.sound and not found.complete and len(found.left_over) == 1
    monkeypatch.setenv("WRITESAE_SCRATCH", str(tmp_path / "another"))
    assert len(list(Store("s3://bucket/out").firings())) > 0
    kept = {name: server.objects["bucket", name] for name in done}
    whole, rest = FakeSource(), FakeSource()
    make(text, tmp_path / "local", whole)
    make(text, "s3://bucket/out", rest)
    assert 0 < rest.calls < whole.calls
    assert {name: server.objects["bucket", name] for name in done} == kept
    assert_same(server, "out", tmp_path / "here", alone["all"][1])


def test_damage_is_found_and_made_again(server, text, alone, tmp_path):
    make(text, "s3://bucket/out")
    unit = server.names("out/units/000001")
    firings = next(name for name in unit if "/firings/" in name)
    data = server.objects["bucket", firings][0]
    server.put(firings, data[:-9] + b"123456789")
    del server.objects["bucket", "out/index/layer-1-head-0.parquet"]
    server.put("out/done/unit-000000.json", b"{}")
    found = verify("s3://bucket/out")
    assert found.missing == ["index/layer-1-head-0.parquet"]
    assert set(found.damaged) == {firings.removeprefix("out/"), "done/unit-000000.json"}
    assert main(["verify", "s3://bucket/out", "--quiet"]) == 1
    with pytest.raises(ValueError, match="s3://bucket/out/done/unit-000000.json"):
        list(Store("s3://bucket/out").firings())
    make(text, "s3://bucket/out")
    assert_same(server, "out", tmp_path / "here", alone["all"][1])


def test_of_large_tables_what_is_asked_for_is_read(server, text, tmp_path, monkeypatch):
    """In blocks, each compared with its digest; a damaged block is no obstacle to who does not ask for it."""
    for where in ("writesae.files", "writesae.collect.marks"):
        monkeypatch.setattr(f"{where}.COMPARED", 256)
    monkeypatch.setattr(files, "ROW_GROUP", 64)
    make(text, "s3://bucket/out", shard_passages=1000, unit=10**6)
    here = Store(server.save("out", tmp_path / "here"))
    name = next(name for name in server.names("out/units/") if "/firings/" in name)
    data = server.objects["bucket", name][0]
    server.put(name, data[:500] + bytes([data[500] ^ 1]) + data[501:])  # in the first row groups
    store = Store.from_pretrained("s3://bucket/out")
    assert [t.to_pylist() for t in store.firings(4, 2, 62)] == [t.to_pylist() for t in here.firings(4, 2, 62)] != []
    assert not (store.path / name.removeprefix("out/")).exists()
    with pytest.raises(ValueError, match=f"s3://bucket/{name} is damaged: its content and its digest disagree"):
        list(store.firings())
    with pytest.raises(ValueError, match="path: expected a store in a folder, got s3://bucket/out"):
        store.push_to_hub("some/one", license="cc-by-4.0")


def test_stores_are_merged_from_and_into_a_bucket(server, text, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text("another text altogether " * 9)
    make(text, "s3://bucket/a")
    make(other, tmp_path / "b")
    merge([tmp_path / "b", "s3://bucket/a"], "s3://bucket/both")
    summary = merge([tmp_path / "b", server.save("a", tmp_path / "a")], tmp_path / "both")
    assert_same(server, "both", tmp_path / "here", tables(tmp_path / "both"))
    again = merge([tmp_path / "b", "s3://bucket/a"], "s3://bucket/both")
    assert again["firings"] == summary["firings"]
    for name in ("a/summary.json", *server.names("a/index/")):
        del server.objects["bucket", name]
    assert put_together("s3://bucket/a")["complete"]
    assert verify("s3://bucket/a").sound


def test_errors_say_what_is_wrong_in_one_line(server, text, capsys, monkeypatch):
    def refused(match: str, url: str, **more):
        with pytest.raises(ValueError, match=match) as caught:
            Store(url) if more.get("reading") else make(text, url)
        assert "\n" not in str(caught.value) and SECRET not in str(caught.value)

    refused("out: expected a bucket that exists, got s3://nowhere/x.*NO_SUCH_BUCKET", "s3://nowhere/x")
    refused("path: expected a folder made by `writesae collect`, got s3://bucket/x", "s3://bucket/x", reading=True)
    server.put("others/file", b"something")
    refused("in s3://bucket/others, got file and no manifest.json", "s3://bucket/others")
    server.read_only.add("mine")
    refused("out: no permission for s3://mine/x/.*AWS_ACCESS_KEY_ID", "s3://mine/x")
    refused("hf://, where every file is a commit.*push_to_hub", "hf://datasets/some/one")
    refused("expected s3://, gs://, hf:// or another store that fsspec knows, got nosuch://a/b", "nosuch://a/b")
    refused("expected s3://BUCKET/PREFIX, got s3://bucket/../x", "s3://bucket/../x")
    for url in (
        f"s3://{KEY}:{SECRET}@bucket/x",
        f"s3://{KEY}:{SECRET}/x@bucket/x",
        f"s3://bucket/x?secret_key={SECRET}",
    ):
        refused("got a URL with credentials or a query in it", url)
        assert main(["verify", url]) == 2 and SECRET not in capsys.readouterr().err
    for address in ("localhost:9000", f"http://{KEY}:{SECRET}@localhost:9000"):
        with monkeypatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", address)
            objects._file_system.cache_clear()
            refused("AWS_ENDPOINT_URL: expected http://HOST:PORT or https://HOST", "s3://bucket/y")
    objects._file_system.cache_clear()
    server.put("z/manifest.json", b"{}")
    server.put("z/done/../../../../outside.json", b"{}")
    refused(
        "s3://bucket/z holds 'done/../../../../outside.json', which is no file's name", "s3://bucket/z", reading=True
    )
    with pytest.raises(FileNotFoundError, match="no object s3://bucket/none, nor any below it"):
        Corpus.from_name("s3://bucket/none")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    objects._file_system.cache_clear()
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    refused("out: no permission for s3://bucket/x.*ACCESS_DENIED", "s3://bucket/x")
    # No manifest or marker knows a key.
    assert not [name for name, (data, _) in server.objects.items() if KEY.encode() in data]


def test_what_fsspec_knows(text, alone, tmp_path, monkeypatch):
    monkeypatch.setenv("WRITESAE_SCRATCH", str(tmp_path / "scratch"))
    make(text, "memory://some/where")
    store = Store("memory://some/where")
    assert store.verify().sound and store.summary()["firings"] == alone["all"][0]["firings"]
    assert store.counts().equals(alone["all"][1]["features.parquet"])
