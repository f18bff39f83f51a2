"""The demo in both frameworks: one model, one training, one measurement."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import compare
import demo
import numpy as np
import pytest
import torch
from emoji_task import DIM, TEXT_WIDTH, Side
from rich.console import Console


def toy(pairs: int = 24) -> Side:
    """Pairs of noise, a picture and a text each."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(pairs, 3, 32, 32, generator=generator)
    texts = torch.nn.functional.normalize(torch.randn(pairs, TEXT_WIDTH, generator=generator), dim=1)
    return Side(pictures, texts, texts, torch.arange(pairs))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_demo_trains_in_either_framework(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "jax":
        pytest.importorskip("optax")
    monkeypatch.setattr(demo, "moved", lambda pictures, generator: pictures)  # noise that moves is other noise
    torch.manual_seed(0)
    side, options = toy(), argparse.Namespace(seed=0, steps=8, seconds_limit=100.0, backend=backend)
    model = demo.learner(backend, 0)
    curves, _ = demo.train(model, side, side, options, Console(quiet=True))
    assert len(curves.loss) == 8
    assert curves.loss[-1] < 0.5 * curves.loss[0]
    assert type(model).__module__ == {"torch": "demo", "jax": "two_tower_jax"}[backend]


def weights_of(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model of two_tower.py as the parameters and running means of two_tower_jax.py."""
    convolutions = dict(zip(("patches", "narrower", "deeper"), model.picture[:3], strict=True))
    linears = {"picture": model.picture[6], "hidden": model.text[1], "text": model.text[5]}
    parameters: dict[str, Any] = {"log_scale": model.log_scale}
    running = {}
    for name, (convolution, norm, _) in convolutions.items():
        weight = convolution.weight.permute(2, 3, 1, 0)
        parameters[name] = {"weight": weight, "gain": norm.weight, "shift": norm.bias}
        running[name] = {"mean": norm.running_mean, "variance": norm.running_var}
    for name, layer in linears.items():
        parameters[name] = {"weight": layer.weight.T, "bias": layer.bias}
    flat = parameters["picture"]["weight"]  # of [channel, row, column], flattened; in JAX channels come last
    parameters["picture"]["weight"] = flat.reshape(-1, 2, 2, DIM).permute(1, 2, 0, 3).reshape(flat.shape)
    parameters["norm"] = {"gain": model.text[2].weight, "shift": model.text[2].bias}
    return parameters, running


def test_the_towers_are_the_same_in_both_frameworks() -> None:
    pytest.importorskip("optax")
    import jax
    import two_tower_jax

    torch.manual_seed(0)
    ours, theirs = demo.TorchLearner(None), two_tower_jax.TwoTower(TEXT_WIDTH, DIM, demo.RATE)
    side = toy()
    with torch.no_grad():
        ours.encode_pictures(side.pictures)  # in training, so that the running means are some
        ours.eval()
        parameters, running = jax.tree.map(lambda tensor: tensor.detach().numpy().copy(), weights_of(ours))
        assert jax.tree.map(np.shape, parameters) == jax.tree.map(np.shape, theirs.parameters)
        theirs.parameters, theirs.running = parameters, running
        for name, inputs in (("encode_pictures", side.pictures), ("encode_texts", side.texts)):
            torch.testing.assert_close(getattr(theirs, name)(inputs), getattr(ours, name)(inputs), rtol=0, atol=2e-6)


def test_the_running_means_are_those_of_pytorch() -> None:
    pytest.importorskip("optax")
    import jax
    import two_tower_jax

    torch.manual_seed(0)
    ours, side = demo.TorchLearner(None), toy()
    parameters, running = jax.tree.map(lambda tensor: tensor.detach().numpy().copy(), weights_of(ours))
    with torch.no_grad():
        ours.encode_pictures(side.pictures)
    tower = jax.jit(two_tower_jax.picture_tower)  # one program, and not one for each operation
    _, after = tower(parameters, running, side.pictures.numpy(), jax.random.key(0))
    for want, got in zip(jax.tree.leaves(weights_of(ours)[1]), jax.tree.leaves(after), strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-5)


@pytest.mark.parametrize("backend", [None, "jax"])
def test_nibs_is_measured_beside_dense_and_agrees(backend: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "jax":
        pytest.importorskip("jax")
    rows = np.random.default_rng(0).standard_normal((2, 96, 16)).astype(np.float32) / 4

    def here(loss: str, pairs: Path, options: list[str], timeout: float | None = None) -> compare.Measurement:
        """Without processes of their own, whose peaks are not looked at here."""
        step = compare.step_in_jax if "jax" in options else compare.step_in_torch
        dense = compare.dense_loss_in_jax if "jax" in options else compare.dense_loss
        with np.load(pairs) as arrays:
            return compare.measure(
                step(dense if loss == "dense" else compare.nibs_loss(backend), arrays["queries"], arrays["keys"], 3.0)
            )

    monkeypatch.setattr(compare, "measured_elsewhere", here)
    monkeypatch.setattr(compare, "ENOUGH_SECONDS", 0.0)
    found = compare.compare(rows[0], rows[1], 3.0, backend)
    assert found.dense is not None
    disagreement = found.disagreement()
    assert disagreement is not None and disagreement < 1e-5


def test_the_step_in_jax_is_compiled_once() -> None:
    pytest.importorskip("optax")
    import two_tower_jax

    model, side = two_tower_jax.TwoTower(TEXT_WIDTH, DIM, demo.RATE), toy()
    before = two_tower_jax.step._cache_size()
    for _ in range(3):
        model.learn(side.pictures, side.texts, side.ids, 1.0)
    assert two_tower_jax.step._cache_size() <= before + 1
