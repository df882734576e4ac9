"""A training run goes on only from its own checkpoint: whole, undamaged, of the same text, model and tokenizer."""

# ruff: noqa: F811 (fixtures of the other file)

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_sae_training import (  # noqa: F401
    SITE,
    SMALL,
    command,
    config,
    corpus,
    model,
    model_folder,
    passages,
    same,
    trainer,
)  # fmt: skip

from writesae.sae import ModelStream, Trainer
from writesae.sae.resume import read_checkpoint, write_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def finished(tmp_path):
    """The folder of a run of three steps."""
    trainer(folder=tmp_path).run(3)
    return tmp_path


# ---- what a run is pinned to ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["tokens", "weights", "model_config", "validation"])
def test_resume_refuses_another(what, model, tmp_path):
    """One token, one weight, one number of the configuration: each is another run."""

    def go_on(text, validation="a", resume=True):
        with ModelStream(model, text, [(0, 1)]) as stream:
            settings = config(F=16, steps=6, states=40, block=16)
            pinned = {"validation": validation}
            Trainer(stream, [(0, 1)], settings, tmp_path, resume, progress=False, pinned=pinned).run()

    go_on(passages(32), resume=False)
    go_on(passages(32))
    other, validation = passages(32), "a"
    weight, eps = model.model.layers[3].mlp.down_proj.weight, model.config.rms_norm_eps
    before = weight.detach().clone()
    with torch.no_grad():
        if what == "tokens":
            other.ids[3, 5] += 1
        elif what == "weights":
            weight[-1, -1] += 1e-3
        elif what == "model_config":
            model.config.rms_norm_eps = 1e-3
        else:
            validation = "b"
        try:
            with torch.enable_grad(), pytest.raises(ValueError, match=f"of another run: {what} differs"):
                go_on(other, validation)
        finally:
            weight.copy_(before)
            model.config.rms_norm_eps = eps


def test_command_refuses_another_text_model_or_tokenizer(model, model_folder, corpus, tmp_path, capsys):
    import shutil

    import writesae.cli  # noqa: F401

    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(model_folder, moved)

    def go_on(folder=moved, text=corpus, *more):
        base = ["--model", folder, "--corpus", text, "--validation", corpus / "0.txt", *SMALL]
        return command(*base, "--site", "0:1", "--steps", 6, "--out", out, "--resume", *more), capsys.readouterr().err

    started = command("--model", model_folder, "--corpus", corpus, "--validation", corpus / "0.txt", *SMALL,
                      "--site", "0:1", "--steps", 6, "--out", out)  # fmt: skip
    assert started == 0
    capsys.readouterr()
    assert go_on()[0] == 0  # the same model in another folder
    text = corpus / "2.txt"
    was = text.read_text()
    text.write_text(was.replace("lazy", "lady", 1))  # edited in place, at the same size
    status, said = go_on()
    assert status == 2 and "of another run: tokens differs" in said
    text.write_text(was)
    (corpus / "0.txt").write_text((corpus / "0.txt").read_text().replace("lazy", "lady"))
    assert "another run: tokens, validation differs" in go_on()[1]
    (corpus / "0.txt").write_text((corpus / "0.txt").read_text().replace("lady", "lazy"))
    tokenizer = moved / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"isolated"', '"removed"', 1).replace('"Isolated"', '"Removed"'))
    assert "tokenizer differs" in go_on()[1]
    shutil.copy(model_folder / "tokenizer.json", tokenizer)
    assert go_on()[0] == 0


# ---- another length -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [60, 30])
def test_a_run_may_get_another_length(steps, tmp_path):
    """What is left follows the schedule of the new length, to the bit, interrupted or not, and says so."""
    for folder in ("a", "b"):
        trainer(folder=tmp_path / folder, warmup=5).run(23)
    whole = trainer(folder=tmp_path / "a", resume=True, steps=steps, warmup=5)
    assert whole.done == 23 and whole.config.rate(29) != config(warmup=5).rate(29)
    saes = whole.run()
    trainer(folder=tmp_path / "b", resume=True, steps=steps, warmup=5).run(27)
    again = trainer(folder=tmp_path / "b", resume=True, steps=steps, warmup=5)
    again.run()
    assert same(whole, again) and whole.history == again.history and whole.done == steps
    assert whole.lengths == again.lengths == [{"done": 23, "steps": steps, "before": 40}]
    assert saes[SITE].training_record["lengths"] == whole.lengths and saes[SITE].training_record["steps"] == steps
    with pytest.raises(ValueError, match=f"steps: the run has done {steps} of {steps}, got 20"):
        trainer(folder=tmp_path / "a", resume=True, steps=20, warmup=5)


def test_command_extends(model_folder, corpus, tmp_path, capsys):
    """--resume keeps the length, --steps and --tokens extend it; tokens are states trained on."""
    import json

    import writesae.cli  # noqa: F401

    base = ["--model", model_folder, "--corpus", corpus, *SMALL, "--site", "0:1", "--out", tmp_path / "out"]
    for more, steps in (["--steps", 4], 4), (["--resume"], 4), (["--resume", "--tokens", 9 * 32 + 5], 9):
        assert command(*base, *more) == 0
        record = json.loads((tmp_path / "out" / "cfg.json").read_text())["training"]
        assert (record["done"], record["steps"]) == (steps, steps)
    assert "going on after step 4, to step 9" in capsys.readouterr().err
    assert record["lengths"] == [{"done": 4, "steps": 9, "before": 4}]


# ---- the file -------------------------------------------------------------------------------------------------------


