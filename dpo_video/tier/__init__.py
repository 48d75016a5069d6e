"""Tiers: presets for a card, a TOML file each.

An entry point of the group `dpo_video.tier` names a package and a tier; the tier is the file
NAME.toml in that package. `dpo_video.estimation.tiers` reads it. [options] hold for every backbone
and are memory modes only, which do not change what is learned; [backbone.NAME] hold for one, and
[model.NAME] for one of its models. Later ones win.

Rank, frames and resolution are Video-DPO's presets for AnimateDiff, except for the T4: its preset
had 8 frames at 256x256, and it holds 16 at 512x512. LoRA's alpha follows its rank. What memory does
not ask for (accumulation, steps, pairs) is in the recipes video-dpo-t4, -l4 and -a100. The text
encoder is in CPU memory, and CogVideoX's VAE runs in tiles, where building pairs, validation videos
or an evaluation would not fit otherwise. The memory modes are the fastest exact ones that
`dpo-video estimate` predicts to fit, with the fewest blocks checkpointed; a family that is not
listed checkpoints all of them. A test checks that every tier holds its own presets.

memory_gib is the total that torch reports, which is less than the advertised size. tflops are dense
fp16 or bf16 tensor-core operations with fp32 accumulation.
"""
