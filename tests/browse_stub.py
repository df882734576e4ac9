"""An atlas made of nothing: what the browser's pages show, in every size, and with hostile text in every field."""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace

import numpy as np

F = 2048
WORDS = (
    " the", " house", "House", " of", "\n", "\t", "    ", "def", " return", "(x)", "ing", " Berlin", " Paris", " seven",
    "7", " 1258", "é", " über", "日本", " שלום", "🙂", ".", ",", " because", " whether", " never", " was", "_id",
    "</div>", "==",
)  # fmt: skip


def hostile(where: str) -> str:
    """Text that would run, break out or hide if any field were not escaped; says where it came from."""
    return (
        f"\"'><script>attacked('{where}')</script><img src=x onerror=attacked('{where}')>"
        "{{7*7}}{%raw%}</textarea></title></bdi>--><svg/onload=attacked(1)>javascript:attacked(2)\u202eevil\x00\x1b[31m\ud800"
    )


class Live:
    """A model that writes words, one each `pause` seconds."""

    def __init__(self, pause: float = 0.0, text=lambda where: ""):
        self.pause, self.extra = pause, text
        self.closed = 0

    def text(self, text, sites=None, top=None):
        if "refuse" in text:
            raise ValueError("text: expected at most 10 tokens, got 11" + self.extra("error"))
        tokens = [w if i == 0 else " " + w for i, w in enumerate(text.split(" "))]
        firings = []
        for position in range(len(tokens)):
            for j in range(4):
                head = j % 2 if sites is None else sites[0][1]
                feature, activation = (position * 7 + j) % 40, 0.5 + (position * 3 + j) % 5
                firings.append(dict(position=position, layer=5, head=head, feature=feature, activation=activation))
        return {"tokens": [t + self.extra("live token") for t in tokens], "firings": firings}

    def compare(self, prompt, edits, max_new_tokens=32):
        if "refuse" in prompt:
            raise ValueError("prompt: expected at most 10 tokens, got 11")
        try:
            for side in ("plain", "edited"):
                for i in range(max_new_tokens):
                    time.sleep(self.pause)
                    j = i % 30 if i < 3 or side == "plain" else (i + 1) % 30
                    yield {"side": side, "token": WORDS[j] + self.extra("generated"), "id": j}
            yield {"done": {"applied": [3] + [0] * (len(edits) - 1), "kl": [0.01, 0.5, 0.0], "first_difference": 3}}
        finally:
            self.closed += 1


