#!/usr/bin/env bash
# A real S3 server without docker: one Ceph monitor, one OSD in memory, one radosgw (Debian's packages).
#   apt-get install --no-install-recommends ceph-mon ceph-osd ceph-common radosgw
#   radosgw.sh start DIR [S3_PORT [MON_PORT]]   # prints endpoint, access key, secret; ready in about 13 s, 0.5 GiB
#   radosgw.sh stop DIR
# DIR must have a short name, for sockets lie in it. The servers end with the process that called `start`.
set -eu
cmd=$1 dir=$2 port=${3:-9103} mon=${4:-9300}
if [ "$cmd" = stop ]; then for f in "$dir"/*.pid; do kill "$(cat "$f")" 2>/dev/null || true; done; exit 0; fi
rm -rf "$dir"; mkdir -p "$dir/mon" "$dir/osd" "$dir/rgw"
fsid=$(cat /proc/sys/kernel/random/uuid) osd=$(cat /proc/sys/kernel/random/uuid) conf=$dir/ceph.conf ring=$dir/keyring
cat >"$conf" <<C
[global]
fsid = $fsid
mon host = [v2:127.0.0.1:$mon/0]
mon initial members = a
keyring = $ring
public addr = 127.0.0.1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
mon allow pool size one = true
mon warn on pool no redundancy = false
mon max pg per osd = 1000
osd crush chooseleaf type = 0
run dir = $dir
log file = $dir/\$name.log
admin socket = $dir/\$name.\$pid.asok
rgw gc obj min wait = 1
rgw gc processor period = 2
rgw gc processor max time = 2
[mon.a]
mon data = $dir/mon
mon data avail crit = 1
[osd.0]
osd data = $dir/osd
osd objectstore = memstore
memstore device bytes = 4294967296
C
# cephx with one keyring: with "auth ... required = none" the gateway hangs
ceph-authtool --create-keyring "$ring" --gen-key -n mon. --cap mon 'allow *' >/dev/null
ceph-authtool "$ring" --gen-key -n client.admin --cap mon 'allow *' --cap osd 'allow *' --cap mgr 'allow *' >/dev/null
ceph-authtool "$ring" --gen-key -n osd.0 --cap mon 'allow profile osd' --cap osd 'allow *' >/dev/null
monmaptool --create --clobber --fsid "$fsid" --addv a "[v2:127.0.0.1:$mon]" "$dir/monmap" >/dev/null
ceph-mon -c "$conf" -i a --mkfs --keyring "$ring" --monmap "$dir/monmap" --mon-data "$dir/mon"
ceph-mon -c "$conf" -i a -f >"$dir/mon.out" 2>&1 & echo $! >"$dir/mon.pid"
for _ in $(seq 50); do timeout 5 ceph -c "$conf" osd new "$osd" >>"$dir/ceph.out" 2>&1 && break; sleep .2; done
ceph-osd -c "$conf" -i 0 --mkfs --osd-uuid "$osd" >>"$dir/osd.out" 2>&1
ceph-osd -c "$conf" -i 0 -f >>"$dir/osd.out" 2>&1 & echo $! >"$dir/osd.pid"
for _ in $(seq 100); do timeout 5 ceph -c "$conf" osd stat 2>/dev/null | grep -q '1 up' && break; sleep .2; done
radosgw -c "$conf" -n client.admin --rgw_frontends="beast endpoint=127.0.0.1:$port tcp_nodelay=1" --rgw_data="$dir/rgw" -f >"$dir/rgw.out" 2>&1 & echo $! >"$dir/rgw.pid"
for _ in $(seq 100); do (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break; sleep .2; done
radosgw-admin -c "$conf" user create --uid=sera --display-name=sera --access-key=sera-access --secret-key=sera-secret >/dev/null
owner=$PPID
( while kill -0 "$owner" 2>/dev/null; do sleep 1; done; for f in "$dir"/*.pid; do kill -9 "$(cat "$f")" || true; done ) >/dev/null 2>&1 &
echo "http://127.0.0.1:$port sera-access sera-secret"
