"""`writesae collect` with a real (tiny, random) model: the command, its questions and its refusals."""

import argparse
import json
import shutil

import pytest
import torch
from test_published import publish
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3_5ForCausalLM, Qwen3_5TextConfig

import writesae
from writesae import options
from writesae.cli import main
from writesae.collect import ModelSource, Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds model/, saes/a and saes/b (layers 0 and 1), and text/."""
    root = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=16, linear_conv_kernel_dim=4, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    Qwen3_5ForCausalLM(config).save_pretrained(root / "model")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({"<end>": 0, **{c: i + 1 for i, c in enumerate(alphabet[:255])}}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<end>").save_pretrained(root / "model")
    for name, layer, head in (("a", 0, 1), ("b", 1, 3)):
        writesae.SAE(8, 16, F=24, k=4, layer=layer, head=head).save_pretrained(root / "saes" / name)
    (root / "text").mkdir()
    for i, size in enumerate((150, 40, 90)):
        (root / "text" / f"{i}.txt").write_text("".join(chr(97 + (j * j + i) % 26) for j in range(size)))
    (root / "text" / "x.bin").write_bytes(b"\0\1")
    return root


def arguments(folder, out, *more) -> list[str]:
    return [
        "collect", str(folder / "text"), "--model", str(folder / "model"), "--sae", str(folder / "saes"),
        "--out", str(out), "--context", "32", "--batch", "4", *map(str, more),
    ]  # fmt: skip


def test_command(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "out")) == 0
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["complete"] and summary["tokens"] == 150 + 40 + 90 + 3
    assert "skipped x.bin: binary" in err and "estimate: about" in err
    store = Store(tmp_path / "out")
    assert store.sites == [(0, 1), (1, 3)] and store.tokens(1)[0] == 0 and len(store.tokens(1)) == 41
    # Each passage alone, unpadded, through the plain hook gives the same firings.
    model, _ = writesae.models.load(folder / "model")
    saes = {(0, 1): writesae.SAE.from_pretrained(folder / "saes" / "a")}
    saes[1, 3] = writesae.SAE.from_pretrained(folder / "saes" / "b")
    expected = []
    for document in range(3):
        ids = torch.tensor(store.tokens(document)).long()
        for row, part in enumerate(ids.split(32)):
            with writesae.attach(model, saes) as tap, torch.no_grad():
                model(input_ids=part[None])
            c = tap.firings.columns()
            places = zip(*(c[n].tolist() for n in ("position", "layer", "head", "feature", "activation")), strict=True)
            expected += [(document, row, *place) for place in places]
    stored = sorted(tuple(row.values()) for table in store.firings() for row in table.to_pylist())
    expected.sort()
    assert [f[:6] for f in stored] == [f[:6] for f in expected]
    torch.testing.assert_close(
        torch.tensor([f[6] for f in stored]), torch.tensor([f[6] for f in expected]), rtol=1e-3, atol=1e-6
    )


def test_a_store_decodes_and_names_what_made_it(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "out")) == 0
    store = Store(tmp_path / "out")
    named = store.manifest["named"]
    assert named["model"] == str(folder / "model") and named["tokenizer"] == str(folder / "model")
    assert named["dictionaries"] == {"0:1": None, "1:3": None} and named["revision"] is None
    text = (folder / "text" / "1.txt").read_text()
    assert store.tokenizer()(store.tokens(1).tolist()).replace(" ", "") == "<end>" + text
    context = next(c for c in store.contexts(0, 1, int(store.counts(0, 1)["count"].to_numpy().argmax()), 1))
    assert context.token and (context.before + context.token + context.after)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")(text)["input_ids"]
    import pandas

    assert len(pandas.read_parquet(tmp_path / "out" / "firings")) == store.summary()["firings"]
    capsys.readouterr()
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_one_changed_weight_is_refused_on_resuming(folder, tmp_path, capsys):
    model, _ = writesae.models.load(folder / "model")
    with torch.no_grad():
        weight = model.model.layers[3].mlp.down_proj.weight
        weight[7, 31] = torch.nextafter(weight[7, 31], torch.tensor(9.0))
    shutil.copytree(folder / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    assert main(arguments(folder, tmp_path / "out")) == 0
    given = arguments(folder, tmp_path / "out")
    given[given.index("--model") + 1] = str(tmp_path / "model")
    assert main(given) == 2
    assert "source.model is " in capsys.readouterr().err


@pytest.mark.parametrize("command", ["collect", "replace"])
def test_a_dictionary_of_another_model(folder, tmp_path, capsys, command):
    writesae.SAE(8, 16, F=24, k=4, layer=0, head=1, model="owner/other").save_pretrained(tmp_path / "sae")
    given = ["--model", str(folder / "model"), "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "out")]
    given = ["collect", str(folder / "text"), *given] if command == "collect" else [
        "replace", *given, "--corpus", str(folder / "text"), "--select", "none", "--firings", "4", "--horizon", "2"
    ]  # fmt: skip
    assert main(given) == 2
    err = capsys.readouterr().err
    assert "the dictionary for 0:1 was made for the model 'owner/other'" in err and "--any-model" in err
    assert not (tmp_path / "out").exists()
    assert main([*given, "--any-model"]) == 0


def test_one_dictionary_and_its_site(folder, tmp_path, capsys):
    more = ["--sae", f"2:0={folder / 'saes' / 'a'}", "--max-tokens", 50]
    given = [x for x in arguments(folder, tmp_path / "out", *more)]
    at = given.index("--sae")
    assert main(given[:at] + given[at + 2 :]) == 0
    assert Store(tmp_path / "out").sites == [(2, 0)]
    assert json.loads(capsys.readouterr().out)["tokens"] == 50


def test_limit_needs_yes(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "out", "--limit", "1kB")) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["declined"] and "more than --limit 1.0 kB; add --yes" in err
    assert not (tmp_path / "out").exists()
    assert main(arguments(folder, tmp_path / "out", "--limit", "1kB", "--yes")) == 0


def test_question_on_a_terminal(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter(["", "y"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert main(arguments(folder, tmp_path / "out", "--limit", "10")) == 1
    assert main(arguments(folder, tmp_path / "out", "--limit", "10")) == 0


@pytest.mark.parametrize(
    "more, named",
    [
        (["--device", "cuda"], "device: cuda cannot be used: not installed"),
        (["--device", "tpu"], "device: tpu cannot be used: expected cpu or cuda"),
        (["--dataset", "x"], "expected a path or --dataset, got both"),
        (["--sae", "text"], "sae: expected a dictionary"),
        (["--sae", "a:b=saes/a"], "sae: expected LAYER:HEAD=PATH, got a:b="),
        (["--sae", "0:1=saes/a"], "sae: expected one dictionary a site, got two for 0:1"),
        (["--sae", "3:0=saes/a"], "layer 3"),
    ],
)
def test_refusals_before_any_work(folder, tmp_path, capsys, monkeypatch, more, named):
    monkeypatch.chdir(folder)
    assert main(arguments(folder, tmp_path / "out", *more)) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out" / "firings").exists()


def test_refused_corpora(folder, tmp_path, capsys):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "a.bin").write_bytes(b"\0")
    for corpus, named in ((tmp_path / "only", "no text among them"), (tmp_path / "none", "no file or folder"),
                          ("stdlib:dev", "expected stdlib:train")):  # fmt: skip
        given = arguments(folder, tmp_path / "out")
        given[1] = str(corpus)
        assert main(given) == 2
        assert named in capsys.readouterr().err


def test_published_dictionaries(folder, tmp_path, capsys):
    """Firings of published files are those of the same dictionaries in our own folders."""
    publish(tmp_path / "saes" / "L0_H1", K=8, V=16, layer=0, head=1)
    publish(tmp_path / "saes" / "L1_H3", K=8, V=16, layer="drop", head="drop", use_batchtopk=True)
    given = arguments(folder, tmp_path / "out", "--batchtopk", "0.05")
    given[given.index("--sae") + 1] = str(tmp_path / "saes")
    assert main(given) == 0
    found = Store(tmp_path / "out")
    assert found.sites == [(0, 1), (1, 3)]
    writesae.SAE.from_pretrained(tmp_path / "saes" / "L0_H1").save_pretrained(tmp_path / "ours" / "a")
    sae = writesae.SAE.from_pretrained(tmp_path / "saes" / "L1_H3", batchtopk=0.05)
    sae.save_pretrained(tmp_path / "ours" / "b")
    given = arguments(folder, tmp_path / "again")
    given[given.index("--sae") + 1] = str(tmp_path / "ours")
    assert main(given) == 0
    tables = [[table.to_pylist() for table in store.firings()] for store in (found, Store(tmp_path / "again"))]
    assert tables[0] == tables[1] and tables[0]
    assert main([x for x in given if x not in ("--out", str(tmp_path / "again"))] + ["--out", str(tmp_path / "x"),
                "--sae", f"2:0={tmp_path / 'saes' / 'L1_H3'}"]) == 2  # fmt: skip
    assert "a BatchTopK dictionary without a threshold" in capsys.readouterr().err


def test_no_dictionary(folder, tmp_path, capsys):
    given = arguments(folder, tmp_path / "out")
    at = given.index("--sae")
    assert main(given[:at] + given[at + 2 :]) == 2
    assert "sae: expected at least one dictionary for this model" in capsys.readouterr().err
    with pytest.raises(ValueError, match="sae: expected at least one"):
        ModelSource(torch.nn.Linear(1, 1), {})


def test_other_dictionary_is_refused_on_resuming(folder, tmp_path, capsys):
    assert main(arguments(folder, tmp_path / "out")) == 0
    changed = writesae.SAE(8, 16, F=24, k=4, layer=0, head=1)
    with torch.no_grad():
        changed.b_enc += 1
    changed.save_pretrained(tmp_path / "saes" / "a")
    writesae.SAE.from_pretrained(folder / "saes" / "b").save_pretrained(tmp_path / "saes" / "b")
    given = arguments(folder, tmp_path / "out")
    given[given.index("--sae") + 1] = str(tmp_path / "saes")
    assert main(given) == 2
    assert "source.dictionary 0:1 is" in capsys.readouterr().err


def test_full_disk(folder, tmp_path, capsys, monkeypatch):
    import pyarrow.parquet as pq

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("writesae.collect.files.pq", type("pq", (), {"write_table": full, "read_table": pq.read_table}))
        assert main(arguments(folder, tmp_path / "out")) == 1
    err = capsys.readouterr().err
    assert "No space left on device while writing" in err and "run the same command again" in err
    assert main(arguments(folder, tmp_path / "out")) == 0


@pytest.mark.parametrize(
    "text, size", [("5", 5), ("1kB", 1000), ("2.5M", 2_500_000), ("3gb", 3 * 10**9), ("1TB", 10**12)]
)
def test_sizes(text, size):
    assert options.size(text) == size


@pytest.mark.parametrize("text", ["", "much", "GB", "inf"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 500MB"):
        options.size(text)
