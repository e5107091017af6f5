#!/usr/bin/env bash
# Starts ranks on one host or several by Open MPI's mpirun, 4 or 5.
#
#   launch/mpirun.sh --hosts node1:8,node2:8 train --config recipes/gpu.toml --data.root data/EuroSAT_RGB
#   launch/mpirun.sh --hostfile hosts.txt --interface eth0 doctor
#   launch/mpirun.sh train --config recipes/quickstart.toml --data.root data/sample
#
#   --hosts LIST       host:slots,…; slots are the ranks a host takes, one for each GPU
#   --hostfile FILE    the same as lines, in any launcher's or scheduler's words: host slots=N, host:N, node[01-04] 8 …
#   --np N             the number of ranks; default: all slots; here one per GPU, or two that share the cores
#   --interface NAME   the network interface that the hosts share; needed where they have several
#   COMMAND …          a verb of ours (train, evaluate, doctor, …) with its arguments, or any program
#
# Without --hosts or --hostfile it takes the hosts of the Slurm, PBS, LSF, Grid Engine or OAR job, or this host. Hosts
# are reached by ssh without a password and have the project, its .venv included, in the same place. At SIGTERM and
# SIGUSR1 the ranks save and end with status 75. The variable MPIRUN names another mpirun than the .venv's.
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

FORWARDED='^(PATH|LD_LIBRARY_PATH|PYTHONPATH|CUDA_|NCCL_|HOROVOD_|HVD_EUROSAT_|OMP_|MPI4PY_|UCX_|TORCH|XDG_CACHE_HOME)'

find_slurm
parse_arguments "$@"
[[ -n $BY_SLURM ]] || check_hosts
tell_mpirun_of_slurm
allow_root
MPIRUN=${MPIRUN:-$BIN/mpirun}
OPTIONS=(-np "$RANKS" --bind-to none) # our ranks share out the cores of a host
while IFS= read -r variable; do
  # Which GPUs are free here says nothing of other hosts, but that none shall be used does. By Slurm each node has its
  # own GPUs' numbers.
  [[ $variable != CUDA_VISIBLE_DEVICES || -z $CUDA_VISIBLE_DEVICES || (-z $BY_SLURM && $NAMES == "$HERE") ]] || continue
  OPTIONS+=(-x "$variable")
done < <(compgen -e | grep -E "$FORWARDED")

VERSION=$("$MPIRUN" --version 2>&1 | head -n 1) || die "$MPIRUN does not run: $VERSION"
case $VERSION in
  *"(Open MPI) 4."*)
    OPTIONS+=(-H "$HOSTS")
    [[ -z $INTERFACE ]] || OPTIONS+=(--mca btl_tcp_if_include "$INTERFACE" --mca oob_tcp_if_include "$INTERFACE")
    [[ -z $FULL_NAMES ]] || OPTIONS+=(--mca orte_keep_fqdn_hostnames 1)
    ;;
  *"(Open MPI) 5."*)
    OPTIONS+=(--host "$HOSTS")
    [[ -z $INTERFACE ]] || OPTIONS+=(--mca btl_tcp_if_include "$INTERFACE" --prtemca prte_if_include "$INTERFACE")
    [[ -z $FULL_NAMES ]] || OPTIONS+=(--prtemca prte_keep_fqdn_hostnames 1)
    ;;
  *) die "$MPIRUN is not Open MPI 4 or 5 but '$VERSION': launch/horovodrun.sh knows MPICH and Intel MPI" ;;
esac
if [[ -n $INTERFACE ]]; then OPTIONS+=(-x "NCCL_SOCKET_IFNAME=$INTERFACE"); fi
# As one command: bash reads a script as it goes, and this one may be edited while it waits.
{ run_until_saved "$MPIRUN" "${OPTIONS[@]}" "${COMMAND[@]}"; exit; }
