"""Policies in `generate` of flash-linear-attention's models, against the reference that reruns the prefix."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip(
    "fla", reason="flash-linear-attention is not installed; `make test-libraries LIBRARIES=fla` runs these"
)

import tiny_fla  # noqa: E402
from policy_cases import check, mixed, some_sites  # noqa: E402

from writesae.models import fla_stand_ins  # noqa: E402

pytestmark = [
    pytest.mark.skipif(fla_stand_ins.missing_driver() is None, reason="there is a GPU: nothing is stood in for"),
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore"),  # fla's own and transformers' deprecations
]


@torch.no_grad()
@pytest.mark.parametrize("family", tiny_fla.FAMILIES)
def test_policies_generate_as_by_the_slow_reference(family, record_property):
    model = tiny_fla.tiny_fla(family)
    saes = some_sites(model)
    record_property("codes", check(model, *tiny_fla.padded(), saes, mixed(saes), do_sample=False))
