#!/bin/sh
# mmdebstrap customize hook: turns a minimal Debian tree ($1) into a guest image and takes the kernel out beside it.
# In: OUT (host directory for the results), WHEELS (host directory of verified wheels), PYTHON_PACKAGES, CA_BUNDLE
# (host file, or empty to keep Debian's own). Out: $OUT/root.erofs, $OUT/boot (kernel, modules, busybox), $OUT/packages.
# Lines "step: …" on standard output drive the progress bar of `cellvm build`.
set -eu
root=$1

echo "step: Python packages"
mkdir "$root/wheels"
cp "$WHEELS"/*.whl "$root/wheels/"
chroot "$root" python3 -m venv /opt/venv
chroot "$root" /opt/venv/bin/pip install --quiet --no-cache-dir --no-index --find-links /wheels $PYTHON_PACKAGES
rm -r "$root/wheels"

echo "step: users and environment"
chroot "$root" useradd --create-home --shell /bin/bash --user-group user
echo 'user ALL=(ALL) NOPASSWD: ALL' > "$root/etc/sudoers.d/user"
chmod 0440 "$root/etc/sudoers.d/user"
# sudo must find the virtual environment too.
echo 'Defaults secure_path="/opt/venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"' \
    > "$root/etc/sudoers.d/path"
chmod 0440 "$root/etc/sudoers.d/path"
chroot "$root" chown -R user:user /opt/venv
# A login shell starts from a path of its own: put the virtual environment back in front.
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
mkdir -p "$OUT/boot/debs"
(cd "$OUT/boot/debs" && apt-get -q download "$image" busybox-static)
for deb in "$OUT"/boot/debs/*.deb; do dpkg-deb -x "$deb" "$OUT/boot"; done
(cd "$OUT/boot/debs" && ls) > "$OUT/packages"
chroot "$root" dpkg-query -W >> "$OUT/packages"
rm -r "$OUT/boot/debs"

echo "step: file system image"
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/log/*.log
# A plain bind mount shows the tree without what mmdebstrap mounted into it (proc, sys, dev). Modification times are
# kept: Python trusts its compiled files by them.
bare=$(mktemp -d)
mount --bind "$root" "$bare"
mkfs.erofs --quiet --preserve-mtime --exclude-regex='^(dev|tmp|run)/.+' "$OUT/root.erofs" "$bare"
umount "$bare"
rmdir "$bare"
