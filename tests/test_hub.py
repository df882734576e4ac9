"""Sets of dictionaries on a hub: the real client against a server of this process, and a real folder either side."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from fake_hub import Hub, Repo

import writesae
from writesae import SAE
from writesae.sae import available, load_set, push_to_hub
from writesae.sae.hub import prepare

K, V, F = 6, 9, 24
REPO = "someone/dictionaries"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    from huggingface_hub import constants

    made = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield made
    made.close()


def dictionary(layer=9, head=4, seed=0, **more):
    torch.manual_seed(seed)
    metrics = {"fvu": 0.25 + layer / 100, "l0": 3.96, "alive": 20, "states": 1000}
    training = {"steps": 50, "done": 50, "lr": 0.001}
    more = {"model": "owner/model", "metrics": metrics, "training": training, **more}
    return SAE(K, V, F, 4, layer=layer, head=head, **more)


@pytest.fixture
def folder(tmp_path):
    """As `writesae train` leaves two sites, without a checkpoint."""
    for layer, head in ((9, 4), (2, 5)):
        dictionary(layer, head, layer).save_pretrained(tmp_path / "run" / f"L{layer}H{head}")
    record = {"model": "owner/model", "metrics": {"L9H4": {}, "L2H5": {}}}
    (tmp_path / "run" / "metrics.json").write_text(json.dumps(record))
    (tmp_path / "run" / "training.json").write_text("[]")
    return tmp_path / "run"


def same(a: SAE, b: SAE) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_there_and_back(hub, folder):
    url = push_to_hub(folder, REPO, license="mit", datasets=["owner/text"])
    commit = hub.repos[REPO].at("main")[0]
    assert url == f"{hub.endpoint}/{REPO}/commit/{commit}" and hub.repos[REPO].private
    assert sorted(hub.files(REPO)) == [".gitattributes", "L2H5/cfg.json", "L2H5/sae.safetensors", "L9H4/cfg.json",
                                       "L9H4/sae.safetensors", "README.md"]  # fmt: skip
    assert len(hub.repos[REPO].branches["main"]) == 2  # one commit for it all

    listed = available(REPO)
    assert [(x.folder, x.layer, x.head, x.revision) for x in listed] == [("L2H5", 2, 5, commit), ("L9H4", 9, 4, commit)]
    assert listed[1].metrics["l0"] == 3.96 and listed[1].bytes == 4 * (4 * F * (K + V) // 2 + F + 2 * K * V)
    assert sorted(hub.downloaded()) == ["L2H5/cfg.json", "L9H4/cfg.json"]

    hub.log.clear()
    sae = SAE.from_pretrained(REPO, "L9H4", revision="main")
    assert same(sae, dictionary(9, 4, 9)) and hub.downloaded() == ["L9H4/sae.safetensors"]
    assert sae.training_record["hub"] == {"repository": REPO, "revision": commit, "folder": "L9H4"}

    saes = load_set(REPO, progress=False)
    assert list(saes) == [(2, 5), (9, 4)] and same(saes[2, 5], dictionary(2, 5, 2))
    assert list(load_set(REPO, [(9, 4)], progress=False)) == [(9, 4)]


def test_a_local_folder_answers_alike(folder):
    assert [x.folder for x in available(folder)] == ["L2H5", "L9H4"] and available(folder)[0].revision is None
    saes = load_set(folder, progress=False)
    assert same(saes[9, 4], SAE.from_pretrained(folder, "L9H4")) and "hub" not in saes[9, 4].training_record
    with pytest.raises(FileNotFoundError, match="sites: expected dictionaries in .*, got L1H1; it holds L2H5, L9H4"):
        load_set(folder, [(1, 1)])
    for call in (available, load_set, SAE.from_pretrained):
        with pytest.raises(ValueError, match="revision: expected None, .* is a folder and no repository; got 'main'"):
            call(folder, revision="main")


def test_the_card(folder):
    import yaml

    found, text = prepare(folder, REPO, license="mit", base_model_revision="abc123", datasets=["owner/text"])
    assert [name for name, _, _ in found] == ["L2H5", "L9H4"]
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "mit", "library_name": "writesae", "base_model": "owner/model", "base_model_revision": "abc123",
        "datasets": ["owner/text"], "tags": ["sparse-autoencoder", "interpretability", "recurrent-state", "writesae"],
    }  # fmt: skip
    assert "| L9H4 | states | bilinear | 24 | 4 | 6 x 9 | 0.3400 | 4.0 | 20 | 1,000 |" in body
    assert "win rate" not in body.split("## Dictionaries")[1].split("\n\n")[1]
    assert "| lr | 0.001 |" in body and "revision `abc123`" in body and "datasets/owner/text" in body
    assert f'writesae.sae.load_set("{REPO}")' in body and "\n\n\n" not in body
    from writesae.files import sha256

    assert f"| L9H4/sae.safetensors | `{sha256(folder / 'L9H4' / 'sae.safetensors')}` |" in body


def test_a_win_rate_is_shown_where_there_is_one(tmp_path):
    sae = dictionary(metrics={"fvu": 0.5, "win_rate": 0.925})
    sae.training_record["note"] = "a | b\n<script>"
    sae.save_pretrained(tmp_path)
    _, text = prepare(tmp_path, REPO, license="mit")
    assert "| FVU | win rate |" in text and "| 0.5000 | 92.5% |" in text
    assert "| note | a \\| b &lt;script> |" in text


def test_a_single_site_goes_into_its_folder(hub, tmp_path):
    dictionary().save_pretrained(tmp_path / "one")
    push_to_hub(tmp_path / "one", REPO, license="mit", private=False, revision="v1")
    assert not hub.repos[REPO].private and "L9H4/cfg.json" in hub.files(REPO, "v1")
    assert "L9H4/cfg.json" not in hub.files(REPO)
    assert same(SAE.from_pretrained(REPO, "L9H4", revision="v1"), dictionary())


def test_a_models_path_does_not_leave_this_machine(folder, tmp_path):
    for path in folder.glob("L*"):
        sae = SAE.from_pretrained(path)
        sae.model = str(tmp_path / "secret")
        sae.save_pretrained(path)
    with pytest.raises(ValueError, match="base_model: expected the model's repository, since the dictionaries call it"):
        prepare(folder, REPO, license="mit")
    found, text = prepare(folder, REPO, license="mit", base_model="owner/public")
    assert all(json.loads(config)["model"] == "owner/public" for _, config, _ in found)
    assert "secret" not in text + "".join(config.decode() for _, config, _ in found)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda x: (x / "L9H4" / "notes.txt").write_text("x"), "L9H4, got 'notes.txt' too: take it away"),
        (lambda x: (x / "best.pt").write_text("x"), "run, got 'best.pt' too .*save_pretrained"),
        (lambda x: (x / "L9H4" / "sae.safetensors").unlink(), "L9H4 is not finished: without sae.safetensors"),
        (lambda x: (x / "L1H1").mkdir(), "L1H1 is not finished: without cfg.json, sae.safetensors"),
        (lambda x: dictionary(training={"steps": 50, "done": 2}).save_pretrained(x / "L9H4"), "2 of 50 steps are done"),
        (lambda x: dictionary(3, 3).save_pretrained(x / "L9H4"), "L9H4 holds the dictionary of L3H3"),
        (lambda x: shutil.rmtree(x / "L9H4"), "run is not whole: metrics.json tells of L9H4"),
        (lambda x: (x / "checkpoint.pt").write_bytes(b"x"), "checkpoint.pt: not a training checkpoint"),
        (lambda x: (x / "metrics.json").rename(x / "checkpoint.pt"), "is not finished: checkpoint.pt, but no metrics"),
        (lambda x: (x / "metrics.json").write_text('{"metrics": NaN}'), "metrics.json: not JSON: NaN"),
        (lambda x: (x / "L9H4" / "sae.safetensors").write_bytes(b"x" * 99), "not a readable safetensors file"),
        (lambda x: dictionary(model="other/model").save_pretrained(x / "L9H4"), "base_model: .* name several models"),
    ],
)  # fmt: skip
def test_what_is_not_pushed(hub, folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        push_to_hub(folder, REPO, license="mit")
    assert not hub.log


def test_a_run_that_was_gone_on_with(folder):
    from writesae.sae.resume import write_checkpoint

    identity = {"config": {}, "tokens": "ab" * 32, "passages": 3}
    content = {"identity": identity, "done": 50, "history": [], "lengths": [], "place": {}, "trainers": []}
    write_checkpoint(folder / "checkpoint.pt", content)
    _, text = prepare(folder, REPO, license="mit")
    assert f"| tokens | `{'ab' * 32}` |" in text and "| passages |" not in text
    write_checkpoint(folder / "checkpoint.pt", {**content, "done": 60})
    with pytest.raises(
        ValueError, match="L2H5 is not finished: the run went on to step 60, its dictionary is of step 50"
    ):
        prepare(folder, REPO, license="mit")


def test_variants_and_ranks(hub, folder, tmp_path):
    """As `writesae train` leaves several dictionaries a site, by several processes."""
    from writesae.sae.resume import write_checkpoint

    out = tmp_path / "out"
    for name in ("k4", "k8"):
        dictionary(9, 4, 1 if name == "k4" else 2).save_pretrained(out / name / "L9H4")
        dictionary(2, 5).save_pretrained(out / name / "L2H5")
    everything = {f"{name}/{site}": {} for name in ("k4", "k8") for site in ("L9H4", "L2H5")}
    (out / "metrics.json").write_text(json.dumps({"metrics": everything}))
    (out / "training.svg").write_text("<svg/>")
    content = {"identity": {"tokens": "ab" * 32}, "done": 50, "history": [], "lengths": [], "place": {}, "trainers": []}
    for rank in range(2):
        (out / f"rank-{rank}-of-2").mkdir()
        write_checkpoint(out / f"rank-{rank}-of-2" / "checkpoint.pt", content)
        (out / f"rank-{rank}-of-2" / "metrics.json").write_text("{}")
    push_to_hub(out, REPO, license="mit")
    assert [x.folder for x in available(REPO)] == ["k4/L2H5", "k8/L2H5", "k4/L9H4", "k8/L9H4"]
    assert same(SAE.from_pretrained(REPO, "k8/L9H4"), dictionary(9, 4, 2))
    card = hub.files(REPO)["README.md"].decode()
    assert "saes = {(2, 5): sae}" in card and "load_set" not in card and "ab" * 32 in card
    (out / "rank-1-of-2" / "metrics.json").unlink()
    with pytest.raises(ValueError, match="rank-1-of-2 is not finished: checkpoint.pt, but no metrics.json"):
        push_to_hub(out, REPO, license="mit")
    (out / "k4" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="k4, got 'notes.txt' too"):
        push_to_hub(out, REPO, license="mit")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"license": ""}, "license: expected an identifier of the hub"),
        ({"license": "all mine"}, "license: .* got 'all mine'"),
        ({"base_model": "/models/x"}, "base_model: expected a repository such as owner/name, got '/models/x'"),
        ({"datasets": ["text"]}, "datasets: expected a repository"),
        ({"base_model_revision": "a b"}, "base_model_revision: expected a branch, tag or commit, got 'a b'"),
    ],
)
def test_arguments(folder, given, message):
    with pytest.raises(ValueError, match=message):
        prepare(folder, REPO, **{"license": "mit", **given})


def test_other_dictionaries_there_stay_unless_replaced(hub, folder, tmp_path):
    dictionary(7, 7).save_pretrained(tmp_path / "old")
    push_to_hub(tmp_path / "old", REPO, license="mit")
    with pytest.raises(ValueError, match=r"repo: .* holds 1 other dictionaries, .* \(L7H7\): name another repository"):
        push_to_hub(folder, REPO, license="mit")
    assert [x.folder for x in available(REPO)] == ["L7H7"]
    push_to_hub(folder, REPO, license="mit", replace=True)
    assert [x.folder for x in available(REPO)] == ["L2H5", "L9H4"]
    assert len(hub.repos[REPO].branches["main"]) == 3


def test_a_token_that_may_not_write(hub, folder):
    hub.deny_writes = True
    with pytest.raises(PermissionError, match=f"^{REPO}: the hub refuses, status 403: `hf auth login`"):
        push_to_hub(folder, REPO, license="mit")


def test_a_push_that_fails_says_so(hub, folder, monkeypatch):
    from huggingface_hub import HfApi, constants

    push_to_hub(folder, REPO, license="mit")
    commit = HfApi.create_commit

    def late(api, repo, operations, **options):
        hub.repos[repo].commit({**hub.files(repo), "notes.txt": b"x"})
        return commit(api, repo, operations, **options)

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", late)
        with pytest.raises(ConnectionError, match=f"^{REPO}: someone else committed meanwhile: nothing was sent"):
            push_to_hub(folder, REPO, license="apache-2.0")
    assert b"license: mit" in hub.files(REPO)["README.md"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=f"^{REPO}: HF_HUB_OFFLINE is set: nothing can be sent"):
        push_to_hub(folder, REPO, license="mit")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ConnectionError, match=f"^{REPO}: the hub was not reached or broke off: .* Nothing was committed"
    ):
        push_to_hub(folder, REPO, license="mit")


def test_the_commands(hub, folder, tmp_path, capsys):
    from writesae import cli

    push = ["push", str(folder), REPO, "--license", "mit", "--dataset", "owner/text"]
    assert cli.main([*push, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "L2H5: " in text and "L9H4: " in text and "license: mit" in text and not hub.log
    assert cli.main(push) == 0 and capsys.readouterr().out.startswith(f"{hub.endpoint}/{REPO}/commit/")
    assert hub.repos[REPO].private
    assert cli.main(["pull", REPO]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[2].split()[:7] == ["L9H4", "states", "bilinear", "24", "4", "0.3400", "4.0"] and len(rows) == 3
    assert cli.main(["pull", REPO, "L9H4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["metrics"]["alive"] == 20
    assert cli.main(["pull", REPO, "L1H1"]) == 2
    assert "dictionary: expected some of L2H5, L9H4, got L1H1" in capsys.readouterr().err
    hub.log.clear()
    out = tmp_path / "out"
    assert cli.main(["pull", REPO, "L9H4", "--out", str(out), "--quiet"]) == 0
    assert [x.name for x in out.iterdir()] == ["L9H4"] and hub.downloaded() == ["L9H4/sae.safetensors"]
    assert same(SAE.from_pretrained(out / "L9H4"), dictionary(9, 4, 9))
    assert cli.main(["pull", REPO, "--out", str(out)]) == 2
    assert cli.main(["pull", "some/nothing"]) == 2 and cli.main([*push[:3], "--license", "?"]) == 2


# ---- what goes wrong, reading ---------------------------------------------------------------------------------------


@pytest.fixture
def pushed(hub, folder):
    push_to_hub(folder, REPO, license="mit")
    hub.log.clear()
    return hub


CALLS = (available, load_set, SAE.from_pretrained)


@pytest.mark.parametrize("call", CALLS)
def test_no_such_repository(pushed, call):
    with pytest.raises(FileNotFoundError, match="^some/nothing: not a local folder, and no such repository on the hub"):
        call("some/nothing")
    with pytest.raises(FileNotFoundError, match=f"^{REPO}: no revision 'v9' in that repository"):
        call(REPO, revision="v9")
    with pytest.raises(FileNotFoundError, match=r"^\.\./x: no such folder or file"):
        call("../x")


@pytest.mark.parametrize("call", CALLS)
def test_a_gated_repository(pushed, call):
    for status, code, message in ((401, "GatedRepo", "gated"), (403, "GatedRepo", "gated"), (403, "", "status 403")):
        pushed.refuse[REPO] = status, code
        with pytest.raises(PermissionError, match=f"^{REPO}: .*{message}.*hf auth login") as found:
            call(REPO)
        assert "\n" not in str(found.value)


def test_a_site_that_is_not_there(pushed):
    with pytest.raises(FileNotFoundError, match=f"^{REPO}: no dictionary in L1H1; it does hold L2H5, L9H4: say which"):
        SAE.from_pretrained(REPO, "L1H1")
    with pytest.raises(FileNotFoundError, match=f"^{REPO}: no dictionary there; it does hold L2H5, L9H4: say which as"):
        SAE.from_pretrained(REPO)
    with pytest.raises(FileNotFoundError, match="got L1H1; it holds L2H5, L9H4"):
        load_set(REPO, [(9, 4), (1, 1)])
    assert not any("safetensors" in path for path in pushed.downloaded())


def test_offline(pushed, monkeypatch):
    from huggingface_hub import constants

    SAE.from_pretrained(REPO, "L9H4")
    commit = pushed.repos[REPO].at("main")[0]
    pushed.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        sae = SAE.from_pretrained(REPO, "L9H4", revision)
        assert same(sae, dictionary(9, 4, 9)) and sae.training_record["hub"]["revision"] == commit
    for call in (lambda: SAE.from_pretrained(REPO, "L2H5"), lambda: SAE.from_pretrained("other/one")):
        with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE|no such folder"):
            call()
    assert not pushed.log


def test_a_download_that_breaks_off_goes_on(pushed, monkeypatch):
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    pushed.broken.add("L9H4/sae.safetensors")
    with pytest.raises(ConnectionError, match=f"^{REPO}: .* broke off: .* the same call goes on"):
        load_set(REPO, progress=False)
    pushed.broken.clear()
    pushed.log.clear()
    assert same(load_set(REPO, progress=False)[9, 4], dictionary(9, 4, 9))
    assert pushed.downloaded() == ["L9H4/sae.safetensors"]


def test_the_hub_is_not_there(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for call in CALLS:
        with pytest.raises(ConnectionError, match=f"^{REPO}: not a local folder, and the hub was not reached"):
            call(REPO)


def test_sizes_are_looked_at_before_anything_is_downloaded(pushed):
    pushed.claimed = {"L9H4/sae.safetensors": 10**12}
    with pytest.raises(ValueError, match=r"L9H4/sae.safetensors: expected at most [\d,]+ bytes, got 1,000,000,000,000"):
        SAE.from_pretrained(REPO, "L9H4")
    assert pushed.downloaded() == ["L9H4/cfg.json"]
    with pytest.raises(ValueError, match=r"L9H4/sae.safetensors: expected at most [\d,]+ bytes"):
        load_set(REPO, progress=False)
    assert not any("safetensors" in path for path in pushed.downloaded())
    config = pushed.files(REPO)["L9H4/cfg.json"]
    for count, message in ((10_001, "at most 10,000 files"), (70, "at most 268,435,456 bytes of configurations")):
        pushed.repos["a/lot"] = Repo()
        pushed.repos["a/lot"].commit({f"L{i}H0/cfg.json": config for i in range(count)})
        pushed.claimed = {f"L{i}H0/cfg.json": 4 * 10**6 for i in range(70)}
        with pytest.raises(ValueError, match=f"a/lot: expected {message}"):
            available("a/lot")
    pushed.claimed = {"L2H5/cfg.json": 10**9}
    with pytest.raises(ValueError, match=r"L2H5/cfg.json: expected at most 4,194,304 bytes"):
        available(REPO)


def test_a_strangers_files(pushed):
    files = dict(pushed.files(REPO))
    pushed.repos["a/pickle"] = Repo()
    pushed.repos["a/pickle"].commit({"L9H4/cfg.json": files["L9H4/cfg.json"], "L9H4/sae.pkl": b"cos\nsystem\n."})
    with pytest.raises(FileNotFoundError, match="no sae.safetensors there"):
        SAE.from_pretrained("a/pickle", "L9H4")
    assert pushed.downloaded() == ["L9H4/cfg.json"]
    pushed.repos["a/liar"] = Repo()
    config = json.loads(files["L9H4/cfg.json"]) | {"layer": "9; rm"}
    pushed.repos["a/liar"].commit({**files, "L9H4/cfg.json": json.dumps(config).encode()})
    for call in (available, load_set):
        with pytest.raises(ValueError, match="layer: expected an integer >= 0 or None, got '9; rm'"):
            call("a/liar")
    pushed.repos["a/twice"] = Repo()
    pushed.repos["a/twice"].commit({**files, **{f"b/{name}": x for name, x in files.items()}})
    with pytest.raises(FileNotFoundError, match="a/pickle: no sae.safetensors in L9H4"):
        load_set("a/pickle", progress=False)
    with pytest.raises(ValueError, match="expected one dictionary a site, got L2H5 and b/L2H5 for L2H5"):
        load_set("a/twice")
    assert same(SAE.from_pretrained("a/twice", "b/L9H4"), dictionary(9, 4, 9))


def test_published_checkpoints(pushed, tmp_path):
    """Of a subfolder only what a dictionary needs is downloaded."""
    from test_published import publish, tensors

    publish(tmp_path / "L9_H4", state=tensors("bilinear"))
    (tmp_path / "L9_H4" / "train_log.jsonl").write_text("{}")
    files = {f"small/L9_H4/{path.name}": path.read_bytes() for path in (tmp_path / "L9_H4").iterdir()}
    pushed.repos[REPO].commit({**pushed.files(REPO), **files})
    sae = SAE.from_pretrained(REPO, "small/L9_H4/")
    assert torch.equal(sae.v_dec, tensors("bilinear")["V_dec"]) and (sae.layer, sae.head) == (9, 4)
    assert sorted(pushed.downloaded()) == ["small/L9_H4/best.pt", "small/L9_H4/config.json"]
    with pytest.raises(FileNotFoundError, match="it does hold L2H5, L9H4, small/L9_H4: say which"):
        SAE.from_pretrained(REPO)
    assert [x.folder for x in available(REPO)] == ["L2H5", "L9H4"]


def test_the_embedded_dictionary_needs_no_hub(hub):
    assert SAE.from_pretrained("default").layer == 5 and not hub.log
    assert writesae.push_to_hub is push_to_hub
