"""The loss as a module, and in the place of open_clip's."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from dense_torch import leaves
from torch.nn.functional import normalize
from torch.testing import assert_close

import nibs
import nibs_torch
from nibs.errors import InvalidInput


def model_out(*, bias: bool) -> dict[str, torch.Tensor]:
    """What an open_clip model returns."""
    queries, keys, _ = leaves(n=9, d=6, dtype=torch.float32)
    found = {
        "image_features": normalize(queries.detach(), dim=-1).requires_grad_(),
        "text_features": normalize(keys.detach(), dim=-1).requires_grad_(),
        "logit_scale": torch.tensor(14.3, requires_grad=True),
    }
    return {**found, "logit_bias": torch.tensor(-10.0, requires_grad=True)} if bias else found


def open_clip_losses():
    """open_clip's loss.py by path: the package itself wants torchvision."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        pytest.skip("open_clip is not installed")
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(spec.origin).with_name("loss.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "objective"), [("ClipLoss", nibs.InfoNCE()), ("SigLipLoss", nibs.Sigmoid())])
def test_open_clips_own_call_gives_open_clips_own_loss(name, objective):
    out = model_out(bias=name == "SigLipLoss")
    theirs = getattr(open_clip_losses(), name)()(**out, output_dict=True)
    ours = nibs_torch.ContrastiveLoss(objective)(**out, output_dict=True)
    assert ours.keys() == theirs.keys()
    assert_close(ours, theirs)
    inputs = list(out.values())
    gradients = [torch.autograd.grad(sum(losses.values()), inputs) for losses in (ours, theirs)]
    assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_positional_arguments_and_open_clips_names_are_the_same():
    out = model_out(bias=True)
    module = nibs_torch.ContrastiveLoss(nibs.Sigmoid())
    assert module(*out.values()) == module(**out)


def test_an_argument_under_both_names_is_refused():
    out = model_out(bias=False)
    with pytest.raises(InvalidInput, match="queries= and image_features= are both given"):
        nibs_torch.ContrastiveLoss()(out["image_features"], out["text_features"], image_features=out["image_features"])


def test_options_of_a_call_go_before_those_of_the_module():
    queries, keys, scale = leaves()
    module = nibs_torch.ContrastiveLoss(reduction="sum")
    assert module(queries, keys, scale) == nibs.contrastive_loss(queries, keys, scale=scale, reduction="sum")
    assert module(queries, keys, scale, reduction="none").shape == (7,)


def test_a_module_has_no_parameters_and_no_state():
    module = nibs_torch.ContrastiveLoss(memory="1MiB")
    assert not list(module.parameters()) and not module.state_dict()


def test_an_option_that_does_not_exist_is_refused_when_the_module_is_made():
    with pytest.raises(InvalidInput, match="temperature"):
        nibs_torch.ContrastiveLoss(temperature=0.07)


def test_what_was_fixed_is_shown():
    text = repr(nibs_torch.ContrastiveLoss(nibs.Sigmoid(), memory="1MiB", weights=torch.ones(3)))
    assert "Sigmoid(" in text and "memory='1MiB'" in text and "tensor of shape (3,)" in text


def test_stats_come_beside_the_loss():
    out = model_out(bias=False)
    found = nibs_torch.ContrastiveLoss(stats=True)(**out, output_dict=True)
    assert found["stats"].count == 9 and found["contrastive_loss"].requires_grad
