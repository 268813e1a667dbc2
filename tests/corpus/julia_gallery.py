"""A gallery of fractals as PNG files, written with zlib alone."""

# %%
import struct
import zlib

WIDTH, HEIGHT = 96, 64


def png(rows):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def julia(c):
    for y in range(HEIGHT):
        row = []
        for x in range(WIDTH):
            z, steps = complex(3 * x / WIDTH - 1.5, 2 * y / HEIGHT - 1), 0
            while abs(z) < 2 and steps < 40:
                z, steps = z * z + c, steps + 1
            row.append(steps * 6)
        yield row


# %%
pictures = {
    name: png(list(julia(c)))
    for name, c in {"rabbit": -0.123 + 0.745j, "dust": 0.3 + 0.5j, "san_marco": -0.75 + 0j}.items()
}
for name, picture in pictures.items():
    with open(f"{name}.png", "wb") as file:
        file.write(picture)
    print(name, len(picture) > 500, picture[1:4])

# %% notebook
# from IPython.display import Image, display
# for picture in pictures.values():
#     display(Image(picture))

# %%
struct.unpack(">II", pictures["dust"][16:24])
