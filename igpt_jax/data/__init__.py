"""Data: from a data set's name to batches of tokens, and between colours and tokens.

Only this package imports tensorflow_datasets and grain, and nothing in it imports TensorFlow except
the one-time preparation of data sets whose TFDS builders need it.
"""
