#!/bin/busybox sh
# The guest's first process: loads the drivers, makes its tree, and runs the commands that the host sends over
# the virtio-serial port "nv.command". The tree is the disk that the kernel's argument nv.root names, or else a
# writable copy-on-write view of the host's tree.
#
# A command is one line "ID LIMIT_S SCRIPT", SCRIPT in base64; its answer is "ID STATUS", the output in
# base64 lines, and a line "." . Commands run one after the other, inside the tree, with stdin empty.
/bin/busybox mkdir -p /proc /sys /dev /tmp /host /copy /tree
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "/modules/$module" || echo "nv: module $module failed" >/dev/console
done </modules/order

hostname guest
ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route add default via 10.0.2.2

root=$(sed -n 's/.*nv\.root=\([^ ]*\).*/\1/p' /proc/cmdline)
if [ "$root" ]; then
    mount "$root" /tree
else
    mount -t virtiofs -o ro host /host
    mount -t tmpfs tmpfs /copy
    mkdir /copy/upper /copy/work
    mount -t overlay -o lowerdir=/host,upperdir=/copy/upper,workdir=/copy/work overlay /tree
fi
mount -t proc proc /tree/proc
mount -t sysfs sysfs /tree/sys
mount -t devtmpfs dev /tree/dev
mount -t tmpfs tmpfs /tree/run
if [ "$root" ]; then # the copy of the host's tree is writable as it is, and the project may lie below one of these
    for place in tmp mnt; do mount -t tmpfs tmpfs "/tree/$place"; done
fi

for port in /sys/class/virtio-ports/*; do
    if [ "$(cat "$port/name")" = nv.command ]; then exec 3<>"/dev/${port##*/}"; fi
done
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
printf '0 0\n.\n' >&3
while read -r id limit script <&3; do
    echo "$script" | /bin/base64 -d >/tree/run/nv.command
    /bin/chroot /tree /usr/bin/timeout -k 1 "$limit" /bin/sh /run/nv.command >/tree/run/nv.output 2>&1 3>&- </dev/null
    status=$?
    { echo "$id $status"; /bin/base64 /tree/run/nv.output; echo .; } >&3
done
