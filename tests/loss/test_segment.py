from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from handmade import errors_of, gradients

from dpo_video.loss.global_ import Global
from dpo_video.loss.segment import Segment
from dpo_video.testing import random_errors
from dpo_video.training.objective import figures
from dpo_video.types import PairErrors

LN3, LN4_3 = math.log(3), math.log(4 / 3)
# Frame 1: the first wins by 0.2 - (-0.1) = 0.3. Frame 2: the second should, but its change of 0.4
# is larger than 0.1: a margin of -(0.4 - 0.1) = -0.3. Frame 3 is a tie.
CHANGES = ([-0.1, 0.1, 0.9], [0.2, 0.4, -0.9], [1.0, -1.0, 0.0])
BETA = LN3 / 0.3  # z = ln 3 and -ln 3


def test_per_frame_by_hand() -> None:
    # (ln(4/3) + ln 4) / 2. sigmoid(-z) = 1/4 and 3/4; a frame is half of the mean, and its label
    # says which video is pulled: frame 1 the first, frame 2 the second.
    errors, loss = errors_of(*CHANGES), Segment(beta=BETA)
    output = loss(errors)
    assert output.loss.item() == pytest.approx((LN4_3 + math.log(4)) / 2)
    assert output.margin.item() == pytest.approx(0, abs=1e-7)
    assert figures(loss, errors).gradient_factor.item() == pytest.approx((1 / 4 + 3 / 4) / 2)
    assert output.chosen_change.item() == pytest.approx((-0.1 + 0.4) / 2)
    assert output.rejected_change.item() == pytest.approx((0.2 + 0.1) / 2)
    first, second = gradients(loss, errors)
    assert first.flatten().tolist() == pytest.approx([BETA / 8, -3 * BETA / 8, 0])
    assert second.flatten().tolist() == pytest.approx([-BETA / 8, 3 * BETA / 8, 0])


def test_per_clip_by_hand() -> None:
    # The margins add up to 0.3 - 0.3 + 0 = 0: ln 2 and a slope of 1/2, a third of it per frame.
    errors, loss = errors_of(*CHANGES), Segment(beta=BETA, per="clip")
    assert loss(errors).loss.item() == pytest.approx(math.log(2))
    first, second = gradients(loss, errors)
    assert first.flatten().tolist() == pytest.approx([BETA / 6, -BETA / 6, 0])
    assert second.flatten().tolist() == pytest.approx([-BETA / 6, BETA / 6, 0])


def by_loops(errors: PairErrors, beta: float, per: str) -> list[float]:
    """The two published formulas, element by element."""
    losses = []
    pairs, channels, frames, height, width = errors.policy_first.shape
    for pair in range(pairs):
        inside = []
        for frame in range(frames):
            change = [0.0, 0.0]
            for c, h, w in product(range(channels), range(height), range(width)):
                at = (pair, c, frame, h, w)
                change[0] += float(errors.policy_first[at]) - float(errors.reference_first[at])
                change[1] += float(errors.policy_second[at]) - float(errors.reference_second[at])
            first, second = (value / (channels * height * width) for value in change)
            label = float(errors.preference[pair, frame])
            # Their beta is twice ours: -0.5 * 2 beta * l * (d(first) - d(second)).
            inside.append((label, -0.5 * (2 * beta) * label * (first - second)))
        if per == "frame":
            kept = [math.log1p(math.exp(-z)) for label, z in inside if label != 0]
            losses.append(sum(kept) / len(kept))
        else:
            losses.append(math.log1p(math.exp(-sum(z for _, z in inside) / frames)))
    return losses


LABELS = torch.tensor([[1.0, -1, 0, 1], [0.0, 0, -1, 0], [-1.0, -1, 1, 1]])


@pytest.mark.parametrize("per", ["frame", "clip"])
def test_it_follows_the_formula(per: str) -> None:
    errors = replace(random_errors(change=2e-2), preference=LABELS)
    loss = Segment(per=per)  # type: ignore[arg-type]
    assert loss(errors).loss.tolist() == pytest.approx(by_loops(errors, 250, per), rel=1e-4)


def test_weighted_pairs_are_the_mean_over_all_decided_frames() -> None:
    errors, loss = replace(random_errors(change=2e-2), preference=LABELS), Segment()
    weights = loss.pair_weights(LABELS)
    assert weights.tolist() == [3, 1, 4]
    frames = []
    for pair, frame in LABELS.nonzero().tolist():
        only = torch.zeros_like(LABELS)
        only[pair, frame] = LABELS[pair, frame]
        frames.append(loss(replace(errors, preference=only)).loss[pair].item())
    mean = (weights * loss(errors).loss).sum() / weights.sum()
    assert mean.item() == pytest.approx(sum(frames) / len(frames))
    assert Segment(per="clip").pair_weights(LABELS).tolist() == [1, 1, 1]


def test_one_labelled_frame_is_the_global_loss_of_that_frame() -> None:
    errors = replace(random_errors(change=1e-2), preference=torch.tensor([[0.0, 0, -1, 0]] * 3))
    elements = {name: value for name, value in vars(errors).items() if value is not None}
    alone = PairErrors(
        **{
            name: value[:, 2:3] if name == "preference" else value[:, :, 2:3]
            for name, value in elements.items()
            if value.ndim > 1
        },
        **{name: value for name, value in elements.items() if value.ndim == 1},
    )
    options = {"beta": 250.0, "sft_weight": 0.1}
    torch.testing.assert_close(Segment(**options)(errors).loss, Global(**options)(alone).loss)
    whole, part = gradients(Segment(**options), errors), gradients(Global(**options), alone)
    for gradient, expected in zip(whole, part, strict=True):
        torch.testing.assert_close(gradient[:, :, 2:3], expected)
        gradient[:, :, 2:3] = 0
        assert not gradient.any()


def test_with_equal_labels_frames_have_the_same_start_and_never_less_loss_than_the_clip() -> None:
    # -logsigmoid is convex, so its mean over frames is at least that of the mean (Jensen); while
    # all margins are 0 both have the same gradient.
    errors = random_errors(change=2e-2)
    frame, clip = Segment(per="frame"), Segment(per="clip")
    assert (frame(errors).loss > clip(errors).loss).all()
    torch.testing.assert_close(frame(errors).margin, clip(errors).margin)
    start = random_errors(change=0.0)
    for one, other in zip(gradients(frame, start), gradients(clip, start), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("per", ["frame", "clip"])
def test_frames_of_ties_have_no_gradient(per: str) -> None:
    errors = replace(random_errors(change=1e-3), preference=LABELS)
    loss = Segment(per=per, sft_weight=0.1)  # type: ignore[arg-type]
    ties = (LABELS == 0)[:, None, :, None, None]
    for gradient in gradients(loss, errors):
        assert not gradient[ties.expand_as(gradient)].any()
    # The SFT term leaves the rejected video of a frame alone: only the sigmoid's push is left.
    first, _ = gradients(loss, errors)
    lost = (LABELS < 0)[:, None, :, None, None].expand_as(first)
    assert (first[lost] < 0).all()


def test_a_pair_without_a_majority_still_trains_its_frames() -> None:
    even = replace(random_errors(change=1e-3), preference=torch.tensor([[1.0, 1, -1, -1]] * 3))
    assert not any(gradient.any() for gradient in gradients(Global(), even))
    assert all(gradient.all() for gradient in gradients(Segment(), even))
