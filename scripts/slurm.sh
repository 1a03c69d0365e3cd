#!/usr/bin/env bash
# Submits a run to the GPUs of a Slurm cluster; --help has all options.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
Usage: scripts/slurm.sh --nodes N --gpus N --time LIMIT [OPTION...] -- ARG...

Submits a job that runs `python -m stackjax.train ARG...` with a process for each GPU. Before
the time is up the run saves; it is then queued again, and goes on where it stopped.

  --nodes N            nodes of the job
  --gpus N             GPUs of each node
  --time LIMIT         time until it is queued again, as sbatch takes it: 24:00:00
  --cpus N             CPU cores of each process (8)
  --grace SECONDS      what the run has to stop and save, before the time is up (300)
  --name NAME          name of the job (stackjax)
  --partition NAME     partition of the nodes (that of the cluster)
  --account NAME       account that is charged (that of the user)
  --setup COMMAND      runs before the processes start, for example '. .venv/bin/activate'
  --dry-run            print what would be run, and run nothing
  --help               print this

Other options of sbatch go by its own variables, such as SBATCH_QOS or SBATCH_CONSTRAINT. Paths
are relative to the repository, in which the job runs.
EOF
}

fail() {
  echo "error: $1; scripts/slurm.sh --help lists all options." >&2
  exit 2
}

nodes='' gpus='' time='' cpus=8 grace=300 name=stackjax partition='' account='' setup='' dry_run=''
while (($#)); do
  case "$1" in
    --nodes | --gpus | --time | --cpus | --grace | --name | --partition | --account | --setup)
      [[ -n "${2:-}" && "$2" != --* ]] || fail "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift 2
      ;;
    --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --dry-run) dry_run=yes && shift ;;
    --help) usage && exit ;;
    --) break ;;
    *) fail "unknown option $1" ;;
  esac
done
for option in nodes gpus time; do
  [[ -n "${!option}" ]] || fail "--$option is missing"
done
(($# > 1)) || fail "nothing to train; end with -- --config FILE"

# In JAX the nth process of a node has the nth of all the GPUs that it sees, and --gpus-per-task
# would hide all but one. srun has to be told --cpus-per-task again. SIGTERM is sent to the
# processes and not to this shell; when they exit with 143 the run has been saved.
batch="#!/usr/bin/env bash
#SBATCH --job-name=$name
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=$gpus
#SBATCH --gres=gpu:$gpus
#SBATCH --cpus-per-task=$cpus
#SBATCH --time=$time
#SBATCH --signal=TERM@$grace
#SBATCH --requeue
#SBATCH --open-mode=append
${partition:+#SBATCH --partition=$partition
}${account:+#SBATCH --account=$account
}set -e
cd $(printf %q "$PWD")
${setup:+$setup
}code=0
srun --cpus-per-task=$cpus --kill-on-bad-exit=1 \\
  python -m stackjax.train$(printf ' %q' "${@:2}") || code=\$?
if [[ \$code == 143 ]]; then
  scontrol requeue \"\$SLURM_JOB_ID\"
fi
exit \"\$code\""

if [[ -n "$dry_run" ]]; then
  printf "sbatch <<'BATCH'\n%s\nBATCH\n" "$batch"
else
  sbatch <<<"$batch"
fi
echo '# follow: tail -F slurm-JOBID.out; save and stop: scancel JOBID'
