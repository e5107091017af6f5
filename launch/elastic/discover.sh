#!/usr/bin/env bash
# Says which hosts an elastic job can have now, as lines of host:slots: those that answer where their sshd listens.
# launch/elastic.sh gives it to horovodrun, which runs it every second.
#
#   launch/elastic/discover.sh --hosts node1:8,node2:8
#   launch/elastic/discover.sh --hostfile hosts.txt     lines, as in mpirun.sh
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

answers() {
  local name port
  [[ $1 != "$HERE" ]] || return 0
  { read -r name && read -r port; } < <(ssh -T -G "$1" | awk '$1 == "hostname" || $1 == "port" { print $2 }')
  # shellcheck disable=SC2016 # bash -c expands them
  timeout 2 bash -c ': <"/dev/tcp/$0/$1"' "$name" "$port" 2>/dev/null
}

(($# == 2)) || usage
read_hosts "$1=$2"
for host in ${HOSTS//,/ }; do
  { ! answers "${host%:*}" || printf '%s\n' "$host"; } &
done
wait
