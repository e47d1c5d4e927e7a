# What virtme-ng starts as root in the guest, with run.py's environment and arguments: DIRECTORY COMMAND...
directory=$1
shift
exec 2>&1 </dev/null
set -e -o pipefail
trap 'exit 125' EXIT

# By which virtme-ng gets the exit status. It is udev that names the port, which the small Debian for arm64 lacks.
if [ ! -e /dev/virtio-ports ]; then
    modprobe virtio_console
    for _ in $(seq 50); do grep -qsx virtme.ret /sys/class/virtio-ports/*/name && break || sleep 0.1; done
    port=$(grep -lx virtme.ret /sys/class/virtio-ports/*/name)
    mkdir /dev/virtio-ports
    ln -s "../$(basename "${port%/name}")" /dev/virtio-ports/virtme.ret
fi

# virtme-ng mounts the host's files without a cache, which makes Python's imports several times slower, and read-only but
# for some directories. So once more: cached (the guest assumes that nobody changes files meanwhile), below an overlay.
mkdir /run/vm && cd /run/vm && mkdir changes root
mount -t tmpfs -o mode=755 tmpfs changes
share=share0
for place in $UMMUNOTIFY_VM_SHARES; do # the first is /
    mkdir -p $share changes/$share/upper changes/$share/work "root$place"
    mount -t 9p -o trans=virtio,version=9p2000.L,access=any,msize=512000,cache=loose,ro $share $share
    mount -t overlay -o lowerdir=$share,upperdir=changes/$share/upper,workdir=changes/$share/work overlay "root$place"
    share=share$((${share#share} + 1))
done
for kept in proc sys dev; do mount --rbind "/$kept" "root/$kept"; done
mkdir -p root/lib/modules && mount --rbind /lib/modules root/lib/modules
mount -t tmpfs -o mode=755 tmpfs root/run
# The tests' files: some things only a disk's file system does.
truncate -s 256M changes/disk
mke2fs -q -t ext4 -O ^has_journal changes/disk
modprobe -a loop ext4
mount -o loop changes/disk root/var/tmp
chmod 1777 root/var/tmp
mkdir root/run/old && cd root && pivot_root . run/old # a mere chroot would forbid user namespaces

cd "$directory"
# The way to the interpreter and to the checkout, for users other than root. It is the overlay that changes.
for path in "$PWD" "$(readlink -f "$(command -v python3)")" ${VIRTUAL_ENV:+"$VIRTUAL_ENV"}; do
    while [ "$path" != / ]; do path=$(dirname "$path"); chmod o+x "$path"; done
done
mount -t bpf bpf /sys/fs/bpf
echo +memory >/sys/fs/cgroup/cgroup.subtree_control
[ "$(uname -m)" != x86_64 ] || modprobe kvm-amd # what QEMU emulates; on arm64 it is there
# An RDMA device that needs no hardware, and Debian's pyverbs, but nothing else of what is beside it.
modprobe -a rdma_rxe ib_uverbs
ip link set lo up
rdma link add rxe0 type rxe netdev lo
chmod 666 /dev/kvm /dev/infiniband/uverbs*
mkdir /run/python
ln -s /usr/lib/python3/dist-packages/pyverbs /run/python/
export PYTHONPATH=/run/python TMPDIR=/var/tmp PYTHONDONTWRITEBYTECODE=1

trap - EXIT
"$@" | cat # a pipe, so that programs may open /dev/stdout
