"""Cost of a compiled program on chips that aren't here: memory, collectives, seconds.

The real TPU compiler runs on any machine; this package reads its output and runs no program.
"""
