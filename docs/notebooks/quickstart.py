# %% [markdown]
# # Train `tiny` on preference pairs
#
# The embedded model draws 16 frames of moving shapes at 64x64 and trains in a minute on a CPU.
# Every step below is also a command of `dpo-video`, with the same options.

# %% Parameters
import os

COUNT = int(os.environ.get("COUNT", "24"))  # pairs
STEPS = int(os.environ.get("STEPS", "40"))  # optimizer steps
NUM_PROMPTS = int(os.environ.get("NUM_PROMPTS", "12"))  # of the evaluation

# %% [markdown]
# ## Pairs
#
# `local` repaints a region of a real clip: the clip is chosen, the repainted one rejected.

# %%
import dpo_video as dv

pairs = dv.build_pairs("local", backbone="tiny", count=COUNT)
pairs

# %% [markdown]
# ## Training
#
# A function prints nothing. This object prints every tenth step.


# %%
class Printed(dv.Progress):
    """Prints every tenth step."""

    def step(self, event, verdict, steps):
        """Print the margin, which is positive when the chosen video is preferred."""
        report = event.report
        if report.step % 10 == 0:
            print(f"step {report.step}: loss {report.loss:.3f}, margin {report.margin:+.1e}")


run = dv.train(
    pairs,
    loss=dv.loss.Region(sft_weight=1000),
    reference="toggle",
    steps=STEPS,
    batch_size=3,
    gradient_accumulation_steps=1,
    learning_rate=3e-4,
    save_steps=STEPS,
    progress=Printed(),
)
run

# %% [markdown]
# ## Evaluation
#
# Base and tuned model draw the same prompts from the same noise.

# %%
evaluation = dv.evaluate(run, num_prompts=NUM_PROMPTS)
evaluation

# %%
evaluation["warp_error"].difference

# %% [markdown]
# ## A video of the tuned model

# %%
(video,) = run.generate(prompt="a red circle moving right")
video

# %% [markdown]
# ## A loss of your own
#
# A class defined here works in this session. To share it, put it in a package: see Plugins.

# %%
from dpo_video.strategies import Loss


class Steeper(Loss):
    """The global loss with another slope."""

    beta: float = 5000.0

    def __call__(self, errors):
        """The loss of every pair."""
        return dv.loss.Global(beta=self.beta)(errors)


own = dv.train(
    pairs,
    loss=Steeper(beta=4000),
    steps=STEPS,
    gradient_accumulation_steps=1,
    validation_videos=0,
)
own
