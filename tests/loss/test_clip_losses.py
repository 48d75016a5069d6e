"""Losses of one margin per pair: examples by hand, formulas and limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from handmade import errors_of, gradients

from dpo_video.loss.dpop import DPOP
from dpo_video.loss.global_ import Global
from dpo_video.loss.hinge import Hinge
from dpo_video.loss.ipo import IPO
from dpo_video.loss.kto import KTO
from dpo_video.loss.mapo import MaPO
from dpo_video.loss.poly import Poly
from dpo_video.loss.region import Region
from dpo_video.loss.robust import Robust
from dpo_video.loss.sdpo import SDPO
from dpo_video.loss.segment import Segment
from dpo_video.loss.sft import SFT
from dpo_video.strategies import Loss
from dpo_video.testing import PREFERENCES, random_errors, swapped
from dpo_video.training.objective import figures
from dpo_video.types import PairErrors

LN2, LN3, LN4_3 = math.log(2), math.log(3), math.log(4 / 3)
# d(first) = -0.2 and d(second) = 0.1 on average, the first chosen: m = 0.1 - (-0.2) = 0.3. With
# this beta, z = beta m = ln 3, where sigmoid(-z) = 1/4, -logsigmoid(z) = ln(4/3) and
# -logsigmoid(-z) = ln 4.
CHANGES = ([-0.1, -0.3], [0.0, 0.2], [1.0, 1.0])
BETA = LN3 / 0.3


def check(
    loss: Loss, errors: PairErrors, value: float, first: list[float], second: list[float]
) -> None:
    """The loss, and its gradient on the one element of each frame of both videos."""
    assert loss(errors).loss.item() == pytest.approx(value, abs=1e-6)
    for gradient, expected in zip(gradients(loss, errors), (first, second), strict=True):
        assert gradient.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_global_by_hand() -> None:
    # dL/dz = -1/4; an element is half of a video's mean, so dz = -beta/2 for the chosen one.
    each = BETA / 4 / 2
    check(Global(beta=BETA), errors_of(*CHANGES), LN4_3, [each, each], [-each, -each])


def test_the_sft_term_by_hand() -> None:
    # + 0.5 times the mean of the chosen video's errors, which are 1: + 0.5, and 0.5 / 2 an element.
    each = BETA / 4 / 2
    loss = Global(beta=BETA, sft_weight=0.5)
    check(loss, errors_of(*CHANGES), LN4_3 + 0.5, [each + 0.25] * 2, [-each, -each])


def test_ipo_by_hand() -> None:
    # (m - 1/2)^2 = 0.04 at beta 1, times (2 beta)^2 = 4: 0.16. d/dm = 4 * 2 (m - 1/2) = -1.6.
    check(IPO(beta=1), errors_of(*CHANGES), 0.16, [0.8, 0.8], [-0.8, -0.8])


def test_hinge_by_hand() -> None:
    # 1 - 2 m = 0.4, with slope -2 on m. At beta 10 the margin is 3 and the pair is done.
    check(Hinge(beta=2), errors_of(*CHANGES), 0.4, [1.0, 1.0], [-1.0, -1.0])
    check(Hinge(beta=10), errors_of(*CHANGES), 0.0, [0.0, 0.0], [0.0, 0.0])


def test_robust_by_hand() -> None:
    # e = 0.2: (0.8 ln(4/3) - 0.2 ln 4) / 0.6; d/dz = -(0.8 / 4 + 0.2 * 3 / 4) / 0.6 = -0.35 / 0.6.
    loss = Robust(beta=BETA, label_smoothing=0.2)
    each = BETA * 0.35 / 0.6 / 2
    value = (0.8 * LN4_3 - 0.2 * math.log(4)) / 0.6
    check(loss, errors_of(*CHANGES), value, [each, each], [-each, -each])


def test_conservative_by_hand() -> None:
    # e = 0.2: 0.8 ln(4/3) + 0.2 ln 4; d/dz = -0.8 / 4 + 0.2 * 3 / 4 = -0.05.
    loss = Robust(beta=BETA, label_smoothing=0.2, variant="conservative")
    each = BETA * 0.05 / 2
    value = 0.8 * LN4_3 + 0.2 * math.log(4)
    check(loss, errors_of(*CHANGES), value, [each, each], [-each, -each])


def test_dpop_by_hand() -> None:
    # d(chosen) = 0.1 and d(rejected) = 0.4: m = 0.3, less twice the winner's rise: 0.1. At a slope
    # of 10 ln 3, z = ln 3 again. dz = 10 ln 3 times -1 - 2 = -3 for d(chosen), 1 for d(rejected).
    errors = errors_of([0.1, 0.1], [0.4, 0.4], [1.0, 1.0])
    each = 10 * LN3 / 4 / 2
    loss = DPOP(beta=10 * LN3, penalty=2)
    check(loss, errors, LN4_3, [3 * each, 3 * each], [-each, -each])


def test_sdpo_by_hand() -> None:
    # |g_w|^2 = 1 (the chosen error), <g_w, g_l> = 0.5: s = 0.1 * 1 / 0.5 = 0.2 at mu 0.9.
    errors = errors_of(*CHANGES, product=0.5)
    assert SDPO().rejected_scale(errors).item() == pytest.approx(0.2)
    each = BETA / 4 / 2
    check(SDPO(beta=BETA), errors, LN4_3, [each, each], [-0.2 * each, -0.2 * each])


def test_poly_by_hand() -> None:
    # 2 (1 - p) = 1/2 more than global; d/dz = -1/4 - 2 * 1/4 * 3/4 = -5/8.
    each = BETA * 5 / 8 / 2
    check(Poly(beta=BETA, alpha=2), errors_of(*CHANGES), LN4_3 + 0.5, [each, each], [-each, -each])


def test_kto_by_hand() -> None:
    # r_w = 0.2 and r_l = -0.1, so z = 0.05: both are 0.15 from it, where 1 - sigmoid(ln 3) = 1/4
    # and its slope is 3/16. Weights 1 and 3: (1/4 + 3/4) / 2.
    beta = LN3 / 0.15
    each = beta * 3 / 16 / 2 / 2
    loss = KTO(beta=beta, rejected_weight=3)
    check(loss, errors_of(*CHANGES), 0.5, [each, each], [-3 * each, -3 * each])
    # r_w = -0.15 and r_l = -0.25: z is 0, and not their mean. The chosen one is at 3/4.
    errors = errors_of([0.15, 0.15], [0.25, 0.25], [1.0, 1.0])
    rejected = sigmoid(-0.25 * beta)
    push = beta * rejected * (1 - rejected) / 2 / 2
    value = (0.75 + rejected) / 2
    check(KTO(beta=beta), errors, value, [each, each], [-push, -push])


def test_mapo_by_hand() -> None:
    # s(ln 2) = ln 2 with the slope 1 - 2 ln 2, and s(ln 3) = ln(3) / 2 with (2 - 3 ln 3) / 4.
    none = torch.zeros(1, 1, 2, 1, 1)
    errors = replace(
        errors_of([0.0, 0.0], [0.0, 0.0], [1.0, 1.0]),
        policy_first=none + LN2, policy_second=none + LN3, reference_first=none,
        reference_second=none,
    )  # fmt: skip
    difference = LN2 - LN3 / 2
    push = 0.5 * sigmoid(-difference)
    chosen, rejected = 1 - push * (1 - 2 * LN2), push * (2 - 3 * LN3) / 4
    check(
        MaPO(beta=0.5, snr=1), errors, LN2 - 0.5 * math.log(sigmoid(difference)),
        [chosen / 2] * 2, [rejected / 2] * 2,
    )  # fmt: skip
    # Errors of 0, at which the score is 1 and its slope -1/2.
    zero = replace(errors, policy_first=none, policy_second=none)
    half = 0.5 * 0.5 / 2
    check(MaPO(beta=0.5, snr=1), zero, 0.5 * LN2, [(1 + half) / 2] * 2, [-half / 2] * 2)


def test_sft_by_hand() -> None:
    # The chosen video's errors are 0.5 and 1.5, of mean 1: 3 times that, and 3 / 2 an element.
    errors = errors_of(*CHANGES)
    errors = replace(errors, policy_first=torch.tensor([0.5, 1.5]).view(1, 1, 2, 1, 1))
    check(SFT(sft_weight=3), errors, 3.0, [1.5, 1.5], [0.0, 0.0])
    mirrored = replace(swapped(errors), preference=-errors.preference)
    check(SFT(sft_weight=3), mirrored, 3.0, [0.0, 0.0], [1.5, 1.5])
    even = replace(errors, preference=torch.tensor([[1.0, -1.0]]))
    check(SFT(sft_weight=3), even, 0.0, [0.0, 0.0], [0.0, 0.0])


def test_sft_is_the_term_of_the_other_losses_and_reports_what_global_does() -> None:
    errors = replace(random_errors(pairs=5, change=1e-3), preference=PREFERENCES)
    alone = Region(global_weight=0, region_weight=0, sft_weight=7, region_sft_weight=0)
    found, plain = SFT(sft_weight=7)(errors), Global()(errors)
    assert torch.equal(found.loss, alone(errors).loss)
    for one, other in zip(
        gradients(SFT(sft_weight=7), errors), gradients(alone, errors), strict=True
    ):
        assert torch.equal(one, other)
    torch.testing.assert_close(found.loss, Global(sft_weight=7)(errors).loss - plain.loss)
    for figure in ("margin", "chosen_change", "rejected_change"):
        assert torch.equal(vars(found)[figure], vars(plain)[figure])
    # The loss does not depend on the margin.
    derived = figures(SFT(), errors)
    assert (derived.logits == 0).all() and (derived.gradient_factor == 0.5).all()


# --- the formulas, written again -------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """A loss and its slopes on the mean error of the chosen and of the rejected video."""

    loss: float
    on_chosen: float
    on_rejected: float


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def of_margin(loss: float, slope: float) -> Expected:
    """`slope` is dL/dm, and m = d(rejected) - d(chosen)."""
    return Expected(loss, -slope, slope)


# What each loss gives at a slope of 2500, from d(chosen), d(rejected), the mean of the chosen
# video's squared errors and the mean of the products of signed errors.
Formula = Callable[[float, float, float, float], Expected]


def dpo(w: float, l: float, *_: float) -> Expected:  # noqa: E741 - as in the papers
    z = 2500 * (l - w)
    return of_margin(-math.log(sigmoid(z)), -2500 * (1 - sigmoid(z)))


def ipo(w: float, l: float, *_: float) -> Expected:  # noqa: E741
    published = (l - w - 1 / 5000) ** 2
    return of_margin(5000**2 * published, 5000**2 * 2 * (l - w - 1 / 5000))


def hinge(w: float, l: float, *_: float) -> Expected:  # noqa: E741
    z = 2500 * (l - w)
    return of_margin(max(0.0, 1 - z), -2500.0 if z < 1 else 0.0)


def smoothed(e: float, sign: float, scale: float) -> Formula:
    def formula(w: float, l: float, *_: float) -> Expected:  # noqa: E741
        z = 2500 * (l - w)
        loss = -(1 - e) * math.log(sigmoid(z)) - sign * e * math.log(sigmoid(-z))
        slope = -(1 - e) * sigmoid(-z) + sign * e * sigmoid(z)
        return of_margin(loss / scale, 2500 * slope / scale)

    return formula


def dpop(w: float, l: float, *_: float) -> Expected:  # noqa: E741
    worse = w > 0
    z = 2500 * (l - w - (5 * w if worse else 0))
    push = 2500 * (1 - sigmoid(z))
    return Expected(-math.log(sigmoid(z)), push * (6 if worse else 1), -push)


def sdpo(w: float, l: float, square: float, product: float) -> Expected:  # noqa: E741
    plain = dpo(w, l)
    scale = min(1.0, 0.1 * square / product) if product > 0 else 1.0
    return replace(plain, on_rejected=scale * plain.on_rejected)


def poly(w: float, l: float, *_: float) -> Expected:  # noqa: E741
    p = sigmoid(2500 * (l - w))
    return of_margin(-math.log(p) + 3 * (1 - p), -2500 * (1 - p + 3 * p * (1 - p)))


def kto(w: float, l: float, *_: float) -> Expected:  # noqa: E741
    point = max(0.0, -(w + l) / 2)
    chosen, rejected = sigmoid(2500 * (-w - point)), sigmoid(2500 * (point + l))
    slopes = (2500 * p * (1 - p) / 2 for p in (chosen, rejected))
    return Expected((2 - chosen - rejected) / 2, next(slopes), -next(slopes))


FORMULAS: dict[str, tuple[Loss, Formula]] = {
    "global": (Global(), dpo),
    "ipo": (IPO(), ipo),
    "hinge": (Hinge(), hinge),
    "robust": (Robust(label_smoothing=0.3), smoothed(0.3, -1, 0.4)),
    "conservative": (
        Robust(label_smoothing=0.3, variant="conservative"),
        smoothed(0.3, 1, 1),
    ),
    "dpop": (DPOP(), dpop),
    "sdpo": (SDPO(), sdpo),
    "poly": (Poly(alpha=3), poly),
    "kto": (KTO(), kto),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients_follow_the_formula(name: str, seed: int) -> None:
    loss, formula = FORMULAS[name]
    errors = replace(random_errors(seed, len(PREFERENCES), change=2e-3), preference=PREFERENCES)
    output, (first, second) = loss(errors), gradients(loss, errors)
    elements = first[0].numel()
    for i, winner in enumerate(errors.label.tolist()):
        if winner == 0:
            assert not first[i].any() and not second[i].any()
            continue
        d_first, d_second, square_first, square_second, product = (
            value[i].double().mean().item()
            for value in (
                errors.policy_first.double() - errors.reference_first.double(),
                errors.policy_second.double() - errors.reference_second.double(),
                errors.policy_first,
                errors.policy_second,
                errors.policy_product,
            )
        )
        if winner > 0:
            expected = formula(d_first, d_second, square_first, product)
            slopes = (expected.on_chosen, expected.on_rejected)
        else:
            expected = formula(d_second, d_first, square_second, product)
            slopes = (expected.on_rejected, expected.on_chosen)
        assert output.loss[i].item() == pytest.approx(expected.loss, rel=1e-3, abs=1e-3)
        for gradient, slope in zip((first[i], second[i]), slopes, strict=True):
            # Every element of a video has the same share of its mean.
            same = torch.full_like(gradient, slope / elements)
            torch.testing.assert_close(gradient, same, rtol=2e-3, atol=1e-3)


# --- limits ----------------------------------------------------------------------------------

UNRELATED = {"policy_product": torch.zeros(3, 2, 4, 3, 3)}
SAME: list[tuple[Loss, dict[str, torch.Tensor]]] = [
    (Robust(label_smoothing=0), {}),
    (Robust(label_smoothing=0, variant="conservative"), {}),
    (DPOP(penalty=0), {}),
    (Poly(alpha=0), {}),
    (SDPO(), UNRELATED),  # gradients that share nothing: the loser has its full strength
    (Segment(per="clip", beta=2500), {}),  # the same label in every frame
]


@pytest.mark.parametrize(("loss", "changed"), SAME, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_limit_is_global(loss: Loss, changed: dict[str, torch.Tensor], sign: int) -> None:
    errors = replace(random_errors(change=1e-3), **changed)
    errors = replace(errors, preference=sign * errors.preference)
    torch.testing.assert_close(loss(errors).loss, Global()(errors).loss)
    for mine, other in zip(gradients(loss, errors), gradients(Global(), errors), strict=True):
        torch.testing.assert_close(mine, other)


def test_dpop_is_global_while_the_chosen_error_falls() -> None:
    errors = random_errors(change=1e-3)
    better = replace(errors, policy_first=errors.reference_first * 0.999)
    worse = replace(errors, policy_first=errors.reference_first * 1.001)
    torch.testing.assert_close(DPOP()(better).loss, Global()(better).loss)
    assert (DPOP()(worse).loss > Global()(worse).loss).all()


def test_the_mean_of_robust_over_flipped_labels_is_global_on_the_true_ones() -> None:
    # The law that rDPO is made for: with a share of 0.3 flipped, its expectation is unbiased.
    errors = random_errors(change=1e-3)
    flipped = replace(errors, preference=-errors.preference)
    loss = Robust(label_smoothing=0.3)
    mean = 0.7 * loss(errors).loss + 0.3 * loss(flipped).loss
    torch.testing.assert_close(mean, Global()(errors).loss)
    cautious = Robust(label_smoothing=0.3, variant="conservative")
    mean = 0.7 * cautious(errors).loss + 0.3 * cautious(flipped).loss
    assert (mean - Global()(errors).loss).abs().max() > 1e-2


def test_conservative_has_its_minimum_at_the_labels_reliability() -> None:
    # z = ln(0.7 / 0.3): the gradient factor and the gradient are 0, and beyond it turns back.
    margin = math.log(0.7 / 0.3) / 2500
    loss = Robust(label_smoothing=0.3, variant="conservative")
    for share, sign in ((0.5, 1), (1.0, 0), (2.0, -1)):
        errors = errors_of([0.0], [share * margin], [1.0])
        first, second = gradients(loss, errors)
        assert first.item() == pytest.approx(-second.item())
        factor = figures(loss, errors).gradient_factor.item()
        if sign == 0:
            assert first.item() == pytest.approx(0, abs=1.0)  # of 1000 at the start
            assert factor == pytest.approx(0, abs=1e-3)
        else:
            assert sign * first.item() > 100 and sign * factor > 0.05


ALL = [loss for loss, _ in FORMULAS.values()] + [Segment(), Segment(per="clip")]


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_the_gradient_factor_is_the_slope_relative_to_the_start(loss: Loss) -> None:
    # On the rejected error alone, which no penalty depends on.
    def slope(second: float) -> float:
        return gradients(loss, errors_of([0.0], [second], [1.0]))[1].item()

    for second in (-4e-4, -1e-4, 1e-4, 3.9e-4, 1e-3):
        factor = figures(loss, errors_of([0.0], [second], [1.0])).gradient_factor.item()
        assert factor == pytest.approx(0.5 * slope(second) / slope(0.0), abs=2e-3)


CLOSED: dict[str, tuple[Loss, Callable[[float], float], float]] = {
    "global": (Global(), lambda z: sigmoid(-z), 1),
    "segment": (Segment(), lambda z: sigmoid(-z), 1),
    "segment per clip": (Segment(per="clip"), lambda z: sigmoid(-z), 1),
    "region": (Region(), lambda z: sigmoid(-z), 2),  # both terms, on a region of everything
    "ipo": (IPO(), lambda z: 0.5 * (1 - 2 * z), 8),
    "hinge": (Hinge(), lambda z: 0.5 * (z < 1), 2),
    "robust": (
        Robust(label_smoothing=0.2),
        lambda z: 0.8 * sigmoid(-z) + 0.2 * sigmoid(z),
        1 / 0.6,
    ),
    "conservative": (
        Robust(label_smoothing=0.2, variant="conservative"),
        lambda z: (sigmoid(-z) - 0.2) / 0.6,
        0.6,
    ),
    "dpop": (DPOP(), lambda z: sigmoid(-z), 1),
    "sdpo": (SDPO(), lambda z: sigmoid(-z), 1),
    "sdpo without the rejected gradient": (SDPO(mu=1), lambda z: sigmoid(-z), 1),
}


@pytest.mark.parametrize("name", CLOSED)
@pytest.mark.parametrize("sft_weight", [0.0, 0.1])
@pytest.mark.parametrize("sign", [1, -1])
def test_figures_are_those_of_the_closed_forms(name: str, sft_weight: float, sign: int) -> None:
    # The factor is half of the slope relative to margin 0; the logits are twice that slope times
    # the margin, which is beta times it for a sigmoid.
    loss, factor, scale = CLOSED[name]
    loss = loss.model_copy(update={"sft_weight": sft_weight})
    beta = float(loss.beta)  # type: ignore[attr-defined]
    for z in (-2.0, 0.0, 2.0):
        first, second = ([0.0] * 4, [z / beta] * 4)[::sign]
        errors = errors_of(first, second, [sign] * 4, product=0.5)
        found = figures(loss, errors)
        assert found.gradient_factor.item() == pytest.approx(factor(z), abs=2e-3)
        assert found.logits.item() == pytest.approx(scale * z, abs=2e-3)
        assert found.loss.item() == loss(errors).loss.item()


def test_frames_of_both_labels_count_by_their_own_slopes() -> None:
    # Frame 1 prefers the first video at z = 2, frame 2 the second at z = -2; frame 3 is a tie.
    changes = [0.0, 2 / 250, 0.3], [2 / 250, 4 / 250, 0.0]
    found = figures(Segment(sft_weight=0.1), errors_of(*changes, [1, -1, 0]))
    assert found.gradient_factor.item() == pytest.approx((sigmoid(-2) + sigmoid(2)) / 2, abs=1e-3)
    assert found.margin.item() == pytest.approx(0, abs=1e-7)


def test_an_even_pair_keeps_the_initial_factor() -> None:
    found = figures(Global(), errors_of([0.1, 0.1], [0.2, 0.2], [1, -1]))
    assert found.gradient_factor.item() == 0.5 and found.logits.item() == 0


def test_the_region_counts_most_in_the_factor_of_region() -> None:
    # A tenth of the elements: d loss / d margin on them is beta (sigmoid(-z_all) / 10 +
    # sigmoid(-z_region)).
    region = torch.tensor([1.0] + [0.0] * 9).view(1, 1, 10, 1, 1)
    errors = replace(errors_of([0.0] * 10, [2 / 2500] + [0.0] * 9, [1] * 10), region=region)
    found = figures(Region(), replace(errors, strength=torch.tensor([0.75])))
    expected = (0.1 * sigmoid(-0.2) + sigmoid(-2)) / 1.1
    assert found.gradient_factor.item() == pytest.approx(expected, abs=1e-3)
    assert found.logits.item() == pytest.approx(2 * 1.1, abs=1e-2)


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_swapping_the_videos_and_negating_the_labels_changes_no_gradient(loss: Loss) -> None:
    errors = replace(random_errors(pairs=5, change=1e-3), preference=PREFERENCES)
    mirrored = replace(swapped(errors), preference=-PREFERENCES)
    loss = loss.model_copy(update={"sft_weight": 0.1})
    for one, other in zip(gradients(loss, errors), gradients(loss, mirrored)[::-1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_ties_train_nothing(loss: Loss) -> None:
    loss = loss.model_copy(update={"sft_weight": 0.1})
    ties = replace(random_errors(change=1e-3), preference=torch.zeros(3, 4))
    output = loss(ties)
    assert (output.margin == 0).all() and output.loss.isfinite().all()
    for gradient in gradients(loss, ties):
        assert not gradient.any()


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_the_sft_term_adds_the_chosen_error(loss: Loss) -> None:
    errors = random_errors(change=1e-3)
    with_sft = loss.model_copy(update={"sft_weight": 0.1})
    added = with_sft(errors).loss - loss(errors).loss
    chosen = errors.policy_first.mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(added, 0.1 * chosen, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "start"),
    [(Global(), LN2), (Segment(), LN2), (Robust(), LN2), (DPOP(), LN2), (SDPO(), LN2),
     (Robust(variant="conservative"), LN2), (IPO(), 1.0), (Hinge(), 1.0), (KTO(), 0.5),
     (Poly(), LN2 + 0.5)],
    ids=repr,
)  # fmt: skip
def test_equal_networks_give_the_start_that_the_docstring_names(loss: Loss, start: float) -> None:
    found = figures(loss, random_errors(change=0.0))
    assert (found.margin == 0).all() and (found.logits == 0).all()
    assert (found.gradient_factor == 0.5).all()
    torch.testing.assert_close(found.loss, torch.full((3,), start), rtol=0, atol=1e-6)
