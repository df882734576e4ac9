"""`gated_delta_rule` on the CPU against transformers' own fallbacks and TransformerLens' eager scan, interleaved.

Rates count 6 K V floating-point operations a token and head (three multiply-adds a state element), the least the
token-by-token form can do. Kimi Delta Attention's floor counts its gate of each channel too, as one operation.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import logsigmoid

from .. import ops
from ..testing import gated_delta_rule_inputs
from .case import Case, Disagree, Missing, Options, Row, agree
from .timing import compare, flat_rows, floor_row, interleaved, ratio_row

SIZE = 128
AGREE = 1e-4  # relative RMS; both compute in float32


def _peer():
    from transformers.models.qwen3_5 import modeling_qwen3_5

    return modeling_qwen3_5


def _inputs(T: int, H: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return gated_delta_rule_inputs(1, T, H, H, SIZE, SIZE, dtype=dtype)


def _name(T: int, H: int, dtype: torch.dtype = torch.float32) -> str:
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    return f"scan, T = {T:,}, {H} head{'s' * (H > 1)}, {kind}"


def _flop(T: int, H: int) -> int:
    return 6 * SIZE * SIZE * T * H


@torch.no_grad()
def sequence_row(T: int, H: int, repeats: int, dtype: torch.dtype = torch.float32, **targets) -> Row:
    x = _inputs(T, H, dtype)
    chunked = _peer().torch_chunk_gated_delta_rule

    def ours():
        return ops.gated_delta_rule(**x, use_qk_l2norm=True, output_final_state=True)

    def theirs():
        return chunked(
            x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], use_qk_l2norm_in_kernel=True, output_final_state=True
        )

    name = _name(T, H, dtype)
    out, (o, state) = ours(), theirs()
    agree(name, out.final_state, state, AGREE)
    agree(name, out.o, o, AGREE if dtype == torch.float32 else 4e-3)
    row = compare(name, "transformers' chunked fallback", "x faster", ours, theirs, repeats, **targets)
    return row.does(_flop(T, H), "GFLOP/s", "float32")


def scan(options: Options) -> Iterator[Row]:
    T, H = 256 if options.quick else 2048, 16
    yield sequence_row(T, H, options.rounds(), target=3, aim=5)
    x = _inputs(T, H)
    yield floor_row(
        f"{_name(T, H)}: processor time",
        lambda: ops.gated_delta_rule(**x, use_qk_l2norm=True, output_final_state=True), _flop(T, H), options.rounds(),
    )  # fmt: skip


@torch.no_grad()
def kda(options: Options) -> Iterator[Row]:
    """Kimi Delta Attention. Few tokens for the peer, whose decays of all pairs in chunks of 64 take 1 MB each."""
    try:
        from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention
    except ImportError as error:
        raise Missing(f"transformers with Kimi Linear is not installed ({error})") from error
    H, T, longer = (2, 64, 128) if options.quick else (32, 512, 2048)

    def inputs(T: int) -> dict[str, torch.Tensor]:
        g = 0.1 * logsigmoid(torch.randn(1, T, H, SIZE, generator=torch.Generator().manual_seed(0)))
        return _inputs(T, H) | {"g": g}

    def ours(x):
        return ops.gated_delta_rule(**x, use_qk_l2norm=True, output_final_state=True)

    def theirs(x):
        q, k, v, g, beta = (x[name] for name in ("q", "k", "v", "g", "beta"))
        return chunk_kimi_delta_attention(q, k, v, g, beta, output_final_state=True, use_qk_l2norm_in_kernel=True)

    name, x = f"KDA, T = {T:,}, {H} heads, fp32", inputs(T)
    out, (o, state) = ours(x), theirs(x)
    agree(name, out.final_state, state, AGREE)
    agree(name, out.o, o, AGREE)
    row = compare(name, KIMI, "x faster", lambda: ours(x), lambda: theirs(x), options.rounds(3), target=4)
    yield row.does(_flop(T, H), "GFLOP/s", "float32")
    name, work, y = f"KDA, T = {longer:,}, {H} heads, fp32", _flop(longer, H) + SIZE * SIZE * longer * H, inputs(longer)
    yield floor_row(f"{name}: processor time", lambda: ours(y), work, options.rounds())


def few_heads(options: Options) -> Iterator[Row]:
    for H in (1, 2):
        yield sequence_row(512 if options.quick else 8192, H, options.rounds(), target=3, aim=5)


def bf16(options: Options) -> Iterator[Row]:
    yield sequence_row(256 if options.quick else 2048, 16, options.rounds(), torch.bfloat16)


@torch.no_grad()
def length(options: Options) -> Iterator[Row]:
    """The op alone, one head, at three lengths. Its longest result is compared with the same in pieces."""
    lengths = (256, 1024) if options.quick else (1024, 8192, 65536)
    x = _inputs(lengths[-1], 1)
    whole = ops.gated_delta_rule(**x, use_qk_l2norm=True).o
    state, pieces = None, []
    for lo in range(0, lengths[-1], lengths[0]):
        piece = {name: y[:, lo : lo + lengths[0]] for name, y in x.items()}
        out = ops.gated_delta_rule(**piece, use_qk_l2norm=True, initial_state=state, output_final_state=True)
        state = out.final_state
        pieces.append(out.o)
    agree("scan, whole against in pieces", whole, torch.cat(pieces, 1), AGREE)
    parts = [{name: y[:, :T].contiguous() for name, y in x.items()} for T in lengths]
    runs = [lambda part=part: ops.gated_delta_rule(**part, use_qk_l2norm=True) for part in parts]
    yield from flat_rows("scan, 1 head", lengths, runs, options.rounds(7))


@torch.no_grad()
def writes(options: Options) -> Iterator[Row]:
    """What writes and edits cost on top."""
    from .. import Edits

    T, H = 256 if options.quick else 2048, 4
    x = _inputs(T, H)
    generator = torch.Generator().manual_seed(0)
    edits = Edits(
        torch.zeros(8, dtype=torch.int64), torch.randint(T // 2, T, (8,), generator=generator), [0, 1, 2, 3] * 2,
        torch.randn(8, SIZE, generator=generator), torch.randn(8, SIZE, generator=generator),
    )  # fmt: skip
    runs = [
        lambda: ops.gated_delta_rule(**x, use_qk_l2norm=True),
        lambda: ops.gated_delta_rule(**x, use_qk_l2norm=True, return_writes=True),
        lambda: ops.gated_delta_rule(**x, use_qk_l2norm=True, edits=edits),
    ]
    o = [run().o for run in runs]
    agree("scan returning its writes", o[1], o[0], AGREE)
    agree("scan with edits, before the first of them", o[2][:, : T // 2], o[0][:, : T // 2], AGREE)
    if torch.equal(o[2][:, T // 2 :], o[0][:, T // 2 :]):
        raise Disagree("the edits changed nothing")
    plain, *others = interleaved(runs, options.rounds())
    for what, taken in zip(("returning the writes", "with eight edits"), others, strict=True):
        yield ratio_row(f"{_name(T, H)}: {what}", "the same without", "x time", taken, plain)


@torch.no_grad()
def step(options: Options) -> Iterator[Row]:
    H = 16
    x = _inputs(1, H)
    now = {name: value[:, 0] for name, value in x.items()}
    start = torch.randn(1, H, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    state = start.clone()
    recurrent = _peer().torch_recurrent_gated_delta_rule

    def ours():
        return ops.gated_delta_rule_step(**now, state=state, use_qk_l2norm=True).o

    def theirs():
        return recurrent(
            x["q"], x["k"], x["v"], g=x["g"], beta=x["beta"], initial_state=start, output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )[0]  # fmt: skip

    name = f"one token, {H} heads, fp32"
    agree(name, ours(), theirs()[:, 0], AGREE)
    row = compare(name, "transformers' recurrent fallback", "x faster", ours, theirs, 20 * options.rounds(), warmup=20)
    yield row.does(_flop(1, H), "GFLOP/s", "float32")


@torch.no_grad()
def eager_scan(options: Options) -> Iterator[Row]:
    """TransformerLens' way to a Gated DeltaNet layer's states: its bridge's token-by-token scan, every state kept."""
    try:
        from transformer_lens.model_bridge.generalized_components.gated_delta_net import GatedDeltaNetBridge
    except ImportError as error:
        raise Missing(f"TransformerLens (4 or later) is not installed ({error})") from error
    T, H = 64 if options.quick else 512, 16
    x = _inputs(T, H)
    bridge = GatedDeltaNetBridge("linear_attn")

    def ours():
        return ops.gated_delta_rule(**x, use_qk_l2norm=True, return_writes=True)

    def theirs():
        return bridge._gated_delta_scan(x["q"], x["k"], x["v"], x["g"], x["beta"], fire_hook=True)

    name = f"{_name(T, H)}, with its writes"
    out, (states, o) = ours(), theirs()
    agree(name, out.o, o, AGREE)
    places = [0, T // 2, T - 1]
    agree(name, out.writes.states(places), states[:, places], AGREE)
    del out, states, o
    yield compare(name, "TransformerLens' eager scan", "x faster", ours, theirs, options.rounds(3))


CHUNKED, KIMI = "transformers' chunked fallback", "transformers' own KDA"
CASES = [
    Case("scan", "scan, T = 2,048, 16 heads, fp32", scan, CHUNKED),
    Case("scan-few-heads", "scan, T = 8,192, 1 and 2 heads, fp32", few_heads, CHUNKED),
    Case("scan-bf16", "scan, T = 2,048, 16 heads, bf16", bf16, CHUNKED),
    Case("scan-length", "scan, 1 head: time a token at T = 1 k, 8 k, 64 k", length, "the same at T = 1,024"),
    Case("scan-writes", "scan, T = 2,048, 4 heads: writes and edits", writes, "the same without"),
    Case("scan-step", "one token, 16 heads, fp32", step, "transformers' recurrent fallback"),
    Case("kda", "KDA, T = 512 and 2,048, 32 heads, fp32", kda, KIMI),
    Case("scan-eager", "scan, T = 512, 16 heads, fp32, with its writes", eager_scan, "TransformerLens' eager scan"),
]
