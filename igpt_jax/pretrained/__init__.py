"""Foreign checkpoints: OpenAI's and Hugging Face's weights to our parameters, and back.

`formats` is the door: `detect`, `open_foreign`, `load`, `save`.
"""
