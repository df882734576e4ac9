"""Train the default language model, or a stand-in of another family, on the Python standard library.

The default model is a small hybrid of the Qwen3.5 architecture: three gated delta-rule layers, one full-attention
layer, and again. Key and value sizes differ (32 and 64) and two value heads share a key head, so that nothing which
confuses them can pass unnoticed. It is trained from scratch, tokenizer included, on the ``"train"`` split of
:mod:`writesae.default.corpus` (library and test suite; the held-out losses are those of the library alone).

    python scripts/train_default_model.py --minutes 72 --work runs/default_model --out writesae/default/model

With ``--family`` it is one of the models in ``families_models.py``, smaller and of recurrent layers alone, trained in
the same way on our kernels' forward and backward instead of transformers' slow fallback, one core being enough:

    python scripts/train_default_model.py --family mamba2 --minutes 30 --tokenizer writesae/default/model \\
        --work runs/mamba2 --out writesae/default/families/mamba2

Runs on two CPU cores with a C++ compiler (``--no-compile`` without one). The learning rate follows the wall clock, so
the run always ends fully decayed at ``--minutes``; the order of the data depends on the seed alone, but how many steps
fit depends on the machine and on what else it does. Stopped and started again with the same ``--work``, it goes on
from its last checkpoint; so does a finished run that is given more ``--minutes``. Matrices are trained with Muon (K.
Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/), everything else with AdamW.
"""

