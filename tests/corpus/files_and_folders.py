"""Walk folders, sum sizes, find duplicates, rename in bulk, pack and unpack."""

# %%
import hashlib
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

root = Path("photos")
for year in (2023, 2024):
    for number in range(3):
        path = root / str(year) / f"IMG {number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture" * (number + 1))
(root / "2024" / "naïve ☃.txt").write_text("snow")
(root / "link").symlink_to("2024")
sum(path.stat().st_size for path in root.rglob("*") if path.is_file())

# %%
digests = {}
for path in sorted(root.rglob("*.jpg")):
    digests.setdefault(hashlib.md5(path.read_bytes()).hexdigest()[:8], []).append(path.as_posix())
for digest, paths in digests.items():
    print(digest, paths)
for path in sorted(root.glob("2024/*.jpg")):
    path.rename(path.with_name(path.name.replace("IMG ", "winter_")))
for folder, folders, files in os.walk(root):
    folders.sort()
    print(folder, folders, sorted(files))

# %%
with tempfile.TemporaryDirectory() as place:
    packed = shutil.make_archive(os.path.join(place, "photos"), "gztar", root_dir=".", base_dir="photos")
    with tarfile.open(packed) as archive:
        print(sum(member.isfile() for member in archive), any(member.issym() for member in archive))
        archive.extractall(place, filter="data")
    print(sorted(os.listdir(place)))
(root / "link").unlink()
os.path.exists(place)
