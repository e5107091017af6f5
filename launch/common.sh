# shellcheck shell=bash disable=SC2034 # the scripts that read this use its variables
# Read by the scripts beside it: which hosts, how many ranks, and whether all of them can take part.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${SETUP_VENV:-$ROOT/.venv}/bin
PROBE_SECONDS=10 # what a host may take to answer ssh

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

parse_arguments() { # sets what read_hosts does, HOSTFILE, INTERFACE and COMMAND; MIN_RANKS, MAX_RANKS if set
  local told=()
  HOSTFILE='' INTERFACE=''
  while (($#)); do
    case $1 in
      --min-np | --max-np)
        [[ -n ${MIN_RANKS:-} ]] || die "$1 is for launch/elastic.sh"
        [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "$1 needs a number of ranks"
        if [[ $1 == --min-np ]]; then MIN_RANKS=$2; else MAX_RANKS=$2; fi
        shift 2
        ;;
      --hosts | --hostfile | --np | --interface)
        (($# > 1)) || die "$1 needs a value"
        if [[ $1 == --interface ]]; then INTERFACE=$2; else told+=("$1=$2"); fi
        if [[ $1 == --hostfile ]]; then HOSTFILE=$2; fi
        shift 2
        ;;
      --) shift && break ;;
      --help) usage ;;
      -*) die "unknown option $1 (--help lists them)" ;;
      *) break ;;
    esac
  done
  set_command "$@"
  read_hosts "${told[@]}"
}

set_command() { # a verb of ours, or any program
  (($#)) || die "what shall the ranks do? For example: train --config recipes/finetune.toml --data.root data"
  COMMAND=("$@")
  if [[ $1 =~ ^[a-z]+$ && -f $ROOT/hvd_eurosat/$1.py ]]; then
    COMMAND=("$BIN/python" -m "hvd_eurosat.$1" "${@:2}")
  fi
}

usage() { # the comment at the head of the script
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
}

# Sets HOSTS (name:slots,…), NAMES of it (with commas), EACH (the slots of all, if as many), RANKS, HERE (this host's name
# among them), FULL_NAMES (yes, if some differ behind a dot alone) and, where Slurm starts the ranks, NODES (all that its
# job has, with commas) and NODE_SLOTS. hvd_eurosat/cluster/hosts.py knows.
read_hosts() {
  local facts name value options=("$@")
  [[ -x $BIN/python ]] || die "there is no $BIN/python: make setup"
  [[ -z ${BY_SLURM:-} ]] || options+=(--by-slurm)
  facts=$("$BIN/python" -m hvd_eurosat.cluster.hosts "${options[@]}") || exit
  while IFS='=' read -r name value; do declare -g "$name=$value"; done <<<"$facts"
}

# Slurm starts mpirun's helpers on the nodes itself, by srun, which a container may lack: then mpirun does it by ssh.
find_slurm() { # sets BY_SLURM
  BY_SLURM=''
  if [[ -n ${SLURM_JOB_ID:-} ]] && command -v srun >/dev/null; then BY_SLURM=yes; fi
}

# Steps of Slurm, mpirun's too, inherit these: they would get one GPU, or the cores of one task, not all of the node's.
forget_tasks() {
  unset SLURM_{GPUS,GPUS_PER_TASK,NTASKS_PER_GPU,TRES_PER_TASK,GPU_BIND,TRES_BIND,CPUS_PER_TASK} SRUN_CPUS_PER_TASK
}

# mpirun takes for given what these variables say of all nodes of the job: were it one node less, its helpers would start
# anywhere. They have all GPUs of their node, and run beside the step, if any, that is the user's shell.
tell_mpirun_of_slurm() {
  if [[ -n $BY_SLURM ]]; then
    export SLURM_JOBID=$SLURM_JOB_ID SLURM_NODELIST=$NODES SLURM_TASKS_PER_NODE=$NODE_SLOTS SLURM_OVERLAP=1
    forget_tasks
    [[ ${SLURM_GPUS_ON_NODE:-0} == 0 ]] || export SLURM_GPUS_PER_NODE=$SLURM_GPUS_ON_NODE
  else
    unset SLURM_JOBID SLURM_NODELIST
  fi
}

check_hosts() { # all at once: what keeps one from taking part, in the first one's words
  local name failures
  failures=$(
    for name in ${NAMES//,/ }; do probe "$name" & done
    wait
  )
  [[ -z $failures ]] || die "$(head -n 1 <<<"$failures")"
}

probe() {
  local script answer
  # Lines with "error: " count, not what login shells and banners say; $BIN, $PWD and $INTERFACE are of this host.
  script="test -x '$BIN/python' || echo 'error: has no $BIN: put the project on a disk that all hosts share'
test -d '$PWD' || echo 'error: has no folder $PWD: start from one that all hosts share'
test -z '$INTERFACE' || test -d '/sys/class/net/$INTERFACE' ||
  echo 'error: has no network interface $INTERFACE, only' \$(ls /sys/class/net)"
  if [[ $1 == "$HERE" ]]; then
    answer=$(sh -c "$script")
  else
    answer=$(timeout "$((2 * PROBE_SECONDS))" \
      ssh -n -o BatchMode=yes -o ConnectTimeout="$PROBE_SECONDS" "$1" "$script" 2>&1) ||
      answer="error: cannot be reached by ssh: $(tail -n 1 <<<"$answer" | tr -d '\r')"
  fi
  sed -n "s/^error: /host $1 /p" <<<"$answer" | head -n 1
}

allow_root() { # Open MPI asks twice
  if ((EUID == 0)); then export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1; fi
}

# Open MPI answers SIGTERM by killing the ranks, a second later or, with odls_base_sigkill_timeout, that much later
# for every failed job too. It forwards SIGUSR1 at once; at that the ranks save and end with 75, which it passes on.
# If SIGUSR1 came before (TOLD), it starts nothing and returns 138, the status of what that signal kills.
: "${TOLD:=0}"
trap 'TOLD=1' USR1
run_until_saved() {
  local child status signalled
  ((!TOLD)) || return 138
  "$@" <&0 &
  child=$!
  while cmp -s "/proc/$$/cmdline" "/proc/$child/cmdline"; do sleep 0.01; done # until its exec it would miss a signal
  trap 'signalled=1; kill -USR1 "$child" 2>/dev/null' TERM
  trap 'signalled=1 TOLD=1; kill -USR1 "$child" 2>/dev/null' USR1
  ((!TOLD)) || kill -USR1 "$child" 2>/dev/null || true
  while
    signalled='' status=0
    wait "$child" || status=$?
    [[ -n $signalled ]] # wait was cut short
  do :; done
  return "$status"
}
