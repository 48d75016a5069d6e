"""Labels from metrics: signs, ties and vetoes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import av
import pytest
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor

from dpo_video.data.video import read_video
from dpo_video.errors import UserError
from dpo_video.labeler.metric import ByMetric, Measuring, relative_lead, widened
from dpo_video.metric.frame_difference import FrameDifference
from dpo_video.strategies import Metric
from dpo_video.testing import small_videos
from dpo_video.workflows.config import resolve

CLIPS = Path(__file__).parents[1] / "clips"
SEGMENTS = [slice(0, 3), slice(3, 6)]
PROMPTS = ["a", "b"]


class Brightness(Metric):
    """The mean pixel."""

    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "0-1"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        return videos.mean(dim=(1, 2, 3, 4))


class Change(Metric):
    """Mean change between frames, as a motion metric."""

    higher_is_better: ClassVar[bool] = True
    unit: ClassVar[str] = "0-1"
    role: ClassVar[Literal["target", "motion", "guard"]] = "motion"

    def __call__(self, videos: Tensor, prompts: Sequence[str]) -> Tensor:
        return videos.diff(dim=2).abs().mean(dim=(1, 2, 3, 4))


def labeler(weights: dict[str, float], **options: object) -> Measuring:
    metrics = {"bright": Brightness(), "still": FrameDifference(), "moves": Change()}
    rule = ByMetric(weights=weights, **{"guards": {}, **options})  # type: ignore[arg-type]
    made = rule.with_metrics({name: metrics[name] for name in rule.metric_names})
    assert isinstance(made, Measuring)
    return made


def flat(*brightness: float) -> Tensor:
    """One video of six frames for each, three of a brightness, then three of half of it."""
    fades = torch.tensor([1.0] * 3 + [0.5] * 3)[None, None, :, None, None]
    frames = torch.tensor(brightness)[:, None, None, None, None] * fades
    return frames.expand(-1, 3, 6, 4, 4)


def test_the_label_is_the_sign_of_the_relative_lead_beyond_the_margin() -> None:
    """0.5 against 0.4 leads by 0.1 / 0.45 = 22% in both segments; 0.40 against 0.41 by 2.5%."""
    first, second = flat(0.5, 0.40), flat(0.4, 0.41)
    assert labeler({"bright": 1}, margin=0.1)(PROMPTS, first, second, SEGMENTS).tolist() == [
        [1, 1], [0, 0]]  # fmt: skip
    assert labeler({"bright": 1}, margin=0.0)(PROMPTS, first, second, SEGMENTS).tolist() == [
        [1, 1], [-1, -1]]  # fmt: skip
    assert not labeler({"bright": 1}, margin=0.3)(PROMPTS, first, second, SEGMENTS).any()


def test_segments_are_judged_separately() -> None:
    first, second = flat(0.5), flat(0.4).clone()
    second[:, :, 3:] = 0.9
    assert labeler({"bright": 1})(["a"], first, second, SEGMENTS).tolist() == [[1, -1]]


def test_the_metrics_direction_sets_the_sign_and_weights_mix() -> None:
    steady, shaky = flat(0.4), flat(0.5) + 0.05 * torch.tensor([1.0, -1] * 3)[:, None, None]
    parts = [slice(0, 3)]
    assert labeler({"bright": 1})(["a"], shaky, steady, parts).item() == 1
    assert labeler({"still": 1})(["a"], shaky, steady, parts).item() == -1
    assert labeler({"still": 1, "bright": 1})(["a"], shaky, steady, parts).item() == -1
    assert labeler({"still": 0.01, "bright": 1})(["a"], shaky, steady, parts).item() == 1


def test_a_frozen_video_is_not_preferred_for_its_smoothness() -> None:
    moving = small_videos(1, 6, 16, 16)
    frozen = moving[:, :, :1].expand_as(moving)
    shortcut, guarded = labeler({"still": 1}), labeler({"still": 1}, guards={"moves": 0.1})
    assert shortcut(["a"], frozen, moving, SEGMENTS).tolist() == [[1, 1]]
    judgement = guarded.judge(["a"], frozen, moving, SEGMENTS)
    assert judgement.labels.tolist() == [[0, 0]]
    assert judgement.notes[0].count("(a tie: the preferred one is worse by moves)") == 2
    assert "still 0 : " in judgement.notes[0] and "moves 0 : " in judgement.notes[0]
    assert guarded(["a"], moving, frozen, SEGMENTS).tolist() == [[0, 0]]
    assert labeler({"moves": 1}, guards={"moves": 0.2})(["a"], moving, frozen, SEGMENTS).all()


@pytest.mark.parametrize(("tolerance", "label"), [(0.3, 1), (0.2, 0)])
def test_the_tolerance_is_relative_to_the_rejected_video(tolerance: float, label: int) -> None:
    """The first is smoother and moves three quarters as much."""
    steps = torch.arange(6.0)[:, None, None]
    first, second = (speed * steps.expand(1, 3, 6, 4, 4) for speed in (0.075, 0.1))
    made = labeler({"still": 1}, guards={"moves": tolerance})
    assert made(["a"], first, second, SEGMENTS).tolist() == [[label, label]]


def test_leads_are_antisymmetric_to_the_bit_and_0_for_equal_values() -> None:
    first, second = torch.tensor([0.0, 3.0, -1.0, 1e-20]), torch.tensor([0.0, 1.0, 1.0, 2e-20])
    assert torch.equal(relative_lead(first, second), -relative_lead(second, first))
    assert relative_lead(first, second)[:2].tolist() == [0, 1]


@pytest.mark.parametrize("weights", [{"bright": -1.0}, {"bright": 0.0}])
def test_weights_that_decide_nothing_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"labeler.weights must not be negative, nor all 0"):
        labeler(weights)


@pytest.mark.parametrize("tolerance", [-0.1, 1.1])
def test_a_tolerance_that_is_no_share_is_refused(tolerance: float) -> None:
    with pytest.raises(UserError, match=r"labeler.guards must be shares between 0 and 1"):
        labeler({"still": 1}, guards={"moves": tolerance})


# --- vetoes ----------------------------------------------------------------------------------


def test_a_guard_of_which_less_is_better_vetoes_too() -> None:
    """The first is brighter and shakes by a fifth more."""
    shake = torch.tensor([1.0, -1] * 3)[:, None, None]
    bright, dark = flat(0.5) + 0.06 * shake, flat(0.4) + 0.05 * shake
    for tolerance, label in ((0.1, 0), (0.3, 1)):
        made = labeler({"bright": 1}, guards={"still": tolerance})
        part = [slice(0, 3)]
        assert made(["a"], bright[:, :, :3], dark[:, :, :3], part).item() == label
        assert made(["a"], dark[:, :, :3], bright[:, :, :3], part).item() == -label


def test_guards_of_short_segments_are_measured_on_the_frames_around_them() -> None:
    """The first video stands still in the first second of two frames, and then moves as much."""
    assert widened(slice(0, 2), 16, 8) == slice(0, 8)
    assert widened(slice(7, 9), 16, 8) == slice(4, 12)
    assert widened(slice(15, 16), 16, 8) == slice(8, 16)
    assert widened(slice(2, 3), 6, 8) == slice(0, 6)
    assert widened(slice(3, 14), 16, 8) == slice(3, 14)
    steps = torch.arange(12.0)[:, None, None].expand(1, 3, 12, 4, 4) / 20
    paused = (steps - 1 / 20).clamp(min=0)
    made = labeler({"still": 1}, guards={"moves": 0.2})
    assert made(["a"], paused, steps, [slice(0, 2)]).item() == 1
    assert made(["a"], steps[:, :, :2] * 0, steps[:, :, :2], [slice(0, 2)]).item() == 0


def compressed(video: Tensor) -> Tensor:
    """H.264 at a low quality."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width = video.shape[-2:]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "40"}
        stream.codec_context.thread_count = 1
        for picture in video[0].movedim(0, -1).mul(255).round().byte().contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    buffer.seek(0)
    with av.open(buffer) as container:
        found = [torch.from_numpy(each.to_ndarray(format="rgb24"))
                 for each in container.decode(video=0)]  # fmt: skip
    return torch.stack(found).movedim(-1, 0)[None] / 255