def test_checkpoint_is_plain_tensors_and_numbers(finished):
    content = torch.load(finished / "checkpoint.pt", weights_only=True)
    assert content["done"] == 3 and not list(finished.glob("*.tmp"))


def test_damaged_checkpoints_are_refused(finished):
    """Bit flips anywhere, truncations anywhere, and what is no checkpoint: one clear error each."""
    path = finished / "checkpoint.pt"
    whole, g = path.read_bytes(), torch.Generator().manual_seed(0)
    for at in torch.randint(len(whole), (60,), generator=g).tolist() + [0, len(whole) - 1, len(whole) - 40]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << at % 8]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="checkpoint.pt: not a training checkpoint"):
            read_checkpoint(path)
    for size in torch.randint(len(whole), (30,), generator=g).tolist() + [0, 1, len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="checkpoint.pt: not a training checkpoint"):
            trainer(folder=finished, resume=True)
    path.write_bytes(whole)
    assert trainer(folder=finished, resume=True).done == 3


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_checkpoint_that_carries_code_is_refused(finished, monkeypatch):
    monkeypatch.chdir(finished)
    write_checkpoint(finished / "checkpoint.pt", {"identity": {}, "done": 1, "history": [], "trainers": [Code()]})
    with pytest.raises(ValueError, match="checkpoint.pt: not a training checkpoint"):
        trainer(folder=finished, resume=True)
    assert not (finished / "ran").exists()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c: c.pop("trainers"), "expected identity, done, history, lengths, place, trainers"),
        (lambda c: c.update(done=10**6), "after at most 40 steps, got 1 after 1000000"),
        (lambda c: c["identity"]["config"].update(steps="40"), "of another run"),
        (lambda c: c["identity"].update(config=3), "of another run"),
        (lambda c: c.update(trainers=[]), "expected 1 sites after at most 40 steps, got 0"),
        (lambda c: c["trainers"][0]["sae"].update(v_enc=torch.zeros(24, 1, 7)), r"sae v_enc: expected .*\(24, 1, 6\)"),
        (lambda c: c["trainers"][0]["sae"].update(bias=torch.full((6, 9), torch.nan)), "sae bias: NaN or infinity"),
        (lambda c: c["trainers"][0]["sae"].pop("mean"), "sae: expected v_dec"),
        (lambda c: c["trainers"][0].update(silent=torch.zeros(24)), "silent: expected torch.int64"),
        (lambda c: c["trainers"][0].update(scale=float("inf")), "scale: expected a finite float"),
        (lambda c: c["trainers"][0].pop("optimizer"), "not of this run"),
        (lambda c: c["trainers"][0]["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)), "parameter 0 exp_avg"),
        (lambda c: c["trainers"][0]["optimizer"].update(param_groups=[]), "not of this run"),
    ],
)
def test_a_checkpoint_of_other_content_is_refused(spoil, message, finished):
    path = finished / "checkpoint.pt"
    content = read_checkpoint(path)
    spoil(content)
    write_checkpoint(path, content)
    with pytest.raises(ValueError, match=f"checkpoint.pt: .*{message}"):
        trainer(folder=finished, resume=True)


def test_nothing_is_written_through_a_link(tmp_path):
    """Neither where a file should be nor where its temporary stands."""
    for name in ("checkpoint.pt", "training.json"):
        folder, outside = tmp_path / name, tmp_path / f"{name}.outside"
        folder.mkdir()
        outside.write_text("precious")
        (folder / name).symlink_to(outside)
        with pytest.raises(ValueError, match=f"{name} is a symbolic link"):
            trainer(folder=folder).run(2)
        (folder / name).unlink()
        (folder / f"{name}.{os.getpid()}.tmp").symlink_to(outside)
        trainer(folder=folder).run(2)
        assert outside.read_text() == "precious" and not (folder / name).is_symlink()


def test_command_refuses_links_in_its_folder(model_folder, corpus, tmp_path, capsys):
    import writesae.cli  # noqa: F401

    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir(), outside.mkdir()
    (out / "L0H1").symlink_to(outside)
    base = ["--model", model_folder, "--corpus", corpus, *SMALL, "--site", "0:1", "--site", "0:2", "--steps", 3]
    assert command(*base, "--out", out) == 2
    assert "L0H1 is a symbolic link" in capsys.readouterr().err
    assert not list(outside.iterdir())
    (out / "L0H1").unlink()
    (out / "checkpoint.pt.4711.tmp").write_bytes(b"of a run that was killed before its first checkpoint")
    assert command(*base, "--out", out) == 0


DRIVER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_sae_training import trainer
run = trainer(folder=sys.argv[1], resume=len(sys.argv) > 3, steps=100000)
print("ready", flush=True)
run.run(checkpoint_every=1)
"""


def test_a_killed_run_goes_on_to_the_same_numbers(tmp_path):
    """SIGKILL while checkpoints are written after every step: what is there is whole, and leads to the same numbers."""
    tests = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = 0
    for more in ([], ["resume"]):
        arguments = [sys.executable, "-c", DRIVER, str(tmp_path), tests, *more]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, env=environment)
        assert process.stdout.readline() == b"ready\n"
        path, began = tmp_path / "checkpoint.pt", time.monotonic()
        stamp = path.stat().st_mtime_ns if path.exists() else 0
        while not (path.exists() and path.stat().st_mtime_ns != stamp) and time.monotonic() - began < 60:
            time.sleep(0.01)
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        resumed = trainer(folder=tmp_path, resume=True, steps=100000)
        assert resumed.done > done
        done = resumed.done
    whole = trainer(steps=100000)
    whole.run(done)
    assert same(whole, resumed)
    assert SITE in resumed.trainers
