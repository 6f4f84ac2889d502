"""Foreign checkpoints: converts OpenAI's and Hugging Face's weights to our parameters and back.

The entry points are in `formats`: `detect`, `open_foreign`, `load`, `save`.
"""
