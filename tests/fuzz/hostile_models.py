"""Hostile model folders: `folders(seed, count, root, marker)` yields `watch.Case`s, the listed faults first.

`python hostile_models.py [seed] [count]` judges them in a process of their own.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from watch import Case, in_child

DEEP = 100_000
CODE = "import pathlib; pathlib.Path({marker!r}).touch()\nraise SystemExit\n"


def a_model(folder: Path) -> None:
    """A tiny model with a word tokenizer."""
    from tiny_models import tiny_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tiny_model().save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder)


def _json(name: str, **changes):
    def act(folder: Path, draw: random.Random, marker: Path) -> None:
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**found, **changes}))

    return act


def _code(change):
    def act(folder: Path, draw: random.Random, marker: Path) -> None:
        for name in ("evil.py", "modeling_evil.py", "configuration_evil.py", "tokenization_evil.py", "setup.py"):
            (folder / name).write_text(CODE.format(marker=str(marker)))
        change(folder, draw, marker)

    return act


def _text(name: str, make: Callable[[bytes], bytes]):
    def act(folder: Path, draw: random.Random, marker: Path) -> None:
        path = folder / name
        path.write_bytes(make(path.read_bytes() if path.exists() else b""))

    return act


def _link(name: str, target: str):
    def act(folder: Path, draw: random.Random, marker: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return act


def _weights(change: Callable[[dict], None]):
    def act(folder: Path, draw: random.Random, marker: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    return act


def _pickled(folder: Path, draw: random.Random, marker: Path) -> None:
    class Owned:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    (folder / "model.safetensors").unlink()
    torch.save({"x": Owned()}, folder / "pytorch_model.bin")


def _index(weight_map: dict | list, keep: bool = False):
    def act(folder: Path, draw: random.Random, marker: Path) -> None:
        if not keep:
            (folder / "model.safetensors").rename(folder.parent / "x.safetensors")
        else:
            (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    return act


def _pipe(folder: Path, draw: random.Random, marker: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def _random_field(folder: Path, draw: random.Random, marker: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    key = draw.choice(sorted(k for k in config if k not in ("bos_token_id", "use_cache")))
    config[key] = draw.choice([None, -1, 0, 10**9, 10**30, 1.5, "x", "../../x", [], {}, [[]], True, 1e300, "<script>"])
    path.write_text(json.dumps(config))


def _flips(folder: Path, draw: random.Random, marker: Path) -> None:
    path = folder / draw.choice(["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice([1, 5, 50])):
        data[draw.randrange(min(len(data), 4000))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(data[: draw.choice([len(data), len(data), len(data) // 2])]))


_AUTO = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
FAULTS: dict[str, Callable[[Path, random.Random, Path], None]] = {
    "code for an unknown kind": _code(_json("config.json", model_type="evil", auto_map=_AUTO)),
    "code for a known kind": _code(_json("config.json", auto_map=_AUTO)),
    "code elsewhere": _code(_json("config.json", model_type="evil", auto_map={"AutoConfig": "a/b--evil.Config"})),
    "code of a tokenizer": _code(_json("tokenizer_config.json", tokenizer_class="Evil", auto_map={
        "AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]})),
    "a chat template": _json("tokenizer_config.json", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"),
    "kernels from the hub": _json("config.json", attn_implementation="evil/kernel"),
    "kernels from the hub, private": _json("config.json", _attn_implementation="evil/kernel"),
    "other weights": _json("config.json", transformers_weights="../x.safetensors"),
    "an adapter": _json("adapter_config.json", base_model_name_or_path="evil/base", peft_type="LORA"),
    "pickled weights": _pickled,
    "weights elsewhere": _link("model.safetensors", "/etc/passwd"),
    "weights endless": _link("model.safetensors", "/dev/zero"),
    "configuration endless": _link("config.json", "/dev/zero"),
    "configuration a pipe": _pipe,
    "deep configuration": _text("config.json", lambda b: b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "deep in a key": _text("config.json", lambda b: b[:1] + b'"x":' + b"[" * 900 + b"]" * 900 + b"," + b[1:]),
    "deep tokenizer": _text("tokenizer.json", lambda b: b"[" * DEEP + b"]" * DEEP),
    "deep tokenizer configuration": _text("tokenizer_config.json", lambda b: b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "configuration a list": _text("config.json", lambda b: b"[" + b + b"]"),
    "configuration cut": _text("config.json", lambda b: b[: len(b) // 2]),
    "generation configuration cut": _text("generation_config.json", lambda b: b"{"),
    "tokenizer cut": _text("tokenizer.json", lambda b: b[: len(b) // 2]),
    "tokenizer of a list": _json("tokenizer_config.json", tokenizer_class=[1], added_tokens_decoder=3),
    "a huge vocabulary": _json("config.json", vocab_size=10**9),
    "a huge width": _json("config.json", hidden_size=10**9),
    "many layers": _json("config.json", num_hidden_layers=10**9, layer_types=None),
    "many labels": _json("config.json", num_labels=10**9),
    "many heads": _json("config.json", num_attention_heads=10**9, linear_num_value_heads=10**9),
    "far positions": _json("config.json", max_position_embeddings=10**12),
    "a huge integer": _json("config.json", hidden_size=10**38),
    "a width of text": _json("config.json", hidden_size="32"),
    "layer kinds of numbers": _json("config.json", layer_types=[1, 2, 3]),
    "a kind that is a list": _json("config.json", model_type=["qwen3_5_text"]),
    "no kind": _json("config.json", model_type=None),
    "another kind": _json("config.json", model_type="llama"),
    "an unknown dtype": _json("config.json", dtype="evil"),
    "quantized by nobody": _json("config.json", quantization_config={"quant_method": "evil"}),
    "an index that leaves": _index({"lm_head.weight": "../x.safetensors"}),
    "an absolute index": _index({"lm_head.weight": "/etc/passwd"}),
    "an index of numbers": _index({"lm_head.weight": 3}),
    "an index of a list": _index([1, 2]),
    "shards missing": _index({"lm_head.weight": "model-00001-of-00002.safetensors",
                              "x": "model-00002-of-00002.safetensors"}, keep=True),
    "tensors not in their shard": _index({"x": "model-00001-of-00002.safetensors"}, keep=True),
    "weights cut": _text("model.safetensors", lambda b: b[: len(b) // 2]),
    "a header of 2^63": _text("model.safetensors", lambda b: struct.pack("<Q", 2**63) + b[8:]),
    "a deep header": _text("model.safetensors", lambda b: struct.pack("<Q", 2 * DEEP) + b"[" * DEEP + b"]" * DEEP),
    "a tensor less": _weights(lambda t: t.pop(sorted(t)[0])),
    "other shapes": _weights(lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]][:1].clone()})),
    "NaN": _weights(lambda t: t[sorted(t)[0]].view(-1).__setitem__(0, float("nan"))),
    "1e300": _weights(lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]].double() + 1e300})),
    "integers": _weights(lambda t: t.update({n: x.to(torch.int8) for n, x in t.items()})),
}  # fmt: skip
RANDOM = (_random_field, _flips)


def fault(loaded) -> str | None:
    model, tokenizer = loaded
    if model.training or any(not bool(torch.isfinite(p).all()) for p in model.parameters()):
        return "weights that are not finite, or in training"
    if any(p.device.type == "meta" for p in model.parameters()):
        return "weights that are not there"
    return None


def folders(seed: int, count: int, root: Path, marker: Path) -> Iterator[Case]:
    """`count` hostile model folders below `root`; each is removed after it was judged."""
    from writesae.models import load

    names, base = list(FAULTS), root / "base"
    a_model(base)
    for i in range(count):
        draw = random.Random(f"{seed}/model/{i}")
        act = FAULTS[names[i]] if i < len(names) else draw.choice(RANDOM)
        folder = root / f"model{i}"
        shutil.copytree(base, folder)
        act(folder, draw, marker)
        name = names[i] if i < len(names) else act.__name__
        yield Case(f"{i}: {name}", folder, lambda folder=folder: load(folder), fault)
        shutil.rmtree(folder)
        (root / "x.safetensors").unlink(missing_ok=True)


def main(seed: int = 0, count: int = 80) -> int:
    found = in_child("hostile_models", "folders", seed, count)
    print(json.dumps({"models": {**found, "bad": len(found["bad"]), "taken": len(found["taken"])}}))
    for name, why in found["bad"]:
        print(f"  {name}: {why}")
    return 1 if found["bad"] else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
