"""What a compiled program costs on chips that aren't here: memory, collectives, seconds.

The real TPU compiler runs on any machine. Here is what is read from its output; running anything is
for others.
"""
