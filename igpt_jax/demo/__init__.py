"""A page on which people complete their own images: a small web server above the jobs.

What may enter: what turns requests into calls of sampling.completer, and the page itself. Nothing here
knows how an image is drawn.
"""
