"""`python -m dpo_video`, for `accelerate launch -m dpo_video train ...`."""

from dpo_video.cli import main

main()
