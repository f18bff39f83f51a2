#!/bin/sh
# The ring between two hosts, on one machine: two network namespaces with a cable between them, torchrun in each.
#
#     sudo examples/two_hosts.sh [options of train_ring.py]
#
# PER_HOST processes on each (default 2), of the interpreter PYTHON.
# Ends with status 77 (skipped) where namespaces may not be made. Nothing is left behind.
set -u
here=$(cd "$(dirname "$0")" && pwd)
one=nibs-one-$$ two=nibs-two-$$
command -v ip >/dev/null || { echo "skipped: no ip command"; exit 77; }
ip netns add "$one" 2>/dev/null || { echo "skipped: network namespaces are not allowed here"; exit 77; }
second=
leave() {
    [ -n "$second" ] && kill "$second" 2>/dev/null
    ip netns del "$one" 2>/dev/null
    ip netns del "$two" 2>/dev/null
}
trap leave EXIT INT TERM

ip netns add "$two" &&
ip link add name veth0 netns "$one" type veth peer name veth0 netns "$two" &&
ip -n "$one" address add 10.77.0.1/24 dev veth0 && ip -n "$one" link set veth0 up && ip -n "$one" link set lo up &&
ip -n "$two" address add 10.77.0.2/24 dev veth0 && ip -n "$two" link set veth0 up && ip -n "$two" link set lo up ||
{ echo "skipped: no veth pair can be made here"; exit 77; }

host() { # host NAMESPACE NODE_RANK OPTIONS...
    space=$1 node=$2
    shift 2
    # gloo asks the name of the host for its address, and here that leads nowhere: name the cable instead.
    exec ip netns exec "$space" env GLOO_SOCKET_IFNAME=veth0 OMP_NUM_THREADS=1 TORCH_NCCL_ASYNC_ERROR_HANDLING=1 \
        "${PYTHON:-python3}" -m torch.distributed.run --nnodes 2 --node-rank "$node" --nproc-per-node "${PER_HOST:-2}" \
        --master-addr 10.77.0.1 --master-port 29500 "$here/train_ring.py" "$@"
}
( host "$two" 1 "$@" ) &
second=$!
( host "$one" 0 "$@" )
status=$?
wait "$second" || status=$?
second=
exit "$status"
