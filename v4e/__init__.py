"""v4e: video models as image editors.

An image is a clip of length one, and an edit is a clip whose last frame you keep.
"""

__version__ = "0.1.0"
