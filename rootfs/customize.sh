#!/bin/sh
# A customize hook of mmdebstrap. It turns a minimal Debian tree ($1) into a guest image and puts the kernel beside it.
# In: OUT (host directory for the results), WHEELS (host directory of verified wheels, which appears when all are there),
# PYTHON_PACKAGES, CA_BUNDLE (host file, or empty to keep Debian's own).
# Out: $OUT/root.erofs, $OUT/boot (kernel, modules, busybox), $OUT/packages.
# Lines "step: …" on standard output drive the progress bar of `cellvm build`.
set -eu
root=$1

chroot "$root" python3 -m venv /opt/venv
[ -d "$WHEELS" ] || echo "step: download Python packages"
until [ -d "$WHEELS" ]; do sleep 0.2; done
echo "step: install Python packages"
mkdir "$root/wheels"
mount --bind "$WHEELS" "$root/wheels"
chroot "$root" /opt/venv/bin/pip install --quiet --no-cache-dir --no-compile --no-index --find-links /wheels \
    $PYTHON_PACKAGES
umount "$root/wheels"
rmdir "$root/wheels"
chroot "$root" localedef -i en_US -f UTF-8 en_US.UTF-8

echo "step: users and environment"
chroot "$root" useradd --create-home --shell /bin/bash --user-group user
echo 'user ALL=(ALL) NOPASSWD: ALL' > "$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"
# sudo must find the virtual environment too.
echo 'Defaults secure_path="/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"' \
    > "$root/etc/sudoers.d/path"
chmod 0440 "$root/etc/sudoers.d/path"
chroot "$root" chown -R user:user /opt/venv
# The list of fonts is in the image, because matplotlib would make it in the first process that draws. matplotlib asks
# no one for substitutes, so the list names some fonts twice: by their own name and by the one that plots ask for.
# It looks for a missing glyph in the further families of `font.family`. Its own styles and seaborn's set that list, so
# each of them gets the families that have what DejaVu lacks: Chinese, Japanese and Korean; emoji.
chroot --userspec=user:user "$root" env HOME=/home/user /opt/venv/bin/python - <<'FONTS'
import dataclasses
import re
import sys
from pathlib import Path

try:
    import matplotlib
    from matplotlib import font_manager
except ImportError:
    sys.exit()  # a template without plots
CJK = (
    "SimHei", "SimSun", "Microsoft YaHei", "PingFang SC", "Heiti TC", "Arial Unicode MS", "Noto Sans CJK SC",
    "Noto Sans SC", "Source Han Sans SC", "MS Gothic", "Meiryo", "Yu Gothic", "Hiragino Sans", "IPAexGothic",
    "Noto Sans CJK JP", "Noto Sans JP", "Malgun Gothic", "NanumGothic", "Noto Sans CJK KR", "Noto Sans KR",
)
SUBSTITUTES = {
    "Liberation Sans": ("Arial", "Helvetica"),
    "Liberation Serif": ("Times New Roman", "Times"),
    "Liberation Mono": ("Courier New", "Courier"),
    "WenQuanYi Micro Hei": CJK,
}
fonts = font_manager.fontManager
known = {font.name for font in fonts.ttflist}
fonts.ttflist += [
    dataclasses.replace(font, name=name)
    for font in fonts.ttflist
    for name in SUBSTITUTES.get(font.name, ())
    if name not in known
]
font_manager.json_dump(fonts, Path(matplotlib.get_cachedir(), f"fontlist-v{fonts._version}.json"))

more = [name for name in ("WenQuanYi Micro Hei", "Symbola") if name in known]
data = Path(matplotlib.get_data_path())
for file in (data / "matplotlibrc", *data.glob("stylelib/*.mplstyle")):
    family = f"sans-serif, {', '.join(more)}" if more else "sans-serif"
    file.write_text(re.sub(r"(?m)^#?(font\.family *: *)sans-serif.*", rf"\g<1>{family}", file.read_text()))
seaborn = data.parents[1] / "seaborn/rcmod.py"
if seaborn.exists():
    text = seaborn.read_text().replace('"font.family": ["sans-serif"]', f'"font.family": {["sans-serif", *more]}')
    family = f"[*([font] if isinstance(font, str) else font), *{more}]"
    seaborn.write_text(text.replace('{"font.family": font}', f'{{"font.family": {family}}}'))
FONTS
# pip would compile on one processor, this uses all. A file that can't be compiled is no error, because some packages
# have such files.
chroot --userspec=user:user "$root" /opt/venv/bin/python -m compileall -qq -j 0 /opt/venv/lib || true
# A login shell starts from a path of its own, so this puts the virtual environment back in front.
cat > "$root/etc/profile.d/venv.sh" <<'PROFILE'
export VIRTUAL_ENV=/opt/venv PATH="/opt/venv/bin:$PATH"
PROFILE
if [ -n "$CA_BUNDLE" ]; then
    cat "$CA_BUNDLE" > "$root/etc/ssl/certs/ca-certificates.crt"
fi
: > "$root/etc/machine-id"
echo sandbox > "$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 sandbox\n' > "$root/etc/hosts"
: > "$root/etc/resolv.conf"
: > "$root/etc/fstab"
mkdir -p "$root/lower" "$root/rw"

echo "step: kernel"
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
image=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-.*\)$/\1/p')
mkdir -p "$OUT/boot"
(
    cd "$root/var/cache/apt/archives" # the cache of packages, mounted there: what it has is not downloaded again
    apt-get -q download "$image" busybox-static
    for package in "$image" busybox-static; do
        version=$(apt-cache show --no-all-versions "$package" | sed -n 's/^Version: //p' | sed 's/:/%3a/')
        dpkg-deb -x "${package}_${version}_amd64.deb" "$OUT/boot"
        echo "${package}_${version}_amd64.deb"
    done > "$OUT/packages"
)
chroot "$root" dpkg-query -W >> "$OUT/packages"

echo "step: file system image"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/log/*.log
# A plain bind mount shows the tree without mmdebstrap's mounts in it (proc, sys, dev). Modification times are kept,
# because Python trusts its compiled files by them.
bare=$(mktemp -d)
mount --bind "$root" "$bare"
mkfs.erofs --quiet --preserve-mtime --exclude-regex='^(dev|tmp|run)/.+' "$OUT/root.erofs" "$bare"
umount "$bare"
rmdir "$bare"
