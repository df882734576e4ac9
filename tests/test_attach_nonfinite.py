"""`attach(check_finite=True)` names where a state broke: in packed batches, in layers that make a call a head, with
policies. (Cached decoding: test_attach_refusals.py; devices: device_cases.py.)"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from tiny_models import mamba_families, tiny_mamba, tiny_model, tokens

from writesae import Policy
from writesae.models import attach, layers

pytestmark = pytest.mark.usefixtures("one_thread", "nothing_stays")


@contextmanager
def poisoned(model, layer, row, token):
    """The layer is given NaN at one token."""

    def poison(_, args, kwargs):
        if args:
            args = (args[0].clone(), *args[1:])
        else:
            kwargs["hidden_states"] = kwargs["hidden_states"].clone()
        (args[0] if args else kwargs["hidden_states"])[row, token] = float("nan")
        return args, kwargs

    module = next(site.module for site in layers(model) if site.layer_index == layer)
    handle = module.register_forward_pre_hook(poison, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("token, row, position", [(4, 0, 4), (5, 1, 0), (6, 2, 0), (13, 2, 7)])
def test_packed(token, row, position):
    model, lengths = tiny_model(), [5, 1, 8]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    where = f"^model: NaN or infinity in the state of layer 3, first at row {row}, position {position}, head 0$"
    with poisoned(model, 3, 0, token), pytest.raises(ValueError, match=where):
        with attach(model, {(3, 2): None}, self_test=False):
            model(tokens(1, 14), position_ids=positions, use_cache=False)


@pytest.mark.skipif("zamba" not in mamba_families(), reason="this transformers has no Zamba to stand in for")
@pytest.mark.filterwarnings("ignore")
def test_a_call_a_head():
    model = tiny_mamba("zamba")
    site = layers(model)[0]
    assert site.binding.one_head_a_call and site.num_v_heads == 2
    for check, expected in ((True, "row 1, position 5, head 0$"), (False, None)):
        with poisoned(model, site.layer_index, 1, 5):
            if expected is None:
                with attach(model, {(site.layer_index, 0): None}, self_test=False, check_finite=check):
                    model(tokens(2, 8))
                continue
            with pytest.raises(ValueError, match=expected):
                with attach(model, {(site.layer_index, 0): None}, self_test=False):
                    model(tokens(2, 8))
    with torch.no_grad():
        site.module.dt_proj_bias[1, 3] = float("nan")
    with pytest.raises(ValueError, match=f"layer {site.layer_index}, first at row 0, position 0, head 1$"):
        with attach(model, {(site.layer_index, 0): None}, self_test=False):
            model(tokens(2, 8))


class AddAt(Policy):
    """Writes at one position, so that the call goes on from there."""

    def act(self, view):
        return [view.add(torch.ones(view.site.K), torch.ones(view.site.V))]


@pytest.mark.parametrize("at", [2, 7])
def test_policies(at):
    model = tiny_model()
    with poisoned(model, 0, 1, 7), pytest.raises(ValueError, match="layer 0, first at row 1, position 7, head 0$"):
        with attach(model, {(0, 3): None}, policies=[AddAt(sites=[(0, 3)], positions=[at])], self_test=False):
            model(tokens(2, 12), use_cache=False)


def test_policies_while_decoding():
    model = tiny_model()
    with poisoned(model, 0, 1, -1), pytest.raises(ValueError, match="layer 0, first at row 1, position 0, head 0$"):
        with attach(model, {(0, 3): None}, policies=[AddAt(sites=[(0, 3)], positions=[0])], self_test=False):
            model(tokens(2, 1))
