"""The package's configurations equal those of the published models."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch

from dpo_video import registry
from dpo_video.diffusion.known_models import FOLDER, KnownModel, find_model, known_models

DENOISERS = ("unet", "transformer", "transformer_2", "")


def networks(model: KnownModel) -> list[torch.nn.Module]:
    """The denoisers of a folder's configurations, on the meta device."""
    found = []
    for part in DENOISERS:
        path = model.folder / part / "config.json"
        if path.exists():
            config = json.loads(path.read_text())
            with torch.device("meta"):
                found.append(getattr(diffusers, config["_class_name"]).from_config(config))
    return found


@pytest.mark.parametrize("model", known_models(), ids=lambda model: model.name)
def test_the_configuration_has_as_many_parameters_as_the_published_weights(
    model: KnownModel,
) -> None:
    counted = sum(p.numel() for network in networks(model) for p in network.parameters())
    assert counted == model.parameters


def test_denoiser_classes_take_every_key_of_their_configurations() -> None:
    for model in known_models():
        for part in DENOISERS:
            path = model.folder / part / "config.json"
            if path.exists():
                config = json.loads(path.read_text())
                network = getattr(diffusers, config["_class_name"])
                stray = {key for key in config if not key.startswith("_")}
                assert stray <= network._get_init_keys(network), path


def test_models_are_found_by_name_and_id_in_any_case() -> None:
    for model in known_models():
        for source in (model.name, *model.hub, model.hub[0].upper()):
            assert find_model(source) is model
    assert find_model("someone/else") is None
    assert find_model(str(FOLDER)) is None


def test_every_model_belongs_to_a_backbone_and_has_its_folder() -> None:
    backbones = {listing.name for listing in registry.listings("backbone")}
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == {model.name for model in known_models()}
    assert {model.backbone for model in known_models()} <= backbones | {"cogvideox", "wan"}
