#!/usr/bin/env bash
# Submits a run to the GPUs of a Slurm cluster; --help has all options.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  cat <<'EOF'
Usage: scripts/slurm.sh --nodes N --gpus N --time LIMIT [OPTION...] -- ARG...

Submits a job with `python -m stackjax.train ARG...` and a process per GPU. The run saves before
the time limit; the job is then requeued and resumes.

  --nodes N            nodes
  --gpus N             GPUs per node
  --time LIMIT         time limit in the format of sbatch: 24:00:00
  --cpus N             CPU cores per process (8)
  --grace SECONDS      time to save before the time limit (300)
  --name NAME          job name (stackjax)
  --partition NAME     partition (default of the cluster)
  --account NAME       account to charge (default of the user)
  --setup COMMAND      command before the processes start, such as '. .venv/bin/activate'
  --dry-run            print the command without running it
  --help               print this

Set other sbatch options by environment variables, such as SBATCH_QOS or SBATCH_CONSTRAINT. The
job runs in the repository, so paths are relative to it.
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

# JAX gives the nth process on a node the nth visible GPU; --gpus-per-task would hide the other
# GPUs. srun needs --cpus-per-task again. SIGTERM goes to the processes and not to this shell; exit
# code 143 means the run is saved.
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
