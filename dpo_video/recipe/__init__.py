"""Recipes: the hyper-parameters of a paper, a TOML file each.

An entry point of the group `dpo_video.recipe` names a package and a recipe; the recipe is the file
NAME.toml in that package. `dpo_video.workflows.recipes` reads it.
"""