import argparse
import contextlib
import datetime
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from families_models import (
    FAMILIES,
    VOCAB,
    build_model,
    check_kernels,
    fast_conv,
    loss_and_gradient,
    our_kernels,
    report,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch._inductor import config as inductor_config
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3_5ForCausalLM
from transformers.models.qwen3_5 import modeling_qwen3_5

from writesae.default.corpus import stdlib_files, stdlib_folder
from writesae.files import whole_file, whole_folder, write_json
from writesae.interrupt import Stop, finishing, script
from writesae.text import Corpus

END = "<|endoftext|>"
# Maps to gates, strengths and their low ranks: small or wide, and not made orthogonal.
GATES = tuple(f"{name}.weight" for name in ("in_proj_a", "in_proj_b", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj",
                                            "b_proj", "x_proj", "dt_proj", "gk_proj.0", "gk_proj.1"))  # fmt: skip
PROJECTIONS = ("proj", "ffn.key", "ffn.value")  # in the names of all others


# ---------------------------------------------------------------------------------------------------- tokenizer, data


def sources(split: str, test_suite: bool = False) -> list[str]:
    """The texts of one split; none of a test suite that this Python does not ship."""
    files = stdlib_files(split, test_suite=test_suite)
    corpus = Corpus.from_files(files, root=stdlib_folder()) if files else Corpus.from_texts([])
    return [document.open().read().decode() for document in corpus.documents()]


def train_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of ``VOCAB`` entries on ``texts`` and save it to ``folder``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def encode(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Return one int64 array a document, each beginning with the end-of-text token."""
    first = tokenizer.bos_token_id
    return [np.array([first, *ids]) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def windows(documents: list[np.ndarray], length: int) -> torch.Tensor:
    """Join documents and cut them into rows of ``length`` + 1 tokens that overlap by one: ``[N, length + 1]``."""
    stream = torch.from_numpy(np.concatenate(documents))
    return stream.unfold(0, length + 1, length)


def one_pass(library: list[np.ndarray], suite: list[np.ndarray], number: int, seed: int, length: int) -> torch.Tensor:
    """Return the shuffled windows of pass ``number``: the whole library and every other file of the test suite."""
    rng = np.random.default_rng([seed, number])
    documents = library + suite[number % 2 :: 2]
    rows = windows([documents[i] for i in rng.permutation(len(documents))], length)
    return rows[torch.from_numpy(rng.permutation(len(rows)))]


# ------------------------------------------------------------------------------------- fast operators of Qwen3.5


class UnitLowerInverse(torch.autograd.Function):
    """Inverse of I + A for strictly lower triangular A ``[..., C, C]``, C a power of two, by repeated squaring."""

    @staticmethod
    def forward(ctx, a):
        inverse, power = torch.eye(a.shape[-1]) - a, a
        for _ in range(a.shape[-1].bit_length() - 2):
            power = power @ power
            inverse = inverse + inverse @ power
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        t = inverse.transpose(-1, -2)
        return -(t @ grad @ t).tril(-1)


def fast_delta_rule(
    query,  # [B, T, Hk, K]
    key,  # [B, T, Hk, K]
    value,  # [B, T, H, V]
    g,  # [B, T, H], log decay
    beta,  # [B, T, H]
    use_qk_l2norm_in_kernel=True,
    chunk=32,
    **_,
):
    """Chunked gated delta rule, as transformers' own but with the triangular solve replaced by small products.

    For training only: no initial and no final state, and T must be a multiple of ``chunk``.
    """
    B, T, Hk, K = key.shape
    H, V = value.shape[-2:]
    N, C = T // chunk, chunk

    def split(x, heads):  # [B, T, heads, ...] -> [B, heads, N, C, ...]
        return x.float().view(B, N, C, heads, -1).permute(0, 3, 1, 2, 4)

    q, k, v = split(query, Hk), split(key, Hk), split(value, H)
    q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6) * K**-0.5
    k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    g, beta = split(g, H).squeeze(-1).cumsum(-1), split(beta, H)
    with torch.autocast("cpu", enabled=False):
        kk, qk = ((x @ k.transpose(-1, -2)).repeat_interleave(H // Hk, 1) for x in (k, q))
        q, k = (x.repeat_interleave(H // Hk, 1) for x in (q, k))
        causal = torch.ones(C, C, dtype=torch.bool).tril()
        decay = (g.unsqueeze(-1) - g.unsqueeze(-2)).masked_fill(~causal, float("-inf")).exp()
        inverse = UnitLowerInverse.apply((kk * decay * beta).tril(-1))
        gamma = g.exp().unsqueeze(-1)
        u, w = (inverse @ torch.cat([v * beta, k * beta * gamma], -1)).split([V, K], -1)
        reads = torch.cat([w, q * gamma], -2).unbind(2)
        lefts = (k * (g[..., -1:] - g).exp().unsqueeze(-1)).transpose(-1, -2).unbind(2)
        ends, u = g[..., -1].exp()[..., None, None].unbind(2), u.unbind(2)
        state = q.new_zeros(B, H, K, V)
        inter, writes = [], []
        for n in range(N):
            seen = reads[n] @ state
            writes.append(u[n] - seen[..., :C, :])
            inter.append(seen[..., C:, :])
            state = state * ends[n] + lefts[n] @ writes[n]
        out = torch.stack(inter, 2) + (qk * decay) @ torch.stack(writes, 2)
    return out.permute(0, 2, 3, 1, 4).reshape(B, T, H, V).to(query.dtype), None


@contextlib.contextmanager
def fast_operators(model: Qwen3_5ForCausalLM) -> Iterator[None]:
    """Within, transformers' delta rule and convolution are replaced, having been checked: same loss, same gradients."""
    original = modeling_qwen3_5.torch_chunk_gated_delta_rule, modeling_qwen3_5.causal_conv1d_fn
    ids = torch.randint(VOCAB, (2, 128), generator=torch.Generator().manual_seed(1))
    try:
        with torch.random.fork_rng():
            probe = Qwen3_5ForCausalLM(model.config)  # its output projections are not zero, as the model's are
            plain = loss_and_gradient(probe, ids)
            modeling_qwen3_5.torch_chunk_gated_delta_rule = fast_delta_rule
            modeling_qwen3_5.causal_conv1d_fn = fast_conv
            report(*plain, *loss_and_gradient(probe, ids))
        yield
    finally:
        modeling_qwen3_5.torch_chunk_gated_delta_rule, modeling_qwen3_5.causal_conv1d_fn = original


@contextlib.contextmanager
def checked_kernels(model) -> Iterator[None]:
    """Within, the recurrent layers of a model of any other family run on the package's own kernels."""
    check_kernels(model)
    with our_kernels(model):
        yield


# ----------------------------------------------------------------------------------------------------------- optimizer


def orthogonalize(m: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrices of a batch ``[n, rows, columns]``, roughly: Muon's Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = m.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.transpose(-1, -2)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.transpose(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.transpose(-1, -2)).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized; for matrices only. Equal shapes are handled as one batch."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                shapes.setdefault(p.shape, []).append(p)
            for shape, members in shapes.items():
                updates = []
                for p in members:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(torch.lerp(p.grad, buffer, group["momentum"]))
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(members, orthogonalize(torch.stack(updates)).unbind(0), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"] * scale)


def build_optimizers(model, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the projections, AdamW for embeddings, norms, convolutions, gates and decay parameters."""
    matrices, rest = [], []
    for name, p in model.named_parameters():
        is_projection = p.ndim == 2 and any(x in name for x in PROJECTIONS) and not name.endswith(GATES)
        (matrices if is_projection else rest).append(p)
    optimizers = [
        Muon(matrices, lr=muon_lr),
        torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def rate(progress: float, step: int) -> float:
    """Learning-rate factor: 50 steps of warm-up, constant for 35 % of the time, then linear to zero."""
    return min(1.0, (step + 1) / 50) * min(1.0, max(0.0, 1 - progress) / 0.65)


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def mean_loss(model, rows: torch.Tensor, batch: int = 16) -> float:
    """Mean cross-entropy in nats a token over windows ``[N, length + 1]`` (every target once)."""
    model.eval()
    total = 0.0
    for part in rows.split(batch):
        hidden = model.base_model(part[:, :-1], use_cache=False).last_hidden_state
        logits = (hidden @ model.lm_head.weight.T).float()
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    model.train()
    return total / rows[:, 1:].numel()


class CountModels:
    """Unigram and bigram models, each smoothed as well as a search on unseen training text can make it.

    The unigram adds a constant to every count. The bigram subtracts a constant discount from every count and gives
    the freed mass to the unigram (interpolated absolute discounting).
    """

    def __init__(self, documents: list[np.ndarray]):
        tune = documents[1::10]
        self.add = 1.0
        self.fit([d for i in range(10) if i != 1 for d in documents[i::10]])
        pairs = windows(tune, 1)
        self.add = min((10.0**e for e in range(-3, 5)), key=lambda k: self.unigram(pairs, k))
        self.discount = min(np.arange(0.3, 1.0, 0.05), key=lambda d: self.bigram(pairs, d))
        self.fit(documents)

    def fit(self, documents):
        stream = np.concatenate(documents)
        self.single = np.bincount(stream, minlength=VOCAB)
        self.double = np.bincount(stream[:-1] * VOCAB + stream[1:], minlength=VOCAB**2).reshape(VOCAB, VOCAB)

    def _unigram(self, add):
        return (self.single + add) / (self.single.sum() + add * VOCAB)

    def unigram(self, rows: torch.Tensor, add: float | None = None) -> float:
        """Mean loss in nats over the targets of ``rows``."""
        return float(-np.log(self._unigram(self.add if add is None else add))[rows[:, 1:].numpy()].mean())

    def bigram(self, rows: torch.Tensor, discount: float | None = None) -> float:
        """Mean loss in nats over the targets of ``rows``."""
        d = self.discount if discount is None else discount
        left, right = rows[:, :-1].numpy().ravel(), rows[:, 1:].numpy().ravel()
        seen, kinds = self.double.sum(1), (self.double > 0).sum(1)
        base = self._unigram(self.add)[right]
        backed = np.where(seen[left] > 0, d * kinds[left] / np.maximum(seen[left], 1), 1.0)
        p = np.maximum(self.double[left, right] - d, 0) / np.maximum(seen[left], 1) + backed * base
        return float(-np.log(p).mean())


# -------------------------------------------------------------------------------------------------------------- export


def export(model, tokenizer, folder: Path, record: dict) -> None:
    """Write model (bfloat16), tokenizer and ``training.json`` to ``folder``, which appears complete or not at all."""
    stored = type(model)(model.config)
    stored.load_state_dict(model.state_dict())
    with whole_folder(folder) as fresh:
        stored.to(torch.bfloat16).save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        write_json(fresh / "training.json", record)
        settings = json.loads((fresh / "tokenizer_config.json").read_text())
        settings = {key: value for key, value in settings.items() if key not in ("is_local", "local_files_only")}
        write_json(fresh / "tokenizer_config.json", settings)
        for path in fresh.iterdir():
            path.chmod(0o644)


def describe(args, state: dict, model, **losses) -> dict:
    """Return what ``training.json`` says about a run."""
    return {
        "script": "scripts/train_default_model.py",
        "family": args.family,
        "date": datetime.date.today().isoformat(),
        "seed": args.seed,
        "steps": state["step"],
        "batch": args.batch,
        "length": args.length,
        "tokens_seen": state["step"] * args.batch * args.length,
        "passes_over_library": round(state["passes"], 2),
        "minutes": round(state["elapsed"] / 60, 1),
        "machine": f"{platform.machine()} CPU shared with other work, {torch.get_num_threads()} thread(s)",
        "muon_lr": args.muon_lr,
        "adam_lr": args.adam_lr,
        "parameters": sum(p.numel() for p in model.parameters()),
        **losses,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            **({"flash-linear-attention": version("fla-core")} if type(model).__module__.startswith("fla.") else {}),
        },
    }


# ------------------------------------------------------------------------------------------------------------ the run


class Threads:
    """Chooses the number of threads by what other processes leave idle (Linux; elsewhere torch's default stays).

    A parallel loop ends with its slowest thread. Where another process holds one of two cores, two threads spend
    their time waiting for each other, and one thread is several times faster.
    """

    def __init__(self):
        self.most, self.last = torch.get_num_threads(), self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Return wall seconds, busy seconds of all cores, and busy seconds of this process."""
        try:
            user, nice, system = (int(x) for x in Path("/proc/stat").read_text().split(maxsplit=4)[1:4])
        except (OSError, ValueError):
            return None
        own = os.times()
        return time.time(), (user + nice + system) / os.sysconf("SC_CLK_TCK"), own.user + own.system

    def adapt(self) -> int:
        """Set the number of threads from what happened in the last seconds and return it."""
        now = self._read()
        if now and self.last and now[0] - self.last[0] > 5:
            wall, busy, own = (b - a for a, b in zip(self.last, now, strict=True))
            free = self.most - (busy - own) / wall
            torch.set_num_threads(max(1, min(self.most, int(free + 0.3))))
            self.last = now
        return torch.get_num_threads()


def train(args, model, library, suite, held_out, tokenizer, stop: Stop) -> dict:
    """Train until the clock runs out, or ``stop``, and return the state; ``model`` is changed in place."""
    optimizers = build_optimizers(model, args.muon_lr, args.adam_lr)
    state = {"step": 0, "elapsed": 0.0, "pass": 0, "batch": 0, "passes": 0.0}
    saved = args.work / "checkpoint.pt"
    if saved.exists():
        checkpoint = torch.load(saved)
        state = checkpoint["state"]
        model.load_state_dict(checkpoint["model"])
        for optimizer, values in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        print(f"going on from step {state['step']}", flush=True)

    def loss_of(rows):
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.base_model(rows[:, :-1], use_cache=False).last_hidden_state
            return head_loss(hidden, model.lm_head.weight, rows[:, 1:])

    def head_loss(hidden, weight, targets):
        return F.cross_entropy((hidden @ weight.T).float().flatten(0, 1), targets.flatten())

    def save():
        values = {"state": state, "model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
        with whole_file(saved) as temporary:
            torch.save(values, temporary)

    if args.compile:
        inductor_config.cpp.dynamic_threads = True
        head_loss = torch.compile(head_loss)
        if args.family == "qwen3_5":  # a compiled layer would not call what stands in for its recurrence
            for layer in model.model.layers:
                layer.forward = torch.compile(layer.forward)

    rows = one_pass(library, suite, state["pass"], args.seed, args.length)
    before, started = state["elapsed"], time.time()
    last_save = last_export = last_print = started
    running, threads = None, Threads()
    while True:
        state["elapsed"] = before + time.time() - started
        progress = state["elapsed"] / (60 * args.minutes)
        if progress >= 1 or stop:
            break
        if (state["batch"] + 1) * args.batch > len(rows):
            state["pass"], state["batch"] = state["pass"] + 1, 0
            rows = one_pass(library, suite, state["pass"], args.seed, args.length)
        part = rows[state["batch"] * args.batch : (state["batch"] + 1) * args.batch]
        loss = loss_of(part)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(progress, state["step"])
            optimizer.step()
            optimizer.zero_grad()
        state["step"] += 1
        state["batch"] += 1
        state["passes"] = state["pass"] + state["batch"] * args.batch / len(rows)
        running = loss.item() if running is None else 0.95 * running + 0.05 * loss.item()
        now, used = time.time(), threads.adapt()
        if now - last_print > 20:
            last_print = now
            print(
                f"{state['elapsed'] / 60:6.1f} min  step {state['step']:5d}  pass {state['passes']:.2f}  "
                f"loss {running:.3f}  norm {norm:.2f}  rate {rate(progress, state['step']):.3f}  threads {used}",
                flush=True,
            )
        if now - last_save > 60 * args.save_minutes:
            last_save = now
            save()
        if now - last_export > 60 * args.export_minutes:
            last_export = now
            with torch.autocast("cpu", torch.bfloat16), torch.compiler.set_stance("force_eager"):
                quick = mean_loss(model, held_out[:: max(1, len(held_out) // 128)])
            print(f"{state['elapsed'] / 60:6.1f} min  step {state['step']:5d}  validation {quick:.4f}", flush=True)
            record = describe(args, state, model, complete=False, validation_loss=round(quick, 4))
            export(model, tokenizer, args.work / "export", record)
    save()
    return state


def final_losses(family: str, model, folder: Path, held_out: dict, text_bytes: dict, counts: CountModels) -> dict:
    """Return the losses of ``model``, of the stored copy in ``folder`` and of the two count models."""
    stored = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    quick = contextlib.nullcontext if family == "qwen3_5" else our_kernels
    losses = {}
    for split, rows in held_out.items():
        with quick(model):
            before = mean_loss(model, rows)
        with quick(stored):
            after = mean_loss(stored, rows)
        losses[split] = {
            "tokens": rows[:, 1:].numel(),
            "loss_before_rounding": round(before, 5),
            "loss": round(after, 5),
            "bits_per_byte": round(after / math.log(2) * text_bytes[split][1] / text_bytes[split][0], 5),
            "unigram_loss": round(counts.unigram(rows), 5),
            "bigram_loss": round(counts.bigram(rows), 5),
        }
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_5", help="family of write rules")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer to take (default: one is trained)")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints and intermediate exports")
    parser.add_argument("--out", type=Path, help="folder for the finished model (default: WORK/export)")
    parser.add_argument("--minutes", type=float, default=72, help="wall time of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=12, help="windows a step")
    parser.add_argument("--length", type=int, default=512, help="tokens a window; a multiple of 32")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--export-minutes", type=float, default=10)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    args = parser.parse_args()
    if args.length % 32:
        parser.error(f"--length: expected a multiple of 32, got {args.length}")
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    texts = {suite: sources("train", suite) for suite in (False, True)}
    folder = args.tokenizer or args.work / "tokenizer"
    if (folder / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
    else:
        tokenizer = train_tokenizer(texts[False] + texts[True], folder)
    library, suite = encode(tokenizer, texts[False]), encode(tokenizer, texts[True])
    held_out, text_bytes = {}, {}
    for split in ("validation", "test"):
        here = sources(split)
        documents = encode(tokenizer, here)
        held_out[split] = windows(documents, args.length)
        text_bytes[split] = (sum(len(s.encode()) for s in here), sum(map(len, documents)))
    print(
        f"tokens: library {sum(map(len, library)):,}, test suite {sum(map(len, suite)):,}, held out "
        + ", ".join(f"{s} {v[1]:,} ({v[0] / v[1]:.3f} bytes each)" for s, v in text_bytes.items()),
        flush=True,
    )
    counts = CountModels(library + suite)
    print(
        f"unigram {counts.unigram(held_out['validation']):.4f} (add {counts.add:g}), "
        f"bigram {counts.bigram(held_out['validation']):.4f} (discount {counts.discount:.2f})",
        flush=True,
    )

    model = build_model(args.family)
    print(f"parameters: {sum(p.numel() for p in model.parameters()):,}", flush=True)
    fast = fast_operators if args.family == "qwen3_5" else checked_kernels
    with fast(model), finishing("step") as stop:
        state = train(args, model, library, suite, held_out["validation"], tokenizer, stop)
    stop.check()
    if args.family == "qwen3_5":
        for layer in model.model.layers:
            layer.__dict__.pop("forward", None)

    out = args.out or args.work / "export"
    export(model, tokenizer, out, describe(args, state, model, complete=False))
    losses = final_losses(args.family, model, out, held_out, text_bytes, counts)
    record = describe(args, state, model, complete=True, dtype="bfloat16", **losses)
    write_json(out / "training.json", record)
    print(json.dumps(record, indent=2), flush=True)


if __name__ == "__main__":
    script(main)
