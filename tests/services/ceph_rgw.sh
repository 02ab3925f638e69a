#!/usr/bin/env bash
# A real single-node Ceph object gateway on loopback, in memory, without systemd or containers: about 12 s to start.
# Needs Debian's ceph-mon ceph-osd radosgw ceph-common (apt-get install --no-install-recommends). Run as root.
#   ceph_rgw.sh start DIR [PORT]   then: endpoint http://127.0.0.1:PORT, and https on PORT+1 with DIR/cert.pem (self-signed,
#                                  for localhost and 127.0.0.1); access key test, secret testtest, path style
#   ceph_rgw.sh stop DIR           ends only the daemons that it started, and waits for them
#   ceph_rgw.sh guard DIR          does so when its standard input ends
# Permissions are enforced: radosgw-admin -c DIR/ceph.conf user create … makes a second user, bucket policies then apply.
set -euo pipefail
action=$1 dir=$(realpath -m "$2") port=${3:-7480}

running() { # a process that only waits to be reaped has ended
  grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$1/status"
}

stop() {
  local pidfile pid pids=()
  for pidfile in "$dir"/run/*.pid; do
    [ -e "$pidfile" ] || continue
    pid=$(cat "$pidfile")
    kill -KILL "$pid" 2>/dev/null && pids+=("$pid")  # all is in memory, there is nothing to save
    rm "$pidfile"
  done
  for pid in "${pids[@]}"; do
    for _ in $(seq 100); do running "$pid" || break; sleep 0.1; done
  done
}

guard() {
  cat >/dev/null
  stop
}

start() {
  rm -rf "$dir"; mkdir -p "$dir"/{mon,osd,run,log}
  local fsid osd conf=$dir/ceph.conf
  fsid=$(cat /proc/sys/kernel/random/uuid)
  cat >"$conf" <<CONF
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$((port + 10)),v1:127.0.0.1:$((port + 11))]
public network = 127.0.0.0/8
cluster network = 127.0.0.0/8
auth allow insecure global id reclaim = false
osd pool default size = 1
osd pool default min size = 1
osd crush chooseleaf type = 0
osd pool default pg num = 8
osd pool default pgp num = 8
mon allow pool size one = true
mon warn on pool no redundancy = false
osd objectstore = memstore
memstore device bytes = 8589934592
ms bind ipv6 = false
run dir = $dir/run
admin socket = $dir/run/\$cluster-\$name.\$pid.asok
log file = $dir/log/\$name.log
pid file = $dir/run/\$name.pid
keyring = $dir/keyring
mon data = $dir/mon/\$id
osd data = $dir/osd/\$id
rgw enable ops log = false
rgw crypt require ssl = false
rgw dynamic resharding = false
rgw gc obj min wait = 5
rgw frontends = beast endpoint=127.0.0.1:$port ssl_endpoint=127.0.0.1:$((port + 1)) ssl_certificate=$dir/server.pem tcp_nodelay=1
CONF
  openssl req -x509 -newkey rsa:2048 -nodes -days 365 -subj /CN=localhost \
    -addext subjectAltName=DNS:localhost,IP:127.0.0.1 -keyout "$dir/key.pem" -out "$dir/cert.pem" 2>/dev/null
  cat "$dir/key.pem" "$dir/cert.pem" >"$dir/server.pem"
  ceph-authtool -C "$dir/keyring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
  ceph-authtool "$dir/keyring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' >/dev/null
  ceph-authtool "$dir/keyring" --gen-key -n osd.0 --cap mon 'allow *' --cap osd 'allow *' >/dev/null
  monmaptool --create --fsid "$fsid" \
    --addv a "[v2:127.0.0.1:$((port + 10)),v1:127.0.0.1:$((port + 11))]" "$dir/monmap" >/dev/null
  ceph-mon --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring" -c "$conf"
  ceph-mon -i a -c "$conf"
  osd=$(cat /proc/sys/kernel/random/uuid)
  timeout 30 ceph -c "$conf" osd new "$osd" 0 >/dev/null
  mkdir -p "$dir/osd/0"
  ceph-osd -i 0 --mkfs --osd-uuid "$osd" -c "$conf" 2>/dev/null
  ceph-osd -i 0 -c "$conf" 2>/dev/null
  radosgw -n client.admin -c "$conf" 2>/dev/null
  for _ in $(seq 120); do
    curl -s -o /dev/null "http://127.0.0.1:$port/" && break
    sleep 0.5
  done
  curl -s -o /dev/null "http://127.0.0.1:$port/" || { echo "the gateway did not start; see $dir/log" >&2; exit 1; }
  timeout 60 radosgw-admin -c "$conf" user create --uid=test --display-name=test \
    --access-key=test --secret-key=testtest >/dev/null 2>"$dir/log/user.log" || { cat "$dir/log/user.log" >&2; exit 1; }
  echo "http://127.0.0.1:$port"
}

"$action"
