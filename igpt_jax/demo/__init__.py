"""A page on which people complete their own images: a small web server around sampling.completer."""