def blurred(video: Tensor) -> Tensor:
    frames = video[0].transpose(0, 1)
    return gaussian_blur2d(frames, (5, 5), (0.8, 0.8)).transpose(0, 1)[None]


def noisy(video: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (video + 0.03 * torch.randn(video.shape, generator=generator)).clamp(0, 1)


def flickering(video: Tensor) -> Tensor:
    gains = 1 + 0.08 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    return (video * gains[:, None, None]).clamp(0, 1)


@pytest.mark.parametrize("size", [(36, 48), (48, 64)], ids=str)
def test_a_degraded_copy_is_never_preferred(size: tuple[int, int]) -> None:
    """Copies of a real clip of 16 frames; noise and flicker must lose, the others may tie."""
    made = resolve(choices={"labeler": "metric"}).labeler
    assert isinstance(made, Measuring)
    frames = read_video(CLIPS / "grand_prix_1906.mp4", start=1.0, frames=16).frames / 255
    clip = F.interpolate(frames.transpose(0, 1), size, mode="area").transpose(0, 1)[None]
    copies = {
        "noise": noisy(clip),
        "flicker": flickering(clip),
        "compression": compressed(clip),
        "blur": blurred(clip),
        "dropped frames": clip[:, :, ::2].repeat_interleave(2, dim=2),
        "freezing": clip[:, :, :1].expand_as(clip),
    }
    videos = torch.cat([clip, *copies.values()])
    values = {name: metric(videos, ["a"] * 7) for name, metric in made.metrics.items()}
    pairs = {name: (each[:1].expand(6), each[1:]) for name, each in values.items()}
    labels = dict(zip(copies, made.decide(pairs, pairs)[0].tolist(), strict=True))
    assert labels["noise"] == labels["flicker"] == 1
    assert min(labels.values()) >= 0, labels


# --- by name ---------------------------------------------------------------------------------


def test_metrics_are_found_by_name_and_their_options_kept() -> None:
    config = resolve(
        choices={"labeler": "metric"},
        assignments=["labeler.weights.warp_error=1", "labeler.weights.sharpness=0.5",
                     "labeler.options.warp_error.flow=videodpo_lk"],
    )  # fmt: skip
    assert isinstance(config.labeler, Measuring)
    assert list(config.labeler.metrics) == [
        "warp_error",
        "sharpness",
        "dynamic_degree",
        "new_frames",
    ]
    table = config.tables["labeler"]
    assert table["name"] == "metric" and table["options"]["warp_error"] == {
        "flow": "videodpo_lk",
        "raft_weights": "",
    }
    assert table["options"]["dynamic_degree"]["share"] == 0.05


def test_a_run_toml_gives_the_same_labeler(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    once = resolve(choices={"labeler": "metric"}, assignments=["labeler.margin=0.2"])
    file.write_text(once.toml())
    again = resolve(file=file)
    assert again.labeler == once.labeler and again.tables == once.tables


@pytest.mark.parametrize(
    ("assignment", "sentence"),
    [
        ("labeler.weights.warp_eror=1", "Unknown metric 'warp_eror'. Did you mean 'warp_error'"),
        ("labeler.options.frame_difference.x=1", "of the labeler 'frame_difference'"),
        ("labeler.options.warp_error.x=1", "Unknown option 'metric.warp_error.x'"),
    ],
)
def test_an_unknown_metric_is_refused(assignment: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve(choices={"labeler": "metric"}, assignments=[assignment])
