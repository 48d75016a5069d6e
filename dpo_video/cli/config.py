"""`dpo-video config`."""

from __future__ import annotations

import json

import typer

from dpo_video.cli.options import (
    Assignments,
    Backbone,
    Clips,
    Count,
    Device,
    File,
    Json,
    Labeler,
    Loss,
    Metrics,
    Pairs,
    Prompt,
    Reference,
    Seed,
    Tier,
    resolve,
)


def config(
    pairs: Pairs = None,
    loss: Loss = None,
    reference: Reference = None,
    backbone: Backbone = None,
    labeler: Labeler = None,
    metric: Metrics = None,
    assignments: Assignments = None,
    file: File = None,
    clips: Clips = None,
    prompt: Prompt = None,
    seed: Seed = None,
    device: Device = None,
    tier: Tier = None,
    count: Count = None,
    as_json: Json = False,
) -> None:
    """Print the fully resolved configuration and stop."""
    resolved = resolve(
        file,
        assignments,
        tier=tier,
        pairs=pairs,
        loss=loss,
        reference=reference,
        backbone=backbone,
        labeler=labeler,
        metrics=metric,
        run_clips=clips,
        run_prompt=prompt,
        run_seed=seed,
        run_device=device,
        build_count=count,
    )
    typer.echo(json.dumps(resolved.tables, indent=2) if as_json else resolved.toml(), nl=as_json)
