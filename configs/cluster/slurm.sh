#!/bin/bash
# A job on Slurm: sbatch configs/cluster/slurm.sh JOB.yaml [a.b=c ...]
#
# Starts a Ray head on the first node and Ray on the others, runs the job, and ends both. Paths in
# JOB.yaml must be URLs, or on a disk that all nodes share. Submit it again to resume.
#
#SBATCH --job-name=gc2ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=48
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --output=gc2ray-%j.log
set -euo pipefail

if [[ $# -lt 1 ]]; then
  echo "usage: sbatch $0 JOB.yaml [a.b=c ...]" >&2
  exit 2
fi

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))  # other jobs may share the node
address="$head:$port"

# Others who can reach the nodes are kept out; srun passes both on.
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

nodes=()
# shellcheck disable=SC2329  # the trap below calls it
finish() {
  kill -TERM "${nodes[@]}" 2>/dev/null || true
  wait "${nodes[@]}" 2>/dev/null || true
}
trap finish EXIT

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --port="$port" --num-cpus="$SLURM_CPUS_PER_TASK" \
  --include-dashboard=false --disable-usage-stats --block &
nodes+=($!)

until (: </dev/tcp/"$head"/"$port") 2>/dev/null; do
  kill -0 "${nodes[0]}" || exit 1  # the head has ended; it has said why
  sleep 1
done

if [[ $SLURM_JOB_NUM_NODES -gt 1 ]]; then
  srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) \
    --exclude="$head" \
    ray start --address="$address" --num-cpus="$SLURM_CPUS_PER_TASK" \
    --disable-usage-stats --block &
  nodes+=($!)
fi

# In the background, so that this shell hears signals: Slurm sends SIGTERM two minutes before the
# time is up, the driver ends what is in flight and commits it.
gc2ray run "$@" --address "$address" &
driver=$!
trap 'kill -TERM "$driver"' TERM INT
code=0
wait "$driver" || code=$?
while kill -0 "$driver" 2>/dev/null; do  # a signal has ended the wait, not the driver
  code=0
  wait "$driver" || code=$?
done
exit "$code"
