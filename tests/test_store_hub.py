"""Stores in dataset repositories of a hub: there and back, and a card whose every line of code runs."""

from __future__ import annotations

import re
import shutil

import pyarrow.parquet as pq
import pytest
import yaml
from fake_source import FakeSource
from test_hub import hub  # noqa: F401
from test_store import Tokenizer

from writesae.collect import Corpus, Store, collect
from writesae.collect.hub import prepare

REPO = "someone/firings"


class Named(FakeSource):
    def __init__(self, **more):
        super().__init__(**more)
        self.names = {"model": "owner/model", "revision": "c0ffee", "dtype": "float32", "dictionaries": {}}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """{name: folder}: one process's, one of several units, and one of mode top."""
    root = tmp_path_factory.mktemp("hub")
    (root / "text").mkdir()
    for i, n in enumerate((90, 0, 500)):
        (root / "text" / f"a|b{i}.txt").write_text(("abcdefg hij" * 50)[:n])
    for name, more in (("all", {}), ("units", {"unit": 50}), ("top", {"mode": "top"})):
        collect(
            Corpus.from_path(root / "text"), Tokenizer(), Named(), root / name, n=20, context=32, shard_passages=7,
            **more,
        )  # fmt: skip
    return {name: root / name for name in ("all", "units", "top")}


def copy(folder, out):
    shutil.copytree(folder, out)
    return Store(out)


@pytest.mark.parametrize("kind", ["all", "units", "top"])
def test_there_and_back(hub, stores, kind):  # noqa: F811
    store = Store(stores[kind])
    url = store.push_to_hub(REPO, license="cc-by-4.0")
    commit = hub.repos[REPO].at("main")[0]
    assert url == f"{hub.endpoint}/{REPO}/commit/{commit}" and hub.repos[REPO].private
    assert len(hub.repos[REPO].branches["main"]) == 2  # one commit for it all
    back = Store.from_pretrained(REPO, progress=False)
    assert back.verify().sound and back.path != store.path
    layer, head = store.sites[0]
    assert back.top(layer, head, 5, 10).equals(store.top(layer, head, 5, 10))
    assert [c.tokens.tolist() for c in back.contexts(layer, head, 5, 9)] == [
        c.tokens.tolist() for c in store.contexts(layer, head, 5, 9)
    ]
    assert [t.to_pylist() for t in back.firings()] == [t.to_pylist() for t in store.firings()]
    assert Store.from_pretrained(stores[kind]).path == stores[kind]


def test_without_the_log_what_needs_it_says_so(hub, stores):  # noqa: F811
    Store(stores["all"]).push_to_hub(REPO, license="mit")
    back = Store.from_pretrained(REPO, revision="main", firings=False, progress=False)
    assert not [name for name in hub.downloaded() if name.startswith("firings/")]
    layer, head = back.sites[0]
    assert len(back.contexts(layer, head, 5, 9)) == 9 and len(back.counts()) > 9
    with pytest.raises(ValueError, match=r"firings/part-000000.parquet is missing"):
        back.at(0, 3)


def test_what_is_refused(hub, stores, tmp_path):  # noqa: F811
    store = Store(stores["all"])
    with pytest.raises(ValueError, match="repo: expected owner/name, got 'nobody'"):
        store.push_to_hub("nobody", license="mit")
    with pytest.raises(ValueError, match="license: expected an identifier"):
        store.push_to_hub(REPO, license="Mine, all mine")
    with pytest.raises(ValueError, match="base_model: expected a repository"):
        store.push_to_hub(REPO, license="mit", base_model="/home/me/model")
    damaged = copy(stores["all"], tmp_path / "damaged")
    part = damaged.path / "tokens" / "part-000000.parquet"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not sound: damaged tokens/part-000000.parquet"):
        damaged.push_to_hub(REPO, license="mit")
    unfinished = copy(stores["all"], tmp_path / "unfinished").path
    (unfinished / "summary.json").unlink()
    with pytest.raises(ValueError, match="is not finished: run its `writesae collect` again"):
        Store(unfinished).push_to_hub(REPO, license="mit")
    assert REPO not in hub.repos
    store.push_to_hub(REPO, license="mit")
    with pytest.raises(ValueError, match="repo: someone/firings holds .* other files .* replace=True"):
        Store(stores["top"]).push_to_hub(REPO, license="mit")
    Store(stores["top"]).push_to_hub(REPO, license="mit", replace=True)
    assert Store.from_pretrained(REPO, progress=False).mode == "top"
    assert not [name for name in hub.files(REPO) if name.startswith("firings/")]
    with pytest.raises(FileNotFoundError, match="someone/nothing"):
        Store.from_pretrained("someone/nothing")
    with pytest.raises(ValueError, match="repo: expected a folder, or a repository"):
        Store.from_pretrained("no where")


@pytest.mark.parametrize("kind", ["all", "units", "top"])
def test_every_example_of_the_card_runs(stores, tmp_path, monkeypatch, capsys, kind):
    """As they stand, but for the repository, in whose place is its folder here."""
    for name in ("datasets", "pandas", "polars", "duckdb"):
        pytest.importorskip(name)
    store = copy(stores[kind], tmp_path / "firings")
    names, card = prepare(store, REPO, license="cc-by-4.0")
    (store.path / "README.md").write_text(card)
    assert store.verify().sound
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "cc-by-4.0" and head["configs"][0]["default"]
    assert "owner/model" in card and "c0ffee" in card and store.manifest["corpus"]["sha256"] in card
    for config in head["configs"]:
        (split,) = config["data_files"]
        found = sorted(store.path.glob(split["path"]))
        assert found, split
        rows = datasets.load_dataset(str(store.path), config["config_name"], split="train")
        assert len(rows) == sum(pq.ParquetFile(path).metadata.num_rows for path in found)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        if "import duckdb" in block and int(__import__("duckdb").__version__.split(".")[0]) < 2:
            continue  # which does not know the files' encodings, as the card says
        code = block.replace(f"hf://datasets/{REPO}", str(store.path)).replace(REPO, str(store.path))
        assert code != block
        exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out


def test_a_hostile_name_stays_text(tmp_path, stores):
    from writesae.collect.hub import _cell

    assert _cell("a|b\n<script>x</script> [l](javascript:x) `y`") == (
        "a\\|b &lt;script&gt;x&lt;/script&gt; \\[l\\](javascript:x) \\`y\\`"
    )
