"""What reading an image file can raise, for every task that reads them."""

from __future__ import annotations

from PIL import Image

# ImportError: once Ultralytics is imported, PIL's `open` tries a decoder that may not be there before it gives up
UNREADABLE = (OSError, SyntaxError, ValueError, ImportError, Image.DecompressionBombError)
