"""Hostile folders of dictionaries and hostile published checkpoints: `folders(seed, count, root, marker)`, `published`.

Each yields `watch.Case`s. The first cases are the listed ones, each once; after them single and double faults are drawn
at random, so that any count is reproducible from its seed. `python hostile_dictionaries.py [seed] [folders] [files]`.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save
from watch import Case, in_child

from writesae.sae import KINDS, SAE

DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool,
          torch.complex64, torch.float8_e4m3fn)  # fmt: skip
DEEP = 100_000


class Owned:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (os.system, (f"touch {self.marker}",))


def values(draw: random.Random) -> object:
    """Something that a field of a configuration may hold in a stranger's file."""
    return draw.choice([
        None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 1e300, 2**31, 2**63, 10**30, 20_000_000, 10**12, "", "x", "four",
        "../../x", "/etc/passwd", "<script>", "a" * 10_000, "\u202e\0\n", "default", [], [1, 2], {}, {"a": {"b": []}},
        ["bilinear"], {"fvu": "x"}, {"fvu": 1e308}, {"fvu": None}, [[[[]]]], "float64", "int8", "threshold", "topk",
        *KINDS,
    ])  # fmt: skip


# ---- what a loaded dictionary must be -------------------------------------------------------------------------------


def fault(sae: SAE) -> str | None:
    """What is wrong with a dictionary that was accepted."""
    state = sae.state_dict()
    if len({x.dtype for x in state.values()}) != 1 or not sae.b_enc.is_floating_point():
        return "mixed or other dtypes"
    if any(x.device.type != "cpu" or not bool(torch.isfinite(x).all()) for x in state.values()):
        return "values that are not finite"
    if sae.threshold is not None and bool((sae.threshold < 0).any()):
        return "a negative threshold"
    own = SAE(sae.K, sae.V, sae.F, sae.k, sae.kind, sae.r, sae.sparsity, target=sae.target).state_dict()
    if {n: x.shape for n, x in own.items()} != {n: x.shape for n, x in state.items()}:
        return "other shapes"
    for value in (sae.layer, sae.head):
        if value is not None and (type(value) is not int or value < 0):
            return f"the site {value!r}"
    if sae.target == "write":
        codes = sae.encode_writes(torch.randn(3, 1, sae.K), torch.randn(3, 1, sae.V))
        if bool(sae.mean.any()) or bool(sae.bias.any()):
            return "a constant part of writes"
    else:
        codes = sae.encode(torch.randn(3, sae.K, sae.V, dtype=torch.float32))
    if bool((codes.values < 0).any()):
        return "negative codes"
    return None


# ---- folders --------------------------------------------------------------------------------------------------------


def a_dictionary(draw: random.Random) -> SAE:
    kind = draw.choice(KINDS)
    K, V, F = draw.choice([(6, 9), (9, 6), (16, 4), (3, 3)]) + (draw.choice([5, 20, 64]),)
    r = draw.choice([1, 2]) if kind != "flat" else 1
    sparsity, target = draw.choice(["topk", "threshold"]), draw.choice(["state", "state", "write"])
    if target == "write" and kind == "bilinear_tied":
        sparsity = "pursuit"
    metrics = {"fvu": 0.5, "l0": 3.0}
    centred = target == "state"
    sae = SAE(
        K, V, F, min(4, F), kind, r, sparsity, 3, 1, "default", centred, {"steps": 3}, metrics, target=target
    )  # fmt: skip
    return sae.requires_grad_(False)


def _text(change: Callable[[dict, random.Random], None]):
    def act(folder: Path, draw: random.Random, marker: Path) -> None:
        path = folder / "cfg.json"
        config = json.loads(path.read_text())
        change(config, draw)
        path.write_text(json.dumps(config))

    return act


def _bytes_of(name: str, make: Callable[[bytes, random.Random], bytes]):
    def act(folder: Path, draw: random.Random, marker: Path) -> None:
        path = folder / name
        data = path.read_bytes() if path.is_file() else b""
        path.write_bytes(make(data, draw))

    return act


