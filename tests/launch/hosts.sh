#!/usr/bin/env bash
# Several hosts on one machine, for tests of what crosses a network: each has its own network, mounts, host name, process
# ids, /tmp and /dev/shm, and an address on a common bridge. Needs root and Debian's iproute2.
#
#   hosts.sh up N              bridge and namespaces for hosts 1..N (10.77.0.1 ... 10.77.0.N, named node1 ... nodeN)
#   hosts.sh start I           host I, with a private /tmp; HOSTS_SHARE lists the folders that all hosts have ("the NFS")
#   hosts.sh exec I CMD ...    runs a command on host I
#   hosts.sh cut I | mend I    takes the network away from host I, and gives it back
#   hosts.sh kill I            ends host I with all of its processes at once
#   hosts.sh down              ends everything
#
# HOSTS_DIR: where the hosts' private folders lie. HOSTS_SHARE: colon-separated. HOSTS_STYLE: good (names resolve),
# debian (a host's own name is 127.0.1.1, as Debian and Ubuntu install it), none (no names).
set -eu
dir=${HOSTS_DIR:-${TMPDIR:-/tmp}/plop-hosts}
bridge=plopbr
pid_of() { cat "$dir/host$1/init.pid"; }
command=${1:?up, start, exec, cut, mend, kill or down}
case $command in
up)
  ip link show $bridge >/dev/null 2>&1 || ip link add $bridge type bridge
  ip addr show dev $bridge | grep -q 10.77.0.254 || ip addr add 10.77.0.254/24 dev $bridge
  ip link set $bridge up
  for i in $(seq 1 "$2"); do
    ip netns add ph$i 2>/dev/null || continue
    ip link del ph$i-v 2>/dev/null || true  # left by a host whose processes have not all ended
    ip link add ph$i-v type veth peer name eth0 netns ph$i
    ip link set ph$i-v master $bridge
    ip link set ph$i-v up
    ip -n ph$i addr add 10.77.0.$i/24 dev eth0
    ip -n ph$i link set eth0 up
    ip -n ph$i link set lo up
    ip -n ph$i route add default via 10.77.0.254
  done ;;
start)
  i=$2 host=$dir/host$2
  mkdir -p "$host/tmp" "$host/etc"
  {
    echo "127.0.0.1 localhost"
    case ${HOSTS_STYLE:-good} in
      good) for k in 1 2 3 4; do echo "10.77.0.$k node$k"; done ;;
      debian) echo "127.0.1.1 node$i"; for k in 1 2 3 4; do [ $k = "$i" ] || echo "10.77.0.$k node$k"; done ;;
    esac
  } > "$host/etc/hosts"
  cat > "$host/init.sh" <<INIT
set -e
hostname node$i
mount -t tmpfs tmpfs /dev/shm
mount --bind $host/etc/hosts /etc/hosts
shared="${HOSTS_SHARE:-}"
for folder in \${shared//:/ }; do
  case \$folder in /tmp/*) mkdir -p "$host\$folder"; mount --bind "\$folder" "$host\$folder" ;; esac
done
mount --rbind $host/tmp /tmp
echo 1 > /tmp/ready
exec sleep infinity
INIT
  rm -f "$host/tmp/ready"
  setsid ip netns exec ph$i unshare --mount --uts --pid --ipc --fork --kill-child --mount-proc --propagation private \
    bash "$host/init.sh" > "$host/init.log" 2>&1 < /dev/null &
  outer=$!
  for _ in $(seq 100); do [ -e "$host/tmp/ready" ] && break; sleep 0.1; done
  [ -e "$host/tmp/ready" ] || { cat "$host/init.log" >&2; exit 1; }
  # the process that is 1 inside: the only child of unshare
  inner=$(pgrep -P "$outer" | head -n 1)
  grep -q 'NSpid.*[[:space:]]1$' "/proc/$inner/status" || inner=$(pgrep -P "$inner" | head -n 1)
  echo "$inner" > "$host/init.pid" ;;
exec) i=$2; shift 2; exec nsenter -t "$(pid_of "$i")" -m -u -i -n -p -- "$@" ;;
cut) ip link set "ph$2-v" down ;;
mend) ip link set "ph$2-v" up ;;
kill) kill -9 "$(pid_of "$2")"; rm -f "$dir/host$2/init.pid" ;;
down)
  for file in "$dir"/host*/init.pid; do [ -e "$file" ] && kill -9 "$(cat "$file")" 2>/dev/null; done
  for name in $(ip netns list | awk '/^ph[0-9]+/{print $1}'); do
    ip link del "$name-v" 2>/dev/null || true
    ip netns del "$name"
  done
  ip link del $bridge 2>/dev/null || true
  rm -rf "$dir" ;;
*) echo "unknown command $command" >&2; exit 2 ;;
esac
