"""Peers are given what they ask for: over stand-ins that read their arguments as they do, each has its column's loss.

Read off inf-cl 1.2.1, memeff 0.3.1, siglip-kernel 0.1.2 and cut-cross-entropy 25.1.1, which want a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

torch = pytest.importorskip("torch")
FOLDER = Path(__file__).parents[2] / "benchmarks"


def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
    assert q.shape[1] % head_dim == 0
    return torch.nn.functional.cross_entropy(scale * (q.float() @ k.float().T), torch.arange(len(q)), reduction="none")


def linear_cross_entropy(e, c, targets, filter_eps="high", impl="cce"):
    assert (impl, filter_eps) == ("torch_compile", None)
    return torch.nn.functional.cross_entropy(e.float() @ c.float().T, targets)


def fused_siglip_loss(img_features, txt_features, log_temperature, bias, use_fp8=False, backend="auto"):
    logits = log_temperature.exp() * (img_features.float() @ txt_features.float().T) + bias
    logits = torch.where(torch.eye(len(logits), dtype=torch.bool), -logits, logits)
    return torch.nn.functional.softplus(logits).sum() / len(logits)


class MemoryEfficientCLIPLoss:
    def __init__(self, temperature, normalized_inputs, stable):
        assert normalized_inputs and not stable
        self.scale = 1 / temperature

    def __call__(self, image_features, text_features):
        sides = [(image_features, text_features), (text_features, image_features)]
        return sum(cal_flash_loss(*side, scale=self.scale, head_dim=1).mean() for side in sides) / 2


STAND_INS = {
    "inf-cl": ("inf_cl", cal_flash_loss),
    "memeff": ("memeff", MemoryEfficientCLIPLoss),
    "cut-cross-entropy": ("cut_cross_entropy", linear_cross_entropy),
    "siglip-kernel": ("siglip_kernel", fused_siglip_loss),
}


@pytest.fixture(params=STAND_INS)
def name(request, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    module, what = STAND_INS[request.param]
    stand_in = ModuleType(module)
    setattr(stand_in, what.__name__, what)
    monkeypatch.setitem(sys.modules, module, stand_in)
    return request.param


def test_a_peer_has_the_loss_of_its_column(name, monkeypatch):
    run = importlib.import_module("run")
    (contender,) = (one for one in run.CONTENDERS if one.name == name)
    monkeypatch.setattr(run, "CONTENDERS", [contender])
    options = argparse.Namespace(only=None, memory=None, turns=0, seconds=8.0, no_memory=True, patience=60.0)
    (row,) = run.Run(options, "cpu", {"float32, torch": 1e9}).measure(contender.objective, "float32", 40, 8)
    assert row.reason == ""
    assert row.loss_error < 1e-5 and row.gradient_error < 1e-4


def test_a_peer_has_the_loss_of_its_column_in_the_gpu_benchmark(name, tmp_path):
    out = tmp_path / "gpu.json"
    sizes = ["--device", "cpu", "--n", "40", "--d", "16", "--repeats", "1"]
    importlib.import_module("gpu").main([*sizes, "--parts", "speed", "--only", name, "--output", str(out)])
    (row,) = json.loads(out.read_text())["speed"]["rows"][1:]
    assert "failed" not in row
    assert row["error"]["loss"] < 1e-2 and row["error"]["queries"] < 2e-2  # of rows times the scale, in bfloat16