def _instead(name: str, put: Callable[[Path, random.Random, Path], object]):
    def act(folder: Path, draw: random.Random, marker: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        put(folder / name, draw, marker)

    return act


def _tensors(change: Callable[[dict, random.Random], None]):
    def act(folder: Path, draw: random.Random, marker: Path) -> None:
        from safetensors.torch import load

        tensors = load((folder / "sae.safetensors").read_bytes())
        change(tensors, draw)
        (folder / "sae.safetensors").write_bytes(save({n: x.contiguous() for n, x in tensors.items()}))

    return act


def _header(change: Callable[[dict, random.Random], None]):
    def act(folder: Path, draw: random.Random, marker: Path) -> None:
        data = (folder / "sae.safetensors").read_bytes()
        n = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + n])
        change(header, draw)
        text = json.dumps(header).encode()
        (folder / "sae.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])

    return act


def _field(config: dict, draw: random.Random) -> None:
    config[draw.choice(sorted(config))] = values(draw)


def _flip(data: bytes, draw: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(draw.choice([1, 1, 2, 30])):
        if out:
            out[draw.randrange(len(out))] ^= 1 << draw.randrange(8)
    return bytes(out)


def _in_header(header: dict, draw: random.Random) -> None:
    entry = header[draw.choice(sorted(header))]
    which = draw.choice(["dtype", "shape", "data_offsets"])
    entry[which] = draw.choice([
        values(draw), [20_000_000, 1, 6], [2**63, 2], [-1, 3], [2**40] * 3, [0, 10**12], [10**18, 10**18 + 4], "F64",
    ])  # fmt: skip


def _poke(value: float):
    def change(tensors: dict, draw: random.Random) -> None:
        x = tensors[draw.choice(sorted(tensors))]
        x.view(-1)[draw.randrange(x.numel())] = value

    return change


def _recast(tensors: dict, draw: random.Random) -> None:
    some = sorted(tensors) if draw.random() < 0.3 else [draw.choice(sorted(tensors))]
    dtype = draw.choice(DTYPES)
    for name in some:
        tensors[name] = tensors[name].to(dtype)


def _double(tensors: dict, draw: random.Random) -> None:
    name = draw.choice(sorted(tensors))
    tensors[name] = tensors[name].double()
    tensors[name].view(-1)[0] = 1e300


def _reshape(tensors: dict, draw: random.Random) -> None:
    name = draw.choice(sorted(tensors))
    x = tensors[name]
    tensors[name] = draw.choice([x.flatten(), x[..., :1], x[None], x.mT if x.ndim > 1 else x[1:], x[:0], x.sum()])


def _rename(tensors: dict, draw: random.Random) -> None:
    name = draw.choice(sorted(tensors))
    x = tensors.pop(name)
    if draw.random() < 0.5:
        tensors[draw.choice(["x", "../x", "v_enc", "threshold", name + " ", "n" * 3000])] = x


FOLDER_FAULTS: dict[str, Callable[[Path, random.Random, Path], None]] = {
    "a field": _text(_field),
    "a key more": _text(lambda c, d: c.update({d.choice(["x", "x" * 5000, "auto_map", "__class__"]): values(d)})),
    "a key less": _text(lambda c, d: c.pop(d.choice(sorted(c)))),
    "layer ../../x": _text(lambda c, d: c.update(layer="../../x")),
    "20 million atoms": _text(lambda c, d: c.update(d_sae=20_000_000)),
    "huge K": _text(lambda c, d: c.update(K=2**40, V=2**40, d_sae=2**40)),
    "other dtype": _text(lambda c, d: c.update(dtype=d.choice(["float64", "float16", "bfloat16", "int8", "Tensor"]))),
    "negative layer": _text(lambda c, d: c.update(layer=-1)),
    "true as an integer": _text(lambda c, d: c.update({d.choice(["k", "r", "layer", "d_sae", "format"]): True})),
    "deep lists": _bytes_of("cfg.json", lambda b, d: b"[" * DEEP + b"]" * DEEP),
    "deep objects": _bytes_of("cfg.json", lambda b, d: b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "deep training": _bytes_of(
        "cfg.json", lambda b, d: b.replace(b'"steps": 3', b'"steps": ' + b"[" * 900 + b"]" * 900)
    ),
    "NaN in metrics": _bytes_of("cfg.json", lambda b, d: b.replace(b"0.5", b"NaN")),
    "1e999": _bytes_of("cfg.json", lambda b, d: b.replace(b"0.5", b"1e999")),
    "long integer": _bytes_of("cfg.json", lambda b, d: b.replace(b"0.5", b"9" * 5000)),
    "a key twice": _bytes_of("cfg.json", lambda b, d: b.replace(b'"k":', b'"k": 1, "k":')),
    "half a surrogate": _bytes_of("cfg.json", lambda b, d: b.replace(b'"default"', b'"\\ud800"')),
    "not UTF-8": _bytes_of("cfg.json", lambda b, d: b"\xff\xfe" + b),
    "an empty configuration": _bytes_of("cfg.json", lambda b, d: b""),
    "a configuration cut": _bytes_of("cfg.json", lambda b, d: b[: d.randrange(len(b) + 1)]),
    "a large configuration": _bytes_of("cfg.json", lambda b, d: b'{"a": [' + b"[],"[:3] * 1_300_000 + b"[]]}"),
    "configuration flipped": _bytes_of("cfg.json", _flip),
    "a list as configuration": _bytes_of("cfg.json", lambda b, d: b"[" + b + b"]"),
    "configuration endless": _instead("cfg.json", lambda p, d, m: p.symlink_to("/dev/zero")),
    "configuration a pipe": _instead("cfg.json", lambda p, d, m: os.mkfifo(p)),
    "configuration a folder": _instead("cfg.json", lambda p, d, m: p.mkdir()),
    "configuration a loop": _instead("cfg.json", lambda p, d, m: p.symlink_to(p.name)),
    "configuration elsewhere": _instead("cfg.json", lambda p, d, m: p.symlink_to("/etc/passwd")),
    "no configuration": _instead("cfg.json", lambda p, d, m: None),
    "weights endless": _instead("sae.safetensors", lambda p, d, m: p.symlink_to("/dev/zero")),
    "weights a pipe": _instead("sae.safetensors", lambda p, d, m: os.mkfifo(p)),
    "weights elsewhere": _instead("sae.safetensors", lambda p, d, m: p.symlink_to("/etc/passwd")),
    "no weights": _instead("sae.safetensors", lambda p, d, m: None),
    "weights pickled": _instead("sae.safetensors", lambda p, d, m: torch.save({"x": Owned(m)}, p)),
    "weights a bare pickle": _instead("sae.safetensors", lambda p, d, m: p.write_bytes(pickle.dumps(Owned(m)))),
    "weights cut": _bytes_of("sae.safetensors", lambda b, d: b[: d.randrange(len(b) + 1)]),
    "weights longer": _bytes_of("sae.safetensors", lambda b, d: b + bytes(d.randrange(1, 99))),
    "weights flipped": _bytes_of("sae.safetensors", _flip),
    "header flipped": _bytes_of("sae.safetensors", lambda b, d: _flip(b[:600], d) + b[600:]),
    "weights noise": _bytes_of("sae.safetensors", lambda b, d: d.randbytes(d.randrange(1, 4000))),
    "a header of 2^63": _bytes_of("sae.safetensors", lambda b, d: struct.pack("<Q", 2**63) + b[8:]),
    "a deep header": _bytes_of("sae.safetensors", lambda b, d: struct.pack("<Q", 2 * DEEP) + b"[" * DEEP + b"]" * DEEP),
    "a header's entry": _header(_in_header),
    "a header of 20 million": _header(lambda h, d: h[sorted(h)[0]].update(shape=[20_000_000, 1, 6])),
    "dtypes": _tensors(_recast),
    "NaN": _tensors(_poke(float("nan"))),
    "infinity": _tensors(_poke(float("-inf"))),
    "a threshold below 0": _tensors(lambda t, d: t.update(threshold=-torch.ones(len(t["b_enc"])))),
    "a mean": _tensors(lambda t, d: t.update(mean=torch.ones_like(t["mean"]))),
    "a metric of another": _tensors(lambda t, d: t.update(metric=d.choice([-1, 0, 1]) * torch.ones(len(t["mean"]), 1))),
    "a metric that is none": _tensors(lambda t, d: t.update(metric=-torch.eye(len(t["mean"])))),
    "another target": _text(lambda c, d: c.update(target=d.choice(["write", "state", "query", None, 3]))),
    "1e300": _tensors(_double),
    "shapes": _tensors(_reshape),
    "names": _tensors(_rename),
}


def folders(seed: int, count: int, root: Path, marker: Path) -> Iterator[Case]:
    """`count` hostile dictionary folders below `root`; each is removed after it was judged."""
    names = list(FOLDER_FAULTS)
    for i in range(count):
        draw = random.Random(f"{seed}/{i}")
        torch.manual_seed(i)
        chosen = [names[i]] if i < len(names) else [draw.choice(names) for _ in range(draw.choice([1, 1, 2]))]
        folder = root / f"folder{i}"
        a_dictionary(draw).save_pretrained(folder)
        for name in chosen:
            if any(p.is_symlink() or not p.is_file() for p in folder.iterdir()):
                break  # a device or pipe, which a second fault would read
            try:
                FOLDER_FAULTS[name](folder, draw, marker)
            except Exception:
                pass  # the second fault finds nothing left to spoil
        yield Case(f"{i}: {' + '.join(chosen)}", folder, lambda folder=folder: SAE.from_pretrained(folder), fault)
        shutil.rmtree(folder)


# ---- published files ------------------------------------------------------------------------------------------------

LAYOUTS = ("bilinear", "bilinear_tied", "bilinear_flat", "matrix", "flat", "jumprelu", "gated", "batchtopk")
TYPES = {"matrix": "rank1", "jumprelu": "bilinear_jumprelu", "gated": "bilinear_gated", "batchtopk": "bilinear"}


def a_checkpoint(draw: random.Random) -> dict:
    """Content of a published file as the paper's code lays it out."""
    kind, (K, V), F, r = draw.choice(LAYOUTS), draw.choice([(6, 9), (9, 6)]), draw.choice([5, 20]), draw.choice([1, 2])

    def factors(*names):
        return {n: torch.randn(F, r, d) for n, d in zip(names, (K, V) * 2, strict=False)}

    state = {"steps_since_active": torch.zeros(F, dtype=torch.long)}
    if kind in ("flat", "matrix"):
        state |= {"encoder.weight": torch.randn(F, K * V), "encoder.bias": torch.randn(F)}
    if kind in ("flat", "bilinear_flat"):
        state |= {"decoder.weight": torch.randn(K * V, F), "decoder.bias": torch.randn(K * V)}
    if kind == "matrix":
        state |= factors("V", "W") | {"bias": torch.randn(K, V)}
    if kind == "bilinear_tied":
        state |= factors("V_dec", "W_dec") | {"b_enc": torch.randn(F), "bias": torch.randn(K, V)}
    if kind == "bilinear_flat":
        state |= factors("V_enc", "W_enc") | {"b_enc": torch.randn(F)}
    if kind in ("bilinear", "jumprelu", "gated", "batchtopk"):
        state |= factors("V_enc", "W_enc", "V_dec", "W_dec") | {"bias": torch.randn(K, V)}
        state |= {n: torch.randn(F) for n in (("b_gate", "b_mag", "r_mag") if kind == "gated" else ("b_enc",))}
    if kind == "jumprelu":
        state["log_threshold"] = torch.randn(F)
    config = {
        "k": 3, "layer": 9, "head": 4, "d_k": K, "d_v": V, "sae_type": TYPES.get(kind, kind), "n_features": F,
        "rank": r, "d_in": K * V, "use_batchtopk": False,
    }  # fmt: skip
    if kind == "batchtopk":
        config.update(use_batchtopk=True, threshold=0.5)
    return {"model_state_dict": state, "config": config, "epoch": 2, "step": 11, "val_mse": 0.25}


def _swap(content: dict, draw: random.Random) -> None:
    c = content["config"]
    c["d_k"], c["d_v"] = c["d_v"], c["d_k"]


def _state(change: Callable[[dict, random.Random], None]):
    return lambda content, draw: change(content["model_state_dict"], draw)


CONTENT_FAULTS: dict[str, Callable[[dict, random.Random], None]] = {
    "a field": lambda c, d: c["config"].update({d.choice(sorted(c["config"])): values(d)}),
    "threshold -1": lambda c, d: c["config"].update(use_batchtopk=True, threshold=-1),
    "threshold tensor -1": lambda c, d: (
        c["config"].update(use_batchtopk=True), c["model_state_dict"].update(threshold=torch.tensor(-1.0))
    ),
    "sizes swapped": _swap,
    "no configuration": lambda c, d: c.pop("config"),
    "configuration a list": lambda c, d: c.update(config=[1]),
    "BatchTopK alone": lambda c, d: c.update(config={**c["config"], "use_batchtopk": True, "threshold": None}),
    "another type": lambda c, d: c["config"].update(sae_type=d.choice([*LAYOUTS, *TYPES.values(), "x" * 5000, 3])),
    "k above F": lambda c, d: c["config"].update(k=10**6),
    "dtypes": _state(_recast),
    "NaN": _state(lambda s, d: _poke(float("nan"))({n: x for n, x in s.items() if x.is_floating_point()}, d)),
    "1e300": _state(_double),
    "shapes": _state(_reshape),
    "names": _state(_rename),
    "a number as a tensor": _state(lambda s, d: s.update({d.choice(sorted(s)): values(d)})),
    "an expanded tensor": _state(lambda s, d: s.update({d.choice(sorted(s)): torch.zeros(1).expand(10**9)})),
    "a strided tensor": _state(lambda s, d: s.update({n: x.mT.contiguous().mT for n, x in s.items() if x.ndim > 1})),
    "state a list": lambda c, d: c.update(model_state_dict=[1, 2]),
    "counters": lambda c, d: c.update({n: values(d) for n in ("epoch", "step", "val_mse")}),
    "gate without its parts": _state(lambda s, d: s.update(b_gate=torch.zeros(5))),
    "numpy": lambda c, d: c.update(val_mse=__import__("numpy").float64(1)),
}  # fmt: skip


def archive(records: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as file:
        for name, data in records:
            file.writestr(name, data)
    return out.getvalue()


def _records(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [(name, file.read(name)) for name in file.namelist()]


def _pickle(make: Callable[[bytes, random.Random, Path], bytes]):
    def act(data: bytes, draw: random.Random, marker: Path) -> bytes:
        return archive([(n, make(x, draw, marker) if n.endswith("data.pkl") else x) for n, x in _records(data)])

    return act


def _storages(make: Callable[[bytes, random.Random], bytes]):
    def act(data: bytes, draw: random.Random, marker: Path) -> bytes:
        return archive([(n, make(x, draw) if "/data/" in n else x) for n, x in _records(data)])

    return act


def _numel(data: bytes, draw: random.Random, marker: Path) -> bytes:
    """A storage that claims to be larger than it is: read past its end by who believes it."""
    at = data.rindex(b"K", 0, data.index(b"Q", data.index(b"cpu"))) if b"cpu" in data else 0
    return data[:at] + b"J" + struct.pack("<i", 2**30) + data[at + 2 :]


def _hash_bomb() -> bytes:
    return b"\x80\x02}" + b"N\x85" + b"2\x86" * 60 + b"K\x01s."


FILE_FAULTS: dict[str, Callable[[bytes, random.Random, Path], bytes]] = {
    "cut": lambda b, d, m: b[: d.randrange(len(b))],
    "flipped": lambda b, d, m: _flip(b, d),
    "noise": lambda b, d, m: d.randbytes(d.randrange(3000)),
    "empty": lambda b, d, m: b"",
    "text": lambda b, d, m: b"hello",
    "pickle flipped": _pickle(lambda b, d, m: _flip(b, d)),
    "pickle cut": _pickle(lambda b, d, m: b[: d.randrange(len(b))]),
    "pickle noise": _pickle(lambda b, d, m: b"\x80\x02" + d.randbytes(200)),
    "pickle runs": _pickle(lambda b, d, m: pickle.dumps({"model_state_dict": Owned(m)}, 2)),
    "pickle runs, newer": _pickle(lambda b, d, m: pickle.dumps({"model_state_dict": Owned(m)}, 4)),
    "pickle builds": _pickle(lambda b, d, m: b"\x80\x02cbuiltins\nexec\nX\x04\x00\x00\x00pass\x85R."),
    "pickle of getattr": _pickle(lambda b, d, m: b"\x80\x02ctorch.serialization\nos.system\nX\x02\x00\x00\x00id\x85R."),
    "pickle memo": _pickle(lambda b, d, m: b"\x80\x02Nr\xff\xff\xff\x7f."),
    "pickle deep": _pickle(lambda b, d, m: b"\x80\x02N" + b"\x85" * DEEP + b"."),
    "pickle of hashes": _pickle(lambda b, d, m: _hash_bomb()),
    "pickle of marks": _pickle(lambda b, d, m: b"\x80\x02" + b"N" * 300_000 + b"(t" * 200_000 + b"."),
    "pickle long": _pickle(lambda b, d, m: b"\x80\x02\x8b\xff\xff\xff\x7f1."),
    "pickle laughs": _pickle(lambda b, d, m: b"\x80\x02]q\x00" + b"(h\x00h\x00h\x00e" * 3 + b"."),
    "pickle large": _pickle(lambda b, d, m: b"\x80\x02" + b"N0" * 10_000_000 + b"N."),
    "storage claims more": _pickle(_numel),
    "storages cut": _storages(lambda b, d: b[: len(b) // 2]),
    "storages longer": _storages(lambda b, d: b + b"\0" * 64),
    "storages gone": lambda b, d, m: archive([x for x in _records(b) if "/data/" not in x[0]]),
    "compressed": lambda b, d, m: archive(_records(b), zipfile.ZIP_DEFLATED),
    "a bomb": lambda b, d, m: archive([*_records(b), ("archive/data/99", bytes(300 * 2**20))], zipfile.ZIP_DEFLATED),
    "two pickles": lambda b, d, m: archive([*_records(b), ("other/data.pkl", b"\x80\x02}.")]),
    "big-endian": lambda b, d, m: archive([(n, b"big" if n.endswith("byteorder") else x) for n, x in _records(b)]),
    "many records": lambda b, d, m: archive([*_records(b), *((f"archive/x{i}", b"") for i in range(40_000))]),
    "a large directory": lambda b, d, m: (
        bytes(6 * 2**20) + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFE, 0xFFFE, 6 * 2**20, 0, 0)
    ),
    "a bare pickle": lambda b, d, m: pickle.dumps(Owned(m), 2),
    "the old format": lambda b, d, m: _old(m),
}


BESIDE_FAULTS: dict[str, Callable[[Path, random.Random, Path], None]] = {
    "beside: a field": lambda p, d, m: p.write_text(json.dumps({d.choice(["k", "layer", "d_k", "rank"]): values(d)})),
    "beside: another site": lambda p, d, m: p.write_text('{"layer": 8, "head": 4}'),
    "beside: deep": lambda p, d, m: p.write_bytes(b'{"a":' * DEEP + b"1" + b"}" * DEEP),
    "beside: large": lambda p, d, m: p.write_bytes(b'{"a": [' + b"[]," * 1_300_000 + b"[]]}"),
    "beside: no text": lambda p, d, m: p.write_bytes(b"\xff\xfe{}"),
    "beside: endless": lambda p, d, m: p.symlink_to("/dev/zero"),
    "beside: a pipe": lambda p, d, m: os.mkfifo(p),
    "beside: a folder": lambda p, d, m: p.mkdir(),
    "beside: a loop": lambda p, d, m: p.symlink_to(p.name),
    "beside: nowhere": lambda p, d, m: p.symlink_to("nowhere"),
    "beside: elsewhere": lambda p, d, m: p.symlink_to("/etc/passwd"),
    "beside: of ours": lambda p, d, m: SAE(6, 9, 20, 3).save_pretrained(p.parent),
}


def _old(marker: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"model_state_dict": {}, "config": Owned(marker)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def published(seed: int, count: int, root: Path, marker: Path) -> Iterator[Case]:
    """`count` hostile `best.pt` files below `root`; each is removed after it was judged."""
    named = [*CONTENT_FAULTS, *FILE_FAULTS, *BESIDE_FAULTS]
    for i in range(count):
        draw = random.Random(f"{seed}/published/{i}")
        torch.manual_seed(i)
        if i < len(named):
            chosen = [named[i]]
        else:
            faults = [CONTENT_FAULTS, FILE_FAULTS, BESIDE_FAULTS]
            chosen = [draw.choice(list(draw.choice(faults))) for _ in range(draw.choice([1, 2]))]
            chosen.sort(key=lambda name: name in FILE_FAULTS)
        content = a_checkpoint(draw)
        for name in chosen:
            if name in CONTENT_FAULTS:
                try:
                    CONTENT_FAULTS[name](content, draw)
                except (KeyError, AttributeError, TypeError, IndexError, RuntimeError, ValueError):
                    pass
        out = io.BytesIO()
        torch.save(content, out)
        data = out.getvalue()
        for name in chosen:
            if name in FILE_FAULTS:
                try:
                    data = FILE_FAULTS[name](data, draw, marker)
                except (zipfile.BadZipFile, ValueError, IndexError):
                    pass
        folder = root / f"published{i}"
        folder.mkdir(parents=True)
        (folder / "best.pt").write_bytes(data)
        path = folder / "best.pt" if draw.random() < 0.5 else folder
        for name in chosen:
            if name in BESIDE_FAULTS and not os.path.lexists(folder / "config.json"):
                BESIDE_FAULTS[name](folder / "config.json", draw, marker)
        yield Case(f"{i}: {' + '.join(chosen)}", folder, lambda path=path: SAE.from_pretrained(path), fault)
        shutil.rmtree(folder)


def main(seed: int = 0, many: int = 1000, files: int = 300) -> int:
    failed = 0
    for function, count in (("folders", many), ("published", files)):
        found = in_child("hostile_dictionaries", function, seed, count)
        print(json.dumps({function: {**found, "bad": len(found["bad"]), "taken": len(found["taken"])}}))
        for name, why in found["bad"]:
            print(f"  {name}: {why}")
        failed += len(found["bad"])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
