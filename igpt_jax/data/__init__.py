"""Data: opens data sets by name, makes batches of tokens, and converts colours to tokens and back.

Only this package imports tensorflow_datasets and grain, and nothing in it imports TensorFlow except
the one-time preparation of data sets whose TFDS builders need it.
"""
