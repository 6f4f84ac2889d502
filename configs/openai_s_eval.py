"""OpenAI's released iGPT-S on ImageNet's held-out images: the published likelihood.

  python -m igpt_jax.main --config configs/openai_s_eval.py --config.job=download
  python -m igpt_jax.main --config configs/openai_s_eval.py

The first command fetches the checkpoint (0.3 GB), its palette and the tokens into downloads/, and goes
on where it stopped. Files that lie elsewhere: --config.checkpoint=DIR/model.ckpt-1000000
--config.data.path=DIR/imagenet_teX.npy; images instead of tokens: --config.data.name=imagenet2012
(resized here, so close but not equal).
Reproduces: openai/image-gpt's README: its evaluation of the checkpoint at 1,000,000 steps.
Hardware: one accelerator with 4 GB; 9e+15 FLOPs in all (arithmetic, not a run).
Expect: test 2.0895 nats/token.
Data: their 50,000 images as tokens (imagenet_teX.npy), from the release's server.
"""

from igpt_jax.config import openai_eval


def get_config():
  return openai_eval("s")
