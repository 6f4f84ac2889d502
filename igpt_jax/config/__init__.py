"""Every setting, declared once (`fields`), read once (`read`), and the paper's (`recipes`)."""

from igpt_jax.config.fields import Settings, base
from igpt_jax.config.recipes import imagenet, openai_eval

__all__ = ["Settings", "base", "imagenet", "openai_eval"]
