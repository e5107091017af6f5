#!/bin/sh
# What a container does:
#
#   train --data.root data …    a verb: python -m hvd_eurosat.<verb> (train, evaluate, predict, prepare, doctor, …)
#   node                        waits for ranks from another node: an sshd for this user on port 2222, with
#                               ~/.ssh/authorized_keys; the image needs --build-arg EXTRAS=openssh-server
#   launch/mpirun.sh --np 8 …   any other program
#   --help                      this
set -eu
case ${1:---help} in
  --help) exec sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0" ;;
  node)
    command -v sshd >/dev/null || { echo 'error: no sshd: build with EXTRAS=openssh-server' >&2 && exit 2; }
    rm -f /tmp/host_key && ssh-keygen -q -t ed25519 -N '' -f /tmp/host_key
    exec "$(command -v sshd)" -D -e -f /opt/hvd_eurosat/docker/sshd_config -h /tmp/host_key
    ;;
esac
if [ -f "/opt/hvd_eurosat/hvd_eurosat/$1.py" ]; then
  verb=$1 && shift
  exec python -m "hvd_eurosat.$verb" "$@"
fi
exec "$@"
