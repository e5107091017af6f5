# shellcheck shell=bash disable=SC2034 # the scripts that read this use its variables
# Read by the scripts beside it: which hosts, how many ranks, and whether all of them can take part.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
BIN=${SETUP_VENV:-$ROOT/.venv}/bin
PROBE_SECONDS=10 # what a host may take to answer ssh

# Slurm's steps, mpirun's too, inherit these: they would get one GPU, or the cores of one task, not all of the node's.
CORES=${SLURM_CPUS_PER_TASK:-}
unset SLURM_{GPUS_PER_TASK,NTASKS_PER_GPU,TRES_PER_TASK,GPU_BIND,TRES_BIND,CPUS_PER_TASK} SRUN_CPUS_PER_TASK

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

parse_arguments() { # sets HOSTS (host:slots,…), HOSTFILE, RANKS, INTERFACE and COMMAND; MIN_RANKS, MAX_RANKS if set
  local hosts
  HOSTFILE='' RANKS='' INTERFACE=''
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
        case $1 in
          --hosts) hosts=${2//,/$'\n'} ;;
          --hostfile) HOSTFILE=$2 ;;
          --np) RANKS=$2 ;;
          --interface) INTERFACE=$2 ;;
        esac
        shift 2
        ;;
      --) shift && break ;;
      --help) usage ;;
      -*) die "unknown option $1 (--help lists them)" ;;
      *) break ;;
    esac
  done
  set_command "$@"
  if [[ -n $HOSTFILE ]]; then
    [[ -z ${hosts+given} ]] || die "--hosts and --hostfile: give one of them"
    hosts=$(cat "$HOSTFILE" 2>/dev/null) || die "--hostfile $HOSTFILE cannot be read"
  fi
  if [[ -z ${hosts+given}$HOSTFILE && -n ${SLURM_JOB_ID:-} ]]; then hosts=$(slurm_hosts); fi
  [[ -n ${hosts+given}$HOSTFILE$RANKS ]] ||
    RANKS=$("$BIN/python" -c 'from hvd_eurosat.cluster.node import ranks_here; print(ranks_here())')
  read_hosts "${hosts-localhost:$RANKS}" "${HOSTFILE:+--hostfile $HOSTFILE}"
}

set_command() { # a verb of ours, or any program
  (($#)) || die "what shall the ranks do? For example: train --config recipes/finetune.toml --data.root data"
  [[ -x $BIN/python ]] || die "there is no $BIN/python: make setup"
  COMMAND=("$@")
  if [[ $1 =~ ^[a-z]+$ && -f $ROOT/hvd_eurosat/$1.py ]]; then
    COMMAND=("$BIN/python" -m "hvd_eurosat.$1" "${@:2}")
  fi
}

usage() { # the comment at the head of the script
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
  exit
}

read_hosts() { # lines $1 of: host, host:slots, host slots=N (and # comments)
  local line pattern='^([A-Za-z0-9][A-Za-z0-9._-]*)(:([1-9][0-9]*)|[[:space:]]+slots=([1-9][0-9]*))?([[:space:]].*)?$'
  local slots total=0
  NAMES=() HOSTS=''
  while IFS= read -r line; do
    line=${line%%#*} line=${line//$'\r'/}
    [[ -n ${line//[[:space:]]/} ]] || continue
    [[ $line =~ $pattern ]] || die "'$line' is no host: write name:slots, or in a file: name slots=N"
    [[ " ${NAMES[*]} " != *" ${BASH_REMATCH[1]} "* ]] || die "host ${BASH_REMATCH[1]} is named twice"
    slots=${BASH_REMATCH[3]}${BASH_REMATCH[4]}
    NAMES+=("${BASH_REMATCH[1]}")
    HOSTS+=${HOSTS:+,}${BASH_REMATCH[1]}:${slots:=1}
    total=$((total + slots))
  done <<<"$1"
  ((total)) || die "no host in ${2:---hosts}: write name:slots, or in a file: name slots=N"
  : "${RANKS:=$total}"
  [[ $RANKS =~ ^[1-9][0-9]*$ ]] || die "--np $RANKS is no number of ranks"
  ((RANKS <= total)) || die "--np $RANKS is more than the $total slots of $HOSTS"
}

slurm_hosts() { # lines of host:slots; SLURM_TASKS_PER_NODE is 8(x2),4 for instance
  local item slots times names
  mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  for item in ${SLURM_TASKS_PER_NODE//,/ }; do
    slots=${item%%(*} times=1
    [[ $item != *x* ]] || times=${item##*x} times=${times%)}
    while ((times--)); do
      printf '%s:%s\n' "${names[0]}" "$slots"
      names=("${names[@]:1}")
    done
  done
}

is_here() { [[ $1 == localhost || $1 == "$(hostname)" || $1 == "$(hostname -s)" ]]; }

check_hosts() { # all at once: what keeps one from taking part, in the first one's words
  local name failures
  failures=$(
    for name in "${NAMES[@]}"; do probe "$name" & done
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
  if is_here "$1"; then
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
run_until_saved() {
  local child status signalled
  "$@" <&0 &
  child=$!
  trap 'signalled=1; kill -USR1 "$child" 2>/dev/null' TERM USR1
  while
    signalled='' status=0
    wait "$child" || status=$?
    [[ -n $signalled ]] # wait was cut short
  do :; done
  return "$status"
}
