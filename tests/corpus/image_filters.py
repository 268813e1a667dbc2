"""Pictures with Pillow and NumPy: draw, filter, resize, thumbnails in other formats."""

# %%
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

image = Image.new("RGB", (120, 80), "white")
draw = ImageDraw.Draw(image)
draw.rectangle((10, 10, 60, 60), fill=(200, 30, 30))
draw.ellipse((50, 20, 110, 75), outline="blue", width=3)
image.save("shapes.png")
image.size

# %% notebook
# display(image)

# %%
blurred = image.filter(ImageFilter.GaussianBlur(2)).convert("L")
pixels = np.asarray(blurred)
print(pixels.shape, pixels.dtype, int(pixels.min()), int(pixels.max()))
edges = np.abs(np.diff(pixels.astype(int), axis=1)) > 20
print("edges:", int(edges.sum()))
Image.fromarray(255 - pixels).resize((60, 40)).save("small.bmp")

# %% notebook
# from IPython.display import Image as Picture, display
# display(Picture("shapes.png"), blurred)

# %%
with Image.open("small.bmp") as small:
    found = (small.format, small.mode, small.size)
found
