"""The prototype on Hopper's own units (docs/hopper.md): the product of encode, on the host twin and on a GPU that has
them. What the twin finds of planted faults is in csrc/test/check_host_twin_hopper.cpp and
check_cuda_encode_product_hopper.cpp."""

from __future__ import annotations

from pathlib import Path

import host_twin
import pytest
import torch
from targets import MACHINES

PACKAGE = Path(__file__).resolve().parents[1] / "writesae"
# Largest error over the sum of the products' sizes, against float64 of the same bf16 operands. Measured: 9e-8 on the
# twin, 1.4e-7 where its sums are cut off as the hardware's are.
TOLERANCE = 1e-6

TWIN = torch.ops.writesae_twin


def operator(target):
    if target.kind == "twin":
        if MACHINES.get(target.name, {}).get("architecture", 90) != 90:
            pytest.skip("the twin of another card")
        return TWIN.encode_product
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("no GPU of compute capability 9.0")
    return torch.ops.writesae_prototypes.encode_product


def rows(n, size, gap=0):
    return torch.randn(n, size + gap).bfloat16()[:, :size]


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("kernel", ["hopper", "hopper ping-pong"])
@pytest.mark.parametrize(
    ("F", "T", "K", "gap"),
    [(64, 128, 64, 0), (1, 1, 8, 0), (333, 131, 128, 0), (200, 60, 20, 4), (130, 257, 256, 8), (1024, 40, 72, 0)],
)
def test_sizes(F, T, K, gap, kernel, cluster, device_target, record_property):
    v, left = rows(F, K, gap), rows(T, K, gap)
    with device_target.in_use():
        got = operator(device_target)(device_target.put(v), device_target.put(left), kernel, cluster).cpu()
    want, size = v.double() @ left.double().T, v.double().abs() @ left.double().abs().T
    assert got.shape == (F, T) and got.dtype == torch.float32
    worst = float(((got - want).abs() / size).max())
    record_property(f"product, {device_target.name}", worst)
    assert worst <= TOLERANCE


def test_nothing_to_do(device_target):
    out = operator(device_target)(device_target.put(rows(0, 64)), device_target.put(rows(5, 64)), "hopper")
    assert out.shape == (0, 5)


@pytest.mark.parametrize(
    ("v", "left", "kernel", "cluster", "message"),
    [
        (rows(64, 64), rows(64, 64), "mma", 1, 'kernel must be "hopper" or "hopper ping-pong", got "mma"'),
        (rows(64, 64), rows(64, 64), "hopper", 4, "cluster must be 1 or 2 blocks, got 4"),
        (rows(64, 64), rows(64, 60), "hopper", 1, "got K = 64 and 60"),
        (rows(64, 264), rows(64, 264), "hopper", 1, "K must be from 1 to 256, got 264"),
        (rows(64, 60), rows(64, 60), "hopper", 1, "v: rows that TMA copies must be .* 16 bytes apart .*, got 120"),
        (rows(64, 64), rows(64, 64, 2), "hopper", 1, "left: rows that TMA copies must be a multiple of 16 bytes"),
        (rows(64, 72)[:, 1:65], rows(64, 64), "hopper", 1, "v: a tensor that TMA copies must begin at"),
        (rows(64, 64).float(), rows(64, 64), "hopper", 1, "v must be BFloat16, got Float"),
        (rows(64, 64), rows(64, 64)[None], "hopper", 1, "left must have two axes, got 3"),
        (rows(64, 64).T, rows(64, 64), "hopper", 1, "the last axis of v must have stride 1, got 64"),
    ],
)  # fmt: skip
def test_refusals(v, left, kernel, cluster, message, device_target):
    with pytest.raises(RuntimeError, match=message):
        operator(device_target)(device_target.put(v), device_target.put(left), kernel, cluster)


def test_sums_cut_off(twin):
    """The twin's wide products truncate as its others do: towards zero."""
    v, left = rows(200, 256), rows(130, 256)
    rounded = TWIN.encode_product(v, left, "hopper").double()
    with host_twin.set_to(truncating=True):
        cut = TWIN.encode_product(v, left, "hopper").double()
    want = v.double() @ left.double().T
    assert float((cut.abs() - want.abs()).mean()) < -2 * float((rounded.abs() - want.abs()).mean().abs())


@pytest.mark.parametrize(("F", "T", "K"), [(1024, 256, 128), (500, 300, 72)])
@pytest.mark.parametrize("kernel", ["hopper", "hopper ping-pong"])
def test_work(F, T, K, kernel, twin):
    """As docs/hopper.md counts it: whole tiles are multiplied, a block's tokens are copied once, and the features once
    a block, or once for both of a cluster."""
    tile = 64 if "ping-pong" in kernel else 128
    v, left = rows(F, K), rows(T, K)
    depth, tokens, features = -(-K // 64) * 64, -(-T // 128) * 128, -(-F // tile) * tile
    for cluster in (1, 2):
        across = -(-tokens // (128 * cluster)) * 128 * cluster
        with host_twin.set_to(multiprocessors=1), host_twin.counted() as counts:
            TWIN.encode_product(v, left, kernel, cluster)
        work = counts["encode_product"]
        assert work["multiply_adds"] == features * across * depth
        assert work["copied_bytes"] == 2 * depth * (across + features * across // (128 * cluster))
        assert work["shared_bytes_written"] == 2 * depth * (across + features * across // 128)
        # Each product of 64 features reads them and the tokens: 64 + 128 rows of 16 numbers.
        assert work["shared_bytes_read"] == features * across * depth // (64 * 128 * 16) * (64 + 128) * 16 * 2
        assert work["shared_bytes_asked"] <= 227 * 1024


@pytest.mark.parametrize("architecture", [80, 89, 100, 120])
def test_other_cards_are_refused(architecture, twin):
    x = rows(64, 64)
    shown = f"needs compute capability 9.0 .sm_90a., this device has {architecture // 10}.{architecture % 10}"
    with host_twin.set_to(architecture=architecture), pytest.raises(RuntimeError, match=shown):
        TWIN.encode_product(x, x, "hopper")


def test_another_gpu_is_refused(device_target):
    if device_target.kind != "cuda" or torch.cuda.get_device_capability() == (9, 0):
        pytest.skip("a GPU that is no Hopper")
    x = rows(64, 64).cuda()
    with pytest.raises(RuntimeError, match="needs compute capability 9.0"):
        torch.ops.writesae_prototypes.encode_product(x, x, "hopper")


def test_nothing_chooses_it():
    assert not hasattr(torch.ops.writesae, "encode_product")
    named = [path for path in PACKAGE.rglob("*.py") if "encode_product" in path.read_text()]
    assert not named, f"{named[0].name} calls a prototype"
