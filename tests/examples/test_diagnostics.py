"""The figures of the diagnostics, against values worked out by hand."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch
from diagnostics import (
    GradientNoise,
    alignment,
    draw,
    effective_rank,
    gradient_noise,
    gradients_of,
    hardest_negative_share,
    recorded,
    step_figures,
    uniformity,
)

CROSS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)


def test_alignment_is_the_mean_squared_distance_of_pairs() -> None:
    # distances 0 and sqrt(2) to a quarter turn
    keys = torch.stack([CROSS[0], CROSS[2]])
    assert alignment(CROSS[:2], keys) == pytest.approx((0 + 2) / 2)
    assert alignment(CROSS[:2], keys, power=1.0) == pytest.approx(math.sqrt(2) / 2)


def test_uniformity_of_a_cross() -> None:
    # each row has two neighbours at squared distance 2 and one at 4
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert uniformity(CROSS) == pytest.approx(expected, abs=1e-12)


def test_uniformity_does_not_depend_on_the_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diagnostics.STRIP", 3)
    expected = math.log((2 * math.exp(-4) + math.exp(-8)) / 3)
    assert uniformity(CROSS) == pytest.approx(expected, abs=1e-12)


def test_uniformity_of_one_point_is_zero() -> None:
    assert uniformity(CROSS[:1].expand(5, 2)) == pytest.approx(0.0, abs=1e-12)


def test_effective_rank_is_that_of_shares() -> None:
    assert effective_rank(torch.diag(torch.tensor([2.0, 2.0, 2.0]))) == pytest.approx(3.0)
    assert effective_rank(torch.ones(4, 3)) == pytest.approx(1.0, abs=1e-5)
    # shares 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(math.exp(entropy))


def test_hardest_negative_share_leaves_the_positive_out() -> None:
    # row 0 has negatives at cosine 0 and -1: exp(0) / (exp(0) + exp(-3)); by symmetry row 2 as well, row 1 halves
    share = hardest_negative_share(CROSS[:3], CROSS[:3], scale=3.0)
    first = 1 / (1 + math.exp(-3))
    assert share == pytest.approx((first + 0.5 + first) / 3)


def test_gradient_noise_parts_signal_and_chance() -> None:
    # mean (3, 0), deviations (0, 2) and (0, -2): variance 8 for two; |mean|^2 = 9 has 8/2 of chance in it
    found = gradient_noise(torch.tensor([[3.0, 2.0], [3.0, -2.0]]))
    assert found.noise == pytest.approx(8.0)
    assert found.signal == pytest.approx(5.0)
    assert found.ratio == pytest.approx(1.6)


def test_gradient_noise_without_signal_is_infinite() -> None:
    assert gradient_noise(torch.tensor([[1.0], [-1.0]])).ratio == math.inf


def test_gradient_noise_of_equal_gradients_is_none() -> None:
    assert gradient_noise(torch.ones(3, 4)).ratio == 0.0


def test_one_gradient_has_no_noise_to_show() -> None:
    with pytest.raises(ValueError, match="from two"):
        gradient_noise(torch.ones(1, 4))


def test_gradients_do_not_add_up_over_batches() -> None:
    weight, unused = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    found = gradients_of(
        lambda rows: (weight * rows).sum().backward(),
        [weight, unused],
        [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])],
    )
    assert found.tolist() == [[1.0, 2.0, 0.0], [3.0, 4.0, 0.0]]


def test_a_step_is_read_from_stats_and_from_a_log_alike() -> None:
    line = {"mean_positive": 6.0, "mean_negative": 1.0, "hardest_negative": 8.0, "mean_lse": 7.0, "top1": 0.25}
    found = step_figures(line, 10.0)
    assert (found.temperature, found.positive, found.negative, found.hardest) == (0.1, 0.6, 0.1, 0.8)
    assert found.positive_share == pytest.approx(math.exp(-1.0))
    assert step_figures(SimpleNamespace(**line), 10.0) == found


def test_a_step_agrees_with_the_loss_itself() -> None:
    import nibs

    rows = torch.nn.functional.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    keys = rows.roll(1, 0)
    loss, stats = nibs.contrastive_loss(rows, keys, scale=5.0, stats=True)
    found = step_figures(stats, 5.0)
    assert found.positive_share == pytest.approx(math.exp(-loss.item()), rel=1e-5)
    assert found.positive == pytest.approx((rows * keys).sum(1).mean().item(), abs=1e-5)


def test_what_is_recorded_is_json_without_infinities() -> None:
    line = {"mean_positive": 6.0, "mean_negative": 1.0, "hardest_negative": 8.0, "mean_lse": 7.0, "top1": 0.25}
    steps = {"run": [step_figures(line, scale) for scale in (10.0, 11.0)]}
    found = {"run": {"alignment": 0.5, "gradient noise at 64": math.inf}}
    text = json.dumps(recorded(steps, {"run": {64: GradientNoise(-1.0, 2.0, math.inf)}}, found), allow_nan=False)
    one = json.loads(text)["run"]
    assert one["figures"] == {"alignment": 0.5}
    assert one["gradient noise"] == {"64": {"signal": -1.0, "noise": 2.0, "ratio": None}}
    assert one["steps"]["temperature"] == [0.1, pytest.approx(1 / 11, rel=1e-5)]
    assert one["steps"].keys() == {field.name for field in fields(steps["run"][0])}


def test_pictures_are_drawn(tmp_path: Path) -> None:
    line = {"mean_positive": 6.0, "mean_negative": 1.0, "hardest_negative": 8.0, "mean_lse": 7.0, "top1": 0.25}
    steps = [step_figures(line, scale) for scale in (10.0, 11.0)]
    draw(
        tmp_path / "one.png",
        {"run": steps},
        {"run": {64: GradientNoise(1.0, 2.0, 2.0), 256: GradientNoise(1.0, 1.0, 1.0)}},
    )
    assert (tmp_path / "one.png").stat().st_size > 10_000
