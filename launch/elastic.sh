#!/usr/bin/env bash
# Starts ranks by horovodrun over Gloo. When hosts are lost the others go on; hosts that come (back) join them.
#
#   launch/elastic.sh --hostfile hosts.txt --interface eth0 train --config recipes/gpu.toml \
#     --data.root data/EuroSAT_RGB
#
#   --hosts LIST       host:slots,…; slots are the ranks a host takes, one for each GPU
#   --hostfile FILE    the same as lines, as in mpirun.sh; lines may come and go while the job runs
#   --interface NAME   the network interface that the hosts share
#   --np N             the number of ranks to start with; default: all slots
#   --min-np N         the smallest number of ranks to go on with; default 1
#   --max-np N         the largest; default: all slots, also of hosts that come later
#   COMMAND …          a verb of ours (train), or any program
#
# Without --hosts or --hostfile it takes the hosts of the Slurm (sbatch --no-kill), PBS, LSF, Grid Engine or OAR job.
# Hosts are reached by ssh without a password and have the project, its .venv included, in the same place. This host
# must not be lost. When one rank of a host fails, the host is left out for half a minute. SIGTERM ends the job at once;
# SIGUSR1 to a rank saves first.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MIN_RANKS=1 MAX_RANKS=''
parse_arguments "$@"
((MIN_RANKS <= RANKS && RANKS <= ${MAX_RANKS:-$RANKS})) ||
  die "--min-np $MIN_RANKS, --np $RANKS${MAX_RANKS:+ and --max-np $MAX_RANKS}: give the least first, the most last"
check_hosts
[[ -n $INTERFACE ]] || die "--interface: which one do the hosts share? Here are: $(cd /sys/class/net && echo *)"
HOSTS_NOW="--hosts '$HOSTS'"
[[ -z $HOSTFILE ]] || HOSTS_NOW="--hostfile '$(realpath "$HOSTFILE")'"
# A rank hears after this time that another's host is gone (Gloo waits so long for data, and for ranks to connect that
# have all started), horovodrun after 15 s (elastic/ssh). A host that failed again and again is tried less and less.
export HOROVOD_GLOO_TIMEOUT_SECONDS=${HOROVOD_GLOO_TIMEOUT_SECONDS:-15}
export PATH=$ROOT/launch/elastic:$PATH
# horovodrun tells the first rank of every change, and would wait two minutes for one whose host is gone.
exec "$BIN/python" -c '
import socket
from horovod.runner.launch import run_commandline
socket.setdefaulttimeout(3)
run_commandline()' --gloo -np "$RANKS" --min-np "$MIN_RANKS" ${MAX_RANKS:+--max-np "$MAX_RANKS"} \
  --host-discovery-script "'$ROOT/launch/elastic/discover.sh' $HOSTS_NOW" --blacklist-cooldown-range 10 300 \
  --elastic-timeout "${HOROVOD_ELASTIC_TIMEOUT:-600}" --network-interface "$INTERFACE" "${COMMAND[@]}"