class Atlas:
    """`sites` sites of F features each; `text(where)` is added to every text of the field named."""

    def __init__(self, sites=((5, 3), (5, 0), (5, 1)), features=F, live=None, text=lambda where: "", seed=0):
        random = np.random.default_rng(seed)
        sites = sorted(sites)
        n = len(sites) * features
        self.text = text
        self.live = live
        count = np.floor(10 ** random.uniform(0, 5, n)).astype(np.int64)
        count[random.random(n) < 0.1] = 0
        win = random.random(n).astype(np.float32)
        win[count < 100] = np.nan
        tokens = [w + text("token") for w in WORDS] + [f" word{i}" for i in range(len(WORDS), 4096)]
        draw = np.minimum(random.geometric(0.01, (n, 5)) - 1, 4095).astype(np.uint32)
        answers = np.minimum(random.geometric(0.02, (n, 5)) - 1, 4095).astype(np.uint32)
        answers[count == 0] = 0xFFFFFFFF
        self.table = SimpleNamespace(
            site=np.repeat(np.arange(len(sites), dtype=np.uint16), features),
            feature=np.tile(np.arange(features, dtype=np.uint32), len(sites)), count=count,
            density=(count / 1e6).astype(np.float32), mean=random.random(n).astype(np.float32),
            max=(1 + 9 * random.random(n)).astype(np.float32), win_rate=win,
            cosine=random.uniform(-0.2, 1, n).astype(np.float32),
            partition=(count > 0).astype(np.uint8) + (count > 1e4),
            partitions=["dead" + text("partition"), "rare", "common"], promoted=draw, suppressed=draw[::-1],
            key_tokens=answers, tokens=tokens,
        )  # fmt: skip
        self.info = {
            "title": "a store of notes" + text("title"), "model": "default" + text("model"),
            "sites": sites, "F": features,
            "firings": int(count.sum()), "tokens": 1_000_000, "documents": 120, "has_model": live is not None,
        }  # fmt: skip

    def feature(self, layer, head, feature):
        t = self.text
        random = np.random.default_rng(feature)
        row = self.info["sites"].index((layer, head)) * self.info["F"] + feature
        largest = float(self.table.max[row])

        def context(low, high):
            tokens = [WORDS[i] + t("context") for i in random.integers(0, len(WORDS), 40)]
            tokens[8:14] = ["\n", "    ", "if", " x", ":", "\n        "]
            activations = np.where(random.random(40) < 0.15, random.random(40) * low, 0.0)
            at = int(random.integers(10, 38))
            activations[at] = random.uniform(low, high)
            return {"document": int(random.integers(120)), "row": 3, "position": 17 + at,
                    "source": "notes/2024-03-02 meeting.txt" + t("source"), "tokens": tokens,
                    "activations": activations.tolist(), "at": at, "activation": float(activations[at])}  # fmt: skip

        bands = [("top", 0.95, 1.0), ("90–100 %", 0.9, 1.0), ("50–90 %", 0.5, 0.9), ("0–50 %", 0.01, 0.5)]
        fired = self.table.count[row] > 0
        levels = [
            {"name": name + t("level"), "low": a * largest, "high": b * largest,
             "contexts": [context(a * largest, b * largest) for _ in range(5)] if fired else []}
            for name, a, b in bands
        ]  # fmt: skip

        def token(i, value):
            return {"token": WORDS[i % len(WORDS)] + t("written"), "id": i, "value": value}

        first = self.info["sites"][0]
        page = {
            "levels": levels,
            "histogram": {"edges": np.linspace(0, largest, 31).tolist(),
                          "counts": (1000 * np.exp(-np.arange(30) / 5)).astype(int).tolist()},
            "writes": {"promoted": [token(i + feature, 3.2 - i / 4) for i in range(10)],
                       "suppressed": [token(i + 7, -2.1 + i / 5) for i in range(10)]},
            "answers": {"tokens": [token(i + 3, 410 - 40 * i) for i in range(8)],
                        "keys": [{"token": WORDS[i] + t("key"), "cosine": 0.9 - i / 9, "count": 40} for i in range(4)],
                        "neighbours": [{"layer": layer, "head": head, "feature": i, "cosine": 0.9} for i in range(3)]},
            "neighbours": [{"layer": layer, "head": head, "feature": i, "cosine": 0.9 - i / 10} for i in range(6)],
            "cofiring": [{"layer": first[0], "head": first[1], "feature": i + 9, "together": 1200 - i, "expected": 40.0,
                          "lift": 30.5 - i, "npmi": 0.4} for i in range(6)],
            "replacement": [{"run": "replace" + t("run"), "n": 30, "cosine": 0.8, "win_rate": 0.93,
                             "kl_median": {"delete": 0.0041, "atom": 0.0012, "made up" + t("condition"): None},
                             "closer_than": {"delete": 0.93}}] if feature % 2 == 0 else None,
        }  # fmt: skip
        return SimpleNamespace(as_dict=lambda: page)


class Served:
    """A server of an atlas in a thread."""

    def __init__(self, atlas):
        self.atlas = atlas
        from writesae.browse.command import address, make_server

        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = address(self.listening).rstrip("/")
        self.server = make_server(atlas, self.listening)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listening]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)

    def close(self):
        self.server.should_exit = True
        self.thread.join(10)
        self.listening.close()
