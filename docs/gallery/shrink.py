"""Makes pictures small enough to commit, in place: python docs/gallery/shrink.py PICTURE...

A picture of curves needs few colours and no more than 1,100 pixels across.
"""

from __future__ import annotations

import sys

from PIL import Image

WIDTH, COLORS = 1100, 64

for path in sys.argv[1:]:
    picture = Image.open(path).convert("RGB")
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    picture.quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
