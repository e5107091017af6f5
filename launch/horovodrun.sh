#!/usr/bin/env bash
# Starts ranks on one host or several by horovodrun, over MPI (Open MPI 4, MPICH, Intel MPI) or over Gloo, without MPI.
#
#   launch/horovodrun.sh --hosts node1:8,node2:8 train --config recipes/gpu.toml --data.root data/EuroSAT_RGB
#   HOROVOD_CONTROLLER=gloo launch/horovodrun.sh --hostfile hosts.txt --interface eth0 train --config …
#
#   --hosts LIST       host:slots,…; slots are the ranks a host takes, one for each GPU
#   --hostfile FILE    the same as lines, in any launcher's or scheduler's words: host slots=N, host:N, node[01-04] 8 …
#   --np N             the number of ranks; default: all slots; here one per GPU, or two that share the cores
#   --interface NAME   the network interface that the hosts share; else horovodrun looks for it
#   COMMAND …          a verb of ours (train, evaluate, doctor, …) with its arguments, or any program
#
# Without --hosts or --hostfile it takes the hosts of the Slurm, PBS, LSF, Grid Engine or OAR job, or this host. Hosts
# are reached by ssh without a password and have the project, its .venv included, in the same place.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

first_slots() { # as many as $1 of the hosts $2: horovodrun starts a rank of Gloo on every slot, whatever -np says
  local left=$1 host slots first=()
  for host in ${2//,/ }; do
    ((left > 0)) || break
    slots=$((${host##*:} < left ? ${host##*:} : left))
    first+=("${host%:*}:$slots")
    ((left -= slots)) || true
  done
  (IFS=, && echo "${first[*]}")
}

find_slurm
[[ ${HOROVOD_CONTROLLER:-mpi} != gloo ]] || BY_SLURM=''
parse_arguments "$@"
check_hosts
tell_mpirun_of_slurm
allow_root
[[ ${HOROVOD_CONTROLLER:-mpi} != gloo ]] || HOSTS=$(first_slots "$RANKS" "$HOSTS")
OPTIONS=(-np "$RANKS" -H "$HOSTS")
if [[ -n $INTERFACE && ${HOSTS%:*} != "$HERE" ]]; then # on this host alone it refuses every interface but lo
  OPTIONS+=(--network-interfaces "$INTERFACE")
fi
if [[ ${HOROVOD_CONTROLLER:-mpi} == gloo ]]; then exec "$BIN/horovodrun" --gloo "${OPTIONS[@]}" "${COMMAND[@]}"; fi
if [[ $(PATH=$BIN:$PATH mpirun --version 2>&1) == *"(Open MPI)"* ]]; then
  MPI="${INTERFACE:+-mca oob_tcp_if_include $INTERFACE}"
  [[ -z $FULL_NAMES ]] || MPI+=" -mca orte_keep_fqdn_hostnames 1"
  [[ ! -x $BIN/orted ]] || MPI+=" --prefix $(dirname "$BIN")" # the .venv's own Open MPI, on every host
  OPTIONS+=(--mpi-args=" $MPI")
fi
# As one command: bash reads a script as it goes, and this one may be edited while it waits.
{ run_until_saved "$BIN/horovodrun" "${OPTIONS[@]}" "${COMMAND[@]}"; exit; }
