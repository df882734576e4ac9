"""A collection verifies itself: what is damaged is named, made again, or refused; nothing is written through a link."""

import json
import os
import shutil

import damage
import pyarrow.parquet as pq
import pytest
import torch
from damage import SETTINGS, Tokenizer, again, prepare, tables
from fake_source import FakeSource, words

from writesae import files
from writesae.cli import main
from writesae.collect import Corpus, ModelSource, Store, collect
from writesae.collect.verify import verify
from writesae.models.identity import loaded_digest, require_same_model, weights_digest
from writesae.sae import SAE


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with the text, {(mode, state): collection})."""
    root = tmp_path_factory.mktemp("verify")
    return root, prepare(root / "made")


@pytest.fixture
def copy(made, tmp_path):
    """Copies a collection beside its text."""

    def take(mode="all", state="finished"):
        out = tmp_path / f"{mode}-{state}"
        shutil.copytree(made[1][mode, state], out)
        return out

    return take


def scratch(made):
    return made[0] / "made"


def test_random_damage_is_never_believed(made):
    outcomes = damage.check(0, 30, scratch(made), made=made[1])
    assert sum(n for name, n in outcomes.items() if name.split()[0] in damage.STATES) == 30
    assert outcomes["verify: named"] > 20 and outcomes["collect: made again"] > 10


def test_the_damage_test_can_fail(made, monkeypatch):
    """Digests that always agree are what it would be like without them."""
    for where in ("collect.marks", "collect.mirror", "collect.folder", "collect.shard"):
        monkeypatch.setattr(f"writesae.{where}.problem", lambda path, expected, progress=None: None)
    with pytest.raises(damage.Defect):
        damage.check(0, 12, scratch(made), made=made[1])


@pytest.mark.parametrize("mode", ["all", "top", "reservoir"])
@pytest.mark.parametrize("state", damage.STATES)
def test_sound_collections(made, capsys, mode, state):
    out = made[1][mode, state]
    found = verify(out)
    assert found.sound and found.complete == (state == "finished") and found.files > 5
    assert main(["verify", str(out)]) == 0
    assert "all as written" in capsys.readouterr().out


def test_command_names_every_file(copy, capsys):
    out = copy()
    (out / "features.parquet").unlink()
    part = out / "tokens" / "part-000001.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    (out / "notes.txt").write_text("mine")
    assert main(["verify", str(out)]) == 1
    printed = capsys.readouterr()
    assert "damaged tokens/part-000001.parquet: expected" in printed.out
    assert "missing features.parquet" in printed.out and "unexpected notes.txt" in printed.out
    assert "1 damaged, 1 missing, 1 unexpected" in printed.err
    assert main(["verify", str(out), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["sound"] and found["missing"] == ["features.parquet"] and found["unexpected"] == ["notes.txt"]


@pytest.mark.parametrize("given", ["missing", "text"])
def test_what_is_no_collection(made, capsys, given):
    assert main(["verify", str(scratch(made) / given)]) == 2
    assert "store: expected a folder made by `writesae collect`" in capsys.readouterr().err


def test_a_finished_collection_is_repaired_without_the_model_where_its_firings_stand(made, copy):
    out, source = copy(), FakeSource()
    for name in ("index/layer-1-head-3.parquet", "features.parquet", "documents.parquet", "tokenizer/vocabulary.txt"):
        (out / name).unlink()
    summary = again(scratch(made), "all", out, source)
    assert summary["complete"] and source.calls == 0 and verify(out).sound
    expected = tables(made[1]["all", "finished"])
    assert {name: t for name, t in tables(out).items() if not t.equals(expected[name])} == {}


@pytest.mark.parametrize("state", damage.STATES)
@pytest.mark.parametrize("name", ["manifest.json", "done/manifest.json"])
def test_a_damaged_manifest_is_restored_from_its_copy(made, copy, name, state):
    out = copy(state=state)
    before = (out / name).read_bytes()
    (out / name).write_bytes(before[:90])
    assert list(verify(out).damaged) == [name]
    assert again(scratch(made), "all", out)["complete"] and (out / name).read_bytes() == before
    (out / "manifest.json").write_text("{}")
    (out / "done" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="manifest.json is not the manifest of a collection.*another folder"):
        again(scratch(made), "all", out)


def test_only_the_damaged_shard_runs_through_the_model(made, copy):
    out, source = copy(state="unfinished"), FakeSource()
    shards = Store(out).summary()["shards"]
    assert shards >= 2
    whole = again(scratch(made), "all", copy(), FakeSource())
    part = out / "firings" / "part-000000.parquet"
    part.write_bytes(part.read_bytes().replace(b"\0", b"\1", 1))
    summary = again(scratch(made), "all", out, source)
    assert summary["repaired"] == [f"{part}: its content and its digest disagree"]
    assert summary["firings"] == whole["firings"] and source.calls <= 3 * (whole["shards"] - shards + 1)


# ---- another model, dictionary, tokenizer or corpus ---------------------------------------------------------------


def test_a_corpus_edited_in_place_is_refused(made, copy, tmp_path):
    out, text = copy(state="unfinished"), tmp_path / "text"
    shutil.copytree(scratch(made) / "text", text)
    file = text / "5.txt"
    data = bytearray(file.read_bytes())
    data[450] ^= 1  # same size, in neither end
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"corpus\.digests\.5\.txt is '[0-9a-f]+' there"):
        collect(Corpus.from_path(text), Tokenizer(), FakeSource(), out, **SETTINGS)


def test_a_corpus_that_grows_meanwhile_is_refused(tmp_path):
    lines = tmp_path / "x.jsonl"
    lines.write_text("".join(json.dumps({"text": f"document {i} " * 9}) + "\n" for i in range(60)))
    whole = lines.read_text()

    class Growing(FakeSource):
        def firings(self, tokens, mask):
            if self.calls == 4:
                with open(lines, "a") as file:
                    file.write(json.dumps({"text": "and one more"}) + "\n")
            return super().firings(tokens, mask)

    with pytest.raises(ValueError, match="corpus: x.jsonl changed while it was being collected"):
        collect(Corpus.from_path(lines), words, Growing(), tmp_path / "out", **SETTINGS)
    with pytest.raises(ValueError, match=r"corpus\.bytes is"):
        collect(Corpus.from_path(lines), words, FakeSource(), tmp_path / "out", **SETTINGS)
    lines.write_text(whole)  # put back: nothing of what was read since is in the store
    assert collect(Corpus.from_path(lines), words, FakeSource(), tmp_path / "out", **SETTINGS)["documents"] == 60
    collect(Corpus.from_path(lines), words, FakeSource(), tmp_path / "whole", **SETTINGS)
    assert all(t.equals(tables(tmp_path / "whole")[name]) for name, t in tables(tmp_path / "out").items())


def test_another_tokenizer_is_refused(made, copy):
    corpus = Corpus.from_path(scratch(made) / "text")

    class Other(Tokenizer):
        def __call__(self, text, add_special_tokens, verbose):
            return {"input_ids": [i + 1 for i in words(text)]}

    with pytest.raises(ValueError, match=r"tokenizer\.sha256 is"):
        collect(corpus, Other(), FakeSource(), copy(state="unfinished"), **SETTINGS)


def test_every_weight_is_in_the_digest():
    sae = SAE(8, 16, F=64, k=4)
    before, seen = weights_digest(sae), set()
    for x in sae.state_dict().values():
        for at in range(0, x.numel(), max(1, x.numel() // 7)):
            flat = x.view(-1)
            old = flat[at].clone()
            flat[at] = torch.nextafter(old, old + 1)
            seen.add(weights_digest(sae))
            flat[at] = old
    assert before not in seen and len(seen) > 30 and weights_digest(sae) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_digest_of_every_kind_of_state(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(4, 4).to(torch.bfloat16), torch.nn.BatchNorm1d(4))
    module.register_buffer("flag", torch.tensor([True, False])), module.register_buffer("one", torch.tensor(3))
    first = weights_digest(module)
    module.flag[1] = True
    assert weights_digest(module) != first
    packed = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(torch.nn.Linear(4, 4)), dtype=torch.qint8)
    before = weights_digest(packed)
    weight, bias = packed[0].weight(), packed[0].bias()
    other = torch._make_per_tensor_quantized_tensor(weight.int_repr() ^ 1, weight.q_scale(), weight.q_zero_point())
    packed[0].set_weight_bias(other, bias)
    assert weights_digest(packed) != before
    with pytest.raises(ValueError, match="0.bias has no values"):
        weights_digest(torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta")))


def test_the_cache_answers_only_for_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 100)
    monkeypatch.setattr(files, "_RACY_SECONDS", 0.0)
    read = []
    with files.DigestCache() as cache:
        first = cache.file(file, read.append)
    monkeypatch.setattr(files, "sha256", lambda path, progress=None: pytest.fail("read again"))
    assert files.DigestCache().file(file) == first
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    times = os.stat(file)
    file.write_bytes(b"a" * 99 + b"b")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # same size, inode and time of content
    assert files.DigestCache().file(file) == files.sha256(file) != first
    # Changed a moment ago: not kept, since it may change again within a tick.
    assert not files.DigestCache().get([files.stamp(file)])
    kept = tmp_path / "cache" / "writesae" / "digests.json"
    kept.write_text(kept.read_text().replace(first[:8], "0" * 8))
    assert files.DigestCache().file(file) == files.sha256(file)


def test_a_loaded_model_is_digested_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(files, "_RACY_SECONDS", 0.0)
    from writesae.models import identity

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"1")
    module = torch.nn.Linear(3, 3)
    before = identity.model_files(tmp_path / "model")
    first = loaded_digest(module, tmp_path / "model", before)
    monkeypatch.setattr(identity, "weights_digest", lambda *a: pytest.fail("read again"))
    assert loaded_digest(module, tmp_path / "model", before) == first
    (tmp_path / "model" / "model.safetensors").write_bytes(b"2")
    with pytest.raises(pytest.fail.Exception):
        loaded_digest(module, tmp_path / "model", identity.model_files(tmp_path / "model"))


class _Named(torch.nn.Linear):
    def __init__(self, name):
        super().__init__(1, 1)
        self.config = type("Config", (), {"_name_or_path": str(name)})()


def test_a_dictionary_of_another_model_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "model").mkdir(parents=True)
    a, b = (str(tmp_path / name / "model") for name in "ab")
    gone = "/elsewhere/model"
    cases = [
        ("default", "default", True), ("default", a, False), (a, "default", False), (a, a + "/", True), (a, b, False),
        ("owner/name", "owner/other", False), ("owner/name", "owner/name", True), (gone, a, True), (None, a, True),
        ("owner/model", a, True), ("owner/other", a, False), ("owner/name", "", True),
        ("owner/name", "/hub/models--owner--name/snapshots/0f3a", True),
    ]  # fmt: skip
    for theirs, here, same in cases:
        saes = {(0, 1): SAE(4, 4, F=8, k=2, layer=0, head=1, model=theirs)}
        if same:
            require_same_model(_Named(here), saes)
            continue
        with pytest.raises(ValueError, match=f"sae: the dictionary for 0:1 was made for the model '{theirs}'"):
            require_same_model(_Named(here), saes)
        with pytest.raises(ValueError, match="--any-model"):
            ModelSource(_Named(here), saes)
        require_same_model(_Named(here), saes, any_model=True)


# ---- links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [".lock", "manifest.json.tmp", "firings", "done", "tokens", "index/x", "tokenizer"])
@pytest.mark.parametrize("state", ["new", "unfinished", "finished"])
def test_nothing_is_written_through_a_link(made, copy, tmp_path, name, state):
    outside = tmp_path / "outside"
    if name in ("firings", "done", "tokens", "tokenizer"):
        outside.mkdir()
    else:
        outside.write_text("precious")
    out = tmp_path / "new" if state == "new" else copy(state=state)
    out.mkdir(exist_ok=True)
    link = out / name
    link.parent.mkdir(exist_ok=True)
    if link.is_dir():
        shutil.rmtree(link)
    elif link.exists():
        link.unlink()
    link.symlink_to(outside)
    with pytest.raises(ValueError, match="is a symbolic link|and no manifest.json"):
        again(scratch(made), "all", out)
    assert list(outside.iterdir()) == [] if outside.is_dir() else outside.read_text() == "precious"


def test_the_folder_itself_may_be_a_link(made, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert again(scratch(made), "all", tmp_path / "link")["complete"]
    assert (tmp_path / "real" / "summary.json").exists() and verify(tmp_path / "link").sound
    (tmp_path / "nowhere").symlink_to("gone")
    with pytest.raises(ValueError, match="leads nowhere"):
        again(scratch(made), "all", tmp_path / "nowhere")


def test_a_lock_that_is_another_file(made, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("precious")
    os.link(tmp_path / "precious", tmp_path / "out" / ".lock")
    with pytest.raises(ValueError, match="is not a plain file of its own"):
        again(scratch(made), "all", tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "precious"
    (tmp_path / "out" / ".lock").unlink()
    os.mkfifo(tmp_path / "out" / ".lock")
    with pytest.raises(ValueError, match="is not a plain file of its own"):
        again(scratch(made), "all", tmp_path / "out")


def test_other_writers(tmp_path, capsys):
    (tmp_path / "precious").write_text("precious")
    from writesae.bench.record import write_record
    from writesae.demo import _refuse_foreign
    from writesae.experiments.parts import Parts

    (tmp_path / "bench.json").symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="bench.json is a symbolic link"):
        write_record(tmp_path / "bench.json", {})
    (tmp_path / "demo").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="demo is a symbolic link"):
        _refuse_foreign(tmp_path / "demo")
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "cfg.json").symlink_to(tmp_path / "precious")
    assert main(["train", "--layer", "0", "--head", "0", "--out", str(tmp_path / "train"), "--resume"]) == 2
    assert "cfg.json is a symbolic link" in capsys.readouterr().err

    (tmp_path / "parts-out").mkdir()
    (tmp_path / "parts-out" / "parts").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="parts is a symbolic link"):
        Parts(tmp_path / "parts-out", {})
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "plots").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="plots is a symbolic link"):
        files.make_folder(tmp_path / "inner", "plots")
    assert (tmp_path / "precious").read_text() == "precious"


# ---- hostile and old folders -----------------------------------------------------------------------------------------


def reseal(path, change) -> None:
    """A file of a stranger who can compute digests."""
    value = json.loads(path.read_text())
    value.pop("sha256", None)
    change(value)
    path.write_text(files.sealed(value))


DEEP = "[" * 100_000


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 100_000, "{", "", "\xff", "[]", '"x"', "1" * 5000, '{"format": {}}'])
@pytest.mark.parametrize("name", ["manifest.json", "summary.json", "done/part-000000.json", "done/tokenizer.json"])
def test_json_that_is_none(made, copy, capsys, name, text):
    out = copy()
    (out / name).write_text(text, encoding="latin-1")
    assert main(["verify", str(out)]) == 1
    assert f"damaged {name}" in capsys.readouterr().out

    def ask():
        store = Store(out)
        store.documents, store.at(0, 3), store.contexts(1, 0, 5, 3)

    with pytest.raises(ValueError, match=name):
        ask()
    if text == DEEP:
        assert again(scratch(made), "all", out)["complete"] and Store(out).verify().sound


@pytest.mark.parametrize(
    "change",
    [{"mode": "most"}, {"context": "32"}, {"context": 0}, {"context": 1e400}, {"n": None}, {"n": True}, {"sites": []},
     {"sites": [[1]]}, {"sites": [["1", 0, 3, 1]]}, {"sites": [[1, 0, 10**30, 1]]}, {"shard_passages": -1},
     {"version": 3}, {"version": "2"}, {"format": []}],
)  # fmt: skip
def test_manifests_that_cannot_be(copy, change):
    out = copy()
    reseal(out / "manifest.json", lambda value: value.update(change))
    with pytest.raises(ValueError, match="manifest.json"):
        Store(out)


@pytest.mark.parametrize("column", range(6))
def test_tables_that_cannot_be(copy, column):
    """Sealed anew after a column was taken, retyped, emptied or put beside every site."""
    import pyarrow as pa

    for kind in ("missing", "type", "null", "range"):
        out = copy()
        path = out / "firings" / "part-000000.parquet"
        table = pq.read_table(path)
        field = table.schema.field(column)
        if kind == "missing":
            table = table.drop_columns([field.name])
        elif kind == "type":
            table = table.set_column(column, field.name, table[column].cast(pa.string()))
        else:
            values = pa.array([None if kind == "null" else 2**31 - 2] * len(table), field.type)
            table = table.set_column(column, field, values)
        pq.write_table(table, path)
        reseal(
            out / "done" / "part-000000.json",
            lambda v, p=path: v["files"].update({f"firings/{p.name}": files.entry(p)}),
        )
        store = Store(out)
        if kind != "range":
            with pytest.raises(ValueError, match="firings/part-000000.parquet"):
                list(store.firings())
        for question in (lambda s: s.top(1, 0, 5, 500), lambda s: s.contexts(1, 0, 5, 500), lambda s: s.at(0, 3)):
            try:
                question(store)
            except ValueError as error:
                assert str(out) in str(error)
        shutil.rmtree(out)


def test_an_old_store_is_read_and_not_gone_on_with(made, copy, capsys):
    out = copy()
    expected = Store(out).top(1, 0, 5, 5)
    (out / "done" / "manifest.json").unlink()
    for path in (out / "manifest.json", out / "summary.json", *(out / "done").glob("part-*")):
        value = json.loads(path.read_text())
        path.write_text(json.dumps({**value, "version": 1} if "format" in value else value))
    with pytest.warns(UserWarning, match="older writesae: its files have no digests"):
        assert Store(out).top(1, 0, 5, 5).equals(expected)
    with pytest.raises(ValueError, match="made by an older writesae, without digests"):
        again(scratch(made), "all", out)
    assert main(["verify", str(out)]) == 2
    assert "older writesae" in capsys.readouterr().err
